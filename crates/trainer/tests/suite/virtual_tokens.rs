//! Prompt and prefix tuning on a whole model: rows, a KV cache, and batches that it must refuse.

use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{Forward, PeftConfig, Values, VirtualConfig};
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::params::IGNORED;
use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use rankfold_reference::ReferenceBackend;
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use rankfold_trainer::step::evaluate;
use std::path::Path;
use std::sync::Arc;

const KINDS: [Kind; 3] = [Kind::Prompt, Kind::Prefix { projection: false }, Kind::Prefix { projection: true }];
/// Beyond the windows of the families' models, 7 and 10 tokens.
const LEARNED: usize = 12;

/// A model of every family with learned tokens.
fn models(backend: Arc<dyn Backend>, kind: Kind) -> Vec<Model> {
    let families = ["llama", "mistral", "qwen2", "qwen3"];
    let model = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families").join(name);
        let config = ModelConfig::open(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let mut model = Model::load(backend.clone(), &checkpoint, config, Precision::AsStored).unwrap();
        model.attach(&PeftConfig::Virtual(VirtualConfig::new(kind, LEARNED)), Values::New(3)).unwrap();
        model
    };
    families.map(model).into()
}

/// `rows` rows of `seq` tokens, all of them taught.
fn batch(rows: usize, seq: usize) -> Batch {
    let ids: Vec<u32> = (0..rows * seq).map(|i| (i * i % 89 + i % 7) as u32).collect();
    let labels = ids.iter().map(|&id| i64::from(id)).collect();
    let positions = (0..rows).flat_map(|_| 0..seq as u32).collect();
    Batch { ids, labels, positions, starts: vec![0; rows * seq], rows, seq }
}

fn logits(model: &Model, batch: &Batch) -> Vec<f32> {
    let logits = model.logits(&model.batch(batch).unwrap(), Compute::F32).unwrap();
    model.backend().download(logits.view()).unwrap()
}

/// `reference` forms every row by itself: what follows a prompt has the bits of a whole row.
#[test]
fn a_kv_cache_behind_learned_tokens_gives_the_logits_of_whole_rows_to_the_bit() {
    for kind in KINDS {
        for model in models(Arc::new(ReferenceBackend::new()), kind) {
            let batch = batch(1, 15);
            let (whole, vocab) = (logits(&model, &batch), model.config.vocab);
            assert_eq!(whole.len(), 15 * vocab);
            for prompt in [1, 6, 14] {
                let mut cache = model.cache(15).unwrap();
                let (mut from, mut to) = (0, prompt);
                while to <= 15 {
                    let next = model.next_logits(&batch.ids[from..to], &mut cache, Compute::F32).unwrap();
                    assert!(next == whole[(to - 1) * vocab..to * vocab], "{kind:?}: token {to} after {prompt}");
                    (from, to) = (to, to + 1);
                }
                assert_eq!(cache.free(), 0);
            }
        }
    }
}

#[test]
fn rows_of_a_batch_see_the_learned_tokens_and_not_each_other() {
    for kind in KINDS {
        for model in models(Arc::new(ReferenceBackend::new()), kind) {
            let both = batch(2, 9);
            let found = logits(&model, &both);
            for row in 0..2 {
                let part = row * 9..(row + 1) * 9;
                let alone = Batch {
                    ids: both.ids[part.clone()].to_vec(),
                    labels: both.labels[part].to_vec(),
                    rows: 1,
                    ..batch(1, 9)
                };
                let vocab = model.config.vocab;
                assert!(found[row * 9 * vocab..][..9 * vocab] == logits(&model, &alone), "{kind:?}, row {row}");
            }
        }
    }
}

/// A learned embedding's position is one that predicts; a learned key's is none. Padding counts for neither.
#[test]
fn the_loss_is_over_real_tokens_alone() {
    for kind in KINDS {
        for model in models(Arc::new(CpuBackend::new(Some(2))), kind) {
            let mut batch = batch(2, 9);
            let targets = |batch: &Batch| {
                let (loss, targets) = evaluate(&model, [batch.clone()], Compute::F32).unwrap();
                assert!(loss.is_finite());
                assert_eq!(targets, model.targets(batch));
                targets
            };
            let firsts = if kind == Kind::Prompt { 2 } else { 0 };
            assert_eq!(targets(&batch), 16 + firsts);
            for row in 0..2 {
                batch.labels[row * 9] = IGNORED;
            }
            assert_eq!(targets(&batch), 16);
            // The last four of the second row are padding.
            for i in 14..18 {
                (batch.labels[i], batch.starts[i], batch.positions[i]) = (IGNORED, 5, i as u32 - 14);
            }
            assert_eq!(targets(&batch), 12);
        }
    }
}

#[test]
fn a_document_that_begins_within_a_row_is_refused_with_its_place() {
    let [model, ..] = &models(Arc::new(ReferenceBackend::new()), Kind::Prompt)[..] else { panic!() };
    let mut packed = batch(2, 9);
    packed.starts[14..].fill(5);
    packed.positions[14..].copy_from_slice(&[0, 1, 2, 3]);
    let message = model.batch(&packed).unwrap_err().to_string();
    assert!(message.contains("begins at token 5 of row 1") && message.contains("one document a row"), "{message}");
}

/// The second run of a block, in backward, forms its keys and values again.
#[test]
fn checkpointing_gives_the_gradients_of_learned_tokens_bit_for_bit() {
    for kind in KINDS {
        for model in models(Arc::new(CpuBackend::new(Some(2))), kind) {
            let gradients = |checkpointing| -> Vec<Vec<f32>> {
                let (backend, batch) = (model.backend().clone(), model.batch(&batch(2, 9)).unwrap());
                let (tape, mode) = (Tape::new(backend.clone()), Forward::evaluation(Compute::F32));
                let (root, _) = model.loss(&tape, &batch, 16.0, &mode, checkpointing).unwrap();
                let mut gradients = Gradients::new(backend.clone());
                tape.backward_from_loss(&root, &mut gradients).unwrap();
                let named = model.parameters();
                assert_eq!(named.len(), if kind == KINDS[2] { 5 } else { 1 });
                let of = |n: &rankfold_trainer::optimizer::Named| {
                    backend.download(gradients.of(&n.parameter).unwrap().view()).unwrap()
                };
                named.iter().map(of).collect()
            };
            let found = gradients(false);
            assert!(found.iter().all(|g| g.iter().any(|g| *g != 0.0)), "{kind:?}");
            assert!(found == gradients(true), "{kind:?}");
        }
    }
}
