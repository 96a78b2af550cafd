//! The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6): out = silu(gate) · up, silu(g) = g·σ(g).

use crate::elementwise::CHUNK;
use crate::simd::{Float, Isa, Kernel, Simd, sigmoid};
use crate::threads::{Disjoint, Threads};

/// out = gate · σ(gate) · up
pub(crate) fn silu_mul(threads: &Threads, isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (len, out) = (out.len(), Disjoint::new(out));
    threads.run_chunks(len, CHUNK, |range| {
        // SAFETY: the ranges of two tasks do not overlap.
        isa.run(Forward { gate: &gate[range.clone()], up: &up[range.clone()], out: unsafe { out.get(range) } });
    });
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.out.len();
        assert!(self.gate.len() == len && self.up.len() == len);
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: elements i … i + n − 1 of all three.
            unsafe {
                let gate = f32::load_part::<S>(self.gate.as_ptr().add(i), n);
                let up = f32::load_part::<S>(self.up.as_ptr().add(i), n);
                let out = S::mul(S::mul(gate, sigmoid::<S>(gate)), up);
                f32::store_part::<S>(self.out.as_mut_ptr().add(i), out, n);
            }
        }
    }
}

/// dgate = dout · up · σ(1 + gate(1 − σ)), from silu' = σ + gate·σ' and σ' = σ(1 − σ); dup = dout · gate · σ.
pub(crate) fn silu_mul_grad(threads: &Threads, isa: Isa, inputs: [&[f32]; 3], outputs: [Option<&mut [f32]>; 2]) {
    let (len, outputs) = (inputs[0].len(), outputs.map(|out| out.map(Disjoint::new)));
    threads.run_chunks(len, CHUNK, |range| {
        let inputs = inputs.map(|x| &x[range.clone()]);
        // SAFETY: the ranges of two tasks do not overlap.
        let outputs = outputs.map(|out| out.map(|out| unsafe { out.get(range.clone()) }));
        isa.run(Backward { inputs, outputs });
    });
}

struct Backward<'a> {
    /// gate, up, dout
    inputs: [&'a [f32]; 3],
    /// dgate, dup
    outputs: [Option<&'a mut [f32]>; 2],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let ([gates, ups, douts], [mut dgate, mut dup]) = (self.inputs, self.outputs);
        let len = gates.len();
        assert!(ups.len() == len && douts.len() == len);
        assert!([&dgate, &dup].into_iter().flatten().all(|out| out.len() == len));
        for i in (0..len).step_by(S::LANES) {
            let n = S::LANES.min(len - i);
            // SAFETY: elements i … i + n − 1 of the inputs and of each output that is asked for.
            unsafe {
                let gate = f32::load_part::<S>(gates.as_ptr().add(i), n);
                let dout = f32::load_part::<S>(douts.as_ptr().add(i), n);
                let (sigma, one) = (sigmoid::<S>(gate), S::splat(1.0));
                if let Some(dgate) = &mut dgate {
                    let up = f32::load_part::<S>(ups.as_ptr().add(i), n);
                    let slope = S::mul(sigma, S::add(one, S::mul(gate, S::sub(one, sigma))));
                    f32::store_part::<S>(dgate.as_mut_ptr().add(i), S::mul(S::mul(dout, up), slope), n);
                }
                if let Some(dup) = &mut dup {
                    f32::store_part::<S>(dup.as_mut_ptr().add(i), S::mul(S::mul(gate, sigma), dout), n);
                }
            }
        }
    }
}
