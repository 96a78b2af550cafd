//! AdamW with moments in 8 bits, in the training of a whole small model.

use rankfold_backend::{Backend, Buffer, DType};
use rankfold_cpu::CpuBackend;
use rankfold_cuda::CudaBackend;
use rankfold_files::Checkpoint;
use rankfold_trainer::checkpoint::Checkpoints;
use rankfold_trainer::data::tokens;
use rankfold_trainer::model::{Model, ModelConfig, Precision};
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments, Slot, State};
use rankfold_trainer::product::{Kind, Product};
use rankfold_trainer::schedule::{Decay, Schedule};
use rankfold_trainer::step::{Batches, Recipe, gradients};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model in training, every step on the same batch.
struct Training {
    model: Model,
    optimizer: AdamW,
    batches: Batches,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn cpu(threads: usize) -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(Some(threads)))
}

const KIND: Kind = Kind::Full { tokenizer: None, dtype: DType::F32 };

impl Training {
    fn new(backend: Arc<dyn Backend>, moments: Moments) -> Self {
        let folder = golden().join("tiny-llama");
        let config = ModelConfig::open(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let model = Model::load(backend.clone(), &checkpoint, config, Precision::Trained).unwrap();
        let batch = tokens::read(&golden().join("tiny-llama-io.safetensors"), model.config.vocab).unwrap();
        let optimizer = AdamW::new(backend, moments, Hyper::default(), model.parameters()).unwrap();
        Self { model, optimizer, batches: Batches::Fixed(batch) }
    }

    /// Steps up to `last`: their losses.
    fn go_on(&mut self, last: u64) -> Vec<f64> {
        let schedule = Schedule { lr: 1e-3, decay: Decay::Constant, warmup: 0, steps: 100 };
        let recipe = Recipe { clip: 1.0, ..Recipe::new(schedule) };
        let first = self.optimizer.step + 1;
        let step = |t: u64| {
            let pending = gradients(&self.model, &mut self.batches, &recipe, &self.optimizer, t as usize).unwrap();
            pending.apply(&recipe, &mut self.optimizer, None).unwrap().loss
        };
        (first..=last).map(step).collect()
    }

    fn save(&self, folder: &Path) {
        let product = Product { model: &self.model, kind: KIND };
        Checkpoints::of(folder).save(self.optimizer.step as usize, product, &self.optimizer, None, 1).unwrap();
    }

    fn restore(&mut self, folder: &Path) -> Result<usize, rankfold_trainer::Error> {
        Checkpoints::of(folder).restore(&mut self.model, KIND, &mut self.optimizer, None)
    }

    /// The bits of every value and every moment.
    fn bits(&self) -> Vec<Vec<u8>> {
        let tensors = self.optimizer.slots.iter().flat_map(|slot| {
            let moments = slot.state.tensors().into_iter().map(|(_, buffer)| buffer);
            let bytes = |buffer: &Buffer| {
                let mut bytes = vec![0; buffer.bytes()];
                self.model.backend().read(buffer.view(), &mut bytes).unwrap();
                bytes
            };
            let value = bytes(slot.named.parameter.tensor().buffer());
            moments.map(bytes).chain([value]).collect::<Vec<_>>()
        });
        tensors.collect()
    }
}

/// From 5.797 to 0.4460 in 32 bits and to 0.4454 in 8 where this was measured (AMD EPYC Zen 4): the falls differ by
/// 1.3·10⁻⁴ of themselves. What is lost at a step is far less than a hundredth of it.
#[test]
fn the_loss_falls_in_8_bits_nearly_as_far_as_in_32() {
    let [exact, coded] = [Moments::F32, Moments::Blockwise8].map(|moments| {
        let mut training = Training::new(cpu(2), moments);
        let is_coded = |slot: &Slot| matches!(slot.state, State::Blockwise8 { .. });
        assert_eq!(training.optimizer.slots.iter().any(is_coded), moments == Moments::Blockwise8);
        training.go_on(30)
    });
    assert!(exact != coded && exact[29] < 0.1 * exact[0], "{exact:?} {coded:?}");
    let fall = |losses: &[f64]| losses[0] - losses[29];
    assert!(fall(&coded) > 0.99 * fall(&exact), "{exact:?} {coded:?}");
}

/// By what golden/README asks of a trajectory.
#[test]
fn cuda_on_the_host_trains_in_8_bits_as_the_cpu_does() {
    let host = Arc::new(CudaBackend::on_host(None).unwrap());
    let [cpu, cuda] = [cpu(2), host].map(|backend| Training::new(backend, Moments::Blockwise8).go_on(8));
    assert!(cpu.iter().zip(&cuda).all(|(a, b)| (a - b).abs() < 1e-3), "{cpu:?} {cuda:?}");
}

#[test]
fn no_number_of_threads_changes_a_bit() {
    let [one, two, three] = [1, 2, 3].map(|threads| {
        let mut training = Training::new(cpu(threads), Moments::Blockwise8);
        training.go_on(4);
        training.bits()
    });
    assert!(one == two && one == three);
}

#[test]
fn a_resumed_run_has_the_bits_of_one_that_never_stopped() {
    for moments in [Moments::F32, Moments::Blockwise8] {
        let folder = tempfile::tempdir().unwrap();
        let mut whole = Training::new(cpu(2), moments);
        whole.go_on(3);
        whole.save(folder.path());
        let losses = whole.go_on(6);

        let mut resumed = Training::new(cpu(2), moments);
        assert_eq!(resumed.restore(folder.path()).unwrap(), 3);
        assert_eq!(resumed.go_on(6), losses);
        assert!(resumed.bits() == whole.bits(), "moments in {moments}");
    }
}

#[test]
fn moments_are_written_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let mut training = Training::new(cpu(2), Moments::Blockwise8);
    training.go_on(1);
    training.save(folder.path());
    let file = Checkpoint::open(&folder.path().join("checkpoints/step-000001/optimizer.safetensors")).unwrap();
    let [matrix, norm] = ["embed_tokens", "norm"].map(|name| format!("model.{name}.weight"));
    for (name, dtype, shape) in [
        (format!("{matrix}.m"), DType::U8, &[256, 64][..]),
        (format!("{matrix}.m.absmax"), DType::F32, &[64]),
        (format!("{matrix}.v"), DType::U8, &[256, 64]),
        (format!("{matrix}.v.absmax"), DType::F32, &[64]),
        (format!("{norm}.m"), DType::F32, &[64]),
        (format!("{norm}.v"), DType::F32, &[64]),
    ] {
        file.expect(&name, &[dtype], shape).unwrap();
    }
    assert!(!file.contains(&format!("{norm}.m.absmax")));
}

#[test]
fn moments_of_another_kind_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    Training::new(cpu(1), Moments::F32).save(folder.path());
    let error = Training::new(cpu(1), Moments::Blockwise8).restore(folder.path()).unwrap_err().to_string();
    assert!(error.contains("state.json") && error.contains("in 32 bits, expected 8 bits"), "{error}");
}
