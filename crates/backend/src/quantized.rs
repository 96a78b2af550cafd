//! A weight in 4 bits: codes, the scales of its blocks, and the one way to make it.

use crate::params::{elements, expect};
use crate::{Backend, Buffer, DType, DynamicMap, Error, Format, NESTED_BLOCK, Result, View};

/// A matrix [outputs, inputs] as 4-bit codes of its flattened row-major elements, scaled block by block.
///
/// Element i is `format.values()[code_i] · absmax_(i / block)`; two codes a byte, the first in the high nibble, an
/// odd count padded with the code of 0.
#[derive(Debug)]
pub struct Quantized {
    /// u8 [⌈elements / 2⌉].
    pub codes: Buffer,
    /// One scale a block.
    pub scales: Scales,
    /// What the codes mean.
    pub format: Format,
    /// Elements a block: a power of two from 32 to 4096.
    pub block: usize,
    /// [outputs, inputs].
    pub shape: [usize; 2],
}

/// The scales of the blocks.
#[derive(Debug)]
pub enum Scales {
    /// absmax as it is: f32 `[blocks]`.
    Plain(Buffer),
    /// Double quantisation (QLoRA, §3): absmax_b = `signed_map[codes_b] · absmax_(b / 256) + offset`, in f32, a
    /// multiply and then an add; it may come out negative and is never clamped.
    Nested {
        /// u8 `[blocks]`.
        codes: Buffer,
        /// f32 [⌈blocks / 256⌉]: the scales of the scales.
        absmax: Buffer,
        /// The mean of the scales.
        offset: f32,
    },
}

impl Quantized {
    /// Quantise `w` (f32, bf16 or f16; row-major [outputs, inputs]), its scales too if `double`.
    ///
    /// NaN and infinities have no code. [`Backend::quantize_4bit`] says what becomes of −0 and of denormals.
    ///
    /// Errors: a block that the formats do not have; a length that is not the shape's; the first value that is not
    /// finite, by its index (who knows the tensor's name adds it); [`Quantized::check_scales`], for the largest values
    /// of f32 and bf16.
    pub fn quantize(
        backend: &dyn Backend,
        w: View,
        shape: [usize; 2],
        format: Format,
        block: usize,
        double: bool,
    ) -> Result<Self> {
        check_block(block)?;
        expect("quantize_4bit", "w", w.len(), elements(&shape))?;
        let blocks = w.len().div_ceil(block);
        let mut codes = backend.alloc(DType::U8, w.len().div_ceil(2))?;
        let mut absmax = backend.alloc(DType::F32, blocks)?;
        backend.quantize_4bit(format, block, w, codes.view_mut(), absmax.view_mut())?;
        let scales = if double {
            let mut scale_codes = backend.alloc(DType::U8, blocks)?;
            let mut nested = backend.alloc(DType::F32, blocks.div_ceil(NESTED_BLOCK))?;
            let offset = backend.quantize_scales(absmax.view(), scale_codes.view_mut(), nested.view_mut())?;
            Scales::Nested { codes: scale_codes, absmax: nested, offset }
        } else {
            Scales::Plain(absmax)
        };
        let made = Self { codes, scales, format, block, shape };
        made.check_scales(backend)?;
        Ok(made)
    }

    /// Elements of the matrix.
    pub fn elements(&self) -> usize {
        elements(&self.shape)
    }

    /// Blocks, the last of which may be short.
    pub fn blocks(&self) -> usize {
        self.elements().div_ceil(self.block)
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.bytes()
            + match &self.scales {
                Scales::Plain(absmax) => absmax.bytes(),
                Scales::Nested { codes, absmax, .. } => codes.bytes() + absmax.bytes() + size_of::<f32>(),
            }
    }

    /// That block, codes and scales agree with the shape.
    pub fn check(&self) -> Result<()> {
        let kernel = "quantised weight";
        check_block(self.block)?;
        expect(kernel, "codes", self.codes.len(), self.elements().div_ceil(2))?;
        match &self.scales {
            Scales::Plain(absmax) => expect(kernel, "absmax", absmax.len(), self.blocks()),
            Scales::Nested { codes, absmax, .. } => {
                expect(kernel, "scale codes", codes.len(), self.blocks())?;
                expect(kernel, "nested absmax", absmax.len(), self.blocks().div_ceil(NESTED_BLOCK))
            }
        }
    }

    /// That every nested scale decodes to a finite number: finite parts may add up to an infinity.
    pub fn check_scales(&self, backend: &dyn Backend) -> Result<()> {
        let Scales::Nested { codes, absmax, offset } = &self.scales else { return Ok(()) };
        let (codes, absmax) = (backend.download::<u8>(codes.view())?, backend.download::<f32>(absmax.view())?);
        let map = DynamicMap::Signed.values();
        for (block, code) in codes.iter().enumerate() {
            let value = map[usize::from(*code)] * absmax[block / NESTED_BLOCK] + offset;
            if !value.is_finite() {
                return Err(Error::Scale { block, value });
            }
        }
        Ok(())
    }
}

/// That a block is one that the formats have. For backends: [`Quantized::check`] does it for a whole weight.
pub fn check_block(block: usize) -> Result<()> {
    if block.is_power_of_two() && (32..=4096).contains(&block) { Ok(()) } else { Err(Error::Block { block }) }
}
