//! LoRA's relatives: gradients, starts, merges, folders.

use crate::common::{UNIT, all, layer, matrix, numbers, purpose, reference, set, write_tensors};
use proptest::prelude::*;
use rankfold_adapters::adapter::Adapter;
use rankfold_adapters::bitfit::Bias;
use rankfold_adapters::bottleneck::{Bottleneck, Placement};
use rankfold_adapters::diff::{Diff, closed_share, expected_share};
use rankfold_adapters::ia3::{Ia3, Side};
use rankfold_adapters::virtual_tokens::{Dimensions, Kind};
use rankfold_adapters::{
    DropoutKey, Error, Forward, Linear, PeftConfig, Relative, RelativeConfig, Values, VirtualConfig, Weight,
};
use rankfold_autograd::gradcheck::{parameter, worst_error};
use rankfold_autograd::{Base, Gradients, Parameter, Tape, Tensor, Value, Variable};
use rankfold_backend::{Backend, Compute, DType, Format, Quantized};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use std::path::Path;
use std::sync::Arc;

const EVALUATION: Forward = Forward { compute: Compute::F32, dropout: None };
/// What the two roundings and the truncation of a central difference leave, many times over: see `gradcheck`.
const ALLOWED: f64 = 1e-7;

fn methods() -> Vec<Relative> {
    vec![
        Relative::Ia3 { feed_forward: None },
        Relative::BitFit,
        Relative::Bottleneck { placement: Placement::Houlsby, bottleneck: 3 },
        Relative::Bottleneck { placement: Placement::Pfeiffer, bottleneck: 2 },
        Relative::Diff { penalty: 0.25 },
    ]
}

/// The linear layers of a block, q_proj and k_proj with a bias.
fn block(backend: &dyn Backend) -> Vec<Linear> {
    block_of(backend, 0)
}

/// The same of other numbers for every `stream`.
fn block_of(backend: &dyn Backend, stream: u64) -> Vec<Linear> {
    let numbers = |index: u64, n| numbers(stream ^ index, n);
    let shapes = [("q_proj", 6, 4), ("k_proj", 2, 4), ("v_proj", 2, 4), ("o_proj", 4, 6), ("down_proj", 4, 5)];
    let layers = shapes.iter().zip(0..).map(|((name, outputs, inputs), index)| {
        let w =
            Tensor::constant(backend.upload(&numbers(index, outputs * inputs)).unwrap(), [*outputs, *inputs]).unwrap();
        let bias = matches!(*name, "q_proj" | "k_proj").then(|| {
            let bias = numbers(90 + index, *outputs);
            Value::Frozen(Tensor::constant(backend.upload(&bias).unwrap(), [*outputs]).unwrap())
        });
        Linear::new(format!("model.layers.0.{name}"), index, Weight::Frozen(Base::Dense(w)), bias).unwrap()
    });
    layers.collect()
}

/// The same layer over a base in 4 bits.
fn in_4_bits(backend: &dyn Backend, layer: &Linear) -> Linear {
    let w = backend.upload(&matrix(backend, layer)).unwrap();
    let dims = [layer.outputs(), layer.inputs()];
    let q = Quantized::quantize(backend, w.view(), dims, Format::Nf4, 32, false).unwrap();
    let weight = Weight::Frozen(Base::Quantized(Arc::new(q)));
    Linear::new(layer.path(), layer.index(), weight, layer.bias().cloned()).unwrap()
}

/// The values of a layer's matrix, whatever it is stored as.
fn values(backend: &dyn Backend, layer: &Linear) -> Vec<f32> {
    let Base::Quantized(q) = layer.base() else { return matrix(backend, layer) };
    let mut values = backend.alloc(DType::F32, q.elements()).unwrap();
    backend.dequantize_4bit(&q, values.view_mut()).unwrap();
    backend.download(values.view()).unwrap()
}

fn config(method: Relative) -> PeftConfig {
    PeftConfig::Relative(RelativeConfig::new(method))
}

fn attach(
    backend: &dyn Backend,
    layers: &mut [Linear],
    config: &PeftConfig,
    values: Values,
) -> Result<PeftConfig, Error> {
    config.attach(backend, &mut all(layers), "llama", values).map(|attached| attached.config)
}

/// Give every trained tensor other values.
fn scramble(backend: &dyn Backend, layers: &[Linear]) {
    scramble_by(backend, layers, 0);
}

/// The same, others for every `stream`.
fn scramble_by(backend: &dyn Backend, layers: &[Linear], stream: u64) {
    for (i, (_, parameter)) in layers.iter().flat_map(Linear::parameters).enumerate() {
        set(backend, &parameter, stream ^ (100 + i as u64));
    }
}

fn outputs(backend: &Arc<dyn Backend>, layer: &Linear, mode: Forward) -> Vec<u32> {
    let tape = Tape::inference(backend.clone());
    let x = Tensor::constant(backend.upload(&numbers(77, 3 * layer.inputs())).unwrap(), [3, layer.inputs()]).unwrap();
    let y = layer.forward(&tape, &x, &mode).unwrap();
    backend.download::<f32>(y.view()).unwrap().into_iter().map(f32::to_bits).collect()
}

fn all_outputs(backend: &Arc<dyn Backend>, layers: &[Linear], mode: Forward) -> Vec<Vec<u32>> {
    layers.iter().map(|layer| outputs(backend, layer, mode)).collect()
}

#[test]
fn gradients_of_every_relative_match_differences() {
    let b = reference();
    let one = |stream, dims: &[usize]| parameter(&b, stream, dims).unwrap();
    let x = one(1, &[5, 4]);
    let adapters = [
        Adapter::Ia3(Ia3 { scale: one(4, &[3, 1]), side: Side::Outputs }),
        Adapter::Ia3(Ia3 { scale: one(4, &[1, 4]), side: Side::Inputs }),
        Adapter::Bias(Bias { bias: one(4, &[3]) }),
        Adapter::Bottleneck(Bottleneck { parts: [one(4, &[2, 3]), one(5, &[2]), one(6, &[3, 2]), one(7, &[3])] }),
        Adapter::Diff(Diff { diff: one(4, &[3, 4]), log_alpha: Some(one(5, &[3, 4])) }),
        Adapter::Diff(Diff { diff: one(4, &[3, 4]), log_alpha: None }),
    ];
    for adapter in adapters {
        let (w, bias) = (one(2, &[3, 4]).tensor(), Value::Frozen(one(3, &[3]).tensor().detach()));
        let mut layer = Linear::new("m", 3, Weight::Frozen(Base::Dense(w)), Some(bias)).unwrap();
        let trained = adapter.parameters().into_iter().map(|(_, parameter)| parameter.clone());
        let trained = [vec![x.clone()], trained.collect()].concat();
        layer.set_adapter(adapter).unwrap();
        for dropout in [None, Some(DropoutKey { seed: 1, draw: 2 })] {
            let mode = Forward { dropout, ..EVALUATION };
            let worst = worst_error(&b, &trained, |tape| {
                layer.forward(tape, &x.tensor(), &mode).map_err(|error| match error {
                    Error::Autograd(error) => error,
                    other => panic!("{other}"),
                })
            });
            assert!(worst.unwrap() < ALLOWED, "{:?}", layer.attached());
        }
    }
}

/// The share is a mean over two layers of unlike sizes.
#[test]
fn the_penalty_is_the_expected_share_and_its_gradient_matches_differences() {
    let b = reference();
    let gates = [parameter(&b, 1, &[3, 4]).unwrap(), parameter(&b, 2, &[2, 1]).unwrap()];
    let layers: Vec<Linear> = gates
        .iter()
        .map(|gates| {
            let dims: [usize; 2] = gates.shape().dims().try_into().unwrap();
            let mut layer = layer(b.as_ref(), "m", 0, dims, &vec![0.0; dims[0] * dims[1]]);
            let diff = parameter(&b, 3, &dims).unwrap();
            layer.set_adapter(Adapter::Diff(Diff { diff, log_alpha: Some(gates.clone()) })).unwrap();
            layer
        })
        .collect();
    let values = |parameter: &Parameter| b.download::<f64>(parameter.tensor().view()).unwrap();
    let open: Vec<f64> = gates.iter().flat_map(values).map(|a| 1.0 / (1.0 + (-a).exp())).collect();
    let mut gradients = Gradients::new(b.clone());
    let before = b.filled(DType::F64, 2, 1.0).unwrap();
    gradients.put(Variable::Parameter(gates[1].id()), before);
    let share = expected_share(b.as_ref(), &layers, 0.5, &mut gradients).unwrap().unwrap();
    // γ = −ζ, so that P(z ≠ 0) is σ(log α); sums of 14 numbers below 1.
    assert!((share - open.iter().sum::<f64>() / 14.0).abs() < 14.0 * f64::EPSILON);
    let found: Vec<f64> =
        gates.iter().flat_map(|gates| b.download::<f64>(gradients.of(gates).unwrap().view()).unwrap()).collect();
    for (i, (found, p)) in found.into_iter().zip(open).enumerate() {
        // What was there is added to.
        let expected = if i < 12 { 0.0 } else { 1.0 } + 0.5 / 14.0 * p * (1.0 - p);
        assert!((found - expected).abs() < 4.0 * f64::EPSILON, "{found} {expected}");
    }
    assert!(expected_share(b.as_ref(), &block(b.as_ref()), 0.5, &mut gradients).unwrap().is_none());
}

/// Multiplying by 1, adding 0 and adding U·(…) with U = 0 are exact, whatever the base is stored as.
#[test]
fn a_new_relative_leaves_the_output_untouched_to_the_bit() {
    for backend in [reference(), Arc::new(CpuBackend::new(Some(2))) as Arc<dyn Backend>] {
        for quantised in [false, true] {
            for method in methods() {
                let mut layers = block(backend.as_ref());
                if quantised {
                    layers.iter_mut().for_each(|layer| *layer = in_4_bits(backend.as_ref(), layer));
                }
                let modes = [EVALUATION, Forward { dropout: Some(DropoutKey { seed: 3, draw: 1 }), ..EVALUATION }];
                let before = all_outputs(&backend, &layers, EVALUATION);
                attach(backend.as_ref(), &mut layers, &config(method.clone()), Values::New(7)).unwrap();
                assert!(layers.iter().any(|layer| layer.attached().is_some()));
                for mode in modes {
                    assert!(all_outputs(&backend, &layers, mode) == before, "{method:?} on {}", backend.name());
                }
                scramble(backend.as_ref(), &layers);
                assert!(all_outputs(&backend, &layers, EVALUATION) != before, "{method:?}");
            }
        }
    }
}

#[test]
fn every_relative_goes_where_its_source_puts_it() {
    let b = reference();
    let names = |method| -> Vec<String> {
        let mut layers = block(b.as_ref());
        attach(b.as_ref(), &mut layers, &config(method), Values::New(7)).unwrap();
        layers.iter().flat_map(Linear::parameters).map(|(name, p)| format!("{name} {}", p.shape())).collect()
    };
    let path = |end: &str| format!("base_model.model.model.layers.0.{end}");
    let ia3 = ["k_proj.ia3_l [2, 1]", "v_proj.ia3_l [2, 1]", "down_proj.ia3_l [1, 5]"].map(path);
    assert_eq!(names(Relative::Ia3 { feed_forward: None }), ia3);
    let biases = ["q_proj.bias [6]", "k_proj.bias [2]", "v_proj.bias [2]", "o_proj.bias [4]", "down_proj.bias [4]"];
    assert_eq!(names(Relative::BitFit), biases.map(path));
    let bottleneck = |layer: &str| {
        let ends = ["down.weight [3, 4]", "down.bias [3]", "up.weight [4, 3]", "up.bias [4]"];
        ends.map(|end| path(&format!("{layer}.bottleneck_{end}")))
    };
    let of = |placement| Relative::Bottleneck { placement, bottleneck: 3 };
    assert_eq!(names(of(Placement::Houlsby)), [bottleneck("o_proj"), bottleneck("down_proj")].concat());
    assert_eq!(names(of(Placement::Pfeiffer)), bottleneck("down_proj"));
    assert_eq!(names(Relative::Diff { penalty: 0.0 }).len(), 10);
}

/// That a merged layer's output, over a dense base or one in 4 bits, is an unmerged one's but for what is `allowed` by
/// Σ_j |x_j w_j| and Σ_j |x_j| of every element.
fn compare(
    method: Relative,
    four_bits: bool,
    stream: u64,
    allowed: impl Fn(f64, f64) -> f64,
) -> Result<(), TestCaseError> {
    let backend = reference();
    let mut layers = block_of(backend.as_ref(), stream);
    if four_bits {
        layers.iter_mut().for_each(|layer| *layer = in_4_bits(backend.as_ref(), layer));
    }
    attach(backend.as_ref(), &mut layers, &config(method), Values::New(7)).unwrap();
    scramble_by(backend.as_ref(), &layers, stream);
    let mut merged = 0;
    for layer in &mut layers {
        let (w, before) = (values(backend.as_ref(), layer), outputs(&backend, layer, EVALUATION));
        let bias = layer.bias().map(|bias| bias.tensor().buffer().clone());
        layer.merge(backend.as_ref()).unwrap();
        prop_assert!(layer.attached().is_none() && layer.parameters().is_empty());
        let x = numbers(77, 3 * layer.inputs());
        for (i, (a, b)) in before.iter().zip(outputs(&backend, layer, EVALUATION)).enumerate() {
            let (t, o) = (i / layer.outputs(), i % layer.outputs());
            let inputs = layer.inputs();
            let product = |j: usize| f64::from((x[t * inputs + j] * w[o * inputs + j]).abs());
            let lengths = |j: usize| f64::from(x[t * inputs + j].abs());
            let [a, b] = [*a, b].map(|bits| f64::from(f32::from_bits(bits)));
            let bound = allowed((0..inputs).map(product).sum(), (0..inputs).map(lengths).sum());
            prop_assert!((a - b).abs() <= bound, "{}: {a} {b}, allowed {bound:e}", layer.path());
            merged += usize::from(a != 0.0);
        }
        layer.unmerge();
        prop_assert_eq!(values(backend.as_ref(), layer), w);
        prop_assert!(outputs(&backend, layer, EVALUATION) == before);
        let back = layer.bias().map(|bias| bias.tensor().buffer().clone());
        prop_assert!(back.zip(bias).is_none_or(|(back, bias)| Arc::ptr_eq(&back, &bias)));
    }
    prop_assert!(merged > 0);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// On `reference` an output is rounded once, as is x∘l, w' by u·|l w| and l∘bias by u·|l bias|: with |l| and
    /// |bias| ≤ 1 both ways are within 3 u (Σ|x w| + 1) of the exact value, to first order, and 1 u more holds the
    /// second.
    #[test]
    fn a_merged_scale_computes_what_the_unmerged_one_does(four_bits: bool, stream: u64) {
        compare(Relative::Ia3 { feed_forward: None }, four_bits, stream, |products, _| 7.0 * UNIT * (products + 1.0))?;
    }

    /// The matrix is the same, and so is the bias that the kernel adds.
    #[test]
    fn a_merged_bias_computes_what_the_unmerged_one_does_to_the_bit(four_bits: bool, stream: u64) {
        compare(Relative::BitFit, four_bits, stream, |_, _| 0.0)?;
    }

    /// Apart, each of the two products is rounded once, and their sum; together, w' = w + z δ once an element,
    /// |z δ| ≤ 1, and the output once: each way within 3 u (Σ|x w| + Σ|x| + 1) and 1 u for the second order.
    #[test]
    fn a_merged_difference_computes_what_the_unmerged_one_does(four_bits: bool, stream: u64) {
        let allowed = |products, lengths| 7.0 * UNIT * (products + lengths + 1.0);
        compare(Relative::Diff { penalty: 0.0 }, four_bits, stream, allowed)?;
    }
}

#[test]
fn a_bottleneck_does_not_merge_and_says_so() {
    let backend = reference();
    let mut layers = block(backend.as_ref());
    let method = Relative::Bottleneck { placement: Placement::Pfeiffer, bottleneck: 3 };
    attach(backend.as_ref(), &mut layers, &config(method), Values::New(7)).unwrap();
    let message = layers[4].merge(backend.as_ref()).unwrap_err().to_string();
    assert_eq!(message, "model.layers.0.down_proj: a bottleneck does not merge into the base's weights");
    assert!(layers[4].attached().is_some());
}

fn write(b: &Arc<dyn Backend>, folder: &Path, config: &PeftConfig, layers: &[Linear], finished: bool) {
    config.write(b, folder, layers, Vec::new(), None, purpose(finished)).unwrap();
}

#[test]
fn what_is_saved_and_read_again_computes_the_same_bits() {
    let b = reference();
    for method in methods() {
        let mut layers = block(b.as_ref());
        let config = attach(b.as_ref(), &mut layers, &config(method.clone()), Values::New(7)).unwrap();
        scramble(b.as_ref(), &layers);
        let folder = tempfile::tempdir().unwrap();
        for finished in [false, true] {
            write(&b, folder.path(), &config, &layers, finished);
            let found = PeftConfig::open(folder.path()).unwrap();
            assert_eq!(found, config);
            let mut again = block(b.as_ref());
            let read = attach(b.as_ref(), &mut again, &found, Values::Saved(folder.path())).unwrap();
            assert_eq!(read, config, "{method:?}");
            // Noise is the gates' alone, and gone when they are fixed.
            let draw = Forward { dropout: Some(DropoutKey { seed: 3, draw: 1 }), ..EVALUATION };
            let modes = if finished { vec![EVALUATION] } else { vec![EVALUATION, draw] };
            for mode in modes {
                assert!(all_outputs(&b, &again, mode) == all_outputs(&b, &layers, mode), "{method:?}, {finished}");
            }
        }
    }
}

/// A trained value of 0 is no difference: as the gate is 0 where log α is far below 0.
#[test]
fn a_finished_difference_is_zero_where_its_gates_are_closed() {
    let b = reference();
    let mut layers = block(b.as_ref());
    let config = attach(b.as_ref(), &mut layers, &config(Relative::Diff { penalty: 1.0 }), Values::New(7)).unwrap();
    scramble(b.as_ref(), &layers);
    let folder = tempfile::tempdir().unwrap();
    write(&b, folder.path(), &config, &layers, true);
    let tensors = Checkpoint::open(&folder.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(tensors.names().count(), layers.len());
    let share = closed_share(b.as_ref(), &layers).unwrap().unwrap();
    let (mut closed, mut all) = (0, 0);
    for layer in &layers {
        let Some(Adapter::Diff(Diff { diff, log_alpha: Some(gates) })) = layer.attached() else { panic!() };
        let values = |parameter: &Parameter| b.download::<f32>(parameter.tensor().view()).unwrap();
        let found = tensors.read_f32(&format!("base_model.model.{}.diff", layer.path())).unwrap();
        for ((found, diff), gate) in found.into_iter().zip(values(diff)).zip(values(gates)) {
            // z = clamp(3 σ(log α) − 1.5) is 0 up to log α = 0.
            assert!((found == 0.0) == (gate <= 0.0 || diff == 0.0));
            closed += usize::from(gate <= 0.0);
            all += 1;
        }
    }
    assert!(closed > 0 && closed < all);
    assert_eq!(share, 1.0 - (all - closed) as f64 / all as f64, "what is told of a run");
}

/// The error of a folder whose tensors are those of `method` but for what `change` does to them.
fn refusal(method: Relative, change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> String {
    let b = reference();
    let mut layers = block(b.as_ref());
    let config = attach(b.as_ref(), &mut layers, &config(method), Values::New(7)).unwrap();
    let mut tensors: Vec<_> = layers
        .iter()
        .flat_map(Linear::parameters)
        .map(|(name, p)| (name, p.shape().dims().to_vec(), b.download(p.tensor().view()).unwrap()))
        .collect();
    change(&mut tensors);
    let folder = tempfile::tempdir().unwrap();
    write(&b, folder.path(), &config, &layers, false);
    write_tensors(folder.path(), &tensors);
    let mut again = block(b.as_ref());
    let error = attach(b.as_ref(), &mut again, &config, Values::Saved(folder.path())).unwrap_err().to_string();
    assert!(again.iter().all(|layer| layer.attached().is_none()), "attached in part");
    let file = format!("{}/adapter_model.safetensors: ", folder.path().display());
    error.strip_prefix(&file).unwrap_or_else(|| panic!("{error}")).to_string()
}

#[test]
fn folders_that_disagree_with_the_model_are_refused_whole() {
    for method in methods() {
        let missing = refusal(method.clone(), |tensors| drop(tensors.remove(0)));
        assert!(missing.starts_with("no tensor 'base_model.model.model.layers.0."), "{missing}");
        let extra = refusal(method.clone(), |tensors| {
            tensors.push(("base_model.model.model.layers.1.q_proj.bias".into(), vec![2], vec![0.0; 2]));
        });
        assert!(extra.contains("layers.1.q_proj.bias' belongs to no layer"), "{extra}");
        let other = refusal(method.clone(), |tensors| {
            tensors[0].1.push(2);
            tensors[0].2 = vec![0.0; tensors[0].1.iter().product()];
        });
        assert!(other.contains("an adapter for another base?"), "{other}");
        let nan = refusal(method.clone(), |tensors| tensors[0].2[1] = f32::NAN);
        assert!(nan.contains("element 1 of ") && nan.contains("is NaN, expected a finite number"), "{nan}");
    }
    // Gates of all layers, or of none.
    for end in ["q_proj.diff", "q_proj.log_alpha"] {
        let message = refusal(Relative::Diff { penalty: 0.0 }, |all| all.retain(|(name, ..)| !name.ends_with(end)));
        assert!(message.starts_with("no tensor ") && message.contains(end), "{message}");
    }
}

#[test]
fn a_trained_base_takes_no_relative() {
    let b = reference();
    let w = Parameter::new(b.upload(&[0f32; 8]).unwrap(), [2, 4]).unwrap();
    for method in methods() {
        let mut layers = ["o_proj", "down_proj", "k_proj", "v_proj"]
            .map(|name| Linear::new(name, 0, Weight::Trained(w.clone()), None).unwrap());
        let error = attach(b.as_ref(), &mut layers, &config(method), Values::New(7)).unwrap_err();
        assert!(matches!(error, Error::TrainedBase { .. }), "{error}");
    }
}

/// The files of PEFT 0.21.2, as it wrote them for a model of 2 layers, 4 heads (2 of keys) of 16.
#[test]
fn configurations_are_those_that_peft_writes() {
    let b = reference();
    let ia3 = r#"{"auto_mapping": null, "base_model_name_or_path": "base", "exclude_modules": null,
        "fan_in_fan_out": false, "feedforward_modules": ["down_proj"], "inference_mode": true,
        "init_ia3_weights": true, "modules_to_save": null, "peft_type": "IA3", "peft_version": "0.21.2",
        "revision": null, "target_modules": ["down_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}"#;
    let mut layers = block(b.as_ref());
    let method = Relative::Ia3 { feed_forward: None };
    let base_model = Some("base".to_owned());
    let new = PeftConfig::Relative(RelativeConfig { base_model: base_model.clone(), ..RelativeConfig::new(method) });
    let attached = attach(b.as_ref(), &mut layers, &new, Values::New(0)).unwrap();
    assert_eq!(attached.to_json(), text(ia3));
    assert_eq!(PeftConfig::from_json(ia3).unwrap(), attached);

    let prompt = r#"{"auto_mapping": null, "base_model_name_or_path": "base", "inference_mode": true,
        "modules_to_save": null, "num_attention_heads": 4, "num_layers": 2, "num_transformer_submodules": 1,
        "num_virtual_tokens": 3, "peft_type": "PROMPT_TUNING", "peft_version": "0.21.2",
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": null, "revision": null, "task_type": "CAUSAL_LM",
        "token_dim": 64, "tokenizer_kwargs": null, "tokenizer_name_or_path": null}"#;
    let prefix = r#"{"auto_mapping": null, "base_model_name_or_path": "base", "encoder_hidden_size": 32,
        "inference_mode": true, "init_weights": null, "modules_to_save": null, "num_attention_heads": 2,
        "num_layers": 2, "num_transformer_submodules": 1, "num_virtual_tokens": 3, "peft_type": "PREFIX_TUNING",
        "peft_version": "0.21.2", "prefix_projection": false, "revision": null, "task_type": "CAUSAL_LM",
        "token_dim": 32}"#;
    let projected = prefix.replace("\"prefix_projection\": false", "\"prefix_projection\": true");
    let dimensions = Dimensions { width: 64, heads: 4, kv_heads: 2, head_dim: 16, layers: 2 };
    for (kind, expected) in [
        (Kind::Prompt, prompt),
        (Kind::Prefix { projection: false }, prefix),
        (Kind::Prefix { projection: true }, &*projected),
    ] {
        let new = VirtualConfig { base_model: base_model.clone(), ..VirtualConfig::new(kind, 3) };
        let (_, config) = new.tokens(b.as_ref(), &dimensions, Values::New(0)).unwrap();
        let config = PeftConfig::Virtual(config);
        assert_eq!(config.to_json(), text(expected));
        assert_eq!(PeftConfig::from_json(expected).unwrap(), config);
    }
}

/// Laid out as PEFT lays it out: keys in order, two spaces.
fn text(json: &str) -> String {
    format!("{:#}", serde_json::from_str::<serde_json::Value>(json).unwrap())
}

#[test]
fn fields_that_are_not_known_or_not_possible_are_refused_by_name() {
    let message = |json: &str| PeftConfig::from_json(json).unwrap_err().to_string();
    for (json, expected) in [
        (r#"{"peft_type": "IA3", "fan_in_fan_out": true}"#, "'fan_in_fan_out' is true: not supported yet"),
        (r#"{"peft_type": "IA3", "modules_to_save": ["a"]}"#, r#"'modules_to_save' is ["a"]: not supported yet"#),
        (r#"{"peft_type": "BITFIT", "feedforward_modules": ["a"]}"#, "'feedforward_modules'"),
        (
            r#"{"peft_type": "IA3", "target_modules": ["a", "b"], "feedforward_modules": ["b", "c"]}"#,
            "'feedforward_modules' is c, expected some of 'target_modules'",
        ),
        (r#"{"peft_type": "BOTTLENECK", "placement": "both", "bottleneck": 3}"#, "expected \"houlsby\" or"),
        (r#"{"peft_type": "BOTTLENECK", "placement": "houlsby"}"#, "'bottleneck' is 0, expected 1 or more"),
        (r#"{"peft_type": "BOTTLENECK", "target_modules": ["a"], "bottleneck": 3}"#, "'target_modules'"),
        (r#"{"peft_type": "DIFF_PRUNING", "diff_penalty": -1}"#, "'diff_penalty' is -1, expected 0 or more"),
        (r#"{"peft_type": "DIFF_PRUNING"}"#, "'diff_penalty' is NaN, expected 0 or more"),
        (r#"{"peft_type": "PROMPT_TUNING"}"#, "'num_virtual_tokens' is 0, expected 1 or more"),
        (
            r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prefix_projection": true}"#,
            "'prefix_projection'",
        ),
        (
            r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "num_transformer_submodules": 2}"#,
            "'num_transformer_submodules' is 2: not supported yet",
        ),
        (r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "mystery": 1}"#, "'mystery' is 1"),
    ] {
        let message = message(json);
        assert!(message.contains(expected), "{json}: {message}");
    }
}
