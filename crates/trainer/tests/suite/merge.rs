//! Merging into 4 bits: what no adapter changes stays as it was, and biases find their tensors.

use rankfold_adapters::{
    AdapterConfig, Form, Linear, Lora, LoraSpec, Part, PeftConfig, Relative, RelativeConfig, Targets, Values, merged,
};
use rankfold_autograd::{Base, Parameter};
use rankfold_backend::{Backend, DType, Format};
use rankfold_cpu::CpuBackend;
use rankfold_files::{Checkpoint, Spec, Writer};
use rankfold_trainer::convert;
use rankfold_trainer::merge::{Requantised, merge_in_4_bits};
use rankfold_trainer::model::{Model, ModelConfig, Precision, Quantization};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// A model of this family in 4 bits, opened.
struct Four {
    place: TempDir,
    checkpoint: Checkpoint,
    model: Model,
}

impl Four {
    fn new(family: &str) -> Self {
        let text = format!(
            r#"{{"model_type": "{family}", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 10000,
            "dtype": "float32", "tie_word_embeddings": true, "vocab_size": 32}}"#
        );
        let config = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
        let place = tempfile::tempdir().unwrap();
        let [dense, four] = ["dense", "four"].map(|name| place.path().join(name));
        [&dense, &four].iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let tensors = config.tensors();
        let specs = tensors.iter().map(|(name, shape)| Spec::new(&**name, DType::F32, &**shape)).collect();
        let mut writer = Writer::create(&dense.join("model.safetensors"), specs).unwrap();
        for (name, shape) in &tensors {
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            writer.write(name, bytemuck::cast_slice(&values)).unwrap();
        }
        writer.finish().unwrap();
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)));
        let how = Quantization { format: Format::Nf4, block: 64, double: true };
        convert::quantize(backend.as_ref(), &Checkpoint::open(&dense).unwrap(), &config, how, &four).unwrap();
        let checkpoint = Checkpoint::open(&four).unwrap();
        let model = Model::load(backend, &checkpoint, config, Precision::AsStored).unwrap();
        Self { place, checkpoint, model }
    }

    /// Layers that were changed, and those whose weights were; what was written.
    fn merge(&self) -> (usize, Vec<String>, Checkpoint) {
        let out = self.place.path().join("merged");
        std::fs::create_dir(&out).unwrap();
        let (layers, errors) = merge_in_4_bits(&self.model, &self.checkpoint, &out).unwrap();
        self.check(&errors, &Checkpoint::open(&out).unwrap());
        (layers, errors.into_iter().map(|layer| layer.path).collect(), Checkpoint::open(&out).unwrap())
    }

    /// The errors, from the weights that were read, their sums and what was written of these, in f64. Of what is
    /// checked each difference is rounded once, to 2⁻²⁴ of itself, and a ratio is of two.
    fn check(&self, errors: &[Requantised], written: &Checkpoint) {
        let backend = self.model.backend();
        let config = ModelConfig::open(written.path()).unwrap();
        let written = Model::load(backend.clone(), written, config, Precision::AsStored).unwrap();
        let values = |layer: &Linear| match layer.base() {
            Base::Quantized(q) => {
                let mut values = backend.alloc(DType::F32, q.elements()).unwrap();
                backend.dequantize_4bit(&q, values.view_mut()).unwrap();
                backend.download::<f32>(values.view()).unwrap()
            }
            Base::Dense(_) => panic!("{}: expected 4 bits", layer.path()),
        };
        let norm = |differences: &mut dyn Iterator<Item = (f32, f32)>| {
            differences.map(|(a, b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
        };
        let apart = |a: &[f32], b: &[f32]| norm(&mut a.iter().copied().zip(b.iter().copied()));
        for (old, new) in self.model.linears().zip(written.linears()) {
            let Some(found) = errors.iter().find(|found| found.path == old.path()) else { continue };
            let sum = merged(backend.as_ref(), old, DType::F32).unwrap().unwrap();
            let sum = backend.download::<f32>(sum.weight.view()).unwrap();
            let (lost, whole) = (apart(&values(new), &sum), norm(&mut sum.iter().map(|x| (*x, 0.0))));
            for (found, expected) in [(found.error, lost / whole), (found.of_update, lost / apart(&sum, &values(old)))]
            {
                assert!(expected > 0.0 && (found / expected - 1.0).abs() <= 2f64.powi(-23), "{found}, not {expected}");
            }
        }
    }

    /// Fill what is trained with 1/8.
    fn train(&self) {
        for named in self.model.parameters() {
            let eighths = vec![0.125f32; named.parameter.shape().elements()];
            let eighths = self.model.backend().upload(&eighths).unwrap();
            named.parameter.update(|value| Ok(self.model.backend().copy(eighths.view(), value.view_mut())?)).unwrap();
        }
    }
}

fn bytes(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; checkpoint.info(name).unwrap().bytes];
    checkpoint.read_into(name, &mut bytes).unwrap();
    bytes
}

#[test]
fn layers_whose_update_is_zero_keep_their_codes_and_are_not_counted() {
    let mut four = Four::new("llama");
    let lora: PeftConfig = AdapterConfig { spec: LoraSpec::new(4, 8.0), ..AdapterConfig::default() }.into();
    // B is 0 in all of its layers.
    four.model.attach(&lora, Values::New(0)).unwrap();
    let backend = four.model.backend().clone();
    let of = |dims: [usize; 2], value: f32| {
        Parameter::new(backend.upload(&vec![value; dims[0] * dims[1]]).unwrap(), dims).unwrap()
    };
    let spec = LoraSpec { form: Form::AdaLora, ..LoraSpec::new(2, 4.0) };
    for layer in four.model.linears_mut() {
        let kept = match layer.path() {
            "model.layers.0.mlp.up_proj" => vec![false, false],
            "model.layers.1.mlp.up_proj" => vec![true, false],
            _ => continue,
        };
        let rank = kept.iter().filter(|kept| **kept).count();
        let (a, b) = (of([rank, layer.inputs()], 0.25), of([layer.outputs(), rank], 0.25));
        let part = Part::Triplets { lambda: of([rank, 1], 0.5), kept };
        let update = Lora::new(layer.path(), a, b, part, spec).unwrap();
        layer.set_adapter(update).unwrap();
    }
    let (layers, changed, merged) = four.merge();
    assert_eq!((layers, changed), (1, vec!["model.layers.1.mlp.up_proj".to_owned()]));
    for name in four.checkpoint.names() {
        let is_changed = name.starts_with("model.layers.1.mlp.up_proj.weight");
        assert!(is_changed || bytes(&merged, name) == bytes(&four.checkpoint, name), "{name}");
    }
    let codes = "model.layers.1.mlp.up_proj.weight";
    assert!(bytes(&merged, codes) != bytes(&four.checkpoint, codes));
}

/// Qwen2 has biases on q, k and v: (IA)³ scales those of the keys' and values' layers, BitFit trains them.
#[test]
fn a_bias_that_an_adapter_changes_is_written_where_the_checkpoint_has_it() {
    for (method, by) in [(Relative::Ia3 { feed_forward: None }, Some(0.125)), (Relative::BitFit, None)] {
        let mut four = Four::new("qwen2");
        let targets = match method {
            Relative::BitFit => Targets::parse("q_proj,v_proj"),
            _ => Targets::Default,
        };
        let config = RelativeConfig { targets, ..RelativeConfig::new(method) };
        four.model.attach(&PeftConfig::Relative(config), Values::New(0)).unwrap();
        four.train();
        let (_, _, merged) = four.merge();
        let name = "model.layers.1.self_attn.v_proj.bias";
        let (before, after) = (four.checkpoint.read_f32(name).unwrap(), merged.read_f32(name).unwrap());
        let expected: Vec<f32> = before.iter().map(|x| by.map_or(0.125, |l| l * x)).collect();
        assert_eq!(after, expected);
        let (k, up) = ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight");
        assert_eq!(bytes(&merged, k), bytes(&four.checkpoint, k));
        assert_eq!(bytes(&merged, up), bytes(&four.checkpoint, up));
    }
}

/// As in a dense merge: Llama's configuration has a place for them, and layers of the kind that have none get zeros.
#[test]
fn biases_that_a_checkpoint_lacks_come_into_it_where_its_architecture_has_a_place() {
    let mut four = Four::new("llama");
    let targets = Targets::parse("q_proj");
    let config = RelativeConfig { targets, ..RelativeConfig::new(Relative::BitFit) };
    four.model.attach(&PeftConfig::Relative(config), Values::New(0)).unwrap();
    four.train();
    let (layers, changed, merged) = four.merge();
    assert_eq!((layers, changed.len()), (2, 0));
    assert_eq!(merged.read_f32("model.layers.0.self_attn.q_proj.bias").unwrap(), [0.125; 64]);
    assert_eq!(merged.read_f32("model.layers.0.self_attn.k_proj.bias").unwrap(), [0.0; 32]);
    let config = ModelConfig::open(merged.path()).unwrap();
    Model::load(four.model.backend().clone(), &merged, config, Precision::AsStored).unwrap();
}

#[test]
fn a_refused_adapter_leaves_the_model_as_it_was() {
    let mut four = Four::new("llama");
    for modules in [&["norm", "no_such"][..], &["lm_head"]] {
        let modules_to_save = modules.iter().map(|name| (*name).to_owned()).collect();
        let config = AdapterConfig { spec: LoraSpec::new(4, 8.0), modules_to_save, ..AdapterConfig::default() };
        four.model.attach(&config.into(), Values::New(0)).unwrap_err();
        assert!(four.model.parameters().is_empty() && four.model.linears().all(|l| l.attached().is_none()));
    }
    let spec = LoraSpec::new(4, f64::NAN);
    let config = AdapterConfig { spec, modules_to_save: vec!["norm".into()], ..AdapterConfig::default() };
    four.model.attach(&config.into(), Values::New(0)).unwrap_err();
    assert!(four.model.parameters().is_empty());
}
