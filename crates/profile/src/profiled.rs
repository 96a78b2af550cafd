//! A backend that hands every call on to another, and notes what each one took and was.
//!
//! Buffers are the other backend's own, and so are errors, names and bits.

use crate::fence::Fence;
use crate::products;
use crate::profile::Profile;
use crate::work::{Operand, Work, count};
use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Format, HostBytes, LinearGrads, LowRank,
    Quantized, Result, View, ViewMut, Weight,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The backend.
#[derive(Debug)]
pub(crate) struct Profiled {
    inner: Arc<dyn Backend>,
    fence: Fence,
    profile: Profile,
}

impl Profiled {
    pub fn new(inner: Arc<dyn Backend>, profile: Profile) -> Result<Self> {
        Ok(Self { fence: Fence::new(inner.as_ref())?, inner, profile })
    }

    /// Hand a call on; when it began and how long it took.
    fn timed<T>(&self, call: impl FnOnce(&dyn Backend) -> Result<T>) -> Result<(T, Instant, Duration)> {
        let begun = Instant::now();
        let done = call(self.inner.as_ref())?;
        self.fence.wait(self.inner.as_ref())?;
        Ok((done, begun, begun.elapsed()))
    }

    /// Hand a call on and note it.
    fn call<T>(&self, kernel: &'static str, work: Work, call: impl FnOnce(&dyn Backend) -> Result<T>) -> Result<T> {
        let (done, begun, took) = self.timed(call)?;
        self.profile.call(kernel, begun, took, work);
        Ok(done)
    }

    /// The same of attention. Which keys its queries see is only looked at once the backend has found the call good.
    fn attends(
        &self,
        kernel: &'static str,
        p: &Attention,
        starts: Option<View>,
        work: products::OfPairs,
        call: impl FnOnce(&dyn Backend) -> Result<()>,
    ) -> Result<()> {
        let ((), begun, took) = self.timed(call)?;
        let starts = starts.map_or(Ok(Vec::new()), |starts| self.inner.download::<u32>(starts))?;
        self.profile.call(kernel, begun, took, work.of(products::visible_pairs(p, &starts)));
        Ok(())
    }
}

// A method that the contract gets and this backend does not hand on would be the contract's default, and not the other
// backend's.
#[deny(clippy::missing_trait_methods)]
impl Backend for Profiled {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        self.call("alloc", Work::new(0.0, &[], &[]), |on| on.alloc(dtype, len))
    }

    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()> {
        let work = Work::new(0.0, &[&bytes], &[&out]);
        self.call("write", work, |on| on.write(bytes, out))
    }

    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()> {
        let work = Work::new(0.0, &[&x], &[&&*bytes]);
        self.call("read", work, |on| on.read(x, bytes))
    }

    fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        self.inner.host_bytes_mut(buffer)
    }

    fn trim(&self) -> Result<()> {
        self.inner.trim()
    }

    fn fill(&self, value: f64, out: ViewMut) -> Result<()> {
        let work = Work::new(0.0, &[], &[&out]);
        self.call("fill", work, |on| on.fill(value, out))
    }

    fn copy(&self, x: View, out: ViewMut) -> Result<()> {
        let work = Work::new(0.0, &[&x], &[&out]);
        self.call("copy", work, |on| on.copy(x, out))
    }

    fn cast(&self, x: View, out: ViewMut) -> Result<()> {
        let work = Work::new(0.0, &[&x], &[&out]);
        self.call("cast", work, |on| on.cast(x, out))
    }

    fn scale_in_place(&self, factor: f64, x: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &x, &[&x], &[&x]);
        self.call("scale_in_place", work, |on| on.scale_in_place(factor, x))
    }

    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &out, &[&a, &b], &[&out]);
        self.call("add", work, |on| on.add(a, b, out))
    }

    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &out, &[&x, &out], &[&out]);
        self.call("add_in_place", work, |on| on.add_in_place(x, out))
    }

    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &out, &[&a, &b], &[&out]);
        self.call("divide", work, |on| on.divide(a, b, out))
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        let work = Work::new(2.0 * count(x.len()), &[&x], &[]);
        self.call("sum_squares", work, |on| on.sum_squares(x))
    }

    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &y, &[&x], &[&y]);
        self.call("dropout", work, |on| on.dropout(p, x, y))
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()> {
        let work = products::matmul(p, a, b, &c);
        self.call("matmul", work, |on| on.matmul(p, a, b, c))
    }

    // v = w · (1 / absmax)
    fn quantize_4bit(&self, format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        let work = Work::new(count(w.len()), &[&w], &[&codes, &absmax]);
        self.call("quantize_4bit", work, |on| on.quantize_4bit(format, block, w, codes, absmax))
    }

    // The mean's sum, the difference from it, its quantisation.
    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32> {
        let work = Work::new(3.0 * count(absmax.len()), &[&absmax], &[&codes, &nested]);
        self.call("quantize_scales", work, |on| on.quantize_scales(absmax, codes, nested))
    }

    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &out, &[q], &[&out]);
        self.call("dequantize_4bit", work, |on| on.dequantize_4bit(q, out))
    }

    fn quantize_8bit(&self, map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        let work = Work::new(count(x.len()), &[&x], &[&codes, &absmax]);
        self.call("quantize_8bit", work, |on| on.quantize_8bit(map, block, x, codes, absmax))
    }

    fn dequantize_8bit(&self, map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &out, &[&codes, &absmax], &[&out]);
        self.call("dequantize_8bit", work, |on| on.dequantize_8bit(map, block, codes, absmax, out))
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
        let work = products::linear(p, x, w, low_rank, bias, &y);
        self.call("linear", work, |on| on.linear(p, x, w, low_rank, bias, y))
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
        let work = products::linear_grad_input(p, dy, w, low_rank, accumulate, &dx);
        self.call("linear_grad_input", work, |on| on.linear_grad_input(p, dy, w, low_rank, accumulate, dx))
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
        let work = products::linear_grad_weight(p, x, dy, w, low_rank, &grads);
        self.call("linear_grad_weight", work, |on| on.linear_grad_weight(p, x, dy, w, low_rank, grads))
    }

    // A square, its sum, two products.
    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()> {
        let work = Work::each(4.0, &y, &[&x, &gain], &[&y, &inv_rms]);
        self.call("rms_norm", work, |on| on.rms_norm(p, x, gain, y, inv_rms))
    }

    // dx: gain·dy, its product with x and the sum c; x·c, the difference, its quotient. dgain: two products, the sum.
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
        let before = dx.as_ref().filter(|_| accumulate);
        let each = if dx.is_some() { 6.0 } else { 0.0 }
            + if before.is_some() { 1.0 } else { 0.0 }
            + if dgain.is_some() { 3.0 } else { 0.0 };
        let flops = each * count(x.len());
        let work = Work::new(flops, &[&x, &gain, &inv_rms, &dy, &before, &dgain], &[&dx, &dgain]);
        self.call("rms_norm_grad", work, |on| on.rms_norm_grad(p, x, gain, inv_rms, dy, accumulate, dx, dgain))
    }

    // Two products and a sum. Of the tables no more is read than a row for each token.
    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()> {
        let most = x.len() / p.heads.max(1) / 2;
        let [cos_read, sin_read] = [cos, sin].map(|table| table.slice(0, table.len().min(most)).ok());
        let work = Work::each(3.0, &y, &[&x, &positions, &cos_read, &sin_read], &[&y]);
        self.call("rope", work, |on| on.rope(p, x, positions, cos, sin, y))
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
        let work = products::attention(p, [q, k, v], starts, &out, &lse);
        self.attends("attention", p, starts, work, |on| on.attention(p, q, k, v, starts, out, lse))
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        let work = products::attention_grad(p, &saved, dout, &grads);
        self.attends("attention_grad", p, saved.starts, work, |on| on.attention_grad(p, saved, dout, grads))
    }

    // σ: an exponential, a sum, a quotient. Two products.
    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()> {
        let work = Work::each(5.0, &out, &[&gate, &up], &[&out]);
        self.call("silu_mul", work, |on| on.silu_mul(gate, up, out))
    }

    // σ; dgate: two sums, four products; dup: two products.
    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()> {
        let each = 3.0 + if dgate.is_some() { 6.0 } else { 0.0 } + if dup.is_some() { 2.0 } else { 0.0 };
        let up_read = dgate.is_some().then_some(up);
        let work = Work::new(each * count(gate.len()), &[&gate, &up_read, &dout], &[&dgate, &dup]);
        self.call("silu_mul_grad", work, |on| on.silu_mul_grad(gate, up, dout, dgate, dup))
    }

    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()> {
        let each = match f {
            Activation::Relu | Activation::Tanh => 1.0,
            Activation::Silu => 4.0,
        };
        let work = Work::each(each, &y, &[&x], &[&y]);
        self.call("activate", work, |on| on.activate(f, x, y))
    }

    // Silu: σ, two sums, two products. Tanh: an exponential, two sums, three products, a quotient. And dy's product.
    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()> {
        let each = match f {
            Activation::Relu => 1.0,
            Activation::Silu | Activation::Tanh => 8.0,
        };
        let work = Work::each(each, &dx, &[&x, &dy], &[&dx]);
        self.call("activate_grad", work, |on| on.activate_grad(f, x, dy, dx))
    }

    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()> {
        let work = Work::new(2.0 * count(x.len()), &[&x], &[&norms]);
        self.call("row_norms", work, |on| on.row_norms(p, x, norms))
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()> {
        let work = Work::each(1.0, &y, &[&x, &factors], &[&y]);
        self.call("scale_columns", work, |on| on.scale_columns(p, x, factors, y))
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
        let before = dx.as_ref().filter(|_| accumulate);
        let each = if dx.is_some() { 1.0 } else { 0.0 }
            + if before.is_some() { 1.0 } else { 0.0 }
            + if dfactors.is_some() { 2.0 } else { 0.0 };
        let x_read = dfactors.is_some().then_some(x);
        let factors_read = dx.is_some().then_some(factors);
        let read: [&dyn Operand; 5] = [&x_read, &factors_read, &dy, &before, &dfactors];
        let work = Work::new(each * count(dy.len()), &read, &[&dx, &dfactors]);
        self.call("scale_columns_grad", work, |on| on.scale_columns_grad(p, x, factors, dy, accumulate, dx, dfactors))
    }

    // A row of the table for each token, in the table's type.
    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()> {
        let Work { flops, bytes, compute } = Work::new(0.0, &[&ids], &[&rows]);
        let gathered = count(rows.len()) * count(table.dtype().size());
        let work = Work { flops, bytes: bytes + gathered, compute };
        self.call("embedding", work, |on| on.embedding(p, ids, table, rows))
    }

    // The same rows, read and written.
    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()> {
        let Work { bytes, compute, .. } = Work::new(0.0, &[&ids, &drows], &[]);
        let added = 2.0 * count(drows.len()) * count(dtable.dtype().size());
        let work = Work { flops: count(drows.len()), bytes: bytes + added, compute };
        self.call("embedding_grad", work, |on| on.embedding_grad(p, ids, drows, dtable))
    }

    // The difference from the largest, an exponential, the sum.
    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()> {
        let work = Work::new(3.0 * count(logits.len()), &[&logits, &labels], &[&losses]);
        self.call("cross_entropy", work, |on| on.cross_entropy(p, logits, labels, losses))
    }

    // And a quotient and a product.
    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()> {
        let work = Work::each(5.0, &logits, &[&logits, &labels], &[&logits, &losses]);
        self.call("cross_entropy_grad_in_place", work, |on| {
            on.cross_entropy_grad_in_place(p, scale, logits, labels, losses)
        })
    }

    // g; the decay; m, three; v, four; m̂, v̂, the root, ε, the quotient, the rate, the difference.
    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()> {
        let work = Work::each(16.0, &param, &[&grad, &param, &m, &v], &[&param, &m, &v]);
        self.call("adamw", work, |on| on.adamw(p, grad, param, m, v))
    }

    // The same, and a product for each moment's decoding and for its encoding.
    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()> {
        let work = Work::each(20.0, &param, &[&grad, &param, &m, &v], &[&param, &m, &v]);
        self.call("adamw_8bit", work, |on| on.adamw_8bit(p, grad, param, m, v))
    }

    // I, two products; mean, three; the difference, and the deviation's three; the score, a product and its sum.
    fn importance(
        &self,
        p: &Importance,
        weight: View,
        grad: View,
        mean: ViewMut,
        deviation: ViewMut,
        scores: ViewMut,
    ) -> Result<()> {
        let read: [&dyn Operand; 4] = [&weight, &grad, &mean, &deviation];
        let work = Work::each(11.0, &mean, &read, &[&mean, &deviation, &scores]);
        self.call("importance", work, |on| on.importance(p, weight, grad, mean, deviation, scores))
    }

    // s: two logarithms, 1 − u, two sums, 1/β, and σ's three; z, two; P, a difference, σ and the sum.
    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64> {
        let work = Work::each(16.0, &z, &[&log_alpha], &[&z]);
        self.call("hard_concrete", work, |on| on.hard_concrete(p, log_alpha, z))
    }

    // The same, and both slopes, s(1 − s) times two factors each, and their sum onto what there is.
    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()> {
        let work = Work::each(26.0, &dlog_alpha, &[&log_alpha, &dz, &dlog_alpha], &[&dlog_alpha]);
        self.call("hard_concrete_grad", work, |on| on.hard_concrete_grad(p, log_alpha, dz, penalty, dlog_alpha))
    }
}
