//! The contract's trait: each method is the function of the same name in its operation's file.

use crate::storage::{Cells, NAME};
use crate::*;
use rankfold_backend::params::{
    Activation, AdamW, Attention, CrossEntropy, Dropout, Embedding, HardConcrete, Importance, Linear, LinearGrads,
    LowRank, MatMul, Moment, RmsNorm, Rope, Rows, Weight,
};
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Format, HostBytes, Quantized, Result, View,
    ViewMut,
};

/// The reference implementation of every kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceBackend;

impl ReferenceBackend {
    /// The backend; it has no state.
    pub const fn new() -> Self {
        Self
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> String {
        NAME.into()
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        storage::alloc(dtype, len)
    }

    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()> {
        elementwise::write(bytes, out)
    }

    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()> {
        elementwise::read(x, bytes)
    }

    fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        let cells = buffer.storage_mut::<Cells>(NAME)?;
        Ok(Some(HostBytes::new(cells.bytes_mut())))
    }

    fn fill(&self, value: f64, out: ViewMut) -> Result<()> {
        elementwise::fill(value, out)
    }

    fn copy(&self, x: View, out: ViewMut) -> Result<()> {
        elementwise::copy(x, out)
    }

    fn cast(&self, x: View, out: ViewMut) -> Result<()> {
        elementwise::cast(x, out)
    }

    fn scale_in_place(&self, factor: f64, x: ViewMut) -> Result<()> {
        elementwise::scale_in_place(factor, x)
    }

    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        elementwise::add(a, b, out)
    }

    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()> {
        elementwise::add_in_place(x, out)
    }

    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        elementwise::divide(a, b, out)
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        elementwise::sum_squares(x)
    }

    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()> {
        dropout::dropout(p, x, y)
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()> {
        matmul::matmul(p, a, b, c)
    }

    fn quantize_4bit(&self, format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        quantize4::quantize_4bit(format, block, w, codes, absmax)
    }

    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32> {
        quantize8::quantize_scales(absmax, codes, nested)
    }

    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()> {
        quantize4::dequantize_4bit(q, out)
    }

    fn quantize_8bit(&self, map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        quantize8::quantize_8bit(map, block, x, codes, absmax)
    }

    fn dequantize_8bit(&self, map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()> {
        quantize8::dequantize_8bit(map, block, codes, absmax, out)
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
        linear::linear(p, x, w, low_rank, bias, y)
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
        linear::linear_grad_input(p, dy, w, low_rank, accumulate, dx)
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
        linear::linear_grad_weight(p, x, dy, w, low_rank, grads)
    }

    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()> {
        rms_norm::rms_norm(p, x, gain, y, inv_rms)
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
        rms_norm::rms_norm_grad(p, x, gain, inv_rms, dy, accumulate, dx, dgain)
    }

    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()> {
        rope::rope(p, x, positions, cos, sin, y)
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
        attention::attention(p, q, k, v, starts, out, lse)
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        attention::attention_grad(p, saved, dout, grads)
    }

    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()> {
        silu_mul::silu_mul(gate, up, out)
    }

    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()> {
        silu_mul::silu_mul_grad(gate, up, dout, dgate, dup)
    }

    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()> {
        activate::activate(f, x, y)
    }

    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()> {
        activate::activate_grad(f, x, dy, dx)
    }

    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()> {
        row_norms::row_norms(p, x, norms)
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()> {
        scale_columns::scale_columns(p, x, factors, y)
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
        scale_columns::scale_columns_grad(p, x, factors, dy, accumulate, dx, dfactors)
    }

    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()> {
        embedding::embedding(p, ids, table, rows)
    }

    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()> {
        embedding::embedding_grad(p, ids, drows, dtable)
    }

    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()> {
        cross_entropy::cross_entropy(p, logits, labels, losses)
    }

    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()> {
        cross_entropy::cross_entropy_grad_in_place(p, scale, logits, labels, losses)
    }

    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()> {
        adamw::adamw(p, grad, param, m, v)
    }

    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()> {
        adamw_8bit::adamw_8bit(p, grad, param, m, v)
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
        importance::importance(p, weight, grad, mean, deviation, scores)
    }

    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64> {
        hard_concrete::hard_concrete(p, log_alpha, z)
    }

    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()> {
        hard_concrete::hard_concrete_grad(p, log_alpha, dz, penalty, dlog_alpha)
    }
}
