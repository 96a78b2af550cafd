//! What a call of the three linear kernels is given.

use crate::conformance::draw::{Draw, size, size_or_zero};
use crate::conformance::harness::TestCaseResult;
use crate::params::Dropout;
use crate::{Backend, Compute, Format, Quantized, Scales};
use half::{bf16, f16};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// How the weight is stored.
#[derive(Clone, Copy, Debug)]
pub enum Storage {
    F32,
    Bf16,
    F16,
    Quantized { format: Format, block: usize, double: bool },
}

/// Which parts the update has.
#[derive(Clone, Copy, Debug)]
pub struct UpdateCase {
    pub rank: usize,
    pub per_rank: bool,
    pub row_scale: bool,
    pub dropout: Option<f32>,
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub tokens: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub compute: Compute,
    pub storage: Storage,
    pub update: Option<UpdateCase>,
    pub bias: bool,
    /// Of dx.
    pub accumulate: bool,
    /// Whether every gradient is asked for that the case has, or only some.
    pub all: bool,
    pub seed: u64,
}

impl Case {
    pub fn rank(&self) -> usize {
        self.update.map_or(0, |update| update.rank)
    }

    pub fn row_scale(&self) -> bool {
        self.update.is_some_and(|update| update.row_scale)
    }

    /// Which of dW, d bias, dA, dB, de and dg are asked for: each that the case has, or three in four of those.
    pub fn asked(&self) -> [bool; 6] {
        let mut draw = Draw::new(!self.seed);
        let update = self.update.is_some();
        let dense = !matches!(self.storage, Storage::Quantized { .. }) && !self.row_scale();
        let per_rank = self.update.is_some_and(|update| update.per_rank);
        [dense, true, update, update, per_rank, self.row_scale()].map(|exists| exists && (!draw.once_in(4) || self.all))
    }

    pub fn dropout(&self) -> Option<Dropout> {
        let probability = self.update?.dropout?;
        Some(Dropout { probability, seed: self.seed, stream: 7 })
    }
}

fn storages() -> impl Strategy<Value = Storage> {
    let blocks = select(vec![32, 64, 128, 256, 4096]);
    let quantized = (select(Format::ALL.to_vec()), blocks, any::<bool>())
        .prop_map(|(format, block, double)| Storage::Quantized { format, block, double });
    prop_oneof![Just(Storage::F32), Just(Storage::Bf16), Just(Storage::F16), quantized.clone(), quantized]
}

fn updates(compute: Compute) -> impl Strategy<Value = Option<UpdateCase>> {
    // In bf16 the factor 1/(1 − p) has to be a power of two, for the reason that `powers` in `Data::draw` gives.
    let probabilities = if compute == Compute::Bf16 { vec![0.5, 0.75] } else { vec![0.1, 0.5, 0.9] };
    let parts = (select(vec![0, 1, 2, 3, 4, 8, 16, 17]), any::<bool>(), any::<bool>());
    let update = (parts, option::of(select(probabilities)))
        .prop_map(|((rank, per_rank, row_scale), dropout)| UpdateCase { rank, per_rank, row_scale, dropout });
    option::weighted(0.75, update)
}

fn with_dims(dims: impl Strategy<Value = (usize, usize, usize)>, compute: Compute) -> impl Strategy<Value = Case> {
    let flags = (any::<bool>(), any::<bool>(), any::<u64>());
    (dims, storages(), updates(compute), flags).prop_map(
        move |((tokens, inputs, outputs), storage, update, (bias, accumulate, seed))| Case {
            tokens,
            inputs,
            outputs,
            compute,
            storage,
            update,
            bias,
            accumulate,
            all: false,
            seed,
        },
    )
}

/// Few tokens and many; ragged rows and blocks, and, once in three, rows of whole vectors, which fused kernels ask for.
pub fn cases(compute: Compute) -> impl Strategy<Value = Case> {
    let whole = (
        select(vec![1, 2, 3, 4, 5, 15, 16, 17, 64, 65]),
        select(vec![32, 64, 96, 128, 160]),
        select(vec![1, 8, 16, 40, 64, 65, 72, 96]),
    );
    with_dims(prop_oneof![2 => (size_or_zero(65), size(129), size(97)), 1 => whole], compute)
}

/// Sizes beyond one block of any blocking.
pub fn large_cases(compute: Compute) -> impl Strategy<Value = Case> {
    let dims = prop_oneof![
        (select(vec![1, 4, 129]), select(vec![513, 768]), select(vec![255, 384])),
        (Just(257), select(vec![129, 192]), select(vec![193, 256])),
        (select(vec![3, 5, 17]), select(vec![1088, 2048]), select(vec![40, 65])),
        (select(vec![5, 17]), select(vec![64, 96]), select(vec![1088, 2048])),
    ];
    with_dims(dims, compute)
}

/// The weight as the candidate gets it.
#[derive(Clone)]
pub enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Quantized { format: Format, block: usize, codes: Vec<u8>, scales: StoredScales },
}

#[derive(Clone)]
pub enum StoredScales {
    Plain(Vec<f32>),
    Nested { codes: Vec<u8>, absmax: Vec<f32>, offset: f32 },
}

/// All tensors of a call; those that the case lacks are empty.
#[derive(Clone)]
pub struct Data {
    pub x: Vec<f32>,
    pub dy: Vec<f32>,
    pub stored: Stored,
    /// The numbers that `stored` stands for.
    pub w: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub s: f32,
    pub e: Vec<f32>,
    pub g: Vec<f32>,
    pub bias: Vec<f32>,
    /// What dx holds before.
    pub dx: Vec<f32>,
    /// What the gradients hold before: dW, d bias, dA, dB, de, dg.
    pub grads: [Vec<f32>; 6],
}

impl Data {
    /// In bf16, s, e and g are powers of two (and g − 1 too: g is 2 or 1/2): multiplying by them commutes with
    /// rounding to bf16, so that it does not matter on which side of it a backend does it, which the contract leaves
    /// open.
    pub fn draw(case: &Case, oracle: &dyn Backend) -> TestCaseResult<Self> {
        let Case { tokens, inputs, outputs, .. } = *case;
        let (rank, powers, mut draw) = (case.rank(), case.compute == Compute::Bf16, Draw::new(case.seed));
        let x = draw.scaled(tokens * inputs);
        let dy = draw.scaled(tokens * outputs);
        let (stored, w) = store(case, oracle, draw.scaled(outputs * inputs))?;
        let a = draw.scaled(rank * inputs);
        let b = draw.scaled(outputs * rank);
        let s = if powers { draw.powers_of_two(1)[0] } else { draw.gauss() as f32 };
        let per_rank = if case.update.is_some_and(|update| update.per_rank) { rank } else { 0 };
        let e = if powers { draw.powers_of_two(per_rank) } else { draw.scaled(per_rank) };
        let g = match (case.row_scale(), powers) {
            (false, _) => Vec::new(),
            (true, true) => (0..outputs).map(|_| if draw.once_in(2) { 2.0 } else { 0.5 }).collect(),
            (true, false) => draw.normal(outputs, 0.5).iter().map(|g| 1.0 + g).collect(),
        };
        let bias = draw.scaled(if case.bias { outputs } else { 0 });
        let dx = draw.scaled(tokens * inputs);
        let lengths = [outputs * inputs, outputs, rank * inputs, outputs * rank, e.len(), g.len()];
        let grads = lengths.map(|len| draw.scaled(len));
        Ok(Self { x, dy, stored, w, a, b, s, e, g, bias, dx, grads })
    }
}

/// A weight as it is stored, and the numbers that it stands for.
fn store(case: &Case, oracle: &dyn Backend, w: Vec<f32>) -> TestCaseResult<(Stored, Vec<f32>)> {
    Ok(match case.storage {
        Storage::F32 => (Stored::F32(w.clone()), w),
        Storage::Bf16 => {
            let w: Vec<bf16> = w.into_iter().map(bf16::from_f32).collect();
            (Stored::Bf16(w.clone()), w.into_iter().map(f32::from).collect())
        }
        Storage::F16 => {
            let w: Vec<f16> = w.into_iter().map(f16::from_f32).collect();
            (Stored::F16(w.clone()), w.into_iter().map(f32::from).collect())
        }
        Storage::Quantized { format, block, double } => {
            let w = oracle.upload(&w)?;
            let q = Quantized::quantize(oracle, w.view(), [case.outputs, case.inputs], format, block, double)?;
            let mut values = oracle.upload(&vec![0f32; q.elements()])?;
            oracle.dequantize_4bit(&q, values.view_mut())?;
            let scales = match &q.scales {
                Scales::Plain(absmax) => StoredScales::Plain(oracle.download(absmax.view())?),
                Scales::Nested { codes, absmax, offset } => StoredScales::Nested {
                    codes: oracle.download(codes.view())?,
                    absmax: oracle.download(absmax.view())?,
                    offset: *offset,
                },
            };
            let codes = oracle.download(q.codes.view())?;
            (Stored::Quantized { format, block, codes, scales }, oracle.download(values.view())?)
        }
    })
}
