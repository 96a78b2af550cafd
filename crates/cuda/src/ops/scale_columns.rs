//! A factor a column, by the kernels of `kernels/columns.cu`.

use super::columns::{self, add_column_sums, add_scaled_columns};
use crate::CudaBackend;
use rankfold_backend::params::Rows;
use rankfold_backend::{DType, Result, View, ViewMut};

/// Rows and columns; no row where there is no column.
fn shape(p: &Rows) -> [usize; 2] {
    [if p.width == 0 { 0 } else { p.rows }, p.width]
}

/// y_rj = x_rj · factors_j
pub(crate) fn scale_columns(on: &CudaBackend, p: &Rows, x: View, factors: View, mut y: ViewMut) -> Result<()> {
    p.check_scale(&x, &factors, &y)?;
    let call = &on.call("scale_columns");
    let (x, factors, y) = (call.f32("x", x)?, call.f32("factors", factors)?, call.f32_mut("y", &mut y)?);
    columns::scale_columns(call, x.value(), factors, 0.0, y.value(), shape(p))
}

/// dx, written or added, and what is added to dfactors; each where asked for.
pub(crate) fn scale_columns_grad(
    on: &CudaBackend,
    p: &Rows,
    x: View,
    factors: View,
    dy: View,
    accumulate: bool,
    mut dx: Option<ViewMut>,
    mut dfactors: Option<ViewMut>,
) -> Result<()> {
    p.check_scale_grad(&x, &factors, &dy, dx.as_ref(), dfactors.as_ref())?;
    let call = &on.call("scale_columns_grad");
    let (x, factors, dy) = (call.f32("x", x)?, call.f32("factors", factors)?, call.f32("dy", dy)?);
    let into = call.some_output("dx", DType::F32, &mut dx)?;
    let into_factors = call.some_output("dfactors", DType::F32, &mut dfactors)?;
    match (&dx, accumulate) {
        (Some(_), true) => add_scaled_columns(call, dy, factors, into, shape(p))?,
        (Some(_), false) => columns::scale_columns(call, dy.value(), factors, 0.0, into.value(), shape(p))?,
        (None, _) => {}
    }
    if dfactors.is_some() {
        add_column_sums(call, dy.value(), Some(x.value()), 1.0, into_factors, shape(p))?;
    }
    Ok(())
}
