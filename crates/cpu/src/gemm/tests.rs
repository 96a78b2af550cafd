//! Every source, orientation, instruction set and number of threads against a naive product in f64.

use super::*;
use crate::quantize4::ScaleSlice;
use crate::simd::Units;
use crate::slices::Floats;
use half::{bf16, f16};
use proptest::prelude::*;
use rankfold_backend::{DynamicMap, Format, philox};

/// Numbers that are the same in every run.
struct Random {
    seed: u64,
    position: u64,
}

impl Random {
    fn word(&mut self) -> u32 {
        self.position += 1;
        philox::word(self.seed, 0, self.position)
    }

    fn uniform(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * philox::unit(self.word())
    }

    fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.uniform(-1.0, 1.0)).collect()
    }
}

/// A stored right operand that owns its memory, and the values that the contract gives it.
struct Stored {
    kind: usize,
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    f16s: Vec<f16>,
    codes: Vec<u8>,
    absmax: Vec<f32>,
    scale_codes: Vec<u8>,
    block: usize,
}

const KINDS: usize = 5;
const OFFSET: f32 = 0.31;

impl Stored {
    fn random(rng: &mut Random, kind: usize, len: usize) -> Self {
        let block = 32 << (rng.word() % 3);
        let blocks = len.div_ceil(block);
        let f32s = rng.vector(len);
        Self {
            kind,
            bf16s: f32s.iter().map(|x| bf16::from_f32(*x)).collect(),
            f16s: f32s.iter().map(|x| f16::from_f32(*x)).collect(),
            codes: (0..len.div_ceil(2)).map(|_| rng.word() as u8).collect(),
            absmax: (0..blocks).map(|_| rng.uniform(0.5, 2.0)).collect(),
            scale_codes: (0..blocks).map(|_| rng.word() as u8).collect(),
            f32s,
            block,
        }
    }

    fn slice(&self) -> WeightSlice<'_> {
        let scales = match self.kind {
            0 => return WeightSlice::Dense(Floats::F32(&self.f32s)),
            1 => return WeightSlice::Dense(Floats::Bf16(&self.bf16s)),
            2 => return WeightSlice::Dense(Floats::F16(&self.f16s)),
            3 => ScaleSlice::Plain(&self.absmax),
            _ => ScaleSlice::nested(&self.scale_codes, &self.absmax, OFFSET),
        };
        WeightSlice::Quantized(QuantSlice { codes: &self.codes, scales, format: self.format(), block: self.block })
    }

    fn format(&self) -> Format {
        Format::ALL[self.block.trailing_zeros() as usize % 3]
    }

    fn value(&self, i: usize) -> f32 {
        let scale = match self.kind {
            0 => return self.f32s[i],
            1 => return self.bf16s[i].to_f32(),
            2 => return self.f16s[i].to_f32(),
            3 => self.absmax[i / self.block],
            _ => {
                let b = i / self.block;
                DynamicMap::Signed.values()[usize::from(self.scale_codes[b])] * self.absmax[b / 256] + OFFSET
            }
        };
        let byte = self.codes[i / 2];
        self.format().values()[usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })] * scale
    }
}

struct Case {
    compute: Compute,
    m: usize,
    n: usize,
    ks: Vec<usize>,
    accumulate: bool,
    finish: bool,
    left_transposed: bool,
    right_transposed: bool,
    kind: usize,
    seed: u64,
}

impl Case {
    /// The product on every instruction set, at 1, 2 and 3 threads, and with the rows in two calls.
    fn check(&self) {
        let Self { m, n, compute, .. } = *self;
        let taken = |x: f32| match compute {
            Compute::F32 => f64::from(x),
            Compute::Bf16 => f64::from(bf16::from_f32(x)),
        };
        let rng = &mut Random { seed: self.seed, position: 0 };
        let lefts: Vec<Vec<f32>> = self.ks.iter().map(|k| rng.vector(m * k)).collect();
        let (before, scale, bias) = (rng.vector(m * n), rng.vector(n), rng.vector(n));
        let rights: Vec<Stored> = self.ks.iter().map(|k| Stored::random(rng, self.kind, k * n)).collect();
        let term = |t: usize| {
            let (k, left, right) = (self.ks[t], &lefts[t], rights[t].slice());
            Term {
                left: if self.left_transposed { Left::transposed(left, m) } else { Left::rows(left, k) },
                right: if self.right_transposed { Right::transposed(right, k) } else { Right::rows(right, n) },
                k,
            }
        };
        let terms: Vec<Term> = (0..self.ks.len()).map(term).collect();
        let run = |threads: usize, isa: Isa| {
            let mut c = before.clone();
            let output = Output {
                accumulate: self.accumulate,
                scale: self.finish.then_some(&scale[..]),
                bias: self.finish.then_some(&bias[..]),
                ..Output::new(&mut c, m, n)
            };
            Gemm { threads: &Threads::new(Some(threads)), isa, compute }.product(&terms, output);
            c
        };

        let mut exact = vec![(0.0f64, 0.0f64); m * n];
        for (t, &k) in self.ks.iter().enumerate() {
            for (i, (sum, magnitude)) in exact.iter_mut().enumerate() {
                let (row, column) = (i / n, i % n);
                for j in 0..k {
                    let a = lefts[t][if self.left_transposed { j * m + row } else { row * k + j }];
                    let b = rights[t].value(if self.right_transposed { column * k + j } else { j * n + column });
                    *sum += taken(a) * taken(b);
                    *magnitude += (taken(a) * taken(b)).abs();
                }
            }
        }
        let depth: usize = self.ks.iter().sum();
        let emulated = [Units::None, Units::Pairs, Units::Tiles].map(Isa::portable_16);
        for isa in Isa::available().into_iter().chain(emulated) {
            let found = run(1, isa);
            for (i, (sum, magnitude)) in exact.iter().enumerate() {
                let (mut sum, mut magnitude) = (*sum, *magnitude);
                if self.accumulate {
                    sum += f64::from(before[i]);
                    magnitude += f64::from(before[i]).abs();
                }
                if self.finish {
                    let (g, b) = (f64::from(scale[i % n]), f64::from(bias[i % n]));
                    (sum, magnitude) = (sum * g + b, magnitude * g.abs() + b.abs());
                }
                // A chain of k FMAs rounds k times, plain Rust's k products in f32 once more each; one more rounding to
                // add to c, one for the scale, one for the bias, and one in place of the terms of second order. Products
                // of bf16 are exact; AMX adds two chains and what they were added to.
                let fused = !isa.to_string().starts_with("portable") || compute == Compute::Bf16;
                let roundings = if fused { depth + 2 * depth.div_ceil(32) } else { 2 * depth };
                let bound = (roundings as f64 + 4.0) * 2f64.powi(-24) * magnitude;
                assert!((f64::from(found[i]) - sum).abs() <= bound, "{isa} [{i}]: {} for {sum} ± {bound}", found[i]);
            }
            for threads in [2, 3] {
                assert_eq!(run(threads, isa), found, "{isa}, {threads} threads");
            }
            // Other rows beside it, other tiles: the same bits, where both are few or neither is.
            let rows = m / 2;
            if m > 1 && !self.left_transposed && few::serves(&terms, rows) == few::serves(&terms, m) {
                let halves: Vec<Term> = (terms.iter().zip(&lefts))
                    .map(|(term, left)| Term { left: Left::rows(&left[..rows * term.k], term.k), ..*term })
                    .collect();
                let mut c = before[..rows * n].to_vec();
                let output = Output { accumulate: self.accumulate, ..Output::new(&mut c, rows, n) };
                let gemm = Gemm { threads: &Threads::new(Some(2)), isa, compute };
                if !self.finish {
                    gemm.product(&halves, output);
                    assert_eq!(c, found[..rows * n], "{isa}, half of the rows");
                }
            }
        }
    }
}

/// Dimensions with everything around the tiles' and blocks' edges.
fn dimension(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![0..4usize, 1..40usize, 1..=most, Just(16), Just(256), Just(257)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn products_are_within_the_bound_and_equal_at_any_number_of_threads(
        m in dimension(90),
        n in dimension(150),
        ks in prop::collection::vec(dimension(530), 1..3),
        [accumulate, finish, left_transposed, right_transposed] in any::<[bool; 4]>(),
        kind in 0..KINDS,
        bf16 in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let compute = if bf16 { Compute::Bf16 } else { Compute::F32 };
        Case { compute, m, n, ks, accumulate, finish, left_transposed, right_transposed, kind, seed }.check();
    }
}

#[test]
fn products_beyond_one_block_of_rows_and_one_group_of_k() {
    for (kind, compute) in [(0, Compute::F32), (4, Compute::F32), (0, Compute::Bf16), (4, Compute::Bf16)] {
        let case = Case {
            compute,
            m: ROWS + 3,
            n: 37,
            ks: vec![if compute == Compute::Bf16 { 2 } else { 1 } * GROUP + 70, 16],
            accumulate: false,
            finish: true,
            left_transposed: false,
            right_transposed: kind == 0,
            kind,
            seed: 7,
        };
        case.check();
    }
}
