//! The dense product of the backend itself, which stands for what the machine can multiply.

use crate::machine;
use rankfold_backend::params::{Compute, Linear, Weight};
use rankfold_backend::{Backend, DType, Result, philox};

/// In [−1, 1).
pub fn draw(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64).map(|i| 2.0 * philox::unit(philox::word(seed, 0, i)) - 1.0).collect()
}

/// Operations a second of the product of 2048³ with inputs in f32 and in bf16, printed too.
pub fn rates(b: &dyn Backend) -> Result<[f64; 2]> {
    const SIDE: usize = 2048;
    let (x, w) = (b.upload(&draw(SIDE * SIDE, 1))?, b.upload(&draw(SIDE * SIDE, 2))?);
    let mut y = b.alloc(DType::F32, SIDE * SIDE)?;
    let rates = [Compute::F32, Compute::Bf16].map(|compute| {
        let p = Linear { tokens: SIDE, inputs: SIDE, outputs: SIDE, compute };
        let weight = Weight::Dense(w.view());
        let best = machine::fastest(5, || {
            b.linear(&p, x.view(), &weight, None, None, y.view_mut()).expect("a right call");
        });
        (2 * SIDE * SIDE * SIDE) as f64 / best
    });
    println!("f32 products {:.1} GFLOP/s, bf16 {:.1}", 1e-9 * rates[0], 1e-9 * rates[1]);
    Ok(rates)
}
