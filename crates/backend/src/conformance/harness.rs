//! Running a law: cases, guarded memory, comparison.

use super::bound::OVERFLOW;
use crate::{Backend, Buffer, DType, Element, Error, Result, View, ViewMut};
use bytemuck::Pod;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner, contextualize_config};
use std::cell::Cell;
use std::fmt::{Debug, Display};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What a law says of a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every case agreed.
    Holds {
        /// A digest of all that the candidate computed: the same for two backends that give the same bits.
        bits: u64,
    },
    /// The candidate does not serve what the law is about, and says so.
    Skipped(String),
    /// A case that disagrees: the smallest that was found, and how.
    Broken(String),
}

/// Checks `law` on `cases` cases of `strategy`, from a seed that is always the same unless the environment says
/// otherwise. A failing case is shrunk for ten seconds at most.
pub fn check<S: Strategy>(cases: u32, strategy: &S, law: impl Fn(S::Value) -> TestCaseResult) -> Verdict
where
    S::Value: Debug,
{
    let most = MOST_CASES.get();
    let config = contextualize_config(Config {
        cases: most.map_or(cases, |most| cases.min(most)),
        rng_seed: RngSeed::Fixed(0),
        failure_persistence: None,
        max_shrink_time: 10_000,
        max_shrink_iters: if most.is_some() { 0 } else { u32::MAX },
        ..Config::default()
    });
    BITS.set(0);
    match TestRunner::new(config).run(strategy, law) {
        Ok(()) => Verdict::Holds { bits: BITS.get() },
        Err(broken) => Verdict::Broken(broken.to_string()),
    }
}

/// What `run` gives with at most `cases` cases a law, none of which is shrunk: for the same laws many times over.
pub fn few_cases<T>(cases: u32, run: impl FnOnce() -> T) -> T {
    MOST_CASES.set(Some(cases));
    let outcome = run();
    MOST_CASES.set(None);
    outcome
}

thread_local! {
    static MOST_CASES: Cell<Option<u32>> = const { Cell::new(None) };
    /// The digest of what [`twice`] has seen since [`check`] began; a law runs on one thread.
    static BITS: Cell<u64> = const { Cell::new(0) };
}

/// The outcome of one case.
pub type TestCaseResult<T = ()> = std::result::Result<T, TestCaseError>;

/// A verdict on what needs no random cases.
pub fn once(law: impl FnOnce() -> TestCaseResult) -> Verdict {
    law().map_or_else(|broken| Verdict::Broken(broken.to_string()), |()| Verdict::Holds { bits: 0 })
}

/// A float type that the suite computes in: f32 on the candidate, f64 on the oracle.
pub trait Real: Element {
    /// An f32 in this type, exactly.
    fn of(value: f32) -> Self;
}

impl Real for f32 {
    fn of(value: f32) -> Self {
        value
    }
}

impl Real for f64 {
    fn of(value: f32) -> Self {
        value.into()
    }
}

/// Elements on either side of a tensor that no kernel may touch.
const GUARD: usize = 16;
/// The guard's bytes. As f32 5.9e-14, so that a sum that reaches beyond its slice is off by little but off.
const GUARD_BYTE: u8 = 0x29;
/// An output's bytes before the kernel: NaN in every float type.
const BLANK_BYTE: u8 = 0xff;

/// Where tensors are put on a backend: each at another offset of a buffer of its own, between guards.
pub struct Desk<'a> {
    /// The backend.
    pub backend: &'a dyn Backend,
    next: Cell<usize>,
}

impl<'a> Desk<'a> {
    /// Offsets that depend on `seed`.
    pub fn new(backend: &'a dyn Backend, seed: u64) -> Self {
        Self { backend, next: Cell::new(seed as usize % (GUARD + 1)) }
    }

    fn place(&self, dtype: DType, bytes: &[u8]) -> Result<Placed> {
        // A stride coprime to 17 visits every offset from 0 to 16.
        let offset = self.next.replace((self.next.get() + 5) % (GUARD + 1));
        let (before, len) = (offset * dtype.size(), bytes.len() / dtype.size());
        let mut whole = vec![GUARD_BYTE; bytes.len() + (offset + GUARD) * dtype.size()];
        whole[before..before + bytes.len()].copy_from_slice(bytes);
        let mut buffer = self.backend.alloc(dtype, offset + len + GUARD)?;
        self.backend.write(&whole, buffer.view_mut())?;
        Ok(Placed { buffer, offset, len })
    }

    /// Values to read, or to work on in place.
    pub fn put<T: Element>(&self, values: &[T]) -> Result<Placed> {
        self.place(T::DTYPE, bytemuck::cast_slice(values))
    }

    /// The same in the type that the suite computes in.
    pub fn real<T: Real>(&self, values: &[f32]) -> Result<Placed> {
        self.put(&values.iter().map(|&value| T::of(value)).collect::<Vec<T>>())
    }

    /// `len` elements to be written: NaN, or all bits set.
    pub fn blank(&self, dtype: DType, len: usize) -> Result<Placed> {
        self.place(dtype, &vec![BLANK_BYTE; len * dtype.size()])
    }

    /// A blank output, or one that is added to.
    pub fn output<T: Real>(&self, accumulate: bool, initial: &[f32]) -> Result<Placed> {
        if accumulate { self.real::<T>(initial) } else { self.blank(T::DTYPE, initial.len()) }
    }

    /// The values of an output, or an error where a guard was touched.
    pub fn take<T: Element>(&self, placed: &Placed) -> TestCaseResult<Vec<T>> {
        let mut whole = vec![T::zeroed(); placed.buffer.len()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut whole);
        self.backend.read(placed.buffer.view(), bytes)?;
        let [start, end] = [placed.offset, placed.offset + placed.len].map(|element| element * size_of::<T>());
        let touched = bytes[..start].iter().chain(&bytes[end..]).any(|&byte| byte != GUARD_BYTE);
        prop_assert!(!touched, "memory beside the output was written");
        Ok(whole[placed.offset..placed.offset + placed.len].to_vec())
    }
}

/// A tensor between its guards.
pub struct Placed {
    buffer: Buffer,
    offset: usize,
    len: usize,
}

impl Placed {
    /// The tensor, to read.
    pub fn view(&self) -> View<'_> {
        self.buffer.slice(self.offset, self.len).expect("it was put there")
    }

    /// The tensor, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        self.buffer.slice_mut(self.offset, self.len).expect("it was put there")
    }
}

/// A kernel's outputs.
pub type Outputs<T> = Vec<Vec<T>>;

/// Outputs as bytes, one after another.
pub trait Bits {
    /// The bytes.
    fn bits(&self) -> Vec<u8>;
}

impl<T: Pod> Bits for Outputs<T> {
    fn bits(&self) -> Vec<u8> {
        self.iter().flat_map(|output| bytemuck::cast_slice(output)).copied().collect()
    }
}

impl Bits for (Vec<u8>, Vec<f32>) {
    fn bits(&self) -> Vec<u8> {
        [&self.0[..], bytemuck::cast_slice(&self.1)].concat()
    }
}

impl Bits for (Vec<f32>, f64) {
    fn bits(&self) -> Vec<u8> {
        [bytemuck::cast_slice(&self.0), bytemuck::bytes_of(&self.1)].concat()
    }
}

/// Runs the candidate twice: the same call gives the same bits.
pub fn twice<R: Bits>(run: impl Fn() -> TestCaseResult<R>) -> TestCaseResult<R> {
    let (first, second) = (run()?, run()?);
    let bits = first.bits();
    prop_assert!(bits == second.bits(), "the same call gave other bits");
    let mut hasher = DefaultHasher::new();
    (BITS.get(), bits).hash(&mut hasher);
    BITS.set(hasher.finish());
    Ok(first)
}

/// That every element of the candidate is within its bound of the oracle's; NaN where the oracle has NaN, the same
/// infinity where it has one, and an infinity of its own only where the bound reaches beyond the largest f32.
pub fn agree(tensor: &str, candidate: &[f32], oracle: &[f64], bound: impl Fn(usize) -> f64) -> TestCaseResult {
    prop_assert_eq!(candidate.len(), oracle.len(), "{}: lengths", tensor);
    for (i, (&found, &exact)) in candidate.iter().zip(oracle).enumerate() {
        let value = f64::from(found);
        let agrees = if !exact.is_finite() {
            value == exact || value.is_nan() && exact.is_nan()
        } else if value.is_infinite() {
            value * exact > 0.0 && exact.abs() + bound(i) >= OVERFLOW
        } else {
            let bound = bound(i);
            prop_assert!(bound.is_finite(), "{tensor}[{i}]: the suite's bound is {bound}");
            (value - exact).abs() <= bound
        };
        if !agrees {
            let (error, bound) = (value - exact, bound(i));
            let message =
                format!("{tensor}[{i}] is {found:e}, the oracle's {exact:e}: off by {error:e}, bound {bound:e}");
            return Err(TestCaseError::fail(message));
        }
    }
    Ok(())
}

/// That two outputs have the same bits, any NaN being like any other.
pub fn same<T: Pod + PartialEq + Display>(tensor: &str, candidate: &[T], oracle: &[T]) -> TestCaseResult {
    prop_assert_eq!(candidate.len(), oracle.len(), "{}: lengths", tensor);
    for (i, (found, expected)) in candidate.iter().zip(oracle).enumerate() {
        // Only NaN differs from itself.
        #[allow(clippy::eq_op)]
        let both_nan = found != found && expected != expected;
        let equal = bytemuck::bytes_of(found) == bytemuck::bytes_of(expected);
        prop_assert!(both_nan || equal, "{tensor}[{i}] is {found}, expected {expected} to the bit");
    }
    Ok(())
}

/// That in a call that asks for some of a kernel's outputs, these have the bits that they have where all are asked for.
pub fn same_where_asked<const N: usize>(
    tensors: [&str; N],
    asked: [bool; N],
    some: &Outputs<f32>,
    all: &Outputs<f32>,
) -> TestCaseResult {
    (0..N).filter(|&i| asked[i]).try_for_each(|i| same(tensors[i], &some[i], &all[i]))
}

/// Why the candidate cannot be judged, where its answer to a trial call is [`Error::Unsupported`].
pub fn unsupported(trial: Result<()>) -> Option<Verdict> {
    match trial {
        Err(error @ Error::Unsupported { .. }) => Some(Verdict::Skipped(error.to_string())),
        _ => None,
    }
}
