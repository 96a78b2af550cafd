//! Folders of methods other than plain LoRA (`bad_folders.rs`) that disagree with the model or with themselves.

use crate::common::{all, layers, reference, write_tensors};
use rankfold_adapters::virtual_tokens::Dimensions;
use rankfold_adapters::{Error, PeftConfig, Values};
use std::path::Path;

/// The target, of [3, 4].
const Q: &str = "layers.0.q_proj";
const DIMENSIONS: Dimensions = Dimensions { width: 6, heads: 3, kv_heads: 1, head_dim: 2, layers: 2 };

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// A method's name, its configuration, and its tensors by their ends (of the target's) and shapes.
type Method = (&'static str, &'static str, &'static [(&'static str, &'static [usize])]);

const METHODS: [Method; 9] = [
    (
        "DoRA",
        r#"{"peft_type": "LORA", "use_dora": true, "r": 2, "target_modules": ["q_proj"]}"#,
        &[("lora_A.weight", &[2, 4]), ("lora_B.weight", &[3, 2]), ("lora_magnitude_vector", &[3])],
    ),
    (
        "AdaLoRA",
        r#"{"peft_type": "ADALORA", "init_r": 2, "target_r": 1, "tinit": 1, "tfinal": 1, "total_step": 9,
            "target_modules": ["q_proj"]}"#,
        &[("lora_A", &[2, 4]), ("lora_B", &[3, 2]), ("lora_E", &[2, 1])],
    ),
    (
        "AdaLoRA, pruned",
        r#"{"peft_type": "ADALORA", "init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 1, "total_step": 9,
            "target_modules": ["q_proj"], "rank_pattern": {"layers.0.q_proj.lora_E": [true, false, true]}}"#,
        &[("lora_A", &[2, 4]), ("lora_B", &[3, 2]), ("lora_E", &[2, 1])],
    ),
    (
        "(IA)³ of outputs",
        r#"{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}"#,
        &[("ia3_l", &[3, 1])],
    ),
    (
        "(IA)³ of inputs",
        r#"{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}"#,
        &[("ia3_l", &[1, 4])],
    ),
    ("BitFit", r#"{"peft_type": "BITFIT", "target_modules": ["q_proj"]}"#, &[("bias", &[3])]),
    ("prompt", r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}"#, &[("prompt_embeddings", &[2, 6])]),
    ("prefix", r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}"#, &[("prompt_embeddings", &[2, 8])]),
    (
        "a projected prefix",
        r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": true,
            "encoder_hidden_size": 5}"#,
        &[
            ("prompt_encoder.embedding.weight", &[3, 2]),
            ("prompt_encoder.transform.0.weight", &[5, 2]),
            ("prompt_encoder.transform.0.bias", &[5]),
            ("prompt_encoder.transform.2.weight", &[8, 5]),
            ("prompt_encoder.transform.2.bias", &[8]),
        ],
    ),
];

/// As the method's folder has them.
fn tensors((_, _, shapes): &Method) -> Tensors {
    let name = |end: &str| match end.starts_with("prompt_") {
        true => end.to_owned(),
        false => format!("base_model.model.{Q}.{end}"),
    };
    shapes.iter().map(|(end, dims)| (name(end), dims.to_vec(), vec![0.5; dims.iter().product()])).collect()
}

/// Attach a folder to a model of the target and one other layer; what is to be warned of. Where it is refused, nothing
/// is attached.
fn attach(folder: &Path) -> Result<Vec<String>, Error> {
    let backend = reference();
    let mut model = layers(backend.as_ref(), [3, 4], &[Q, "layers.0.k_proj"]);
    let config = PeftConfig::open(folder)?;
    let attached = match config.virtual_tokens() {
        Some(learned) => learned.tokens(backend.as_ref(), &DIMENSIONS, Values::Saved(folder)).map(|_| Vec::new()),
        None => config
            .attach(backend.as_ref(), &mut all(&mut model), "llama", Values::Saved(folder))
            .map(|attached| attached.warnings),
    };
    let is_on = model[0].attached().is_some();
    assert!(is_on == (attached.is_ok() && config.virtual_tokens().is_none()) && model[1].attached().is_none());
    attached
}

fn opened(config: &str, tensors: &Tensors) -> Result<Vec<String>, Error> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    write_tensors(folder.path(), tensors);
    attach(folder.path())
}

#[test]
fn sound_folders_are_attached() {
    for method in METHODS {
        assert!(opened(method.1, &tensors(&method)).unwrap().is_empty(), "{}", method.0);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    for method in METHODS {
        for left_out in 0..method.2.len() {
            let mut tensors = tensors(&method);
            let name = tensors.remove(left_out).0;
            let why = opened(method.1, &tensors).unwrap_err();
            assert!(matches!(&why, Error::MissingTensor { tensor, .. } if *tensor == name), "{}: {why}", method.0);
        }
    }
}

#[test]
fn an_extra_tensor_is_named() {
    for method in METHODS {
        for extra in ["other", "prompt_embeddings.other", "base_model.model.layers.0.k_proj.lora_A.weight"] {
            let mut tensors = tensors(&method);
            tensors.push((extra.into(), vec![1], vec![0.0]));
            let why = opened(method.1, &tensors).unwrap_err();
            assert!(matches!(&why, Error::ExtraTensor { tensor, .. } if tensor == extra), "{}: {why}", method.0);
        }
    }
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    for method in METHODS {
        for (at, (end, dims)) in method.2.iter().enumerate() {
            for side in 0..=dims.len() {
                let mut tensors = tensors(&method);
                // One more along each side, and another side.
                let mut found = dims.to_vec();
                match found.get_mut(side) {
                    Some(len) => *len += 1,
                    None => found.push(1),
                }
                (tensors[at].1, tensors[at].2) = (found.clone(), vec![0.5; found.iter().product()]);
                let (name, why) = (&tensors[at].0, opened(method.1, &tensors).unwrap_err());
                let is_rank = end.starts_with("lora_") && dims.get(side) == Some(&2);
                match &why {
                    Error::OtherBase { tensor, found: f, expected, .. } if !is_rank => {
                        assert_eq!((tensor, f, expected), (name, &found, &dims.to_vec()), "{}", method.0);
                    }
                    Error::OtherRank { tensor, found: 3, expected: 2, .. } if is_rank => assert_eq!(tensor, name),
                    _ => panic!("{}: {why}", method.0),
                }
            }
        }
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_with_their_place() {
    for method in METHODS {
        for at in 0..method.2.len() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut tensors = tensors(&method);
                let last = tensors[at].2.len() - 1;
                tensors[at].2[last] = bad;
                let why = opened(method.1, &tensors).unwrap_err();
                match &why {
                    Error::NonFinite { tensor, index, .. } => assert_eq!((tensor, *index), (&tensors[at].0, last)),
                    _ => panic!("{}: {why}", method.0),
                }
            }
        }
    }
}

#[test]
fn truncated_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for method in METHODS {
        std::fs::write(folder.path().join("adapter_config.json"), method.1).unwrap();
        write_tensors(folder.path(), &tensors(&method));
        let path = folder.path().join("adapter_model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = attach(folder.path()).unwrap_err().to_string();
            assert!(message.contains("adapter_model.safetensors: "), "{}, {length} bytes: {message}", method.0);
        }
    }
}

#[test]
fn adalora_patterns_that_disagree_with_tensors_or_targets_are_told() {
    let (_, config, _) = METHODS[2];
    let with = |pattern: &str| config.replace("[true, false, true]", pattern);
    let tensors = tensors(&METHODS[2]);
    let message = |config: &str| {
        let message = opened(config, &tensors).unwrap_err().to_string();
        message.rsplit("safetensors: ").next().unwrap().to_owned()
    };
    let of = |found: usize, expected| {
        format!("'base_model.model.{Q}.lora_A' has rank {found}, expected {expected} by the configuration")
    };
    assert_eq!(message(&with("[true, true, true]")), of(2, 3));
    assert_eq!(message(&with("[false, true, false]")), of(2, 1));
    assert_eq!(message(&with("[false, false, false]")), of(2, 0));
    let field = format!("'rank_pattern: {Q}.lora_E'");
    let short = format!("{field} is of 2 entries beside an init_r of 3, expected as many");
    assert_eq!(message(&with("[true, true]")), short);
    let other = config.replace("layers.0.q_proj.lora_E", "layers.9.q_proj.lora_E");
    assert_eq!(message(&other), format!("{field} is missing, expected an entry for every layer that is targeted"));
    let more = config.replace("\"layers.0", "\"layers.9.q_proj.lora_E\": [true, true, true], \"layers.0");
    let warnings = opened(&more, &tensors).unwrap();
    assert_eq!(warnings, ["rank_pattern: layers.9.q_proj.lora_E means no layer of this model"]);
}

/// A layer that is cut to nothing has tensors without elements.
#[test]
fn an_adalora_of_rank_0_is_attached() {
    let (_, config, _) = METHODS[2];
    let name = |end: &str| format!("base_model.model.{Q}.{end}");
    let tensors: Tensors = [("lora_A", [0, 4]), ("lora_B", [3, 0]), ("lora_E", [0, 1])]
        .map(|(end, dims)| (name(end), dims.to_vec(), Vec::new()))
        .into();
    assert!(opened(&config.replace("[true, false, true]", "[false, false, false]"), &tensors).unwrap().is_empty());
}
