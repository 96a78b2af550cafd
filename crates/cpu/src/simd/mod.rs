//! One vector type, three instruction sets.
//!
//! A kernel is written once, generic over `Simd`, as a struct that implements `Kernel`; `Isa::run` enters a
//! function compiled for the chosen instruction set and everything below it is inlined there. So nothing but this
//! folder names an intrinsic, and the same source runs on all machines.
//!
//! Read `Simd` first, then `portable.rs`, which says in plain Rust what each method means.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
mod float;
mod math;
mod portable;
pub(crate) mod tiles;

pub(crate) use bf16::Bf16Units;
pub(crate) use float::Float;
pub(crate) use math::{exp, sigmoid, tanh};
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use {avx2::Avx2, avx512::Avx512};

use std::fmt;

/// A vector of f32 on one instruction set. The type itself is a zero-sized token.
///
/// # Safety
/// Every method may use the instruction set's instructions: it must only be called where they exist, which
/// [`Isa::run`] guarantees. Pointers must be valid for the elements that the method's comment names; none need be
/// aligned.
pub(crate) unsafe trait Simd: Copy + Send + Sync + 'static {
    /// The vector.
    type V: Copy;
    /// Sixteen f32 values, ready for lookups.
    type Table: Copy;
    /// Elements of a vector: 8 or 16.
    const LANES: usize;
    /// Vectors that the registers hold: 8, 16 or 32.
    const REGISTERS: usize;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// LANES elements.
    unsafe fn load(p: *const f32) -> Self::V;
    /// LANES elements.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The first `n` < LANES elements, 0 in the rest.
    unsafe fn load_first(p: *const f32, n: usize) -> Self::V;
    /// Only the first `n` < LANES elements.
    unsafe fn store_first(p: *mut f32, v: Self::V, n: usize);
    /// LANES bf16 elements, widened.
    unsafe fn load_bf16(p: *const half::bf16) -> Self::V;
    /// LANES f16 elements, widened.
    unsafe fn load_f16(p: *const half::f16) -> Self::V;

    /// To the nearest bf16, ties to even; a NaN stays one.
    unsafe fn round_bf16(a: Self::V) -> Self::V;
    /// LANES elements, rounded to nearest even; a NaN stays one.
    unsafe fn store_bf16(p: *mut half::bf16, v: Self::V);
    /// LANES elements, rounded to nearest even; a NaN stays one.
    unsafe fn store_f16(p: *mut half::f16, v: Self::V);

    /// a + b
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c: one rounding where the machine has it, two on `Portable`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// |a|
    unsafe fn abs(a: Self::V) -> Self::V;
    /// √a
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even; |a| < 2³¹.
    unsafe fn round(a: Self::V) -> Self::V;
    /// a · 2ⁿ for integral n in [−252, 254]; a denormal result may be rounded twice.
    unsafe fn scale_exp2(a: Self::V, n: Self::V) -> Self::V;

    /// The sum of all lanes, by halves: (0+8)(…) first at 16 lanes, then (0+4), (0+2), (0+1).
    unsafe fn sum(a: Self::V) -> f32;
    /// The largest lane.
    unsafe fn max_lane(a: Self::V) -> f32;

    /// Make a table.
    unsafe fn table(values: &[f32; 16]) -> Self::Table;
    /// LANES values by the nibbles of LANES/2 bytes, the high nibble of each byte first.
    unsafe fn lookup_nibbles(table: Self::Table, p: *const u8) -> Self::V;

    /// The inverse of lookup: each lane gets the code `codes[i]` with i the number of thresholds (ascending, padded
    /// with +∞) that it exceeds; LANES/2 bytes are written, the first lane of a pair in the high nibble. `codes`
    /// holds integers as the bits of f32s.
    unsafe fn encode_nibbles(thresholds: Self::Table, codes: Self::Table, v: Self::V, p: *mut u8);

    /// The same for [`ENCODED`] elements: the first ENCODED / LANES vectors of `v`, 16 bytes.
    #[inline(always)]
    unsafe fn encode_many(thresholds: Self::Table, codes: Self::Table, v: [Self::V; 4], p: *mut u8) {
        for (i, v) in v.into_iter().take(ENCODED / Self::LANES).enumerate() {
            // SAFETY: the caller's.
            unsafe { Self::encode_nibbles(thresholds, codes, v, p.add(i * Self::LANES / 2)) }
        }
    }

    /// Ask for the cache line of an address, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    /// Transpose a LANES × LANES tile in place: lane j of row i becomes lane i of row j.
    /// `rows` has LANES entries.
    unsafe fn transpose(rows: &mut [Self::V]);
}

/// Elements of [`Simd::encode_many`]: the least block of a quantised weight.
pub(crate) const ENCODED: usize = 32;

/// Work that [`Isa::run`] runs on some instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Do it. Implementations are `#[inline(always)]`, and so is everything generic that they call.
    ///
    /// # Safety
    /// The instruction set of `S` exists on this machine.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Work that [`Isa::run_bf16`] runs on a machine with bf16 units.
pub(crate) trait Bf16Kernel {
    /// What it returns.
    type Output;
    /// Do it, as [`Kernel::run`].
    ///
    /// # Safety
    /// The instruction set of `S` exists on this machine, its bf16 units too, and `S::Tiles` where [`Isa::units`] says.
    unsafe fn run<S: Bf16Units>(self) -> Self::Output;
}

/// The units of a machine that multiply bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Units {
    /// It has none: bf16 are widened.
    None,
    /// Pairs in vectors: [`Bf16Units`].
    Pairs,
    /// Matrices: [`tiles`], and pairs too.
    Tiles,
}

/// An instruction set that the kernels are compiled for, and that this machine has: only [`Isa::available`] and
/// [`Isa::PORTABLE`] are values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// AVX-512 with its bf16, and AMX's tiles: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with its bf16: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA, F16C: 8 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain Rust: 8 lanes, left to the compiler.
    Portable,
    /// Plain Rust at AVX-512's width, so that its tiles are tried on any machine; bf16 units in plain Rust too.
    #[cfg(test)]
    Portable16(Units),
}

impl Isa {
    /// Plain Rust, which every machine runs.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// AVX-512's width in plain Rust.
    #[cfg(test)]
    pub(crate) const fn portable_16(units: Units) -> Self {
        Self(Set::Portable16(units))
    }

    /// The instruction sets of this machine, the fastest first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = is_x86_feature_detected!("avx512bf16");
            let sets = [
                (Set::Amx, avx2 && avx512 && bf16 && tiles::usable()),
                (Set::Avx512Bf16, avx2 && avx512 && bf16),
                (Set::Avx512, avx2 && avx512),
                (Set::Avx2, avx2),
            ];
            found.extend(sets.into_iter().filter(|(_, is_there)| *is_there).map(|(set, _)| Self(set)));
        }
        found.push(Self::PORTABLE);
        found
    }

    /// The one of [`Isa::available`] with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.to_string() == name)
    }

    /// Whether it multiplies bf16 in units of their own.
    pub fn has_bf16_units(self) -> bool {
        self.units() != Units::None
    }

    /// What it multiplies bf16 with.
    pub(crate) fn units(self) -> Units {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Amx => Units::Tiles,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => Units::Pairs,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Avx2 => Units::None,
            Set::Portable => Units::None,
            #[cfg(test)]
            Set::Portable16(units) => units,
        }
    }

    /// Run `kernel` on this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available`, which asked the processor, is the one place that makes these values.
            Set::Amx | Set::Avx512Bf16 | Set::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: plain Rust runs everywhere.
            Set::Portable => unsafe { kernel.run::<Portable<8>>() },
            #[cfg(test)]
            // SAFETY: as above.
            Set::Portable16(_) => unsafe { kernel.run::<Portable<16>>() },
        }
    }

    /// Run `kernel` on this instruction set's bf16 units.
    ///
    /// # Panics
    /// Where it has none: see [`Isa::units`].
    #[inline]
    pub(crate) fn run_bf16<K: Bf16Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as in `run`.
            Set::Amx | Set::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
            #[cfg(test)]
            // SAFETY: plain Rust runs everywhere.
            Set::Portable16(_) => unsafe { kernel.run::<Portable<16>>() },
            _ => unreachable!("{self} has no bf16 units"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn run_avx512_bf16<K: Bf16Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's machine has the features of this function.
    unsafe { kernel.run::<Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's machine has the features of this function.
    unsafe { kernel.run::<Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's machine has the features of this function.
    unsafe { kernel.run::<Avx2>() }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            Set::Portable => "portable",
            #[cfg(test)]
            Set::Portable16(Units::None) => "portable16",
            #[cfg(test)]
            Set::Portable16(Units::Pairs) => "portable16, pairs",
            #[cfg(test)]
            Set::Portable16(Units::Tiles) => "portable16, tiles",
        })
    }
}

#[cfg(test)]
mod tests;
