//! Products with a weight in NF4, blocks of 64 with doubly quantised scales, over the number of tokens: by the default
//! crossovers, and with each of the three ways forced, so that the crossovers can be read off. Beside them the dense
//! product in bf16 of the same shape. Calls take several weights in turn, each with an adapter of its own: a model's
//! layers find nothing of theirs in the cache.

use crate::limits::Dense;
use crate::meter::{Case, Meter};
use crate::sizes::{Numbers, Sizes};
use rankfold_backend::params::{Linear, LowRank};
use rankfold_backend::{Backend, Buffer, Compute, DType, Format, Quantized, Result, Weight};
use rankfold_cuda::{Crossover, CudaBackend, Transposition};

const RANK: usize = 16;

/// The most tokens that `kernels/linear_few.cu` takes.
const FEW: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Forward,
    Backward,
}

impl Way {
    fn kernel(self) -> &'static str {
        if self == Self::Forward { "linear" } else { "linear_grad_input" }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Default,
    Few,
    Tensor,
    Decoded,
}

impl Path {
    const ALL: [Self; 4] = [Self::Default, Self::Few, Self::Tensor, Self::Decoded];

    fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Few => "few",
            Self::Tensor => "tensor",
            Self::Decoded => "decoded",
        }
    }

    fn crossover(self) -> Crossover {
        match self {
            Self::Default => Crossover::default(),
            Self::Few => Crossover { few: FEW, tensor: 0 },
            Self::Tensor => Crossover { few: 0, tensor: usize::MAX },
            Self::Decoded => Crossover { few: 0, tensor: 0 },
        }
    }

    /// Whether there are kernels of this way for the case.
    fn serves(self, way: Way, compute: Compute, tokens: usize) -> bool {
        match self {
            Self::Few => way == Way::Forward && tokens <= FEW,
            Self::Tensor => compute == Compute::Bf16,
            Self::Default | Self::Decoded => true,
        }
    }
}

/// What the products of one shape are made of.
struct Tensors {
    weights: Vec<Quantized>,
    /// For each weight A [rank, inputs] and B [outputs, rank].
    a: Buffer,
    b: Buffer,
    /// As many rows of [inputs] and of [outputs] as there are tokens at the most; one is read and the other written.
    inputs: Buffer,
    outputs: Buffer,
}

pub fn measure(mut on: CudaBackend, meter: &mut Meter, sizes: &Sizes, numbers: &Numbers) -> Result<()> {
    let most = sizes.tokens.iter().copied().max().unwrap_or(0);
    for &shape in sizes.weights {
        let [outputs, inputs] = shape;
        for (way, transposition, columns, depth) in
            [(Way::Forward, Transposition::Nt, outputs, inputs), (Way::Backward, Transposition::Nn, inputs, outputs)]
        {
            let turns = turns(sizes, DType::Bf16.size() * outputs * inputs);
            let dims = [most, columns, depth];
            let dense = Dense::new(on.driver(), numbers, DType::Bf16, transposition, dims, turns)?;
            for &tokens in sizes.tokens {
                let kernel = format!("{} dense", way.kernel());
                dense.measure(meter, Case::new(kernel, name(shape)).with("tokens", tokens), tokens);
            }
        }
        let mut tensors = Tensors::new(&on, sizes, numbers, shape, most)?;
        for way in [Way::Forward, Way::Backward] {
            for compute in [Compute::Bf16, Compute::F32] {
                for &tokens in sizes.tokens {
                    let p = Linear { tokens, inputs, outputs, compute };
                    for path in Path::ALL.into_iter().filter(|path| path.serves(way, compute, tokens)) {
                        on = on.with_crossover(path.crossover());
                        let plain = tensors.measure(&on, meter, &p, way, path, 0);
                        let adapted = tensors.measure(&on, meter, &p, way, path, RANK);
                        if let (Some(plain), Some(adapted)) = (plain, adapted) {
                            meter.note("over_rank_0", adapted / plain);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn name([outputs, inputs]: [usize; 2]) -> String {
    format!("{outputs}x{inputs}")
}

/// How many weights of so many bytes are taken in turn.
fn turns(sizes: &Sizes, bytes: usize) -> usize {
    (sizes.turns_bytes / bytes).max(1)
}

impl Tensors {
    fn new(on: &CudaBackend, sizes: &Sizes, numbers: &Numbers, shape: [usize; 2], tokens: usize) -> Result<Self> {
        let (b, [outputs, inputs]): (&dyn Backend, _) = (on, shape);
        let w = numbers.f32(b, outputs * inputs, 0)?;
        let turns = turns(sizes, outputs * inputs / 2);
        let weights = (0..turns).map(|_| Quantized::quantize(b, w.view(), shape, Format::Nf4, 64, true));
        Ok(Self {
            weights: weights.collect::<Result<_>>()?,
            a: numbers.f32(b, turns * RANK * inputs, 1)?,
            b: numbers.f32(b, turns * RANK * outputs, 2)?,
            inputs: numbers.f32(b, tokens * inputs, 3)?,
            outputs: numbers.f32(b, tokens * outputs, 4)?,
        })
    }

    fn measure(
        &mut self,
        on: &CudaBackend,
        meter: &mut Meter,
        p: &Linear,
        way: Way,
        path: Path,
        rank: usize,
    ) -> Option<f64> {
        let (b, dtype): (&dyn Backend, _) = (on, if p.compute == Compute::Bf16 { DType::Bf16 } else { DType::F32 });
        let (sides, weight) = (p.inputs + p.outputs, self.weights[0].bytes());
        let case = Case::new(format!("{} nf4", way.kernel()), name([p.outputs, p.inputs]))
            .with("tokens", p.tokens)
            .with("compute", dtype.name())
            .with("rank", rank)
            .with("path", path.name())
            .bytes(weight + 4 * (p.tokens + rank) * sides)
            .flops(2 * p.tokens * (p.inputs * p.outputs + rank * sides), dtype);
        let Self { weights, a, b: outer, inputs, outputs } = self;
        let (inputs_len, outputs_len) = (p.tokens * p.inputs, p.tokens * p.outputs);
        meter.measure(on.driver(), case, |turn| {
            let turn = turn % weights.len();
            let a = a.slice(turn * RANK * p.inputs, rank * p.inputs)?;
            let outer = outer.slice(turn * RANK * p.outputs, rank * p.outputs)?;
            let low_rank = LowRank { rank, a, b: outer, scale: 2.0, per_rank: None, row_scale: None, dropout: None };
            let (w, low_rank) = (Weight::Quantized(&weights[turn]), Some(&low_rank).filter(|_| rank > 0));
            match way {
                Way::Forward => {
                    let (x, y) = (inputs.slice(0, inputs_len)?, outputs.slice_mut(0, outputs_len)?);
                    b.linear(p, x, &w, low_rank, None, y)
                }
                Way::Backward => {
                    let (dy, dx) = (outputs.slice(0, outputs_len)?, inputs.slice_mut(0, inputs_len)?);
                    b.linear_grad_input(p, dy, &w, low_rank, false, dx)
                }
            }
        })
    }
}
