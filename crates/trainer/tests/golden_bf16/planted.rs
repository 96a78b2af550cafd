//! `reference` with the inputs of a weight's products rounded to a number of bits.

use rankfold_backend::params::*;
use rankfold_backend::*;
use rankfold_reference::ReferenceBackend;

#[derive(Clone, Copy, Debug)]
pub struct Planted {
    /// Significant bits.
    pub bits: u32,
    /// Towards zero, and not to nearest even.
    pub truncate: bool,
}

impl Planted {
    fn rounded(self, x: View) -> Result<Buffer> {
        let reference: &dyn Backend = &ReferenceBackend;
        let dropped = f32::MANTISSA_DIGITS - self.bits;
        let round = |x: f32| {
            let (bits, half) = (x.to_bits(), (1 << (dropped - 1)) - 1);
            let up = if self.truncate { 0 } else { half + (bits >> dropped & 1) };
            f32::from_bits((bits + up) >> dropped << dropped)
        };
        reference.upload(&reference.download::<f32>(x)?.into_iter().map(round).collect::<Vec<_>>())
    }
}

impl Backend for Planted {
    fn linear(
        &self,
        p: &Linear,
        x: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<View>,
        y: ViewMut,
    ) -> Result<()> {
        let Weight::Dense(w) = w else { panic!("a weight in 4 bits") };
        let (x, w) = (self.rounded(x)?, self.rounded(*w)?);
        ReferenceBackend.linear(p, x.view(), &Weight::Dense(w.view()), low_rank, bias, y)
    }

    as_reference! {
        fn linear_grad_input(
            p: &Linear, dy: View, w: &Weight, low_rank: Option<&LowRank>, accumulate: bool, dx: ViewMut
        ) -> Result<()>;
        fn attention_grad(p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()>;
    }
    as_reference!(memory);
    as_reference!(rest);
}
