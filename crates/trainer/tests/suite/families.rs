//! Every known architecture against transformers, and against itself: from a KV cache, and in packed rows.
//!
//! `families/make.py` made the models and their logits, in f64, and measured how far transformers' own f32 is from
//! them (`peer_error`).

use rankfold_backend::{Backend, Compute};
use rankfold_cpu::CpuBackend;
use rankfold_files::Checkpoint;
use rankfold_reference::ReferenceBackend;
use rankfold_trainer::data::Batch;
use rankfold_trainer::model::{DeviceBatch, Model, ModelConfig, Precision};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many times as far from the exact logits ours may be as transformers' f32 is. Both round the same steps in f32,
/// in other orders, and take the largest error of 13,824 logits: figures of one size. Measured: up to 0.55 on
/// `reference`, 1.65 on `cpu` (AVX-512, AVX2 and portable; a whole row, a cache or a packed row).
const PEER_ERRORS: f64 = 4.0;

fn folders() -> Vec<PathBuf> {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/families");
    let entries = std::fs::read_dir(families).unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<_> = entries.filter(|path| path.join("config.json").exists()).collect();
    assert!(!folders.is_empty());
    folders
}

/// A model, two rows of tokens, and the logits that the model must give them.
struct Case {
    name: String,
    model: Model,
    ids: Vec<u32>,
    seq: usize,
    /// [2, seq, vocab]
    expected: Vec<f32>,
    /// How far from them logits may lie.
    bound: f64,
}

impl Case {
    /// What transformers computes.
    fn open(folder: &Path, backend: Arc<dyn Backend>) -> Self {
        let config = ModelConfig::open(folder).unwrap();
        let name = format!("{} on {}", config.architecture.model_type(), backend.name());
        let model = Model::load(backend, &Checkpoint::open(folder).unwrap(), config, Precision::AsStored).unwrap();
        let io = Checkpoint::open(&folder.join("io.safetensors")).unwrap();
        let ids: Vec<u32> = io.read::<i64>("ids").unwrap().into_iter().map(|id| id as u32).collect();
        let bound = PEER_ERRORS * f64::from(io.read::<f32>("peer_error").unwrap()[0]);
        Self { name, model, seq: ids.len() / 2, ids, expected: io.read::<f32>("logits").unwrap(), bound }
    }

    /// The cases of a law that says what rows' logits are, however they are formed. `reference` forms every row by
    /// itself, so they are those of whole rows to the bit; `cpu` sums in the order of its blocks, and its logits are
    /// as far from transformers' as those of whole rows may be.
    fn of_a_law() -> Vec<Self> {
        let cases = folders().into_iter().flat_map(|folder| {
            let mut exact = Self::open(&folder, Arc::new(ReferenceBackend::new()));
            exact.expected = exact.logits(&exact.whole_rows());
            exact.bound = 0.0;
            [exact, Self::open(&folder, Arc::new(CpuBackend::new(None)))]
        });
        cases.collect()
    }

    /// Both rows, each one document.
    fn whole_rows(&self) -> Batch {
        let positions = (0..2).flat_map(|_| 0..self.seq as u32).collect();
        let (ids, labels) = (self.ids.clone(), vec![0; self.ids.len()]);
        Batch { ids, labels, positions, starts: vec![0; self.ids.len()], rows: 2, seq: self.seq }
    }

    fn logits(&self, batch: &Batch) -> Vec<f32> {
        let device = DeviceBatch::new(self.model.backend().as_ref(), batch).unwrap();
        let logits = self.model.logits(&device, Compute::F32).unwrap();
        self.model.backend().download(logits.view()).unwrap()
    }

    /// That `found` are the logits of the tokens from `first` on, both rows counted.
    fn assert_logits(&self, what: &str, first: usize, found: &[f32]) {
        let expected = &self.expected[first * self.model.config.vocab..][..found.len()];
        let differences = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
        // `max` forgets NaN.
        let worst = differences.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { d.max(worst) });
        assert!(worst <= self.bound, "{}, {what}: logits off by {worst:e}, allowed {:e}", self.name, self.bound);
    }
}

#[test]
fn logits_are_those_of_transformers() {
    let mut families = Vec::new();
    for folder in folders() {
        for backend in [Arc::new(ReferenceBackend::new()) as Arc<dyn Backend>, Arc::new(CpuBackend::new(None))] {
            let case = Case::open(&folder, backend);
            case.assert_logits("whole rows", 0, &case.logits(&case.whole_rows()));
            families.push(case.model.config.architecture.model_type());
        }
    }
    families.sort_unstable();
    families.dedup();
    assert_eq!(families, ["llama", "mistral", "qwen2", "qwen3"]);
}

/// Prompts shorter and longer than the windows (7 and 10 tokens) and the first block of keys (64).
#[test]
fn a_kv_cache_gives_the_logits_of_whole_rows() {
    for case in Case::of_a_law() {
        for prompt in [1, 6, 7, 8, 10, 11, 50, 65] {
            for row in 0..2 {
                let first = row * case.seq;
                let ids = &case.ids[first..first + case.seq];
                let mut cache = case.model.cache(case.seq).unwrap();
                let (mut from, mut to) = (0, prompt);
                while to <= case.seq {
                    let logits = case.model.next_logits(&ids[from..to], &mut cache, Compute::F32).unwrap();
                    case.assert_logits(&format!("token {to} after a prompt of {prompt}"), first + to - 1, &logits);
                    (from, to) = (to, to + 1);
                }
                assert_eq!(cache.free(), 0);
            }
        }
    }
}

/// Each row holds the beginnings of two documents: a model that is causal gives them the logits that they have at the
/// beginning of a row of their own.
#[test]
fn packed_documents_have_the_logits_of_documents_alone() {
    for case in Case::of_a_law() {
        for cut in [1, 29, case.seq - 1] {
            // (document, tokens): two rows of two.
            let pieces = [(0, cut), (1, case.seq - cut), (1, cut), (0, case.seq - cut)];
            let mut packed = Batch { ids: vec![], positions: vec![], starts: vec![], ..case.whole_rows() };
            for (piece, (document, len)) in pieces.into_iter().enumerate() {
                let start = if piece % 2 == 0 { 0 } else { cut };
                packed.ids.extend(&case.ids[document * case.seq..][..len]);
                packed.positions.extend(0..len as u32);
                packed.starts.extend(vec![start as u32; len]);
            }
            let logits = case.logits(&packed);
            let mut rest = logits.as_slice();
            for (document, len) in pieces {
                let (found, others) = rest.split_at(len * case.model.config.vocab);
                case.assert_logits(&format!("document {document}, cut at {cut}"), document * case.seq, found);
                rest = others;
            }
            assert!(rest.is_empty());
        }
    }
}
