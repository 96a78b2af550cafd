//! The oracle with one fault.

use rankfold_backend::params::*;
use rankfold_backend::{
    AttentionGrads, AttentionSaved, Backend, Buffer, Compute, DType, DynamicMap, Element, Error, Format, HostBytes,
    LinearGrads, LowRank, Quantized, Result, View, ViewMut, Weight,
};
use rankfold_reference::ReferenceBackend;
use std::sync::atomic::{AtomicBool, Ordering};

pub const ORACLE: ReferenceBackend = ReferenceBackend::new();
/// The same, to read and write whole buffers through.
const HOST: &dyn Backend = &ORACLE;

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    Harmless,
    /// One element of an output is off by that part of itself; a code by one.
    Nudge(&'static str, usize, f64),
    /// Every other call is: the result is right, but not the same twice.
    Unsteady(&'static str, usize),
    /// The element beyond the output is written.
    Spill(&'static str, usize),
    /// The output's last element is not.
    Skip(&'static str, usize),
    /// A parameter is not listened to.
    Deaf(&'static str),
    /// One element of an output is off by a last bit where the output after it (the first after the last) is absent.
    Lonely(&'static str, usize),
    /// An error is not reported.
    Lenient(&'static str),
    /// An error is reported, but only after an output was written.
    Hasty(&'static str),
}
use Fault::*;

/// A backend that delegates to the oracle, and spoils what its fault says.
#[derive(Debug)]
pub struct Mutant {
    fault: Fault,
    odd: AtomicBool,
}

impl Mutant {
    pub fn new(fault: Fault) -> Self {
        Self { fault, odd: AtomicBool::new(false) }
    }

    fn deaf(&self, parameter: &'static str) -> bool {
        self.fault == Deaf(parameter)
    }

    /// Runs a kernel on its outputs, and spoils what the fault says.
    fn run<const N: usize>(
        &self,
        kernel: &'static str,
        outputs: [ViewMut; N],
        call: impl FnOnce([ViewMut; N]) -> Result<()>,
    ) -> Result<()> {
        self.run_asked(kernel, outputs.map(Some), |outputs| call(outputs.map(|output| output.expect("asked for"))))
    }

    /// [`Mutant::run`] where outputs may be absent.
    fn run_asked<const N: usize>(
        &self,
        kernel: &'static str,
        mut outputs: [Option<ViewMut>; N],
        call: impl FnOnce([Option<ViewMut>; N]) -> Result<()>,
    ) -> Result<()> {
        let skipped = match self.fault {
            Skip(name, output) if name == kernel => outputs[output].as_ref().map(bytes).transpose()?,
            _ => None,
        };
        let answer = call(outputs.each_mut().map(|output| output.as_mut().map(ViewMut::reborrow)));
        if self.fault == Lenient(kernel) {
            return Ok(());
        }
        if self.fault == Hasty(kernel) && answer.is_err() {
            // A spoilt output may be nobody's memory, which cannot be written.
            outputs.iter_mut().flatten().try_for_each(|output| match ORACLE.fill(0.0, output.reborrow()) {
                Err(Error::Foreign { .. }) => Ok(()),
                filled => filled,
            })?;
        }
        answer?;
        let absent = outputs.each_ref().map(Option::is_none);
        let (Nudge(name, output, _)
        | Unsteady(name, output)
        | Spill(name, output)
        | Skip(name, output)
        | Lonely(name, output)) = self.fault
        else {
            return Ok(());
        };
        let Some(out) = outputs.get_mut(output).and_then(Option::as_mut).filter(|_| name == kernel) else {
            return Ok(());
        };
        match self.fault {
            Nudge(_, _, by) => nudge(out, by),
            Unsteady(..) if self.odd.fetch_xor(true, Ordering::Relaxed) => nudge(out, LAST_BIT),
            Lonely(..) if absent[(output + 1) % N] => nudge(out, LAST_BIT),
            Spill(..) => spill(out),
            Skip(..) => restore_last(out, &skipped.expect("taken before the call")),
            _ => Ok(()),
        }
    }
}

/// As a part of a number: at least one step of f32.
const LAST_BIT: f64 = f32::EPSILON as f64;

/// The element beyond the output is overwritten, where the buffer has one.
fn spill(out: &mut ViewMut) -> Result<()> {
    let end = out.offset() + out.len();
    if end < out.buffer_mut().len() {
        ORACLE.fill(0.0, out.buffer_mut().slice_mut(end, 1)?)?;
    }
    Ok(())
}

/// The last element gets back what it was in `before`.
fn restore_last(out: &mut ViewMut, before: &[u8]) -> Result<()> {
    let Some(last) = out.len().checked_sub(1) else { return Ok(()) };
    ORACLE.write(&before[last * out.dtype().size()..], out.slice_mut(last, 1)?)
}

fn bytes(x: &ViewMut) -> Result<Vec<u8>> {
    let mut bytes = vec![0; x.len() * x.dtype().size()];
    ORACLE.read(x.as_view(), &mut bytes)?;
    Ok(bytes)
}

/// Off by `by` of itself, in the middle of the output: a float rounded to its type again, a code off by one.
fn nudge(out: &mut ViewMut, by: f64) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let middle = out.len() / 2;
    let mut one = out.slice_mut(middle, 1)?;
    if one.dtype().is_float() {
        ORACLE.scale_in_place(1.0 + by, one)
    } else {
        let mut code = bytes(&one)?;
        code[0] ^= 1;
        ORACLE.write(&code, one.reborrow())
    }
}

/// Every element replaced by what `to` makes of it.
fn change<T: Element>(mut out: ViewMut, to: impl Fn(T) -> T) -> Result<()> {
    let changed: Vec<T> = HOST.download::<T>(out.as_view())?.into_iter().map(to).collect();
    ORACLE.write(bytemuck::cast_slice(&changed), out.reborrow())
}

impl Backend for Mutant {
    fn name(&self) -> String {
        format!("{:?}", self.fault)
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        ORACLE.alloc(dtype, len)
    }

    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()> {
        self.run("write", [out], |[out]| ORACLE.write(bytes, out))
    }

    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()> {
        let answer = ORACLE.read(x, bytes);
        if self.fault == Lenient("read") { Ok(()) } else { answer }
    }

    fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
        let lent = ORACLE.host_bytes_mut(buffer)?;
        // A copy of them: what the host writes is lost.
        Ok(lent.map(|bytes| if self.deaf("host bytes") { HostBytes::new(bytes.to_vec()) } else { bytes }))
    }

    fn fill(&self, value: f64, out: ViewMut) -> Result<()> {
        let value = if self.deaf("f64 of fill") { f64::from(value as f32) } else { value };
        self.run("fill", [out], |[out]| ORACLE.fill(value, out))
    }

    fn copy(&self, x: View, out: ViewMut) -> Result<()> {
        self.run("copy", [out], |[out]| ORACLE.copy(x, out))
    }

    fn cast(&self, x: View, out: ViewMut) -> Result<()> {
        self.run("cast", [out], |[out]| ORACLE.cast(x, out))
    }

    fn scale_in_place(&self, factor: f64, x: ViewMut) -> Result<()> {
        self.run("scale_in_place", [x], |[x]| ORACLE.scale_in_place(factor, x))
    }

    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        self.run("divide", [out], |[out]| ORACLE.divide(a, b, out))
    }

    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()> {
        self.run("add", [out], |[out]| ORACLE.add(a, b, out))
    }

    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()> {
        self.run("add_in_place", [out], |[out]| ORACLE.add_in_place(x, out))
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        let sum = ORACLE.sum_squares(x)?;
        Ok(if self.deaf("f64 of sum_squares") { f64::from(sum as f32) } else { sum })
    }

    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()> {
        let p = if self.deaf("stream") { Dropout { stream: 0, ..*p } } else { *p };
        self.run("dropout", [y], |[y]| ORACLE.dropout(&p, x, y))
    }

    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()> {
        let mut p = *p;
        p.accumulate &= !self.deaf("accumulate of matmul");
        if self.deaf("compute") {
            p.compute = Compute::F32;
        }
        self.run("matmul", [c], |[c]| ORACLE.matmul(&p, a, b, c))
    }

    fn quantize_4bit(&self, format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        let positive;
        let w = if self.deaf("signs") {
            let values: Vec<f32> = HOST.download(w)?;
            positive = HOST.upload(&values.iter().map(|w| w.abs()).collect::<Vec<_>>())?;
            positive.view()
        } else {
            w
        };
        let format = if self.deaf("format") { Format::Fp4 } else { format };
        self.run("quantize_4bit", [codes, absmax], |[mut codes, mut absmax]| {
            ORACLE.quantize_4bit(format, block, w, codes.reborrow(), absmax.reborrow())?;
            if self.deaf("the codes' last bit") {
                change(codes, |byte: u8| byte & 0xee)?;
            }
            if self.deaf("scales below 1e-6") {
                change(absmax, |scale: f32| scale.max(1e-6))?;
            }
            Ok(())
        })
    }

    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32> {
        let mut offset = 0.0;
        self.run("quantize_scales", [codes, nested], |[codes, nested]| {
            offset = ORACLE.quantize_scales(absmax, codes, nested)?;
            Ok(())
        })?;
        Ok(if self.deaf("offset") { offset.next_up() } else { offset })
    }

    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()> {
        self.run("dequantize_4bit", [out], |[out]| ORACLE.dequantize_4bit(q, out))
    }

    fn quantize_8bit(&self, map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()> {
        self.run("quantize_8bit", [codes, absmax], |[codes, absmax]| ORACLE.quantize_8bit(map, block, x, codes, absmax))
    }

    fn dequantize_8bit(&self, map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()> {
        self.run("dequantize_8bit", [out], |[out]| ORACLE.dequantize_8bit(map, block, codes, absmax, out))
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
        let low_rank = self.update(low_rank);
        let bias = bias.filter(|_| !self.deaf("bias"));
        self.run("linear", [y], |[y]| ORACLE.linear(&self.precision(p), x, w, low_rank.as_ref(), bias, y))
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
        let low_rank = self.update(low_rank);
        let accumulate = accumulate && !self.deaf("accumulate of dx");
        self.run("linear_grad_input", [dx], |[dx]| {
            ORACLE.linear_grad_input(&self.precision(p), dy, w, low_rank.as_ref(), accumulate, dx)
        })
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
        let low_rank = self.update(low_rank);
        let LinearGrads { weight, bias, a, b, per_rank, row_scale } = grads;
        let outputs = [weight, bias, a, b, per_rank, row_scale];
        self.run_asked("linear_grad_weight", outputs, |[weight, bias, a, b, per_rank, row_scale]| {
            let grads = LinearGrads { weight, bias, a, b, per_rank, row_scale };
            ORACLE.linear_grad_weight(&self.precision(p), x, dy, w, low_rank.as_ref(), grads)
        })
    }

    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()> {
        let p = if self.deaf("eps") { RmsNorm { eps: 0.0, ..*p } } else { *p };
        self.run("rms_norm", [y, inv_rms], |[y, inv_rms]| ORACLE.rms_norm(&p, x, gain, y, inv_rms))
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
        let accumulate = accumulate && !self.deaf("accumulate of rms_norm");
        self.run_asked("rms_norm_grad", [dx, dgain], |[dx, dgain]| {
            ORACLE.rms_norm_grad(p, x, gain, inv_rms, dy, accumulate, dx, dgain)
        })
    }

    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()> {
        let p = Rope { inverse: p.inverse && !self.deaf("inverse"), ..*p };
        self.run("rope", [y], |[y]| ORACLE.rope(&p, x, positions, cos, sin, y))
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
        let (p, starts) = self.heard(p, starts);
        self.run("attention", [out, lse], |[out, lse]| ORACLE.attention(&p, q, k, v, starts, out, lse))
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        let (p, starts) = self.heard(p, saved.starts);
        let AttentionGrads { dq, dk, dv } = grads;
        self.run_asked("attention_grad", [dq, dk, dv], |[dq, dk, dv]| {
            ORACLE.attention_grad(&p, AttentionSaved { starts, ..saved }, dout, AttentionGrads { dq, dk, dv })
        })
    }

    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()> {
        self.run("silu_mul", [out], |[out]| ORACLE.silu_mul(gate, up, out))
    }

    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()> {
        self.run_asked("silu_mul_grad", [dgate, dup], |[dgate, dup]| ORACLE.silu_mul_grad(gate, up, dout, dgate, dup))
    }

    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()> {
        self.run("activate", [y], |[mut y]| {
            ORACLE.activate(f, x, y.reborrow())?;
            if y.dtype() != DType::F32 {
                return Ok(());
            }
            if self.deaf("NaN of activate") {
                return change(y, |y: f32| if y.is_nan() { 0.0 } else { y });
            }
            if self.deaf("the small of activate") && f == Activation::Tanh {
                return change(y, |y: f32| (1.0 + y) - 1.0);
            }
            Ok(())
        })
    }

    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()> {
        let f = if self.deaf("function") { Activation::Relu } else { f };
        self.run("activate_grad", [dx], |[dx]| ORACLE.activate_grad(f, x, dy, dx))
    }

    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()> {
        self.run("row_norms", [norms], |[mut norms]| {
            ORACLE.row_norms(p, x, norms.reborrow())?;
            // What squares in f32 leave of it.
            match self.deaf("range of row_norms") {
                true => change(norms, |norm: f32| if norm * norm == f32::INFINITY { f32::INFINITY } else { norm }),
                false if self.deaf("small rows of row_norms") => {
                    change(norms, |norm: f32| if norm * norm == 0.0 { 0.0 } else { norm })
                }
                false => Ok(()),
            }
        })
    }

    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()> {
        self.run("scale_columns", [y], |[y]| ORACLE.scale_columns(p, x, factors, y))
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
        let accumulate = accumulate && !self.deaf("accumulate of scale_columns");
        self.run_asked("scale_columns_grad", [dx, dfactors], |[dx, dfactors]| {
            ORACLE.scale_columns_grad(p, x, factors, dy, accumulate, dx, dfactors)
        })
    }

    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()> {
        self.run("embedding", [rows], |[rows]| ORACLE.embedding(p, ids, table, rows))
    }

    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()> {
        self.run("embedding_grad", [dtable], |[dtable]| ORACLE.embedding_grad(p, ids, drows, dtable))
    }

    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()> {
        self.run("cross_entropy", [losses], |[losses]| ORACLE.cross_entropy(p, logits, labels, losses))
    }

    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()> {
        let scale = if self.deaf("scale") { 1.0 } else { scale };
        self.run("cross_entropy_grad", [logits, losses], |[logits, losses]| {
            ORACLE.cross_entropy_grad_in_place(p, scale, logits, labels, losses)
        })
    }

    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()> {
        self.run("adamw", [param, m, v], |[param, m, v]| ORACLE.adamw(&self.taken(p), grad, param, m, v))
    }

    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()> {
        let outputs = [param, m.codes, m.absmax, v.codes, v.absmax];
        self.run("adamw_8bit", outputs, |[param, m_codes, m_absmax, mut v_codes, v_absmax]| {
            let m = Moment { codes: m_codes, absmax: m_absmax };
            let v = Moment { codes: v_codes.reborrow(), absmax: v_absmax };
            ORACLE.adamw_8bit(&self.taken(p), grad, param, m, v)?;
            match self.deaf("the least v") {
                true => lose_the_least(v_codes),
                false => Ok(()),
            }
        })
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
        let mut p = *p;
        if self.deaf("beta2") {
            p.beta2 = p.beta1;
        }
        if self.deaf("grad_scale") {
            p.grad_scale = 1.0;
        }
        self.run("importance", [mean, deviation, scores], |[mean, deviation, scores]| {
            ORACLE.importance(&p, weight, grad, mean, deviation, scores)
        })
    }

    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64> {
        let mut open = 0.0;
        self.run("hard_concrete", [z], |[z]| {
            open = ORACLE.hard_concrete(&self.gate(p), log_alpha, z)?;
            Ok(())
        })?;
        Ok(if self.deaf("sum of hard_concrete") { open * (1.0 + 1e-6) } else { open })
    }

    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()> {
        let penalty = if self.deaf("penalty") { 0.0 } else { penalty };
        self.run("hard_concrete_grad", [dlog_alpha], |[dlog_alpha]| {
            ORACLE.hard_concrete_grad(&self.gate(p), log_alpha, dz, penalty, dlog_alpha)
        })
    }
}

/// Codes of 1 become 0.
fn lose_the_least(codes: ViewMut) -> Result<()> {
    let mut values = HOST.download::<u8>(codes.as_view())?;
    values.iter_mut().filter(|code| **code == 1).for_each(|code| *code = 0);
    ORACLE.write(&values, codes)
}

impl Mutant {
    fn taken(&self, p: &AdamW) -> AdamW {
        let step = p.step + u64::from(self.deaf("step"));
        let weight_decay = if self.deaf("weight_decay") { 0.0 } else { p.weight_decay };
        AdamW { step, weight_decay, ..*p }
    }

    fn gate(&self, p: &HardConcrete) -> HardConcrete {
        let noise = p.noise.filter(|_| !self.deaf("noise"));
        HardConcrete { noise: noise.map(|(seed, stream)| (seed, if self.deaf("stream") { 0 } else { stream })), ..*p }
    }

    fn precision(&self, p: &Linear) -> Linear {
        Linear { compute: if self.deaf("compute") { Compute::F32 } else { p.compute }, ..*p }
    }

    fn update<'a>(&self, low_rank: Option<&LowRank<'a>>) -> Option<LowRank<'a>> {
        let mut low_rank = *low_rank.filter(|_| !self.deaf("low_rank"))?;
        low_rank.per_rank = low_rank.per_rank.filter(|_| !self.deaf("per_rank"));
        low_rank.row_scale = low_rank.row_scale.filter(|_| !self.deaf("row_scale"));
        low_rank.dropout = low_rank.dropout.filter(|_| !self.deaf("dropout"));
        if self.deaf("scale of the update") {
            low_rank.scale = 1.0;
        }
        Some(low_rank)
    }

    fn heard<'a>(&self, p: &Attention, starts: Option<View<'a>>) -> (Attention, Option<View<'a>>) {
        let window = p.window.filter(|_| !self.deaf("window"));
        (Attention { window, ..*p }, starts.filter(|_| !self.deaf("starts")))
    }
}
