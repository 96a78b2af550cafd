//! Backends of tests: `reference`, but for some kernels.

/// The kernels of a group as `reference` has them, for the `impl Backend` of a backend with others of its own.
///
/// `memory`: what makes buffers and fills them from the host; `products`: those of the forward pass and of the gradients
/// by their inputs; `rest`: all others.
macro_rules! as_reference {
    (memory) => {
        as_reference! {
            fn alloc(dtype: DType, len: usize) -> Result<Buffer>;
            fn write(bytes: &[u8], out: ViewMut) -> Result<()>;
        }
    };
    (products) => {
        as_reference! {
            fn linear(p: &Linear, x: View, w: &Weight, low_rank: Option<&LowRank>, bias: Option<View>, y: ViewMut)
                -> Result<()>;
            fn linear_grad_input(
                p: &Linear, dy: View, w: &Weight, low_rank: Option<&LowRank>, accumulate: bool, dx: ViewMut
            ) -> Result<()>;
            fn attention_grad(p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()>;
        }
    };
    (rest) => {
        fn host_bytes_mut<'a>(&self, buffer: &'a mut Buffer) -> Result<Option<HostBytes<'a>>> {
            ReferenceBackend.host_bytes_mut(buffer)
        }
        as_reference! {
            fn name() -> String;
            fn read(x: View, bytes: &mut [u8]) -> Result<()>;
            fn fill(value: f64, out: ViewMut) -> Result<()>;
            fn copy(x: View, out: ViewMut) -> Result<()>;
            fn cast(x: View, out: ViewMut) -> Result<()>;
            fn scale_in_place(factor: f64, x: ViewMut) -> Result<()>;
            fn add(a: View, b: View, out: ViewMut) -> Result<()>;
            fn add_in_place(x: View, out: ViewMut) -> Result<()>;
            fn divide(a: View, b: View, out: ViewMut) -> Result<()>;
            fn sum_squares(x: View) -> Result<f64>;
            fn dropout(p: &Dropout, x: View, y: ViewMut) -> Result<()>;
            fn matmul(p: &MatMul, a: View, b: View, c: ViewMut) -> Result<()>;
            fn quantize_4bit(format: Format, block: usize, w: View, codes: ViewMut, absmax: ViewMut) -> Result<()>;
            fn quantize_scales(absmax: View, codes: ViewMut, nested: ViewMut) -> Result<f32>;
            fn dequantize_4bit(q: &Quantized, out: ViewMut) -> Result<()>;
            fn quantize_8bit(map: DynamicMap, block: usize, x: View, codes: ViewMut, absmax: ViewMut) -> Result<()>;
            fn dequantize_8bit(map: DynamicMap, block: usize, codes: View, absmax: View, out: ViewMut) -> Result<()>;
            fn linear_grad_weight(
                p: &Linear, x: View, dy: View, w: &Weight, low_rank: Option<&LowRank>, grads: LinearGrads
            ) -> Result<()>;
            fn rms_norm(p: &RmsNorm, x: View, gain: View, y: ViewMut, inv_rms: ViewMut) -> Result<()>;
            fn rms_norm_grad(
                p: &RmsNorm, x: View, gain: View, inv_rms: View, dy: View, accumulate: bool, dx: Option<ViewMut>,
                dgain: Option<ViewMut>
            ) -> Result<()>;
            fn rope(p: &Rope, x: View, positions: View, cos: View, sin: View, y: ViewMut) -> Result<()>;
            fn attention(
                p: &Attention, q: View, k: View, v: View, starts: Option<View>, out: ViewMut, lse: ViewMut
            ) -> Result<()>;
            fn silu_mul(gate: View, up: View, out: ViewMut) -> Result<()>;
            fn silu_mul_grad(gate: View, up: View, dout: View, dgate: Option<ViewMut>, dup: Option<ViewMut>)
                -> Result<()>;
            fn activate(f: Activation, x: View, y: ViewMut) -> Result<()>;
            fn activate_grad(f: Activation, x: View, dy: View, dx: ViewMut) -> Result<()>;
            fn row_norms(p: &Rows, x: View, norms: ViewMut) -> Result<()>;
            fn scale_columns(p: &Rows, x: View, factors: View, y: ViewMut) -> Result<()>;
            fn scale_columns_grad(
                p: &Rows, x: View, factors: View, dy: View, accumulate: bool, dx: Option<ViewMut>,
                dfactors: Option<ViewMut>
            ) -> Result<()>;
            fn embedding(p: &Embedding, ids: View, table: View, rows: ViewMut) -> Result<()>;
            fn embedding_grad(p: &Embedding, ids: View, drows: View, dtable: ViewMut) -> Result<()>;
            fn cross_entropy(p: &CrossEntropy, logits: View, labels: View, losses: ViewMut) -> Result<()>;
            fn cross_entropy_grad_in_place(
                p: &CrossEntropy, scale: f64, logits: ViewMut, labels: View, losses: ViewMut
            ) -> Result<()>;
            fn adamw(p: &AdamW, grad: View, param: ViewMut, m: ViewMut, v: ViewMut) -> Result<()>;
            fn adamw_8bit(p: &AdamW, grad: View, param: ViewMut, m: Moment, v: Moment) -> Result<()>;
            fn importance(
                p: &Importance, weight: View, grad: View, mean: ViewMut, deviation: ViewMut, scores: ViewMut
            ) -> Result<()>;
            fn hard_concrete(p: &HardConcrete, log_alpha: View, z: ViewMut) -> Result<f64>;
            fn hard_concrete_grad(
                p: &HardConcrete, log_alpha: View, dz: View, penalty: f64, dlog_alpha: ViewMut
            ) -> Result<()>;
        }
    };
    ($(fn $name:ident($($x:ident: $of:ty),*) -> $out:ty;)*) => {
        $(fn $name(&self, $($x: $of),*) -> $out {
            ReferenceBackend.$name($($x),*)
        })*
    };
}
