//! The kernels of `kernels/attention.cu` and `kernels/attention_grad.cu`, and in bf16, on tensor cores, those of
//! `kernels/attention_mma.cu` and `kernels/attention_mma_grad.cu`.

use super::elementwise::cast_at;
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

/// Entry points on tensor cores, for head_dim up to 64 and 128, and the tiles that their blocks keep in shared memory.
struct MmaKernels {
    names: [&'static str; 2],
    /// Rows of all tiles, stages counted.
    rows: usize,
    /// Bytes beside them.
    beside: usize,
}
const MMA_FORWARD: MmaKernels =
    MmaKernels { names: ["attention_mma_64", "attention_mma_128"], rows: STAGES * 2 * TILE, beside: 0 };
const MMA_GRAD_QUERIES: MmaKernels =
    MmaKernels { names: ["attention_dq_mma_64", "attention_dq_mma_128"], rows: STAGES * 2 * WALKED, beside: 0 };
const MMA_GRAD_KEYS: MmaKernels = MmaKernels {
    names: ["attention_dkv_mma_64", "attention_dkv_mma_128"],
    rows: 2 * TILE + STAGES * 2 * WALKED,
    beside: STAGES * WALKED * COLUMN,
};
/// Threads of their blocks, elements behind each row of a tile, stages, rows that a gradient's block walks at a time,
/// and bytes of `struct Column`.
const MMA_THREADS: u32 = 128;
const PAD: usize = 8;
const STAGES: usize = 2;
const WALKED: usize = 32;
const COLUMN: usize = 16;

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
    fn new(call: &Call, p: &'a Attention, starts: Option<View>) -> Result<Self> {
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
            for (row, start) in call.on_the_host::<u32>("starts", starts)?.into_iter().enumerate() {
                p.check_start(row % p.queries, start as usize)?;
            }
        }
        Ok(Self { p, sizes, width })
    }

    /// Whether tensor cores are for it. Their softmax takes the largest product of q and k for the largest score.
    fn is_for_tensor_cores(&self) -> bool {
        let p = self.p;
        p.compute == Compute::Bf16 && p.head_dim.is_multiple_of(16) && (16..=128).contains(&p.head_dim) && p.scale > 0.0
    }

    /// A block for each tile of `rows` rows of each head of each sequence.
    fn launch(&self, call: &Call, kernels: Kernels, rows: [usize; 2], tensors: &[Argument]) -> Result<()> {
        call.launch(kernels[self.width], self.grid(rows, THREADS), &[tensors, &self.sizes].concat())
    }

    /// The same on tensor cores.
    fn launch_mma(&self, call: &Call, kernels: MmaKernels, rows: [usize; 2], tensors: &[Argument]) -> Result<()> {
        let width = [64, 128][self.width];
        let grid =
            self.grid(rows, MMA_THREADS).shared(kernels.rows * (width + PAD) * size_of::<u16>() + kernels.beside);
        call.launch(kernels.names[self.width], grid, &[tensors, &self.sizes].concat())
    }

    fn grid(&self, [rows, heads]: [usize; 2], threads: u32) -> Grid {
        Grid::cube([rows.div_ceil(TILE), heads, self.p.batch], threads)
    }
}

/// A product's input: as it is, or rounded to bf16.
struct Taken {
    argument: Argument,
    /// Keeps what was rounded until the kernels are launched.
    _rounded: Option<Scratch>,
}

impl Taken {
    fn new(call: &Call, p: &Attention, x: Argument, n: usize) -> Result<Self> {
        if p.compute == Compute::F32 {
            return Ok(Self { argument: x, _rounded: None });
        }
        let rounded = call.scratch(DType::F32, n)?;
        call.launch("round_bf16_f32", Grid::stride(n), &[x, rounded.output(), (n as u64).into()])?;
        Ok(Self { argument: rounded.input(), _rounded: Some(rounded) })
    }
}

/// A tensor in bf16.
fn in_bf16(call: &Call, x: Argument, n: usize) -> Result<Scratch> {
    let rounded = call.scratch(DType::Bf16, n)?;
    cast_at(call, (DType::F32, x.value()), (DType::Bf16, rounded.at(0)), n)?;
    Ok(rounded)
}

/// out and lse, by tiles of queries. In bf16 without tensor cores, q, k and v are rounded and P is not: f32's units
/// have no use for it, and the contract's bound has room.
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
    let call = &on.call("attention");
    p.check(&q, &k, &v, starts.as_ref(), &out, &lse)?;
    let (q, k, v) = (call.f32("q", q)?, call.f32("k", k)?, call.f32("v", v)?);
    let starts_in = call.some_input("starts", DType::U32, starts)?;
    let (out, lse) = (call.f32_mut("out", &mut out)?, call.f32_mut("lse", &mut lse)?);
    let problem = Problem::new(call, p, starts)?;
    if problem.is_for_tensor_cores() {
        let [k, v] = [in_bf16(call, k, p.key_elements())?, in_bf16(call, v, p.key_elements())?];
        let tensors = [q, k.input(), v.input(), starts_in, out, lse];
        return problem.launch_mma(call, MMA_FORWARD, [p.queries, p.heads], &tensors);
    }
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
    let call = &on.call("attention_grad");
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
    if problem.is_for_tensor_cores() {
        let [held_k, held_v] = [in_bf16(call, k, p.key_elements())?, in_bf16(call, v, p.key_elements())?];
        let [k, v] = [held_k.input(), held_v.input()];
        if dq.is_some() {
            let tensors = [q, k, v, starts, dout, lse, dots, to_q];
            problem.launch_mma(call, MMA_GRAD_QUERIES, [p.queries, p.heads], &tensors)?;
        }
        if dk.is_some() || dv.is_some() {
            let [q, dout] = [in_bf16(call, q, p.query_elements())?, in_bf16(call, dout, p.query_elements())?];
            let tensors = [q.input(), k, v, starts, dout.input(), lse, dots, to_k, to_v];
            problem.launch_mma(call, MMA_GRAD_KEYS, [p.keys, p.kv_heads], &tensors)?;
        }
        return Ok(());
    }
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
