//! Prompt and prefix tuning: what is saved, what is seen of it, and whose it is.

use crate::common::{purpose, reference, set, write_tensors};
use rankfold_adapters::virtual_tokens::{Dimensions, Kind};
use rankfold_adapters::{PeftConfig, Purpose, Values, VirtualConfig, VirtualTokens};
use rankfold_autograd::gradcheck::{parameter, worst_error};
use rankfold_autograd::{Tape, Tensor};
use rankfold_backend::Backend;
use rankfold_files::Checkpoint;
use std::sync::Arc;

/// What the two roundings and the truncation of a central difference leave, many times over: see `gradcheck`.
const ALLOWED: f64 = 1e-7;

const MODEL: Dimensions = Dimensions { width: 6, heads: 4, kv_heads: 2, head_dim: 2, layers: 3 };

fn learned(b: &Arc<dyn Backend>, kind: Kind) -> (VirtualTokens, PeftConfig) {
    let (tokens, config) = VirtualConfig::new(kind, 2).tokens(b.as_ref(), &MODEL, Values::New(7)).unwrap();
    for (i, (_, parameter)) in tokens.parameters().into_iter().enumerate() {
        set(b.as_ref(), parameter, i as u64);
    }
    (tokens, PeftConfig::Virtual(config))
}

/// Bits of what a model sees of the tokens.
fn seen(b: &Arc<dyn Backend>, tokens: &VirtualTokens) -> Vec<Vec<u32>> {
    let tape = Tape::inference(b.clone());
    let of_layers = (0..MODEL.layers).filter_map(|layer| tokens.keys_and_values(&tape, layer).unwrap());
    let bits = |t: Tensor| b.download::<f32>(t.view()).unwrap().into_iter().map(f32::to_bits).collect();
    of_layers.flatten().chain(tokens.embeddings()).map(bits).collect()
}

#[test]
fn learned_tokens_that_are_saved_and_read_again_are_seen_as_the_same_bits() {
    let b = reference();
    for kind in [Kind::Prompt, Kind::Prefix { projection: false }, Kind::Prefix { projection: true }] {
        let (tokens, config) = learned(&b, kind);
        for finished in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            config.write(&b, folder.path(), &[], Vec::new(), Some(&tokens), purpose(finished)).unwrap();
            let found = PeftConfig::open(folder.path()).unwrap();
            assert_eq!(found, config);
            let found = found.virtual_tokens().unwrap().clone();
            let (again, read) = found.tokens(b.as_ref(), &MODEL, Values::Saved(folder.path())).unwrap();
            assert_eq!(seen(&b, &again), seen(&b, &tokens), "{kind:?}, {finished}");
            // A finished prefix no longer comes out of its projection.
            let flat = finished && kind == Kind::Prefix { projection: true };
            assert_eq!(read.kind, if flat { Kind::Prefix { projection: false } } else { kind });
            let names: Vec<String> = Checkpoint::open(&folder.path().join("adapter_model.safetensors"))
                .map(|file| file.names().map(str::to_owned).collect())
                .unwrap();
            assert!(!finished || names == ["prompt_embeddings"]);
        }
    }
}

#[test]
fn gradients_of_a_projected_prefix_match_differences() {
    let b = reference();
    let f64s = |stream, dims: &[usize]| parameter(&b, stream, dims).unwrap();
    let parts = [f64s(1, &[2, 4]), f64s(2, &[3, 4]), f64s(3, &[3]), f64s(4, &[24, 3]), f64s(5, &[24])];
    let tokens = VirtualTokens::projected(parts.clone(), 4);
    let worst = worst_error(&b, &parts, |tape| {
        let of = |layer| tokens.keys_and_values(tape, layer).unwrap().unwrap();
        let ([k0, v0], [k2, v2]) = (of(0), of(2));
        tape.add(&tape.silu_mul(&k0, &v2)?, &tape.silu_mul(&k2, &v0)?)
    });
    assert!(worst.unwrap() < ALLOWED);
}

#[test]
fn learned_tokens_of_another_model_are_refused() {
    let b = reference();
    let (tokens, config) = learned(&b, Kind::Prompt);
    let folder = tempfile::tempdir().unwrap();
    config.write(&b, folder.path(), &[], Vec::new(), Some(&tokens), Purpose::Exchange).unwrap();
    let read = |model: Dimensions, config: &VirtualConfig| {
        config.tokens(b.as_ref(), &model, Values::Saved(folder.path())).map(|_| ()).unwrap_err().to_string()
    };
    let config = config.virtual_tokens().unwrap();
    let wider = Dimensions { width: 8, ..MODEL };
    let expected = "'token_dim' is 6, but the model's is 8: an adapter for another base?";
    assert_eq!(read(wider, config), expected);
    let silent = VirtualConfig { shape: [None; 3], ..config.clone() };
    assert!(read(wider, &silent).contains("has shape [2, 6], expected [2, 8] for the learned tokens"));
    let more = VirtualConfig { tokens: 3, ..config.clone() };
    assert!(read(MODEL, &more).contains("has shape [2, 6], expected [3, 6]"));
    let extra =
        vec![("prompt_embeddings".to_owned(), vec![2, 6], vec![0.0; 12]), ("other".to_owned(), vec![1], vec![0.0])];
    write_tensors(folder.path(), &extra);
    assert!(read(MODEL, config).contains("'other'"));
}
