//! Linear layers with a LoRA: the weight dense, and in NF4 with doubly quantised scales; few tokens and many.

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::params::Linear;
use rankfold_backend::{Backend, Buffer, Compute, DType, Format, LinearGrads, LowRank, Quantized, Result, Weight};

const RANK: usize = 16;
const TOKENS: [usize; 3] = [1, 16, 512];

/// How a weight is stored, and the precision that it is multiplied in.
const CASES: [(&str, Option<DType>, Compute); 4] = [
    ("f32 in f32", Some(DType::F32), Compute::F32),
    ("bf16 in bf16", Some(DType::Bf16), Compute::Bf16),
    ("nf4 in f32", None, Compute::F32),
    ("nf4 in bf16", None, Compute::Bf16),
];

/// A weight in one of the types.
enum Stored {
    Dense(Buffer),
    Quantized(Quantized),
}

impl Stored {
    fn new(b: &dyn Backend, numbers: &Numbers, dtype: Option<DType>, shape: [usize; 2]) -> Result<Self> {
        let n = shape.iter().product();
        Ok(match dtype {
            Some(dtype) => Self::Dense(numbers.typed(b, dtype, n)?),
            None => {
                let dense = numbers.f32(b, n)?;
                Self::Quantized(Quantized::quantize(b, dense.view(), shape, Format::Nf4, 64, true)?)
            }
        })
    }

    fn weight(&self) -> Weight<'_> {
        match self {
            Self::Dense(buffer) => Weight::Dense(buffer.view()),
            Self::Quantized(codes) => Weight::Quantized(codes),
        }
    }
}

/// Bytes of a weight: NF4's are four bits each and a byte for a block of 64, whose own scales are next to nothing.
fn bytes(dtype: Option<DType>, elements: usize) -> usize {
    dtype.map_or(elements / 2 + elements / 64, |dtype| elements * dtype.size())
}

/// A and B.
struct Update {
    a: Buffer,
    b: Buffer,
}

impl Update {
    fn new(b: &dyn Backend, numbers: &Numbers, [outputs, inputs]: [usize; 2]) -> Result<Self> {
        Ok(Self { a: numbers.f32(b, RANK * inputs)?, b: numbers.f32(b, outputs * RANK)? })
    }

    fn low_rank(&self) -> LowRank<'_> {
        let (a, b) = (self.a.view(), self.b.view());
        LowRank { rank: RANK, a, b, scale: 1.0, per_rank: None, row_scale: None, dropout: None }
    }
}

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let shape @ [outputs, inputs] = size.weight;
    for tokens in TOKENS {
        // Numbers of the update, and those of x and y.
        let (update, rows) = (RANK * (inputs + outputs), tokens * (inputs + outputs));
        for (name, dtype, compute) in CASES {
            let p = Linear { tokens, inputs, outputs, compute };
            let cost = |read: usize, written: usize| Cost {
                read: bytes(dtype, inputs * outputs) + size_of::<f32>() * (update + tokens * read),
                written: size_of::<f32>() * tokens * written,
                products: Some((2 * tokens * (inputs * outputs + update), compute)),
            };
            meter.measure(&format!("linear {name}, tokens {tokens}"), cost(inputs, outputs), || {
                let (w, low_rank) = (Stored::new(b, numbers, dtype, shape)?, Update::new(b, numbers, shape)?);
                let (x, mut y) = (numbers.f32(b, tokens * inputs)?, b.alloc(DType::F32, tokens * outputs)?);
                Ok(move || b.linear(&p, x.view(), &w.weight(), Some(&low_rank.low_rank()), None, y.view_mut()))
            });
            meter.measure(&format!("linear_grad_input {name}, tokens {tokens}"), cost(outputs, inputs), || {
                let (w, low_rank) = (Stored::new(b, numbers, dtype, shape)?, Update::new(b, numbers, shape)?);
                let (dy, mut dx) = (numbers.f32(b, tokens * outputs)?, b.alloc(DType::F32, tokens * inputs)?);
                Ok(move || {
                    b.linear_grad_input(&p, dy.view(), &w.weight(), Some(&low_rank.low_rank()), false, dx.view_mut())
                })
            });
        }
        for (name, compute) in [("f32", Compute::F32), ("bf16", Compute::Bf16)] {
            let p = Linear { tokens, inputs, outputs, compute };
            // x Aᵀ and dy B, then the two gradients of these; the gradients are added to.
            let cost = Cost { products: Some((4 * tokens * update, compute)), ..Cost::f32s(2 * update + rows, update) };
            meter.measure(&format!("linear_grad_weight of a LoRA in {name}, tokens {tokens}"), cost, || {
                // No gradient of A or B asks for W: any will do.
                let (w, low_rank) = (Stored::new(b, numbers, None, shape)?, Update::new(b, numbers, shape)?);
                let (x, dy) = (numbers.f32(b, tokens * inputs)?, numbers.f32(b, tokens * outputs)?);
                let mut grads = Update::new(b, numbers, shape)?;
                Ok(move || {
                    let (da, db) = (Some(grads.a.view_mut()), Some(grads.b.view_mut()));
                    let grads = LinearGrads { a: da, b: db, ..LinearGrads::default() };
                    b.linear_grad_weight(&p, x.view(), dy.view(), &w.weight(), Some(&low_rank.low_rank()), grads)
                })
            });
        }
    }
    Ok(())
}
