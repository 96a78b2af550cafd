//! What the optimiser remembers of a parameter: its two moments, in 32 bits or in 8.
//!
//! In 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2) an element's moments are two
//! codes, and every block of 256 elements has a scale for each: 2 bytes and 1/32 an element, for 8. A tensor of less
//! than 4096 elements has little to gain and keeps 32 bits, as with bitsandbytes.

use rankfold_adapters::adalora::Gather;
use rankfold_backend::params::{AdamW, MOMENT_BLOCK, Moment};
use rankfold_backend::{Backend, Buffer, DType, DynamicMap, Result, View, ViewMut};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Elements from which on a tensor's moments are in 8 bits, where 8 bits are asked for.
pub const LEAST_IN_8_BITS: usize = 4096;

/// What an optimiser keeps its moments in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moments {
    /// f32.
    #[default]
    F32,
    /// Codes of 8 bits in blocks of 256; f32 below [`LEAST_IN_8_BITS`] elements.
    Blockwise8,
}

impl fmt::Display for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "32 bits",
            Self::Blockwise8 => "8 bits",
        })
    }
}

impl Moments {
    /// Whether those of a tensor of `elements` elements are in 8 bits.
    pub fn are_coded(self, elements: usize) -> bool {
        self == Self::Blockwise8 && elements >= LEAST_IN_8_BITS
    }

    /// Bytes of a tensor's two moments.
    pub fn bytes(self, elements: usize) -> usize {
        match self.are_coded(elements) {
            false => 2 * size_of::<f32>() * elements,
            true => 2 * (elements + size_of::<f32>() * elements.div_ceil(MOMENT_BLOCK)),
        }
    }
}

/// A moment in 8 bits.
#[derive(Debug)]
pub struct Coded {
    /// u8 \[n\]
    pub codes: Buffer,
    /// f32 [⌈n / 256⌉]
    pub absmax: Buffer,
}

impl Coded {
    fn zero(backend: &dyn Backend, elements: usize) -> Result<Self> {
        // 0 is what an absmax of 0 says, whatever the codes.
        let codes = backend.filled(DType::U8, elements, 0.0)?;
        Ok(Self { codes, absmax: backend.filled(DType::F32, elements.div_ceil(MOMENT_BLOCK), 0.0)? })
    }

    /// The codes of a moment in f32.
    fn of(backend: &dyn Backend, moment: &Buffer, map: DynamicMap) -> Result<Self> {
        let mut coded = Self::zero(backend, moment.len())?;
        let (codes, absmax) = (coded.codes.view_mut(), coded.absmax.view_mut());
        backend.quantize_8bit(map, MOMENT_BLOCK, moment.view(), codes, absmax)?;
        Ok(coded)
    }

    /// Elements `range`, which begins with a block.
    fn part(&mut self, range: &Range<usize>) -> Result<Moment<'_>> {
        let blocks = range.start / MOMENT_BLOCK..range.end.div_ceil(MOMENT_BLOCK);
        Ok(Moment { codes: part(&mut self.codes, range)?, absmax: part(&mut self.absmax, &blocks)? })
    }
}

/// The moments of a parameter of n elements.
#[derive(Debug)]
pub enum State {
    /// Both f32 \[n\].
    F32 {
        /// The first.
        m: Buffer,
        /// The second.
        v: Buffer,
    },
    /// Both in 8 bits.
    Blockwise8 {
        /// The first, in the signed map.
        m: Coded,
        /// The second, in the unsigned map.
        v: Coded,
    },
}

impl State {
    /// Moments of 0.
    pub fn zero(backend: &dyn Backend, moments: Moments, elements: usize) -> Result<Self> {
        Ok(match moments.are_coded(elements) {
            false => {
                let zeros = || backend.filled(DType::F32, elements, 0.0);
                Self::F32 { m: zeros()?, v: zeros()? }
            }
            true => Self::Blockwise8 { m: Coded::zero(backend, elements)?, v: Coded::zero(backend, elements)? },
        })
    }

    /// What it consists of, by the end of its name in a checkpoint: `m` and `v`, in 8 bits `m.absmax` and `v.absmax`
    /// as well.
    pub fn tensors(&self) -> Vec<(&'static str, &Buffer)> {
        match self {
            Self::F32 { m, v } => vec![("m", m), ("v", v)],
            Self::Blockwise8 { m, v } => {
                vec![("m", &m.codes), ("m.absmax", &m.absmax), ("v", &v.codes), ("v.absmax", &v.absmax)]
            }
        }
    }

    /// The same, to be written.
    pub fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Buffer)> {
        match self {
            Self::F32 { m, v } => vec![("m", m), ("v", v)],
            Self::Blockwise8 { m, v } => {
                vec![("m", &mut m.codes), ("m.absmax", &mut m.absmax), ("v", &mut v.codes), ("v.absmax", &mut v.absmax)]
            }
        }
    }

    /// The moments of the elements that `gather` leaves; coded, where they are large enough, from the decoded ones.
    pub(super) fn cut(&self, backend: &dyn Backend, moments: Moments, gather: &Gather) -> crate::Result<Self> {
        let (m, v) = match self {
            Self::F32 { m, v } => (gather.of_buffer(backend, m)?, gather.of_buffer(backend, v)?),
            Self::Blockwise8 { m, v } => {
                let left = |coded: &Coded, map| -> crate::Result<Buffer> {
                    let mut decoded = backend.alloc(DType::F32, coded.codes.len())?;
                    let (codes, absmax) = (coded.codes.view(), coded.absmax.view());
                    backend.dequantize_8bit(map, MOMENT_BLOCK, codes, absmax, decoded.view_mut())?;
                    Ok(gather.of_buffer(backend, &decoded)?)
                };
                (left(m, DynamicMap::Signed)?, left(v, DynamicMap::Unsigned)?)
            }
        };
        if !moments.are_coded(m.len()) {
            return Ok(Self::F32 { m, v });
        }
        let [m, coded] = [Coded::of(backend, &m, DynamicMap::Signed)?, Coded::of(backend, &v, DynamicMap::Unsigned)?];
        // As the contract has it of `adamw_8bit`: a second moment that is not 0 is never encoded as 0.
        let mut codes = backend.download::<u8>(coded.codes.view())?;
        for (code, value) in codes.iter_mut().zip(backend.download::<f32>(v.view())?) {
            *code = if value == 0.0 { *code } else { (*code).max(1) };
        }
        Ok(Self::Blockwise8 { m, v: Coded { codes: backend.upload(&codes)?, ..coded } })
    }

    /// A step of elements `range`, which begins with a block of [`MOMENT_BLOCK`], of `grad` and `value`.
    pub(super) fn step(
        &mut self,
        backend: &dyn Backend,
        p: &AdamW,
        range: Range<usize>,
        grad: View,
        value: ViewMut,
    ) -> Result<()> {
        match self {
            Self::F32 { m, v } => backend.adamw(p, grad, value, part(m, &range)?, part(v, &range)?),
            Self::Blockwise8 { m, v } => backend.adamw_8bit(p, grad, value, m.part(&range)?, v.part(&range)?),
        }
    }
}

fn part<'a>(buffer: &'a mut Buffer, range: &Range<usize>) -> Result<ViewMut<'a>> {
    buffer.slice_mut(range.start, range.len())
}
