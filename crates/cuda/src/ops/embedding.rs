//! The kernels of `kernels/embedding.cu`.

use crate::CudaBackend;
use crate::call::{Call, Grid};
use rankfold_backend::params::Embedding;
use rankfold_backend::{DType, Error, Result, View, ViewMut};

const THREADS: usize = 256;

/// The ids on the host, each in the table.
fn checked_ids(call: &Call, p: &Embedding, ids: View) -> Result<Vec<u32>> {
    let ids = call.on_the_host::<u32>("ids", ids)?;
    match ids.iter().position(|id| *id as usize >= p.vocab) {
        Some(position) => Err(Error::TokenId { position, id: ids[position].into(), vocab: p.vocab }),
        None => Ok(ids),
    }
}

/// The entry point from a table's type to rows' type, both of them floats.
fn kernel(table: DType, rows: DType) -> &'static str {
    match (table, rows) {
        (DType::F32, DType::F32) => "embedding_f32_f32",
        (DType::F32, DType::Bf16) => "embedding_f32_bf16",
        (DType::F32, _) => "embedding_f32_f16",
        (DType::Bf16, DType::F32) => "embedding_bf16_f32",
        (DType::Bf16, DType::Bf16) => "embedding_bf16_bf16",
        (DType::Bf16, _) => "embedding_bf16_f16",
        (_, DType::F32) => "embedding_f16_f32",
        (_, DType::Bf16) => "embedding_f16_bf16",
        (_, _) => "embedding_f16_f16",
    }
}

/// rows_t = table_(ids_t), rounded to rows' type.
pub(crate) fn embedding(on: &CudaBackend, p: &Embedding, ids: View, table: View, mut rows: ViewMut) -> Result<()> {
    p.check(&ids, &table, &rows)?;
    let (call, dtypes) = (&on.call("embedding"), [table.dtype(), rows.dtype()]);
    call.float("table", dtypes[0])?;
    call.float("rows", dtypes[1])?;
    let arguments = [
        call.input("ids", DType::U32, ids)?,
        call.input("table", dtypes[0], table)?,
        call.output("rows", dtypes[1], &mut rows)?,
        (p.width as u64).into(),
    ];
    checked_ids(call, p, ids)?;
    call.launch(kernel(dtypes[0], dtypes[1]), Grid::blocks(p.tokens, THREADS as u32), &arguments)
}

/// dtable_(ids_t) += drows_t, in the order of t.
///
/// The ids are on the host for their check, so that they are sorted there: without it a block would have to look
/// for its id's other tokens among all.
pub(crate) fn embedding_grad(
    on: &CudaBackend,
    p: &Embedding,
    ids: View,
    drows: View,
    mut dtable: ViewMut,
) -> Result<()> {
    p.check_grad(&ids, &drows, &dtable)?;
    let call = &on.call("embedding_grad");
    let ids_argument = call.input("ids", DType::U32, ids)?;
    let (drows, dtable) = (call.f32("drows", drows)?, call.f32_mut("dtable", &mut dtable)?);
    let ids = checked_ids(call, p, ids)?;
    let (order, starts) = runs(&ids);
    let (order_on, starts_on) = (call.scratch(DType::U32, order.len())?, call.scratch(DType::U32, starts.len())?);
    call.driver().upload(bytemuck::cast_slice(&order), order_on.at(0))?;
    call.driver().upload(bytemuck::cast_slice(&starts), starts_on.at(0))?;
    let arguments = [ids_argument, order_on.input(), starts_on.input(), drows, dtable, (p.width as u64).into()];
    let grid = Grid::cube([starts.len() - 1, p.width.div_ceil(THREADS), 1], THREADS as u32);
    call.launch("embedding_grad_f32", grid, &arguments)
}

/// The tokens sorted by id, equal ids in their own order; and where in that each run of one id begins, with the end.
fn runs(ids: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    let id = |token: u32| ids[token as usize];
    order.sort_by_key(|token| id(*token));
    let mut starts = vec![0];
    starts.extend(order.chunk_by(|a, b| id(*a) == id(*b)).scan(0, |end, run| {
        *end += run.len() as u32;
        Some(*end)
    }));
    (order, starts)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(host_kernels)]
    use {
        crate::call::FLOATS,
        rankfold_backend::{Backend, Buffer},
    };

    #[test]
    fn runs_hold_each_ids_tokens_in_their_order() {
        assert_eq!(runs(&[7, 2, 7, 9, 2, 7]), (vec![1, 4, 0, 2, 5, 3], vec![0, 2, 5, 6]));
        assert_eq!(runs(&[]), (vec![], vec![0]));
    }

    #[cfg(host_kernels)]
    #[test]
    fn rows_of_every_type_come_from_tables_of_every_type() {
        let on = CudaBackend::on_host(None).unwrap();
        let on: &dyn Backend = &on;
        let p = Embedding { tokens: 3, vocab: 2, width: 300 };
        let values: Vec<f32> = (0..600).map(|i| 1.0 / (i + 1) as f32).collect();
        let picked = [&values[300..], &values[..300], &values[300..]].concat();
        let (ids, values, picked) =
            (on.upload(&[1u32, 0, 1]).unwrap(), on.upload(&values).unwrap(), on.upload(&picked).unwrap());
        let cast = |x: &Buffer, dtype| {
            let mut out = on.alloc(dtype, x.len()).unwrap();
            on.cast(x.view(), out.view_mut()).unwrap();
            out
        };
        for from in FLOATS {
            for to in FLOATS {
                let mut rows = on.alloc(to, 900).unwrap();
                on.embedding(&p, ids.view(), cast(&values, from).view(), rows.view_mut()).unwrap();
                let bytes = |x: &Buffer| {
                    let mut bytes = vec![0; x.bytes()];
                    on.read(x.view(), &mut bytes).map(|()| bytes).unwrap()
                };
                assert_eq!(bytes(&rows), bytes(&cast(&cast(&picked, from), to)), "{from} to {to}");
            }
        }
    }

    /// Ids that the device wrote over are checked as they are now, not as the host last wrote them.
    #[cfg(host_kernels)]
    #[test]
    fn ids_are_checked_as_they_are_on_the_device() {
        let backend = CudaBackend::on_host(None).unwrap();
        let on: &dyn Backend = &backend;
        let p = Embedding { tokens: 2, vocab: 3, width: 1 };
        let (mut ids, table) = (on.upload(&[0u32, 2]).unwrap(), on.upload(&[1f32, 2.0, 3.0]).unwrap());
        let mut rows = on.alloc(DType::F32, 2).unwrap();
        on.embedding(&p, ids.view(), table.view(), rows.view_mut()).unwrap();
        assert_eq!(on.download::<f32>(rows.view()).unwrap(), [1.0, 3.0]);
        on.fill(7.0, ids.slice_mut(1, 1).unwrap()).unwrap();
        let error = on.embedding(&p, ids.view(), table.view(), rows.view_mut()).unwrap_err();
        assert_eq!(error, Error::TokenId { position: 1, id: 7, vocab: 3 });
    }
}
