//! Embedding: rows_t = table_(ids_t). Its gradient adds each row's gradient to the table's row that it came from.
//!
//! ids u32 [tokens], table [vocab, width], rows [tokens, width].

use crate::operands::Kernel;
use rankfold_backend::params::Embedding;
use rankfold_backend::{Error, Result, View, ViewMut};

/// The ids as row numbers.
fn rows_of(p: &Embedding, kernel: Kernel, ids: View) -> Result<Vec<usize>> {
    let ids = kernel.elements::<u32>("ids", ids)?.iter().enumerate();
    ids.map(|(position, &id)| match id as usize {
        row if row < p.vocab => Ok(row),
        _ => Err(Error::TokenId { position, id: i64::from(id), vocab: p.vocab }),
    })
    .collect()
}

/// rows_t = table_(ids_t), rounded to rows' type.
pub(crate) fn embedding(p: &Embedding, ids: View, table: View, mut rows: ViewMut) -> Result<()> {
    let kernel = Kernel("embedding");
    p.check(&ids, &table, &rows)?;
    let (picked, table) = (rows_of(p, kernel, ids)?, kernel.floats("table", table)?);
    let mut rows = kernel.floats_mut("rows", &mut rows)?;
    rows.store(picked.into_iter().flat_map(|row| table[row * p.width..][..p.width].iter().copied()));
    Ok(())
}

/// dtable_(ids_t) += drows_t: a row of the table has as many terms as its id has occurrences.
pub(crate) fn embedding_grad(p: &Embedding, ids: View, drows: View, mut dtable: ViewMut) -> Result<()> {
    let kernel = Kernel("embedding_grad");
    p.check_grad(&ids, &drows, &dtable)?;
    let (picked, drows) = (rows_of(p, kernel, ids)?, kernel.floats("drows", drows)?);
    let mut dtable = kernel.floats_mut("dtable", &mut dtable)?;
    let mut sums = dtable.load();
    for (t, row) in picked.into_iter().enumerate() {
        for i in 0..p.width {
            sums[row * p.width + i] += drows[t * p.width + i];
        }
    }
    dtable.store(sums);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BACKEND, buffer, output, values};

    const P: Embedding = Embedding { tokens: 3, vocab: 3, width: 2 };

    #[test]
    fn rows_are_picked_and_their_gradients_meet_again() {
        let ids = BACKEND.upload(&[2u32, 0, 2]).unwrap();
        let table = buffer(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let mut rows = output(6);
        BACKEND.embedding(&P, ids.view(), table.view(), rows.view_mut()).unwrap();
        assert_eq!(values(&rows), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let mut dtable = buffer(&[0.5; 6]);
        BACKEND.embedding_grad(&P, ids.view(), rows.view(), dtable.view_mut()).unwrap();
        assert_eq!(values(&dtable), [1.5, 2.5, 0.5, 0.5, 10.5, 12.5]);
    }

    #[test]
    fn an_id_beyond_the_table_is_named_and_nothing_is_written() {
        let ids = BACKEND.upload(&[0u32, 3, 1]).unwrap();
        let (rows, mut dtable) = (buffer(&[1.0; 6]), buffer(&[0.5; 6]));
        let error = BACKEND.embedding_grad(&P, ids.view(), rows.view(), dtable.view_mut()).unwrap_err();
        assert_eq!(error, Error::TokenId { position: 1, id: 3, vocab: 3 });
        assert_eq!(values(&dtable), [0.5; 6]);
    }
}
