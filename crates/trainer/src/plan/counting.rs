//! A backend that counts and computes nothing: its buffers are numbers of bytes, its kernels note what they were given.
//!
//! Values do not exist: what is read is zeros. Every kernel checks its parameters as any backend does, so that a step
//! that goes through is one that a real backend takes.

use super::Category;
use super::Phase;
use super::ledger::Ledger;
use super::scratch::Nest;
use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Error, Format, HostBytes, LinearGrads, LowRank,
    Quantized, Result, Scales, Storage, View, ViewMut, Weight,
};
use std::any::Any;
use std::sync::Arc;

const NAME: &str = "counting";

/// The backend; clones share one ledger.
#[derive(Clone, Debug, Default)]
pub(super) struct CountingBackend {
    pub ledger: Arc<Ledger>,
}

/// A buffer without memory.
#[derive(Debug)]
struct Counted {
    piece: usize,
    ledger: Arc<Ledger>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.ledger.freed(self.piece);
    }
}

impl Storage for Counted {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// A buffer's number.
pub(super) fn piece(buffer: &Buffer) -> Result<usize> {
    Ok(buffer.storage::<Counted>(NAME)?.piece)
}

/// The buffers of a 4-bit weight: its codes, then its scales.
pub(super) fn buffers(q: &Quantized) -> Vec<&Buffer> {
    match &q.scales {
        Scales::Plain(absmax) => vec![&q.codes, absmax],
        Scales::Nested { codes, absmax, .. } => vec![&q.codes, codes, absmax],
    }
}

fn weight_views<'a>(w: &Weight<'a>) -> Vec<View<'a>> {
    match w {
        Weight::Dense(w) => vec![*w],
        Weight::Quantized(q) => buffers(q).into_iter().map(Buffer::view).collect(),
    }
}

fn low_rank_views<'a>(low_rank: Option<&LowRank<'a>>) -> Vec<View<'a>> {
    low_rank.map_or(Vec::new(), |l| [Some(l.a), Some(l.b), l.per_rank, l.row_scale].into_iter().flatten().collect())
}

impl CountingBackend {
    /// A kernel's call on these views; those that it does not have are `None`.
    fn call<'a>(&self, kernel: &'static str, views: impl IntoIterator<Item = Option<View<'a>>>) -> Result<()> {
        let touched = |view: View| Ok((piece(view.buffer())?, (view.len() * view.dtype().size()) as u64));
        let touched = views.into_iter().flatten().map(touched).collect::<Result<_>>()?;
        self.ledger.call(kernel, touched);
        Ok(())
    }

    fn label(&self, view: &ViewMut, category: Category) -> Result<()> {
        self.ledger.label(piece(view.as_view().buffer())?, category);
        Ok(())
    }
}

impl Backend for CountingBackend {
    fn name(&self) -> String {
        NAME.into()
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        let piece = len.checked_mul(dtype.size()).and_then(|bytes| self.ledger.made(bytes as u64));
        let piece = piece.ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Buffer::new(Counted { piece, ledger: self.ledger.clone() }, dtype, len))
    }

    fn write(&self, _: &[u8], _: ViewMut) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: View, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn host_bytes_mut<'a>(&self, _: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        Ok(None)
    }

    fn fill(&self, _: f64, _: ViewMut) -> Result<()> {
        Ok(())
    }

    fn copy(&self, x: View, out: ViewMut) -> Result<()> {
        expect("copy", "out", out.len(), x.len())?;
        self.call("copy", [Some(x), Some(out.as_view())])
    }

    fn cast(&self, x: View, out: ViewMut) -> Result<()> {
        expect("cast", "out", out.len(), x.len())?;
        self.call("cast", [Some(x), Some(out.as_view())])
    }

    fn scale_in_place(&self, _: f64, x: ViewMut) -> Result<()> {
        self.call("scale_in_place", [Some(x.as_view())])
    }

    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        self.call("add", [Some(a), Some(b), Some(out.as_view())])
    }

    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()> {
        self.call("add_in_place", [Some(x), Some(out.as_view())])
    }

    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        self.call("divide", [Some(a), Some(b), Some(out.as_view())])
    }

    fn sum_squares(&self, _: View) -> Result<f64> {
        Ok(0.0)
    }

    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()> {
        p.check(&x, &y)?;
        self.call("dropout", [Some(x), Some(y.as_view())])
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()> {
        p.check(&a, &b, &c)?;
        self.call("matmul", [Some(a), Some(b), Some(c.as_view())])
    }

    fn quantize_4bit(&self, _: Format, _: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        self.call("quantize_4bit", [Some(w), Some(codes.as_view()), Some(absmax.as_view())])
    }

    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32> {
        self.ledger.scratch(&Nest::of(absmax.len()));
        self.call("quantize_scales", [Some(absmax), Some(codes.as_view()), Some(nested.as_view())])?;
        Ok(0.0)
    }

    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()> {
        let views = weight_views(&Weight::Quantized(q));
        self.call("dequantize_4bit", views.into_iter().chain([out.as_view()]).map(Some))
    }

    fn quantize_8bit(&self, _: DynamicMap, _: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        self.call("quantize_8bit", [Some(x), Some(codes.as_view()), Some(absmax.as_view())])
    }

    fn dequantize_8bit(&self, _: DynamicMap, _: usize, codes: View, absmax: View, out: ViewMut) -> Result<()> {
        self.call("dequantize_8bit", [Some(codes), Some(absmax), Some(out.as_view())])
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
        p.check(&x, w, low_rank, bias.as_ref(), &y)?;
        self.ledger.scratch(&Nest::linear(p, low_rank));
        let views = [weight_views(w), low_rank_views(low_rank), vec![x, y.as_view()]].concat();
        self.call("linear", views.into_iter().map(Some).chain([bias]))
    }

    fn linear_grad_input(
        &self,
        p: &Linear,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        _: bool,
        dx: ViewMut,
    ) -> Result<()> {
        p.check_grad_input(&dy, w, low_rank, &dx)?;
        self.ledger.scratch(&Nest::linear_grad_input(p, low_rank));
        // In forward only the head forms a gradient.
        if self.ledger.phase() == Some(Phase::Forward) {
            self.label(&dx, Category::Head)?;
        }
        let views = [weight_views(w), low_rank_views(low_rank), vec![dy, dx.as_view()]].concat();
        self.call("linear_grad_input", views.into_iter().map(Some))
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
        p.check_grad_weight(&x, &dy, w, low_rank, &grads)?;
        let LinearGrads { weight, bias, a, b, per_rank, row_scale } = &grads;
        let update = [a, b, per_rank, row_scale];
        let of_update = update.iter().any(|grad| grad.is_some());
        self.ledger.scratch(&Nest::linear_grad_weight(p, low_rank, weight.is_some(), of_update));
        let outputs = [weight, bias].into_iter().chain(update).map(|grad| grad.as_ref().map(ViewMut::as_view));
        let inputs = [low_rank_views(low_rank), vec![x, dy]].concat();
        self.call("linear_grad_weight", inputs.into_iter().map(Some).chain(outputs))
    }

    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()> {
        p.check(&x, &gain, &y, &inv_rms)?;
        self.call("rms_norm", [Some(x), Some(gain), Some(y.as_view()), Some(inv_rms.as_view())])
    }

    fn rms_norm_grad(
        &self,
        p: &RmsNorm,
        x: View,
        gain: View,
        inv_rms: View,
        dy: View,
        _: bool,
        dx: Option<ViewMut>,
        dgain: Option<ViewMut>,
    ) -> Result<()> {
        p.check_grad(&x, &gain, &inv_rms, &dy, dx.as_ref(), dgain.as_ref())?;
        self.ledger.scratch(&Nest::column_sums(if dgain.is_some() { p.rows } else { 0 }, p.width));
        let outputs = [&dx, &dgain].map(|grad| grad.as_ref().map(ViewMut::as_view));
        self.call("rms_norm_grad", [x, gain, inv_rms, dy].map(Some).into_iter().chain(outputs))
    }

    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()> {
        p.check(&x, &positions, &cos, &sin, &y)?;
        self.call("rope", [x, positions, cos, sin, y.as_view()].map(Some))
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
        p.check(&q, &k, &v, starts.as_ref(), &out, &lse)?;
        self.ledger.scratch(&Nest::attention(p));
        self.call("attention", [Some(q), Some(k), Some(v), starts, Some(out.as_view()), Some(lse.as_view())])
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        p.check_grad(&saved, &dout, &grads)?;
        self.ledger.scratch(&Nest::attention_grad(p));
        let AttentionSaved { q, k, v, starts, out, lse } = saved;
        let outputs = [&grads.dq, &grads.dk, &grads.dv].map(|grad| grad.as_ref().map(ViewMut::as_view));
        self.call("attention_grad", [q, k, v, out, lse, dout].map(Some).into_iter().chain([starts]).chain(outputs))
    }

    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()> {
        self.call("silu_mul", [gate, up, out.as_view()].map(Some))
    }

    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()> {
        let outputs = [&dgate, &dup].map(|grad| grad.as_ref().map(ViewMut::as_view));
        self.call("silu_mul_grad", [gate, up, dout].map(Some).into_iter().chain(outputs))
    }

    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()> {
        f.check(&x, &y)?;
        self.call("activate", [x, y.as_view()].map(Some))
    }

    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()> {
        f.check_grad(&x, &dy, &dx)?;
        self.call("activate_grad", [x, dy, dx.as_view()].map(Some))
    }

    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()> {
        p.check_norms(&x, &norms)?;
        self.call("row_norms", [x, norms.as_view()].map(Some))
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()> {
        p.check_scale(&x, &factors, &y)?;
        self.call("scale_columns", [x, factors, y.as_view()].map(Some))
    }

    fn scale_columns_grad(
        &self,
        p: &Rows,
        x: View,
        factors: View,
        dy: View,
        _: bool,
        dx: Option<ViewMut>,
        dfactors: Option<ViewMut>,
    ) -> Result<()> {
        p.check_scale_grad(&x, &factors, &dy, dx.as_ref(), dfactors.as_ref())?;
        self.ledger.scratch(&Nest::column_sums(if dfactors.is_some() { p.rows } else { 0 }, p.width));
        let outputs = [&dx, &dfactors].map(|grad| grad.as_ref().map(ViewMut::as_view));
        self.call("scale_columns_grad", [x, factors, dy].map(Some).into_iter().chain(outputs))
    }

    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()> {
        p.check(&ids, &table, &rows)?;
        self.call("embedding", [ids, table, rows.as_view()].map(Some))
    }

    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()> {
        p.check_grad(&ids, &drows, &dtable)?;
        self.call("embedding_grad", [ids, drows, dtable.as_view()].map(Some))
    }

    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()> {
        p.check("cross_entropy", logits.len(), &labels, &losses)?;
        self.ledger.label(piece(logits.buffer())?, Category::Head);
        self.call("cross_entropy", [logits, labels, losses.as_view()].map(Some))
    }

    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        _: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()> {
        p.check("cross_entropy_grad_in_place", logits.len(), &labels, &losses)?;
        self.label(&logits, Category::Head)?;
        self.call("cross_entropy_grad_in_place", [logits.as_view(), labels, losses.as_view()].map(Some))
    }

    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()> {
        p.check(&grad, &param, &m, &v)?;
        self.call("adamw", [grad, param.as_view(), m.as_view(), v.as_view()].map(Some))
    }

    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()> {
        p.check_8bit(&grad, &param, &m, &v)?;
        let [m, m_absmax, v, v_absmax] = [&m.codes, &m.absmax, &v.codes, &v.absmax].map(ViewMut::as_view);
        self.call("adamw_8bit", [grad, param.as_view(), m, m_absmax, v, v_absmax].map(Some))
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
        p.check(&weight, &grad, &mean, &deviation, &scores)?;
        self.ledger.scratch(&Nest::column_sums(if p.triplets == Triplets::Columns { p.rows } else { 0 }, p.width));
        self.call("importance", [weight, grad, mean.as_view(), deviation.as_view(), scores.as_view()].map(Some))
    }

    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64> {
        p.check(&log_alpha, &z)?;
        self.call("hard_concrete", [log_alpha, z.as_view()].map(Some))?;
        Ok(0.0)
    }

    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        _: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()> {
        p.check_grad(&log_alpha, &dz, &dlog_alpha)?;
        self.call("hard_concrete_grad", [log_alpha, dz, dlog_alpha.as_view()].map(Some))
    }
}
