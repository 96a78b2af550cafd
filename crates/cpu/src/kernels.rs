//! The kernel contract on this backend: each kernel checks its parameters, turns views into slices, and calls the file
//! of its operation.

use crate::CpuBackend;
use crate::adamw_8bit::Coded;
use crate::attention::{self, Gradients};
use crate::linear::GradSlices;
use crate::quantize4;
use crate::rms_norm::{self, Saved};
use crate::rope::{self, Angles};
use crate::simd::Float;
use crate::slices::{BACKEND, Slices};
use crate::storage::HostMemory;
use crate::weights::{low_rank_slice, scale_slice, weight_slice};
use crate::{activate, hard_concrete, importance, row_norms, scale_columns};
use crate::{adamw, adamw_8bit, cross_entropy, dropout, elementwise, embedding, quantize8, silu_mul};
use half::{bf16, f16};
use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, DType, DynamicMap, Error, Format, HostBytes, NESTED_BLOCK,
    Quantized, Result, View, ViewMut, check_block,
};

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({})", self.isa)
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        if dtype == DType::F64 {
            return Err(Error::Unsupported { backend: BACKEND, what: "f64" });
        }
        let bytes = len.checked_mul(dtype.size()).ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Buffer::new(self.pool.take(bytes)?, dtype, len))
    }

    fn write(&self, bytes: &[u8], mut out: ViewMut) -> Result<()> {
        let s = Slices::new("write");
        let out = s.bytes_mut("out", &mut out)?;
        expect(s.kernel, "bytes", bytes.len(), out.len())?;
        elementwise::copy(&self.threads, bytes, out);
        Ok(())
    }

    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()> {
        let s = Slices::new("read");
        let x = s.bytes("x", x)?;
        expect(s.kernel, "bytes", bytes.len(), x.len())?;
        elementwise::copy(&self.threads, x, bytes);
        Ok(())
    }

    fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        let memory: &mut HostMemory = buffer.storage_mut(BACKEND)?;
        memory.host_bytes().map(Some).map_err(Error::paging("host_bytes_mut", "buffer"))
    }

    fn trim(&self) -> Result<()> {
        self.pool.trim();
        Ok(())
    }

    fn fill(&self, value: f64, mut out: ViewMut) -> Result<()> {
        let (s, out, threads) = (Slices::new("fill"), &mut out, &self.threads);
        let integer = value.round_ties_even();
        match out.dtype() {
            DType::F32 => elementwise::fill(threads, value as f32, s.get_mut("out", out)?),
            DType::Bf16 => elementwise::fill(threads, <bf16 as Float>::from_f64(value), s.get_mut("out", out)?),
            DType::F16 => elementwise::fill(threads, <f16 as Float>::from_f64(value), s.get_mut("out", out)?),
            DType::F64 => elementwise::fill(threads, value, s.get_mut("out", out)?),
            DType::U8 => elementwise::fill(threads, integer as u8, s.get_mut("out", out)?),
            DType::U32 => elementwise::fill(threads, integer as u32, s.get_mut("out", out)?),
            DType::I64 => elementwise::fill(threads, integer as i64, s.get_mut("out", out)?),
        }
        Ok(())
    }

    fn copy(&self, x: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("copy");
        expect(s.kernel, "out", out.len(), x.len())?;
        if out.dtype() != x.dtype() {
            let (expected, found) = (x.dtype().name(), out.dtype());
            return Err(Error::DType { kernel: s.kernel, tensor: "out", expected, found });
        }
        elementwise::copy(&self.threads, s.bytes("x", x)?, s.bytes_mut("out", &mut out)?);
        Ok(())
    }

    fn cast(&self, x: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("cast");
        expect("cast", "out", out.len(), x.len())?;
        elementwise::cast(&self.threads, self.isa, s.floats("x", x)?, s.floats_mut("out", &mut out)?);
        Ok(())
    }

    fn scale_in_place(&self, factor: f64, mut x: ViewMut) -> Result<()> {
        let s = Slices::new("scale_in_place");
        elementwise::scale_in_place(&self.threads, self.isa, factor as f32, s.get_mut("x", &mut x)?);
        Ok(())
    }

    fn add(&self, a: View, b: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("add");
        expect("add", "b", b.len(), a.len())?;
        expect("add", "out", out.len(), a.len())?;
        elementwise::add(&self.threads, self.isa, s.get("a", a)?, s.get("b", b)?, s.get_mut("out", &mut out)?);
        Ok(())
    }

    fn add_in_place(&self, x: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("add_in_place");
        expect("add_in_place", "out", out.len(), x.len())?;
        elementwise::add_in_place(&self.threads, self.isa, s.get("x", x)?, s.get_mut("out", &mut out)?);
        Ok(())
    }

    fn divide(&self, a: View, b: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("divide");
        expect("divide", "b", b.len(), a.len())?;
        expect("divide", "out", out.len(), a.len())?;
        elementwise::divide(&self.threads, self.isa, s.get("a", a)?, s.get("b", b)?, s.get_mut("out", &mut out)?);
        Ok(())
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        let s = Slices::new("sum_squares");
        Ok(elementwise::sum_squares(&self.threads, self.isa, s.get("x", x)?))
    }

    fn dropout(&self, p: &Dropout, x: View, mut y: ViewMut) -> Result<()> {
        let s = Slices::new("dropout");
        p.check(&x, &y)?;
        dropout::dropout(&self.threads, self.isa, p, s.get("x", x)?, s.get_mut("y", &mut y)?);
        Ok(())
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, mut c: ViewMut) -> Result<()> {
        let s = Slices::new("matmul");
        p.check(&a, &b, &c)?;
        self.gemm(p.compute).matmul(p, s.get("a", a)?, s.get("b", b)?, s.get_mut("c", &mut c)?);
        Ok(())
    }

    fn quantize_4bit(
        &self,
        format: Format,
        block: usize,
        w: View,
        mut codes: ViewMut,
        mut absmax: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("quantize_4bit");
        check_block(block)?;
        expect(s.kernel, "codes", codes.len(), w.len().div_ceil(2))?;
        expect(s.kernel, "absmax", absmax.len(), w.len().div_ceil(block))?;
        let (codes, absmax) = (s.get_mut("codes", &mut codes)?, s.get_mut("absmax", &mut absmax)?);
        quantize4::quantize_4bit(&self.threads, self.isa, format, block, s.floats("w", w)?, codes, absmax)
    }

    fn quantize_scales(&self, absmax: View, mut codes: ViewMut, mut nested: ViewMut) -> Result<f32> {
        let s = Slices::new("quantize_scales");
        expect(s.kernel, "codes", codes.len(), absmax.len())?;
        expect(s.kernel, "nested", nested.len(), absmax.len().div_ceil(NESTED_BLOCK))?;
        let (codes, nested) = (s.get_mut("codes", &mut codes)?, s.get_mut("nested", &mut nested)?);
        quantize8::quantize_scales(&self.threads, s.get("absmax", absmax)?, codes, nested)
    }

    fn dequantize_4bit(&self, q: &Quantized, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("dequantize_4bit");
        q.check()?;
        expect(s.kernel, "out", out.len(), q.elements())?;
        let (codes, scales) = (s.get("codes", q.codes.view())?, scale_slice(&s, &q.scales)?);
        let out = s.floats_mut("out", &mut out)?;
        quantize4::dequantize_4bit(&self.threads, self.isa, q.format, q.block, codes, scales, out);
        Ok(())
    }

    fn quantize_8bit(
        &self,
        map: DynamicMap,
        block: usize,
        x: View,
        mut codes: ViewMut,
        mut absmax: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("quantize_8bit");
        check_block(block)?;
        expect(s.kernel, "codes", codes.len(), x.len())?;
        expect(s.kernel, "absmax", absmax.len(), x.len().div_ceil(block))?;
        let (codes, absmax) = (s.get_mut("codes", &mut codes)?, s.get_mut("absmax", &mut absmax)?);
        quantize8::quantize_8bit(&self.threads, map, block, s.get("x", x)?, codes, absmax)
    }

    fn dequantize_8bit(
        &self,
        map: DynamicMap,
        block: usize,
        codes: View,
        absmax: View,
        mut out: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("dequantize_8bit");
        check_block(block)?;
        expect(s.kernel, "absmax", absmax.len(), codes.len().div_ceil(block))?;
        expect(s.kernel, "out", out.len(), codes.len())?;
        let (codes, absmax) = (s.get("codes", codes)?, s.get("absmax", absmax)?);
        quantize8::dequantize_8bit(&self.threads, map, block, codes, absmax, s.get_mut("out", &mut out)?);
        Ok(())
    }

    fn linear(
        &self,
        p: &Linear,
        x: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<View>,
        mut y: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("linear");
        p.check(&x, w, low_rank, bias.as_ref(), &y)?;
        let (x, w, low_rank) = (s.get("x", x)?, weight_slice(&s, w)?, low_rank_slice(&s, low_rank)?);
        let bias = bias.map(|bias| s.get("bias", bias)).transpose()?;
        self.gemm(p.compute).linear(p, x, w, low_rank.as_ref(), bias, s.get_mut("y", &mut y)?);
        Ok(())
    }

    fn linear_grad_input(
        &self,
        p: &Linear,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        accumulate: bool,
        mut dx: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("linear_grad_input");
        p.check_grad_input(&dy, w, low_rank, &dx)?;
        let (dy, w, low_rank) = (s.get("dy", dy)?, weight_slice(&s, w)?, low_rank_slice(&s, low_rank)?);
        let dx = s.get_mut("dx", &mut dx)?;
        self.gemm(p.compute).linear_grad_input(p, dy, w, low_rank.as_ref(), accumulate, dx);
        Ok(())
    }

    fn linear_grad_weight(
        &self,
        p: &Linear,
        x: View,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        mut grads: LinearGrads,
    ) -> Result<()> {
        let s = Slices::new("linear_grad_weight");
        p.check_grad_weight(&x, &dy, w, low_rank, &grads)?;
        let (x, dy) = (s.get("x", x)?, s.get("dy", dy)?);
        let low_rank = low_rank_slice(&s, low_rank)?;
        // Only the gradient of g asks for W: a weight that has been paged out may stay there.
        let w = grads.row_scale.is_some().then(|| weight_slice(&s, w)).transpose()?;
        let grads = GradSlices {
            weight: s.some_mut("d weight", &mut grads.weight)?,
            bias: s.some_mut("d bias", &mut grads.bias)?,
            a: s.some_mut("d a", &mut grads.a)?,
            b: s.some_mut("d b", &mut grads.b)?,
            per_rank: s.some_mut("d per_rank", &mut grads.per_rank)?,
            row_scale: s.some_mut("d row_scale", &mut grads.row_scale)?.zip(w),
        };
        self.gemm(p.compute).linear_grad_weight(p, x, dy, low_rank.as_ref(), grads);
        Ok(())
    }

    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, mut y: ViewMut, mut inv_rms: ViewMut) -> Result<()> {
        let s = Slices::new("rms_norm");
        p.check(&x, &gain, &y, &inv_rms)?;
        let (x, gain) = (s.get("x", x)?, s.get("gain", gain)?);
        let (y, inv_rms) = (s.get_mut("y", &mut y)?, s.get_mut("inv_rms", &mut inv_rms)?);
        rms_norm::rms_norm(&self.threads, self.isa, p, x, gain, y, inv_rms);
        Ok(())
    }

    fn rms_norm_grad(
        &self,
        p: &RmsNorm,
        x: View,
        gain: View,
        inv_rms: View,
        dy: View,
        accumulate: bool,
        mut dx: Option<ViewMut>,
        mut dgain: Option<ViewMut>,
    ) -> Result<()> {
        let s = Slices::new("rms_norm_grad");
        p.check_grad(&x, &gain, &inv_rms, &dy, dx.as_ref(), dgain.as_ref())?;
        let (x, gain) = (s.get("x", x)?, s.get("gain", gain)?);
        let saved = Saved { x, gain, inv_rms: s.get("inv_rms", inv_rms)?, dy: s.get("dy", dy)? };
        let (dx, dgain) = (s.some_mut("dx", &mut dx)?, s.some_mut("dgain", &mut dgain)?);
        rms_norm::rms_norm_grad(&self.threads, self.isa, p, saved, accumulate, dx, dgain);
        Ok(())
    }

    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, mut y: ViewMut) -> Result<()> {
        let s = Slices::new("rope");
        let known = p.check(&x, &positions, &cos, &sin, &y)?;
        let angles =
            Angles { positions: s.get("positions", positions)?, cos: s.get("cos", cos)?, sin: s.get("sin", sin)? };
        rope::rope(&self.threads, self.isa, p, known, s.get("x", x)?, angles, s.get_mut("y", &mut y)?)
    }

    fn attention(
        &self,
        p: &Attention,
        q: View,
        k: View,
        v: View,
        starts: Option<View>,
        mut out: ViewMut,
        mut lse: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("attention");
        p.check(&q, &k, &v, starts.as_ref(), &out, &lse)?;
        let inputs = [s.get("q", q)?, s.get("k", k)?, s.get("v", v)?];
        let starts = starts.map(|starts| s.get("starts", starts)).transpose()?;
        let (out, lse) = (s.get_mut("out", &mut out)?, s.get_mut("lse", &mut lse)?);
        attention::attention(&self.threads, self.isa, p, inputs, starts, out, lse)
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        let s = Slices::new("attention_grad");
        p.check_grad(&saved, &dout, &grads)?;
        let AttentionSaved { q, k, v, starts, out, lse } = saved;
        let saved = attention::Saved {
            q: s.get("q", q)?,
            k: s.get("k", k)?,
            v: s.get("v", v)?,
            starts: starts.map(|starts| s.get("starts", starts)).transpose()?,
            out: s.get("out", out)?,
            lse: s.get("lse", lse)?,
            dout: s.get("dout", dout)?,
        };
        let AttentionGrads { mut dq, mut dk, mut dv } = grads;
        let gradients = Gradients {
            dq: s.some_mut("dq", &mut dq)?,
            dk: s.some_mut("dk", &mut dk)?,
            dv: s.some_mut("dv", &mut dv)?,
        };
        attention::attention_grad(&self.threads, self.isa, p, saved, gradients)
    }

    fn silu_mul(&self, gate: View, up: View, mut out: ViewMut) -> Result<()> {
        let s = Slices::new("silu_mul");
        expect(s.kernel, "up", up.len(), gate.len())?;
        expect(s.kernel, "out", out.len(), gate.len())?;
        let (gate, up) = (s.get("gate", gate)?, s.get("up", up)?);
        silu_mul::silu_mul(&self.threads, self.isa, gate, up, s.get_mut("out", &mut out)?);
        Ok(())
    }

    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        mut dgate: Option<ViewMut>,
        mut dup: Option<ViewMut>,
    ) -> Result<()> {
        let (s, len) = (Slices::new("silu_mul_grad"), gate.len());
        expect(s.kernel, "up", up.len(), len)?;
        expect(s.kernel, "dout", dout.len(), len)?;
        expect_some(s.kernel, "dgate", dgate.as_ref().map(ViewMut::len), len)?;
        expect_some(s.kernel, "dup", dup.as_ref().map(ViewMut::len), len)?;
        let inputs = [s.get("gate", gate)?, s.get("up", up)?, s.get("dout", dout)?];
        let outputs = [s.some_mut("dgate", &mut dgate)?, s.some_mut("dup", &mut dup)?];
        silu_mul::silu_mul_grad(&self.threads, self.isa, inputs, outputs);
        Ok(())
    }

    fn activate(&self, f: Activation, x: View, mut y: ViewMut) -> Result<()> {
        let s = Slices::new("activate");
        f.check(&x, &y)?;
        activate::activate(&self.threads, self.isa, f, s.get("x", x)?, s.get_mut("y", &mut y)?);
        Ok(())
    }

    fn activate_grad(&self, f: Activation, x: View, dy: View, mut dx: ViewMut) -> Result<()> {
        let s = Slices::new("activate_grad");
        f.check_grad(&x, &dy, &dx)?;
        let (x, dy) = (s.get("x", x)?, s.get("dy", dy)?);
        activate::activate_grad(&self.threads, self.isa, f, x, dy, s.get_mut("dx", &mut dx)?);
        Ok(())
    }

    fn row_norms(&self, p: &Rows, x: View, mut norms: ViewMut) -> Result<()> {
        let s = Slices::new("row_norms");
        p.check_norms(&x, &norms)?;
        row_norms::row_norms(&self.threads, self.isa, p, s.get("x", x)?, s.get_mut("norms", &mut norms)?);
        Ok(())
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, mut y: ViewMut) -> Result<()> {
        let s = Slices::new("scale_columns");
        p.check_scale(&x, &factors, &y)?;
        let (x, factors) = (s.get("x", x)?, s.get("factors", factors)?);
        scale_columns::scale_columns(&self.threads, self.isa, p, x, factors, s.get_mut("y", &mut y)?);
        Ok(())
    }

    fn scale_columns_grad(
        &self,
        p: &Rows,
        x: View,
        factors: View,
        dy: View,
        accumulate: bool,
        mut dx: Option<ViewMut>,
        mut dfactors: Option<ViewMut>,
    ) -> Result<()> {
        let s = Slices::new("scale_columns_grad");
        p.check_scale_grad(&x, &factors, &dy, dx.as_ref(), dfactors.as_ref())?;
        let inputs = [s.get("x", x)?, s.get("factors", factors)?, s.get("dy", dy)?];
        let (dx, dfactors) = (s.some_mut("dx", &mut dx)?, s.some_mut("dfactors", &mut dfactors)?);
        scale_columns::scale_columns_grad(&self.threads, self.isa, p, inputs, accumulate, dx, dfactors);
        Ok(())
    }

    fn embedding(&self, p: &Embedding, ids: View, table: View, mut rows: ViewMut) -> Result<()> {
        let s = Slices::new("embedding");
        p.check(&ids, &table, &rows)?;
        let (ids, table) = (s.get("ids", ids)?, s.floats("table", table)?);
        embedding::embedding(&self.threads, self.isa, p, ids, table, s.floats_mut("rows", &mut rows)?)
    }

    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, mut dtable: ViewMut) -> Result<()> {
        let s = Slices::new("embedding_grad");
        p.check_grad(&ids, &drows, &dtable)?;
        let (ids, drows) = (s.get("ids", ids)?, s.get("drows", drows)?);
        embedding::embedding_grad(&self.threads, self.isa, p, ids, drows, s.get_mut("dtable", &mut dtable)?)
    }

    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, mut losses: ViewMut) -> Result<()> {
        let s = Slices::new("cross_entropy");
        p.check(s.kernel, logits.len(), &labels, &losses)?;
        let (logits, labels) = (s.get("logits", logits)?, s.get("labels", labels)?);
        let losses = s.get_mut("losses", &mut losses)?;
        cross_entropy::cross_entropy(&self.threads, self.isa, p, logits, labels, losses)
    }

    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        mut logits: ViewMut,
        labels: View,
        mut losses: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("cross_entropy_grad_in_place");
        p.check(s.kernel, logits.len(), &labels, &losses)?;
        let (logits, labels) = (s.get_mut("logits", &mut logits)?, s.get("labels", labels)?);
        let losses = s.get_mut("losses", &mut losses)?;
        cross_entropy::cross_entropy_grad_in_place(&self.threads, self.isa, p, scale, logits, labels, losses)
    }

    fn adamw(&self, p: &AdamW, grad: View, mut param: ViewMut, mut m: ViewMut, mut v: ViewMut) -> Result<()> {
        let s = Slices::new("adamw");
        p.check(&grad, &param, &m, &v)?;
        let grad = s.get("grad", grad)?;
        let (param, m) = (s.get_mut("param", &mut param)?, s.get_mut("m", &mut m)?);
        let state = [param, m, s.get_mut("v", &mut v)?];
        adamw::adamw(&self.threads, self.isa, p, grad, state);
        Ok(())
    }

    fn adamw_8bit(&self, p: &AdamW, grad: View, mut param: ViewMut, mut m: Moment, mut v: Moment) -> Result<()> {
        let s = Slices::new("adamw_8bit");
        p.check_8bit(&grad, &param, &m, &v)?;
        let (grad, param) = (s.get("grad", grad)?, s.get_mut("param", &mut param)?);
        let m = Coded { codes: s.get_mut("m codes", &mut m.codes)?, absmax: s.get_mut("m absmax", &mut m.absmax)? };
        let v = Coded { codes: s.get_mut("v codes", &mut v.codes)?, absmax: s.get_mut("v absmax", &mut v.absmax)? };
        adamw_8bit::adamw_8bit(&self.threads, self.isa, p, grad, param, m, v);
        Ok(())
    }

    fn importance(
        &self,
        p: &Importance,
        weight: View,
        grad: View,
        mut mean: ViewMut,
        mut deviation: ViewMut,
        mut scores: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("importance");
        p.check(&weight, &grad, &mean, &deviation, &scores)?;
        let inputs = [s.get("weight", weight)?, s.get("grad", grad)?];
        let averages = [s.get_mut("mean", &mut mean)?, s.get_mut("deviation", &mut deviation)?];
        importance::importance(&self.threads, self.isa, p, inputs, averages, s.get_mut("scores", &mut scores)?);
        Ok(())
    }

    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, mut z: ViewMut) -> Result<f64> {
        let s = Slices::new("hard_concrete");
        p.check(&log_alpha, &z)?;
        let (log_alpha, z) = (s.get("log_alpha", log_alpha)?, s.get_mut("z", &mut z)?);
        Ok(hard_concrete::hard_concrete(&self.threads, self.isa, p, log_alpha, z))
    }

    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        mut dlog_alpha: ViewMut,
    ) -> Result<()> {
        let s = Slices::new("hard_concrete_grad");
        p.check_grad(&log_alpha, &dz, &dlog_alpha)?;
        let (log_alpha, dz) = (s.get("log_alpha", log_alpha)?, s.get("dz", dz)?);
        let dlog_alpha = s.get_mut("dlog_alpha", &mut dlog_alpha)?;
        hard_concrete::hard_concrete_grad(&self.threads, self.isa, p, log_alpha, dz, penalty, dlog_alpha);
        Ok(())
    }
}
