//! Embedding: rows_t = table_(ids_t). Its gradient adds each row's gradient to the table's row that it came from.
//!
//! ids u32 [tokens], table [vocab, width], rows [tokens, width].

use crate::elementwise::{AddInPlace, cast};
use crate::simd::Isa;
use crate::slices::{Floats, FloatsMut};
use crate::threads::{Disjoint, Threads};
use rankfold_backend::params::Embedding;
use rankfold_backend::{Error, Result};

/// Columns of a task of the gradient: two to four cache lines of a row.
const COLUMNS: usize = 64;

fn check_ids(p: &Embedding, ids: &[u32]) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= p.vocab) {
        Some(position) => Err(Error::TokenId { position, id: ids[position].into(), vocab: p.vocab }),
        None => Ok(()),
    }
}

/// rows_t = table_(ids_t), rounded to rows' type. Row by row: a step copies each of its tokens' rows once.
pub(crate) fn embedding(
    threads: &Threads,
    isa: Isa,
    p: &Embedding,
    ids: &[u32],
    table: Floats,
    mut rows: FloatsMut,
) -> Result<()> {
    check_ids(p, ids)?;
    for (t, id) in ids.iter().enumerate() {
        let from = *id as usize * p.width;
        cast(threads, isa, table.part(from..from + p.width), rows.part(t * p.width..(t + 1) * p.width));
    }
    Ok(())
}

/// dtable_(ids_t) += drows_t. A task has some columns of every row, so that a repeated id's terms are added in the
/// order of t whatever the number of threads.
pub(crate) fn embedding_grad(
    threads: &Threads,
    isa: Isa,
    p: &Embedding,
    ids: &[u32],
    drows: &[f32],
    dtable: &mut [f32],
) -> Result<()> {
    check_ids(p, ids)?;
    let dtable = Disjoint::new(dtable);
    threads.run_chunks(p.width, COLUMNS, |columns| {
        for (t, id) in ids.iter().enumerate() {
            let (from, to) = (t * p.width, *id as usize * p.width);
            // SAFETY: the columns of two tasks do not overlap, and a task holds one part at a time.
            let out = unsafe { dtable.get(to + columns.start..to + columns.end) };
            isa.run(AddInPlace { x: &drows[from + columns.start..from + columns.end], out });
        }
    });
    Ok(())
}
