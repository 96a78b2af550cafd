//! Two decompositions of a matrix, in f64: W = U S Vᵀ, of which the r largest triples are kept, and W = Q R.
//!
//! The first gives the best approximation of rank r (Eckart & Young 1936): what is left over has the norm of the
//! singular values that were not kept. Both are made unique where they can be: the largest component of each column of
//! U is positive, and so is R's diagonal.
//!
//! The arithmetic is faer's, on one thread, by Householder reflections: the same bits whatever the number of threads.
//! Which vector instructions it uses is the machine's to say, so that another machine may give other last bits.

use crate::{Error, Result};
use faer::linalg::svd::{ComputeSvdVectors, svd_scratch};
use faer::{MatRef, Par};

/// U S Vᵀ, the largest first.
#[derive(Clone, Debug)]
pub struct Svd {
    /// U [rows, rank], columns of length 1 at right angles.
    pub u: Vec<f64>,
    /// S `[rank]`, at least 0, descending.
    pub s: Vec<f64>,
    /// Vᵀ [rank, columns], rows of length 1 at right angles.
    pub vt: Vec<f64>,
}

/// Q R.
#[derive(Clone, Debug)]
pub struct Qr {
    /// Q [rows, rank], columns of length 1 at right angles.
    pub q: Vec<f64>,
    /// R [rank, columns], 0 left of its diagonal.
    pub r: Vec<f64>,
}

/// The `rank` largest triples of w [rows, columns], row-major; all of them where there are fewer.
///
/// `module` is for the message. Errors: an iteration that does not converge, which a finite matrix's does.
pub fn svd(module: &str, w: &[f64], [rows, columns]: [usize; 2], rank: usize) -> Result<Svd> {
    let rank = rank.min(rows).min(columns);
    if rank == 0 {
        return Ok(Svd { u: Vec::new(), s: Vec::new(), vt: Vec::new() });
    }
    let w = MatRef::from_row_major_slice(w, rows, columns);
    let found = w.thin_svd().map_err(|_| Error::Decomposition { module: module.into() })?;
    let (u, s, v) = (found.U(), found.S().column_vector(), found.V());
    let signs: Vec<f64> = (0..rank).map(|k| sign_of_largest((0..rows).map(|i| u[(i, k)]))).collect();
    Ok(Svd {
        u: (0..rows * rank).map(|i| signs[i % rank] * u[(i / rank, i % rank)]).collect(),
        s: (0..rank).map(|k| s[k]).collect(),
        vt: (0..rank * columns).map(|i| signs[i / columns] * v[(i % columns, i / columns)]).collect(),
    })
}

/// Bytes that [`svd`] takes of the heap while it works: U, V and what the iteration needs, four times W where W is not
/// nearly square.
pub(crate) fn svd_bytes([rows, columns]: [usize; 2]) -> usize {
    let thin = ComputeSvdVectors::Thin;
    let scratch = svd_scratch::<f64>(rows, columns, thin, thin, Par::Seq, Default::default());
    let vectors = rows.saturating_add(columns).saturating_mul(rows.min(columns));
    scratch.unaligned_bytes_required().saturating_add(vectors.saturating_mul(size_of::<f64>()))
}

/// The same of [`qr`]: the reflections, beside them R, and Q, each no larger than W.
pub(crate) fn qr_bytes([rows, columns]: [usize; 2]) -> usize {
    rows.saturating_mul(columns).saturating_mul(3 * size_of::<f64>())
}

/// The first `rank` columns of Q and rows of R, of w [rows, columns], row-major; all of them where there are fewer.
pub fn qr(w: &[f64], [rows, columns]: [usize; 2], rank: usize) -> Qr {
    let rank = rank.min(rows).min(columns);
    if rank == 0 {
        return Qr { q: Vec::new(), r: Vec::new() };
    }
    let found = MatRef::from_row_major_slice(w, rows, columns).qr();
    let (q, r) = (found.compute_thin_Q(), found.thin_R());
    let signs: Vec<f64> = (0..rank).map(|k| sign(r[(k, k)])).collect();
    let upper = |i: usize, j: usize| if j < i { 0.0 } else { signs[i] * r[(i, j)] };
    Qr {
        q: (0..rows * rank).map(|i| signs[i % rank] * q[(i / rank, i % rank)]).collect(),
        r: (0..rank * columns).map(|i| upper(i / columns, i % columns)).collect(),
    }
}

/// x [m, k] times y [k, n].
pub(crate) fn product(x: &[f64], y: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for (i, x) in x.chunks_exact(k.max(1)).enumerate().take(m) {
        let row = &mut out[i * n..][..n];
        for (x, y) in x.iter().zip(y.chunks_exact(n.max(1))) {
            row.iter_mut().zip(y).for_each(|(out, y)| *out += x * y);
        }
    }
    out
}

/// xᵀ of x [m, n].
pub(crate) fn transposed(x: &[f64], [m, n]: [usize; 2]) -> Vec<f64> {
    (0..m * n).map(|i| x[i % m * n + i / m]).collect()
}

/// Of the element of the largest magnitude, the first of several.
fn sign_of_largest(values: impl Iterator<Item = f64>) -> f64 {
    sign(values.fold(0.0, |largest: f64, x| if x.abs() > largest.abs() { x } else { largest }))
}

fn sign(x: f64) -> f64 {
    if x < 0.0 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn norm(x: impl IntoIterator<Item = f64>) -> f64 {
        x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    fn distance(x: &[f64], y: &[f64]) -> f64 {
        norm(x.iter().zip(y).map(|(x, y)| x - y))
    }

    /// ‖XᵀX − I‖_F of X [rows, rank].
    fn from_orthonormal(x: &[f64], [rows, rank]: [usize; 2]) -> f64 {
        let gram = product(&transposed(x, [rows, rank]), x, [rank, rows, rank]);
        norm(gram.iter().enumerate().map(|(i, g)| g - f64::from(u8::from(i % rank == i / rank))))
    }

    /// Householder's reductions leave ‖W − U S Vᵀ‖_F ≤ c·m·n·ε·‖W‖_F and factors as far from orthonormal, c a small
    /// constant (Higham 2002, thm 19.4 and §19.3); 16 is many times what the two sides and the sums here need.
    fn bound([rows, columns]: [usize; 2]) -> f64 {
        16.0 * (rows * columns) as f64 * f64::EPSILON
    }

    /// Of any rank up to full, that of zeros among them; with repeated rows.
    fn matrices() -> impl Strategy<Value = ([usize; 2], Vec<f64>)> {
        (0..9usize, 0..9usize, 0..9usize).prop_flat_map(|(rows, columns, rank)| {
            let numbers = |len| prop::collection::vec((-64i8..=64).prop_map(f64::from), len);
            (numbers(rows * rank), numbers(rank * columns))
                .prop_map(move |(x, y)| ([rows, columns], product(&x, &y, [rows, rank, columns])))
        })
    }

    proptest! {
        #[test]
        fn the_largest_triples_are_orthonormal_and_leave_the_tail_of_singular_values(
            (dims, w) in matrices(), rank in 0..10usize
        ) {
            let [rows, columns] = dims;
            let (all, kept) = (svd("m", &w, dims, usize::MAX).unwrap(), svd("m", &w, dims, rank).unwrap());
            let rank = rank.min(rows).min(columns);
            let (size, eps) = (norm(w.iter().copied()), bound(dims));
            prop_assert_eq!([kept.u.len(), kept.s.len(), kept.vt.len()], [rows * rank, rank, rank * columns]);
            prop_assert_eq!(&kept.s, &all.s[..rank]);
            prop_assert!(all.s.is_sorted_by(|a, b| a >= b) && all.s.iter().all(|s| *s >= 0.0));
            prop_assert!(from_orthonormal(&kept.u, [rows, rank]) <= eps);
            prop_assert!(from_orthonormal(&transposed(&kept.vt, [rank, columns]), [columns, rank]) <= eps);
            let us: Vec<f64> = kept.u.iter().enumerate().map(|(i, u)| u * kept.s[i % rank.max(1)]).collect();
            let left = distance(&product(&us, &kept.vt, [rows, rank, columns]), &w);
            let tail = norm(all.s[rank..].iter().copied());
            prop_assert!((left - tail).abs() <= eps * size, "{left:e} left of {size:e}, expected {tail:e}");
            for k in 0..rank {
                let column = (0..rows).map(|i| kept.u[i * rank + k]);
                prop_assert!(sign_of_largest(column) > 0.0);
            }
        }

        #[test]
        fn q_is_orthonormal_r_triangular_and_their_product_the_matrix((dims, w) in matrices(), rank in 0..10usize) {
            let [rows, columns] = dims;
            let (all, kept) = (qr(&w, dims, usize::MAX), qr(&w, dims, rank));
            let (full, rank) = (rows.min(columns), rank.min(rows).min(columns));
            let (size, eps) = (norm(w.iter().copied()), bound(dims));
            prop_assert!(from_orthonormal(&kept.q, [rows, rank]) <= eps);
            prop_assert!(distance(&product(&all.q, &all.r, [rows, full, columns]), &w) <= eps * size);
            for (i, r) in kept.r.iter().enumerate() {
                prop_assert_eq!(*r, all.r[i]);
                prop_assert!(i % columns >= i / columns || *r == 0.0);
                prop_assert!(i % columns != i / columns || *r >= 0.0);
            }
        }
    }
}
