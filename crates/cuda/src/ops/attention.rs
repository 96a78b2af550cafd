//! The kernels of `kernels/attention.cu` and `kernels/attention_grad.cu`.

use crate::call::{Call, Grid, Scratch};
use crate::{Argument, CudaBackend};
use rankfold_backend::params::{Attention, Compute};
use rankfold_backend::{AttentionGrads, AttentionSaved, DType, Error, Result, View, ViewMut};

/// Queries, or keys, of a block, and its threads.
const TILE: usize = 64;
const THREADS: u32 = 256;

/// Entry points for head_dim up to 64, 128 and 256: what their blocks keep in registers.
type Kernels = [&'static str; 3];
const FORWARD: Kernels = ["attention_64_f32", "attention_128_f32", "attention_256_f32"];
const GRAD_QUERIES: Kernels = ["attention_dq_64_f32", "attention_dq_128_f32", "attention_dq_256_f32"];
const GRAD_KEYS: Kernels = ["attention_dkv_64_f32", "attention_dkv_128_f32", "attention_dkv_256_f32"];

/// The problem as the kernels take it.
struct Problem<'a> {
    p: &'a Attention,
    /// The last of every kernel's parameters.
    sizes: [Argument; 8],
    /// Which of [`Kernels`].
    width: usize,
}

impl<'a> Problem<'a> {
    /// An error where the kernels' registers or 32-bit offsets do not hold it, or a segment starts after its query.
    fn new(call: Call, p: &'a Attention, starts: Option<View>) -> Result<Self> {
        let invalid = |why: String| Error::Invalid { kernel: call.kernel, why };
        let width = match p.head_dim {
            ..=64 => 0,
            65..=128 => 1,
            129..=256 => 2,
            head_dim => return Err(invalid(format!("head_dim {head_dim}: expected at most 256"))),
        };
        let product = |sizes: [usize; 3]| sizes.into_iter().fold(1, usize::saturating_mul);
        let (q, k) = ([p.queries, p.heads, p.head_dim], [p.keys, p.kv_heads, p.head_dim]);
        for (elements, of) in [(product(q), "q"), (product(k), "k"), (p.keys, "keys"), (p.heads, "heads")] {
            if i32::try_from(elements).is_err() {
                return Err(invalid(format!("{elements} elements of {of} a sequence: expected at most 2³¹ − 1")));
            }
        }
        let size = |n: usize| Argument::from(n as u32);
        let window = p.window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
        let sizes = [
            size(p.queries),
            size(p.keys),
            size(p.kv_heads),
            size(p.heads / p.kv_heads),
            size(p.head_dim),
            p.scale.into(),
            size(p.query_offset),
            window.into(),
        ];
        if let Some(starts) = starts {
            for (row, start) in call.on_the_host::<u32>(starts)?.into_iter().enumerate() {
                p.check_start(row % p.queries, start as usize)?;
            }
        }
        Ok(Self { p, sizes, width })
    }

    /// A block for each tile of `rows` rows of each head of each sequence.
    fn launch(&self, call: Call, kernels: Kernels, [rows, heads]: [usize; 2], tensors: &[Argument]) -> Result<()> {
        let grid = Grid::cube([rows.div_ceil(TILE), heads, self.p.batch], THREADS);
        call.launch(kernels[self.width], grid, &[tensors, &self.sizes].concat())
    }
}

/// A product's input: as it is, or rounded to bf16.
struct Taken {
    argument: Argument,
    /// Keeps what was rounded until the kernels are launched.
    _rounded: Option<Scratch>,
}

impl Taken {
    fn new(call: Call, p: &Attention, x: Argument, n: usize) -> Result<Self> {
        if p.compute == Compute::F32 {
            return Ok(Self { argument: x, _rounded: None });
        }
        let rounded = call.scratch(DType::F32, n)?;
        call.launch("round_bf16_f32", Grid::stride(n), &[x, rounded.output(), (n as u64).into()])?;
        Ok(Self { argument: rounded.input(), _rounded: Some(rounded) })
    }
}

/// out and lse, by tiles of queries. In bf16, q, k and v are rounded and P is not: f32's units have no use for it, and
/// the contract's bound has room.
pub(crate) fn attention(
    on: &CudaBackend,
    p: &Attention,
    q: View,
    k: View,
    v: View,
    starts: Option<View>,
    mut out: ViewMut,
    mut lse: ViewMut,
) -> Result<()> {
    let call = on.call("attention");
    p.check(&q, &k, &v, starts.as_ref(), &out, &lse)?;
    let (q, k, v) = (call.f32("q", q)?, call.f32("k", k)?, call.f32("v", v)?);
    let starts_in = call.some_input("starts", DType::U32, starts)?;
    let (out, lse) = (call.f32_mut("out", &mut out)?, call.f32_mut("lse", &mut lse)?);
    let problem = Problem::new(call, p, starts)?;
    let q = Taken::new(call, p, q, p.query_elements())?;
    let [k, v] = [Taken::new(call, p, k, p.key_elements())?, Taken::new(call, p, v, p.key_elements())?];
    let tensors = [q.argument, k.argument, v.argument, starts_in, out, lse];
    problem.launch(call, FORWARD, [p.queries, p.heads], &tensors)
}

/// dq by tiles of queries, dk and dv by tiles of keys; before them D = Σ dout out of each query, which dv alone does
/// not take.
pub(crate) fn attention_grad(
    on: &CudaBackend,
    p: &Attention,
    saved: AttentionSaved,
    dout: View,
    grads: AttentionGrads,
) -> Result<()> {
    let call = on.call("attention_grad");
    p.check_grad(&saved, &dout, &grads)?;
    let (q, k, v) = (call.f32("q", saved.q)?, call.f32("k", saved.k)?, call.f32("v", saved.v)?);
    let starts = call.some_input("starts", DType::U32, saved.starts)?;
    let (out, lse, dout) = (call.f32("out", saved.out)?, call.f32("lse", saved.lse)?, call.f32("dout", dout)?);
    let AttentionGrads { mut dq, mut dk, mut dv } = grads;
    let [to_q, to_k, to_v] = [
        call.some_output("dq", DType::F32, &mut dq)?,
        call.some_output("dk", DType::F32, &mut dk)?,
        call.some_output("dv", DType::F32, &mut dv)?,
    ];
    let problem = Problem::new(call, p, saved.starts)?;

    let rows = p.lse_elements();
    let dots = (dq.is_some() || dk.is_some()).then(|| call.scratch(DType::F32, rows)).transpose()?;
    if let Some(dots) = &dots {
        const ROWS: usize = THREADS as usize / 32;
        let sizes = [p.queries, p.heads, p.head_dim].map(|n| Argument::from(n as u32));
        let arguments = [&[out, dout, dots.output(), (rows as u64).into()], &sizes[..]].concat();
        call.launch("attention_dots_f32", Grid::blocks(rows.div_ceil(ROWS), THREADS), &arguments)?;
    }
    let dots = dots.as_ref().map_or(Argument::input(DType::F32, 0), |dots| dots.input());
    let [q, dout] = [Taken::new(call, p, q, p.query_elements())?, Taken::new(call, p, dout, p.query_elements())?];
    let [k, v] = [Taken::new(call, p, k, p.key_elements())?, Taken::new(call, p, v, p.key_elements())?];
    let inputs = [q.argument, k.argument, v.argument, starts, dout.argument, lse, dots];
    if dq.is_some() {
        problem.launch(call, GRAD_QUERIES, [p.queries, p.heads], &[&inputs[..], &[to_q]].concat())?;
    }
    if dk.is_some() || dv.is_some() {
        problem.launch(call, GRAD_KEYS, [p.keys, p.kv_heads], &[&inputs[..], &[to_k, to_v]].concat())?;
    }
    Ok(())
}
