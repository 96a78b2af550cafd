//! The contract itself: one object-safe trait, a method a kernel.
//!
//! Exactness, unless a kernel says otherwise: for elementwise kernels a few roundings of the stated formula; for
//! sums of n products |error| ≤ (n + c)·2⁻²⁴·Σ|aᵢ bᵢ|, whatever the order of summation, c the roundings outside
//! the sum. `reference` sums in f64. Quantisation is exact to the bit. The bits of a result never depend on the
//! number of threads.

use crate::params::*;
use crate::{Buffer, DType, DynamicMap, Element, Format, HostBytes, Quantized, Result, View, ViewMut};
use std::fmt::Debug;

/// Kernels on plain buffers. Every method checks lengths and element types before it writes anything.
///
/// An output that is an `Option` is formed where it is asked for, with the same bits whichever others are.
///
/// Tensors are row-major. "x + y" in a kernel's formula is elementwise; `d` marks a gradient of the loss.
pub trait Backend: Debug + Send + Sync {
    /// For messages: "cpu (avx2)", "reference".
    fn name(&self) -> String;

    /// `len` elements of unspecified value.
    fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer>;

    /// Host bytes (native endian) into `out`; lengths equal in bytes.
    fn write(&self, bytes: &[u8], out: ViewMut) -> Result<()>;

    /// `x` into host bytes; lengths equal in bytes.
    fn read(&self, x: View, bytes: &mut [u8]) -> Result<()>;

    /// The buffer's own bytes where the host can write them, so that files are read straight into place.
    ///
    /// Errors: a buffer of another backend, where this one's can be written; pages that cannot be brought into memory.
    fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>>;

    /// Give the memory that was freed and is kept for reuse back to the system. A backend that keeps none does nothing.
    fn trim(&self) -> Result<()> {
        Ok(())
    }

    /// out_i = value, rounded to the element type.
    fn fill(&self, value: f64, out: ViewMut) -> Result<()>;

    /// out = x; one element type.
    fn copy(&self, x: View, out: ViewMut) -> Result<()>;

    /// out = x between float types, to nearest even.
    fn cast(&self, x: View, out: ViewMut) -> Result<()>;

    /// x_i ← factor · x_i
    fn scale_in_place(&self, factor: f64, x: ViewMut) -> Result<()>;

    /// out = a + b
    fn add(&self, a: View, b: View, out: ViewMut) -> Result<()>;

    /// out ← out + x
    fn add_in_place(&self, x: View, out: ViewMut) -> Result<()>;

    /// out = a / b, and 0 where b is.
    fn divide(&self, a: View, b: View, out: ViewMut) -> Result<()>;

    /// Σ x_i², in f64 by fixed chunks.
    fn sum_squares(&self, x: View) -> Result<f64>;

    /// y = x where kept, times 1/(1 − p); 0 where dropped. Its gradient is the same kernel on dy.
    fn dropout(&self, p: &Dropout, x: View, y: ViewMut) -> Result<()>;

    /// c = a·b or c += a·b, in one of three transpositions.
    fn matmul(&self, p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()>;

    /// Blockwise 4-bit quantisation of w (f32, bf16 or f16).
    ///
    /// absmax_b = max |w_i| of the block, as it is; v = w_i · (1 / max(absmax_b, 1e-38)), the reciprocal and the
    /// product in f32, clamped to [−1, 1]; code = that of v's interval ([`Format::thresholds`]). A zero block has
    /// absmax 0 and the code of 0; an odd count is padded with that code. Exact to the bit.
    ///
    /// −0 is 0: it has 0's code and no part in absmax. Denormals are values like any other, and never flushed; but in
    /// a block whose absmax is below 1e-38 v comes out too small, so that of ŵ only its sign and |ŵ| ≤ absmax are
    /// promised.
    ///
    /// Errors: the first element that is NaN or infinite; nothing that was written then counts.
    fn quantize_4bit(&self, format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()>;

    /// Double quantisation: returns offset = mean of absmax (summed left to right in f64, rounded to f32) and
    /// quantises absmax − offset (in f32) as [`Backend::quantize_8bit`] with the signed map and blocks of 256.
    /// Exact to the bit.
    fn quantize_scales(&self, absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32>;

    /// out_i = `values[code_i] · absmax_(i / block)` in f32, then rounded to out's type. Exact to the bit.
    fn dequantize_4bit(&self, q: &Quantized, out: ViewMut) -> Result<()>;

    /// Blockwise 8-bit quantisation of x (f32): absmax as in 4 bits, v likewise, code = the index of the nearest
    /// map value, a tie to the lower index. Exact to the bit.
    ///
    /// "Nearest" is exact: v takes the upper neighbour where it exceeds their midpoint as a real number (in f64 the
    /// midpoint is exact; in f32, v exceeds it where v exceeds the midpoint rounded down, and not to nearest).
    fn quantize_8bit(&self, map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()>;

    /// out_i = `map[code_i] · absmax_(i / block)`, in f32. Exact to the bit.
    fn dequantize_8bit(&self, map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()>;

    /// y = g ∘ (x Wᵀ + s·(x̃ (e∘A)ᵀ) Bᵀ) + bias, for x [tokens, inputs] and y [tokens, outputs].
    ///
    /// e = `per_rank` scales A's rows, g = `row_scale` the outputs (each 1 where absent), x̃ = dropout(x), its
    /// elements numbered row-major. With both g and dropout the base is split as PEFT does:
    /// y = x Wᵀ + (g − 1) ∘ x̃ Wᵀ + g ∘ s·(x̃ (e∘A)ᵀ) Bᵀ + bias.
    fn linear(
        &self,
        p: &Linear,
        x: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<View>,
        y: ViewMut,
    ) -> Result<()>;

    /// dx = dy·W + dropout(s·((dy B) ∘ e) A), or dx += that; with g, dy is g∘dy (and with dropout, too, the base
    /// is split as in [`Backend::linear`]).
    fn linear_grad_input(
        &self,
        p: &Linear,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        accumulate: bool,
        dx: ViewMut,
    ) -> Result<()>;

    /// Adds to each gradient asked for: dW += dyᵀ x; d bias += Σ_t dy_t; and with dz = g∘dy:
    /// dA += s·(dz B ∘ e)ᵀ x̃; dB += s·dzᵀ (x̃ (e∘A)ᵀ); de_r += s·Σ_t (dz B)_tr (x̃ Aᵀ)_tr;
    /// dg_o += Σ_t dy_to z_to, z what g multiplies in [`Backend::linear`].
    fn linear_grad_weight(
        &self,
        p: &Linear,
        x: View,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        grads: LinearGrads,
    ) -> Result<()>;

    /// y_i = gain_i · x_i / ρ with ρ = √(mean(x²) + ε) a row (Zhang & Sennrich 2019, eq. 4); inv_rms = 1/ρ `[rows]`.
    fn rms_norm(&self, p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()>;

    /// dx_i = (gain_i dy_i − x_i c)/ρ with c = Σ_j gain_j x_j dy_j / (width·ρ²), or dx += that where `accumulate`;
    /// dgain_i += Σ_rows dy_i x_i / ρ, always added. Each where asked for.
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
    ) -> Result<()>;

    /// Pair (i, i + head_dim/2) of each head turns by the angle of its token's position:
    /// y_i = x_i cos − x_j sin, y_j = x_j cos + x_i sin; `inverse` turns back. positions u32 `[tokens]`;
    /// cos, sin f32 [positions, head_dim/2] ([`crate::rope::tables`]).
    fn rope(&self, p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()>;

    /// out = softmax(scale · q kᵀ over the visible keys) · v; lse [batch, heads, queries] is the log of the
    /// softmax's denominator, saved for backward.
    ///
    /// Where a key or value that a query does not see is not finite, the query's rows of out and dq are unspecified if
    /// the backend takes both in one block, in which 0 times that value is NaN; `reference` skips it.
    fn attention(
        &self,
        p: &Attention,
        q: View,
        k: View,
        v: View,
        starts: Option<View>,
        out: ViewMut,
        lse: ViewMut,
    ) -> Result<()>;

    /// With P = exp(scale·q kᵀ − lse), dP = dout vᵀ, D_i = Σ dout_i out_i, dS = P ∘ (dP − D):
    /// dq = scale·dS k, dk = scale·dSᵀ q, dv = Pᵀ dout, summed over the query heads of a group. Each where asked for.
    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()>;

    /// out = gate · σ(gate) · up
    fn silu_mul(&self, gate: View, up: View, out: ViewMut) -> Result<()>;

    /// With σ = σ(gate): dgate = dout · up · σ(1 + gate(1 − σ)), dup = dout · gate · σ. Each where asked for.
    fn silu_mul_grad(
        &self,
        gate: View,
        up: View,
        dout: View,
        dgate: Option<ViewMut>,
        dup: Option<ViewMut>,
    ) -> Result<()>;

    /// y = f(x). A NaN in x is one in y.
    fn activate(&self, f: Activation, x: View, y: ViewMut) -> Result<()>;

    /// dx = dy · f'(x), relatively exact for tanh too, whose slope 4e/(1 + e)² with e = e^−2|x| does not cancel as
    /// 1 − tanh² does. A NaN in x is one in dx.
    fn activate_grad(&self, f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()>;

    /// norms_r = √(Σ_j x_rj²), finite wherever the row and its norm are, and not lost to 0: squares are summed in f64,
    /// or of scaled elements.
    fn row_norms(&self, p: &Rows, x: View, norms: ViewMut) -> Result<()>;

    /// y_rj = x_rj · factors_j
    fn scale_columns(&self, p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()>;

    /// dx_rj = dy_rj · factors_j, or dx += that where `accumulate`; dfactors_j += Σ_r dy_rj x_rj, always added. Each
    /// where asked for.
    fn scale_columns_grad(
        &self,
        p: &Rows,
        x: View,
        factors: View,
        dy: View,
        accumulate: bool,
        dx: Option<ViewMut>,
        dfactors: Option<ViewMut>,
    ) -> Result<()>;

    /// rows_t = table_(ids_t), cast to rows' type; ids u32.
    fn embedding(&self, p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()>;

    /// dtable_(ids_t) += drows_t, in the order of t.
    fn embedding_grad(&self, p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()>;

    /// losses_r = log Σ exp(logits_r) − `logits_r[label_r]`, 0 where ignored; labels i64.
    fn cross_entropy(&self, p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()>;

    /// The same losses, and logits ← scale·(softmax(logits) − onehot(label)), 0 in ignored rows.
    fn cross_entropy_grad_in_place(
        &self,
        p: &CrossEntropy,
        scale: f64,
        logits: ViewMut,
        labels: View,
        losses: ViewMut,
    ) -> Result<()>;

    /// With g = grad_scale·grad: param ← param·(1 − lr·weight_decay); m ← β1 m + (1 − β1) g;
    /// v ← β2 v + (1 − β2) g²; param ← param − lr·(m/(1 − β1^t)) / (√(v/(1 − β2^t)) + ε).
    fn adamw(&self, p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()>;

    /// [`Backend::adamw`] with its moments kept in 8 bits, in blocks of [`MOMENT_BLOCK`] elements: m by the signed
    /// map, v by the unsigned one (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2).
    ///
    /// The moments are decoded as by [`Backend::dequantize_8bit`]; the new ones are formed of them and move param as
    /// in [`Backend::adamw`], and only then are encoded as by [`Backend::quantize_8bit`]; but a v that is not 0 is
    /// never encoded as 0: its least code is 1. Where a new moment is not finite, what becomes of its block is
    /// unspecified: no error looks for it.
    ///
    /// Without that exception a v below 1.6·10⁻⁷ of its block's largest would be lost while its m is not, and the next
    /// step without a gradient would be lr·m̂/ε. With it no step is larger than a bound that ε is no part of
    /// (`reference`, adamw_8bit.rs).
    fn adamw_8bit(&self, p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()>;

    /// With I = |weight · grad_scale·grad|, elementwise (Zhang et al. 2023, eq. 8–10): mean ← β1 mean + (1 − β1) I;
    /// deviation ← β2 deviation + (1 − β2) |I − mean|, of the new mean; scores_i ← the mean over triplet i's elements
    /// of mean · deviation.
    fn importance(
        &self,
        p: &Importance,
        weight: View,
        grad: View,
        mean: ViewMut,
        deviation: ViewMut,
        scores: ViewMut,
    ) -> Result<()>;

    /// z by [`HardConcrete`]'s formula; returns Σ P(z ≠ 0), summed in f64 by fixed chunks.
    fn hard_concrete(&self, p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64>;

    /// dlog_alpha += dz · ∂z/∂logα + penalty · ∂P(z ≠ 0)/∂logα, with the noise of forward. ∂z/∂logα is 0 where z was
    /// clamped; which of both a gate within its own rounding of an end is, is the backend's.
    fn hard_concrete_grad(
        &self,
        p: &HardConcrete,
        log_alpha: View,
        dz: View,
        penalty: f64,
        dlog_alpha: ViewMut,
    ) -> Result<()>;
}

impl dyn Backend + '_ {
    /// A buffer holding `values`.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer> {
        let mut buffer = self.alloc(T::DTYPE, values.len())?;
        self.write(bytemuck::cast_slice(values), buffer.view_mut())?;
        Ok(buffer)
    }

    /// A buffer of `len` times `value`.
    pub fn filled(&self, dtype: DType, len: usize, value: f64) -> Result<Buffer> {
        let mut buffer = self.alloc(dtype, len)?;
        self.fill(value, buffer.view_mut())?;
        Ok(buffer)
    }

    /// The values of a view, whose element type must be `T`.
    pub fn download<T: Element>(&self, x: View) -> Result<Vec<T>> {
        if x.dtype() != T::DTYPE {
            return Err(crate::Error::Invalid {
                kernel: "download",
                why: format!("the view is {}, expected {}", x.dtype(), T::DTYPE),
            });
        }
        let mut values = vec![T::zeroed(); x.len()];
        self.read(x, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}
