//! Embedding: rows are copied, to the bit; the gradient's |error| ≤ γ_n·Σ|terms| with n the times an id occurs.

use super::bound::gamma;
use super::draw::{Draw, abs, size, size_or_zero};
use super::harness::*;
use crate::params::Embedding;
use crate::{Backend, DType};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

fn cases() -> impl Strategy<Value = (Embedding, u64)> {
    (size_or_zero(129), size(65), size(129), any::<u64>())
        .prop_map(|(tokens, vocab, width, seed)| (Embedding { tokens, vocab, width }, seed))
}

/// Ids, half of them one and the same.
fn ids(draw: &mut Draw, p: &Embedding) -> Vec<u32> {
    let often = draw.below(p.vocab);
    (0..p.tokens).map(|_| if draw.once_in(2) { often } else { draw.below(p.vocab) } as u32).collect()
}

/// Rows in f32 from tables of every float type.
pub fn forward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call(
        backend: &dyn Backend,
        p: &Embedding,
        seed: u64,
        dtype: DType,
        ids: &[u32],
        table: &[f32],
    ) -> TestCaseResult<Outputs<f32>> {
        let desk = Desk::new(backend, seed);
        let table = match dtype {
            DType::Bf16 => desk.put(&table.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>())?,
            DType::F16 => desk.put(&table.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>())?,
            _ => desk.put(table)?,
        };
        let (ids, mut rows) = (desk.put(ids)?, desk.blank(DType::F32, p.tokens * p.width)?);
        backend.embedding(p, ids.view(), table.view(), rows.view_mut())?;
        Ok(vec![desk.take(&rows)?])
    }
    let dtypes = select(vec![DType::F32, DType::Bf16, DType::F16]);
    check(128, &(cases(), dtypes), |((p, seed), dtype)| {
        let mut draw = Draw::new(seed);
        let (ids, table) = (ids(&mut draw, &p), draw.scaled(p.vocab * p.width));
        let found = twice(|| call(candidate, &p, seed, dtype, &ids, &table))?;
        same("rows", &found[0], &call(oracle, &p, seed, dtype, &ids, &table)?[0])
    })
}

/// dtable, added to what is there, over ids that repeat.
pub fn backward(candidate: &dyn Backend, oracle: &dyn Backend) -> Verdict {
    fn call<T: Real>(
        backend: &dyn Backend,
        (p, seed): (&Embedding, u64),
        ids: &[u32],
        drows: &[f32],
        dtable: &[f32],
    ) -> TestCaseResult<Outputs<T>> {
        let desk = Desk::new(backend, seed);
        let (ids, drows, mut dtable) = (desk.put(ids)?, desk.real::<T>(drows)?, desk.real::<T>(dtable)?);
        backend.embedding_grad(p, ids.view(), drows.view(), dtable.view_mut())?;
        Ok(vec![desk.take(&dtable)?])
    }
    check(128, &cases(), |(p, seed)| {
        let mut draw = Draw::new(seed);
        let ids = ids(&mut draw, &p);
        let (drows, dtable) = (draw.scaled(p.tokens * p.width), draw.scaled(p.vocab * p.width));
        let found = twice(|| call::<f32>(candidate, (&p, seed), &ids, &drows, &dtable))?;
        let exact = call::<f64>(oracle, (&p, seed), &ids, &drows, &dtable)?;
        let mass = call::<f64>(oracle, (&p, seed), &ids, &abs(&drows), &abs(&dtable))?;
        let occurs = |row: usize| ids.iter().filter(|&&id| id as usize == row).count();
        let bounds: Vec<f64> = (0..p.vocab).map(|row| gamma(occurs(row))).collect();
        agree("dtable", &found[0], &exact[0], |i| bounds[i / p.width] * mass[0][i])
    })
}
