//! The kernel of `kernels/dropout.cu`.

use crate::call::{Call, Grid};
use crate::{Argument, CudaBackend};
use rankfold_backend::params::Dropout;
use rankfold_backend::{Result, View, ViewMut};

/// Elements that a thread has at a time, from one draw of four words.
const GROUP: usize = 4;

/// y = dropout(x).
pub(crate) fn dropout(on: &CudaBackend, p: &Dropout, x: View, mut y: ViewMut) -> Result<()> {
    p.check(&x, &y)?;
    let (call, n) = (&on.call("dropout"), x.len());
    dropped(call, p, call.f32("x", x)?, call.f32_mut("y", &mut y)?, n)
}

/// y = dropout(x) for `n` elements, numbered from 0.
pub(crate) fn dropped(call: &Call, p: &Dropout, x: Argument, y: Argument, n: usize) -> Result<()> {
    let arguments =
        [x, y, (n as u64).into(), p.seed.into(), p.stream.into(), p.threshold().into(), p.keep_scale().into()];
    call.launch("dropout_f32", Grid::stride(n.div_ceil(GROUP)), &arguments)
}
