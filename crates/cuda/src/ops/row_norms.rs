//! The kernel of `kernels/row_norms.cu`.

use crate::CudaBackend;
use crate::call::Grid;
use rankfold_backend::params::Rows;
use rankfold_backend::{Result, View, ViewMut};

/// The norm of every row.
pub(crate) fn row_norms(on: &CudaBackend, p: &Rows, x: View, mut norms: ViewMut) -> Result<()> {
    p.check_norms(&x, &norms)?;
    let call = &on.call("row_norms");
    let arguments = [call.f32("x", x)?, call.f32_mut("norms", &mut norms)?, (p.width as u64).into()];
    call.launch("row_norms_f32", Grid::a_block_a_row(p.rows, p.width), &arguments)
}
