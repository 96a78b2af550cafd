//! The backend: each kernel of the contract is the function of the same name in its operation's file.

use crate::call::Call;
use crate::memory::{BufferMemory, DeviceMemory};
use crate::paging::DevicePager;
use crate::pool::Paging;
use crate::tables::Tables;
use crate::{Argument, Crossover, Driver, NAME, ops};
use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Error, Format, HostBytes, Quantized, Result,
    View, ViewMut,
};
use rankfold_pager::{self as pager, Pager};
use std::sync::Arc;

/// Bytes of the counters of a launch.
const COUNTERS: usize = 12;

/// The kernels of `kernels/` on a driver.
#[derive(Debug)]
pub struct CudaBackend {
    driver: Arc<dyn Driver>,
    /// Where there is none, all memory is the driver's.
    paging: Option<Arc<Paging>>,
    pub(crate) tables: Tables,
    /// `struct Counters` of `kernels/between_blocks.cuh`, between launches all 0.
    counters: DeviceMemory,
    pub(crate) crossover: Crossover,
}

impl CudaBackend {
    /// On a driver of any kind.
    pub fn new(driver: impl Driver + 'static) -> crate::Result<Self> {
        let driver: Arc<dyn Driver> = Arc::new(driver);
        let counters = DeviceMemory::new(&driver, None, COUNTERS)?;
        let (tables, crossover) = (Tables::new(&driver)?, Crossover::default());
        let backend = Self { tables, counters, crossover, paging: None, driver };
        backend.clear_counters()?;
        Ok(backend)
    }

    /// On the first GPU of this machine.
    pub fn on_gpu() -> crate::Result<Self> {
        Self::new(crate::gpu::GpuDriver::open()?)
    }

    /// On the host, with a block at a time on each of `threads` OS threads (all cores where `None`).
    pub fn on_host(threads: Option<usize>) -> crate::Result<Self> {
        #[cfg(host_kernels)]
        return Self::new(crate::host::HostDriver::new(crate::host::Options { threads, ..Default::default() })?);
        #[cfg(not(host_kernels))]
        {
            let _ = threads;
            let why =
                "the kernels were built without their host driver: no C++20 compiler with a thread sanitiser was found";
            Err(crate::Error::Missing(why.into()))
        }
    }

    /// With other crossovers between the kernels of a product: for benches that look for them.
    pub fn with_crossover(self, crossover: Crossover) -> Self {
        Self { crossover, ..self }
    }

    /// With at most `limit` bytes of the device's memory for its buffers and its kernels' working memory: buffers of a
    /// frame or more are paged to the host's memory, and from there to wherever that pager's pages go, which divide a
    /// frame. Each kernel holds what it touches until it is launched. Buffers that were made before stay where they
    /// are.
    ///
    /// Errors: a limit below a frame; a device that has no frames.
    pub fn on_pager(self, host: Pager, limit: usize) -> pager::Result<Self> {
        let paging = Paging::new(&self.driver, host, limit, None)?;
        Ok(Self { paging: Some(paging), ..self })
    }

    /// The same for buffers of `from` bytes and more.
    pub fn on_pager_from(self, host: Pager, limit: usize, from: usize) -> pager::Result<Self> {
        let paging = Paging::new(&self.driver, host, limit, Some(from))?;
        Ok(Self { paging: Some(paging), ..self })
    }

    /// The pager of its buffers, where they are paged.
    pub fn pager(&self) -> Option<&DevicePager> {
        self.paging.as_ref().map(|paging| &paging.pager)
    }

    /// The driver that it runs on.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// As they are between launches.
    pub(crate) fn clear_counters(&self) -> crate::Result<()> {
        self.driver.upload(&[0; COUNTERS], self.counters.address())
    }

    /// Counters for a launch whose blocks hand work to each other.
    pub(crate) fn counters(&self) -> Argument {
        Argument::output(DType::U32, self.counters.address())
    }

    /// Whether memory is this backend's device's.
    pub(crate) fn owns(&self, memory: &BufferMemory) -> bool {
        memory.belongs_to(&self.driver)
    }

    /// `bytes` bytes that stay where they are, of unspecified value.
    pub(crate) fn fixed(&self, bytes: usize) -> crate::Result<DeviceMemory> {
        DeviceMemory::new(&self.driver, self.paging.as_ref(), bytes)
    }

    pub(crate) fn call(&self, kernel: &'static str) -> Call<'_> {
        Call::new(self, kernel)
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> String {
        format!("{NAME} ({})", self.driver.name())
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        if dtype == DType::F64 {
            return Err(Error::Unsupported { backend: NAME, what: "f64" });
        }
        let bytes = len.checked_mul(dtype.size()).ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        let memory = match self.paging.as_ref().filter(|paging| bytes >= paging.from) {
            Some(on) => BufferMemory::paged(on.alloc(bytes).map_err(Error::paging("alloc", "buffer"))?),
            None => BufferMemory::fixed(self.fixed(bytes)?),
        };
        Ok(Buffer::new(memory, dtype, len))
    }

    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()> {
        ops::elementwise::write(self, bytes, out)
    }

    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()> {
        ops::elementwise::read(self, x, bytes)
    }

    fn host_bytes_mut<'a>(&self, _: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        Ok(None)
    }

    fn trim(&self) -> Result<()> {
        Ok(self.driver.trim()?)
    }

    fn fill(&self, value: f64, out: ViewMut) -> Result<()> {
        ops::elementwise::fill(self, value, out)
    }

    fn copy(&self, x: View, out: ViewMut) -> Result<()> {
        ops::elementwise::copy(self, x, out)
    }

    fn cast(&self, x: View, out: ViewMut) -> Result<()> {
        ops::elementwise::cast(self, x, out)
    }

    fn scale_in_place(&self, factor: f64, x: ViewMut) -> Result<()> {
        ops::elementwise::scale_in_place(self, factor, x)
    }

    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        ops::elementwise::add(self, a, b, out)
    }

    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()> {
        ops::elementwise::add_in_place(self, x, out)
    }

    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        ops::elementwise::divide(self, a, b, out)
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        ops::elementwise::sum_squares(self, x)
    }

    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()> {
        ops::dropout::dropout(self, p, x, y)
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()> {
        ops::matmul::matmul(self, p, a, b, c)
    }

    fn quantize_4bit(&self, format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        ops::quantize4::quantize_4bit(self, format, block, w, codes, absmax)
    }

    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32> {
        ops::quantize8::quantize_scales(self, absmax, codes, nested)
    }

    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()> {
        ops::quantize4::dequantize_4bit(self, q, out)
    }

    fn quantize_8bit(&self, map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        ops::quantize8::quantize_8bit(self, map, block, x, codes, absmax)
    }

    fn dequantize_8bit(&self, map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()> {
        ops::quantize8::dequantize_8bit(self, map, block, codes, absmax, out)
    }

    fn linear(
        &self,
        p: &Linear,
        x: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<View>,
        y: ViewMut,
    ) -> Result<()> {
        ops::linear::linear(self, p, x, w, low_rank, bias, y)
    }

    fn linear_grad_input(
        &self,
        p: &Linear,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        accumulate: bool,
        dx: ViewMut,
    ) -> Result<()> {
        ops::linear::linear_grad_input(self, p, dy, w, low_rank, accumulate, dx)
    }

    fn linear_grad_weight(
        &self,
        p: &Linear,
        x: View,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        grads: LinearGrads,
    ) -> Result<()> {
        ops::linear::linear_grad_weight(self, p, x, dy, w, low_rank, grads)
    }

    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()> {
        ops::rms_norm::rms_norm(self, p, x, gain, y, inv_rms)
    }

    fn rms_norm_grad(
        &self,
        p: &RmsNorm,
        x: View,
        gain: View,
        inv_rms: View,
        dy: View,
        accumulate: bool,
        dx: Option<ViewMut>,
        dgain: Option<ViewMut>,
    ) -> Result<()> {
        ops::rms_norm::rms_norm_grad(self, p, x, gain, inv_rms, dy, accumulate, dx, dgain)
    }

    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()> {
        ops::rope::rope(self, p, x, positions, cos, sin, y)
    }

    fn attention(
        &self,
        p: &Attention,
        q: View,
        k: View,
        v: View,
        starts: Option<View>,
        out: ViewMut,
        lse: ViewMut,
    ) -> Result<()> {
        ops::attention::attention(self, p, q, k, v, starts, out, lse)
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        ops::attention::attention_grad(self, p, saved, dout, grads)
    }

    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()> {
        ops::silu_mul::silu_mul(self, gate, up, out)
    }

    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()> {
        ops::silu_mul::silu_mul_grad(self, gate, up, dout, dgate, dup)
    }

    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()> {
        ops::activate::activate(self, f, x, y)
    }

    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()> {
        ops::activate::activate_grad(self, f, x, dy, dx)
    }

    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()> {
        ops::row_norms::row_norms(self, p, x, norms)
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()> {
        ops::scale_columns::scale_columns(self, p, x, factors, y)
    }

    fn scale_columns_grad(
        &self,
        p: &Rows,
        x: View,
        factors: View,
        dy: View,
        accumulate: bool,
        dx: Option<ViewMut>,
        dfactors: Option<ViewMut>,
    ) -> Result<()> {
        ops::scale_columns::scale_columns_grad(self, p, x, factors, dy, accumulate, dx, dfactors)
    }

    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()> {
        ops::embedding::embedding(self, p, ids, table, rows)
    }

    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()> {
        ops::embedding::embedding_grad(self, p, ids, drows, dtable)
    }

    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()> {
        ops::cross_entropy::cross_entropy(self, p, logits, labels, losses)
    }

    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()> {
        ops::cross_entropy::cross_entropy_grad_in_place(self, p, scale, logits, labels, losses)
    }

    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()> {
        ops::adamw::adamw(self, p, grad, param, m, v)
    }

    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()> {
        ops::adamw::adamw_8bit(self, p, grad, param, m, v)
    }

    fn importance(
        &self,
        p: &Importance,
        weight: View,
        grad: View,
        mean: ViewMut,
        deviation: ViewMut,
        scores: ViewMut,
    ) -> Result<()> {
        ops::importance::importance(self, p, weight, grad, mean, deviation, scores)
    }

    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64> {
        ops::hard_concrete::hard_concrete(self, p, log_alpha, z)
    }

    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()> {
        ops::hard_concrete::hard_concrete_grad(self, p, log_alpha, dz, penalty, dlog_alpha)
    }
}
