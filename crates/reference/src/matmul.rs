//! The matrix product: c_ij = Σ_l a_il b_lj, in three transpositions.
//!
//! a [m, k], b [k, n], c [m, n]; `Nt` stores b as [n, k], `Tn` stores a as [k, m]. The gradients of a product are
//! products: for c = a·b, da = dc·bᵀ (`Nt`) and db = aᵀ·dc (`Tn`).

use crate::operands::{Kernel, to_bf16};
use rankfold_backend::params::{Compute, Layout, MatMul};
use rankfold_backend::{Result, View, ViewMut};

/// c = a·b, or c += a·b: the sum in f64, then one rounding.
pub(crate) fn matmul(p: &MatMul, a: View, b: View, mut c: ViewMut) -> Result<()> {
    p.check(&a, &b, &c)?;
    let kernel = Kernel("matmul");
    let (a, b) = (kernel.floats("a", a)?, kernel.floats("b", b)?);
    let mut c = kernel.floats_mut("c", &mut c)?;
    let sums = product(p.compute, p.layout, [p.m, p.n, p.k], &a, &b);
    if p.accumulate {
        c.add(sums);
    } else {
        c.store(sums);
    }
    Ok(())
}

/// The product [m, n] of a and b, each stored as `layout` says and rounded as `compute` says.
pub(crate) fn product(compute: Compute, layout: Layout, [m, n, k]: [usize; 3], a: &[f64], b: &[f64]) -> Vec<f64> {
    let (a, b) = (as_compute(compute, a), as_compute(compute, b));
    let a = if layout == Layout::Tn { transposed(&a, k, m) } else { a };
    let b = if layout == Layout::Nt { transposed(&b, n, k) } else { b };
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + l] * b[l * n + j];
            }
        }
    }
    c
}

/// The inputs of a product: as they are, or rounded to bf16.
pub(crate) fn as_compute(compute: Compute, x: &[f64]) -> Vec<f64> {
    match compute {
        Compute::F32 => x.to_vec(),
        Compute::Bf16 => x.iter().map(|&x| f64::from(to_bf16(x))).collect(),
    }
}

/// x [rows, columns] as [columns, rows].
fn transposed(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| x[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReferenceBackend;
    use rankfold_backend::Backend;

    fn run(layout: Layout, accumulate: bool, compute: Compute, a: &[f64], b: &[f64], c: &[f64]) -> Vec<f64> {
        let backend = &ReferenceBackend as &dyn Backend;
        let p = MatMul { m: 2, n: 2, k: 3, layout, accumulate, compute };
        let (a, b) = (backend.upload(a).unwrap(), backend.upload(b).unwrap());
        let mut c = backend.upload(c).unwrap();
        backend.matmul(&p, a.view(), b.view(), c.view_mut()).unwrap();
        backend.download(c.view()).unwrap()
    }

    const ROWS: [f64; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2, 3]
    const COLUMNS: [f64; 6] = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]; // its transpose [3, 2]

    #[test]
    fn the_three_layouts_multiply_the_same_matrices() {
        // [1 2 3; 4 5 6] times its own transpose.
        let expected = [14.0, 32.0, 32.0, 77.0];
        let zeros = [0.0; 4];
        assert_eq!(run(Layout::Nn, false, Compute::F32, &ROWS, &COLUMNS, &zeros), expected);
        assert_eq!(run(Layout::Nt, false, Compute::F32, &ROWS, &ROWS, &zeros), expected);
        assert_eq!(run(Layout::Tn, false, Compute::F32, &COLUMNS, &COLUMNS, &zeros), expected);
    }

    #[test]
    fn accumulation_adds_and_overwriting_ignores_what_was_there() {
        let before = [1.0, f64::NAN, 1.0, 1.0];
        let sums = run(Layout::Nt, true, Compute::F32, &ROWS, &ROWS, &before);
        assert!(sums[0] == 15.0 && sums[1].is_nan() && sums[3] == 78.0);
        assert_eq!(run(Layout::Nt, false, Compute::F32, &ROWS, &ROWS, &before), [14.0, 32.0, 32.0, 77.0]);
    }

    #[test]
    fn bf16_rounds_both_inputs_and_not_the_sum() {
        // 1 + 2⁻⁹ rounds to 1 in bf16; 1 + 2⁻⁷ is a bf16, and its square needs 14 bits of fraction.
        let (below, kept) = (1.0 + 2f64.powi(-9), 1.0 + 2f64.powi(-7));
        let a = [below, 0.0, 0.0, kept, 0.0, 0.0];
        let c = run(Layout::Nt, false, Compute::Bf16, &a, &a, &[0.0; 4]);
        assert_eq!(c, [1.0, kept, kept, kept * kept]);
    }

    #[test]
    fn an_empty_sum_is_zero() {
        assert_eq!(product(Compute::F32, Layout::Nn, [2, 1, 0], &[], &[]), [0.0, 0.0]);
    }
}
