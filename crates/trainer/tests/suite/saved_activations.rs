//! A whole model whose activations are kept in bf16 between forward and backward.

use rankfold_adapters::Forward;
use rankfold_autograd::{Gradients, SavedAs, Tape};
use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use std::path::Path;
use std::sync::Arc;

const ROWS: usize = 3;
const SEQ: usize = 40;

/// How far a parameter's gradient may be from that of exact activations, over its own norm. Half a unit in the last of
/// bf16's 8 bits is 2⁻⁸ of an element at the most, and 0.42·2⁻⁸ in the root of the mean square (the error uniform, and
/// the element's logarithm). A block saves ten activations, the last norm one: over two blocks 21 independent errors,
/// √21 times as much, 0.75 %. Three times that is allowed, for some enter a gradient more than once.
const NEAR: f64 = 0.022;

/// The loss, and the gradient of every parameter by name.
fn gradients(threads: usize, saved_as: SavedAs, checkpointing: bool) -> (f64, Vec<(String, Vec<f32>)>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families/llama");
    let (config, checkpoint) = (ModelConfig::open(&folder).unwrap(), Checkpoint::open(&folder).unwrap());
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(threads)));
    let model = Model::load(backend.clone(), &checkpoint, config, Precision::Trained).unwrap();
    let ids: Vec<u32> = (0..ROWS * SEQ).map(|t| (t * t * 7 % 96) as u32).collect();
    let batch = Batch {
        labels: ids.iter().map(|id| i64::from(*id)).collect(),
        ids,
        positions: (0..ROWS * SEQ).map(|t| (t % SEQ) as u32).collect(),
        starts: vec![0; ROWS * SEQ],
        rows: ROWS,
        seq: SEQ,
    };
    let (device, tape) = (model.batch(&batch).unwrap(), Tape::saving(backend.clone(), saved_as));
    let mode = Forward::evaluation(Compute::F32);
    let (root, loss) = model.loss(&tape, &device, device.kept as f64, &mode, checkpointing).unwrap();
    let mut gradients = Gradients::new(backend.clone());
    tape.backward_from_loss(&root, &mut gradients).unwrap();
    let values = |buffer| backend.download::<f32>(buffer).unwrap();
    let of = model.parameters().into_iter();
    (loss, of.map(|n| (n.name, values(gradients.of(&n.parameter).unwrap().view()))).collect())
}

#[test]
fn the_loss_has_the_same_bits_and_every_gradient_is_near() {
    let (loss, exact) = gradients(1, SavedAs::Computed, false);
    for checkpointing in [false, true] {
        let (again, found) = gradients(1, SavedAs::Bf16, checkpointing);
        assert_eq!(loss.to_bits(), again.to_bits());
        for ((name, exact), (_, found)) in exact.iter().zip(&found) {
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let apart = norm(&mut exact.iter().zip(found).map(|(a, b)| f64::from(a - b)));
            let distance = apart / norm(&mut exact.iter().map(|x| f64::from(*x)));
            assert!(distance < NEAR, "{name}: {distance}, checkpointing {checkpointing}");
        }
        assert!(exact != found, "nothing is rounded");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for checkpointing in [false, true] {
        let one = gradients(1, SavedAs::Bf16, checkpointing);
        for threads in [2, 3] {
            assert!(gradients(threads, SavedAs::Bf16, checkpointing) == one, "{threads} threads");
        }
    }
}
