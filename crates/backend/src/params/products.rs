//! Products, and products with a weight that may be in 4 bits and have a low-rank update beside it.

use super::{Compute, Dropout, elements, expect, expect_some};
use crate::{Error, Quantized, Result, View, ViewMut};

/// Which inputs of [`MatMul`] are stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// a [m, k] · b [k, n]
    Nn,
    /// a [m, k] · b [n, k]ᵀ
    Nt,
    /// a [k, m]ᵀ · b [k, n]
    Tn,
}

/// c [m, n] = a · b, or c += a · b.
#[derive(Clone, Copy, Debug)]
pub struct MatMul {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
    /// How a and b are stored.
    pub layout: Layout,
    /// Add to c instead of overwriting it.
    pub accumulate: bool,
    /// Precision of the inputs.
    pub compute: Compute,
}

impl MatMul {
    /// Lengths of a, b and c.
    pub fn check(&self, a: &View, b: &View, c: &ViewMut) -> Result<()> {
        expect("matmul", "a", a.len(), elements(&[self.m, self.k]))?;
        expect("matmul", "b", b.len(), elements(&[self.k, self.n]))?;
        expect("matmul", "c", c.len(), elements(&[self.m, self.n]))
    }
}

/// A frozen or trained matrix [outputs, inputs], whatever it is stored as.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// f32, bf16 or f16 (f64 on `reference`).
    Dense(View<'a>),
    /// 4-bit codes with their scales.
    Quantized(&'a Quantized),
}

/// A low-rank update beside a weight: LoRA, AdaLoRA (`per_rank`), DoRA (`row_scale`).
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// Rows of `a`, columns of `b`. 0 is legal: a pruned module.
    pub rank: usize,
    /// A [rank, inputs].
    pub a: View<'a>,
    /// B [outputs, rank].
    pub b: View<'a>,
    /// α/r, or whatever the method makes of it.
    pub scale: f32,
    /// AdaLoRA's E `[rank]`: A's rows are scaled by it.
    pub per_rank: Option<View<'a>>,
    /// DoRA's m/‖W + s·B·A‖ `[outputs]`.
    pub row_scale: Option<View<'a>>,
    /// Dropout on the input of A; beside a `row_scale` also of what that adds to the base.
    pub dropout: Option<Dropout>,
}

/// A product of `tokens` rows with a weight [outputs, inputs].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Rows of x and y.
    pub tokens: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// Precision of the inputs of every product.
    pub compute: Compute,
}

/// Where `linear_grad_weight` adds its gradients; `None` costs nothing.
#[derive(Debug, Default)]
pub struct LinearGrads<'a> {
    /// [outputs, inputs]; an error for a quantised weight or beside a `row_scale`.
    pub weight: Option<ViewMut<'a>>,
    /// `[outputs]`
    pub bias: Option<ViewMut<'a>>,
    /// [rank, inputs]
    pub a: Option<ViewMut<'a>>,
    /// [outputs, rank]
    pub b: Option<ViewMut<'a>>,
    /// `[rank]`
    pub per_rank: Option<ViewMut<'a>>,
    /// `[outputs]`
    pub row_scale: Option<ViewMut<'a>>,
}

impl Linear {
    fn check_weight(&self, kernel: &'static str, weight: &Weight, low_rank: Option<&LowRank>) -> Result<()> {
        match weight {
            Weight::Dense(w) => expect(kernel, "weight", w.len(), elements(&[self.outputs, self.inputs]))?,
            Weight::Quantized(q) => {
                if q.shape != [self.outputs, self.inputs] {
                    let why =
                        format!("the quantised weight is {:?}, expected [{}, {}]", q.shape, self.outputs, self.inputs);
                    return Err(Error::Invalid { kernel, why });
                }
                q.check()?;
            }
        }
        let Some(l) = low_rank else { return Ok(()) };
        expect(kernel, "a", l.a.len(), elements(&[l.rank, self.inputs]))?;
        expect(kernel, "b", l.b.len(), elements(&[self.outputs, l.rank]))?;
        expect_some(kernel, "per_rank", l.per_rank.as_ref().map(View::len), l.rank)?;
        expect_some(kernel, "row_scale", l.row_scale.as_ref().map(View::len), self.outputs)?;
        l.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check_probability())
    }

    /// Lengths for `linear`.
    pub fn check(
        &self,
        x: &View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<&View>,
        y: &ViewMut,
    ) -> Result<()> {
        self.check_weight("linear", w, low_rank)?;
        expect("linear", "x", x.len(), elements(&[self.tokens, self.inputs]))?;
        expect_some("linear", "bias", bias.map(View::len), self.outputs)?;
        expect("linear", "y", y.len(), elements(&[self.tokens, self.outputs]))
    }

    /// Lengths for `linear_grad_input`.
    pub fn check_grad_input(&self, dy: &View, w: &Weight, low_rank: Option<&LowRank>, dx: &ViewMut) -> Result<()> {
        self.check_weight("linear_grad_input", w, low_rank)?;
        expect("linear_grad_input", "dy", dy.len(), elements(&[self.tokens, self.outputs]))?;
        expect("linear_grad_input", "dx", dx.len(), elements(&[self.tokens, self.inputs]))
    }

    /// Lengths for `linear_grad_weight`, and which gradients exist at all.
    pub fn check_grad_weight(
        &self,
        x: &View,
        dy: &View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        g: &LinearGrads,
    ) -> Result<()> {
        let kernel = "linear_grad_weight";
        self.check_weight(kernel, w, low_rank)?;
        expect(kernel, "x", x.len(), elements(&[self.tokens, self.inputs]))?;
        expect(kernel, "dy", dy.len(), elements(&[self.tokens, self.outputs]))?;
        let rank = low_rank.map_or(0, |l| l.rank);
        expect_some(kernel, "d weight", g.weight.as_ref().map(ViewMut::len), elements(&[self.outputs, self.inputs]))?;
        expect_some(kernel, "d bias", g.bias.as_ref().map(ViewMut::len), self.outputs)?;
        expect_some(kernel, "d a", g.a.as_ref().map(ViewMut::len), elements(&[rank, self.inputs]))?;
        expect_some(kernel, "d b", g.b.as_ref().map(ViewMut::len), elements(&[self.outputs, rank]))?;
        expect_some(kernel, "d per_rank", g.per_rank.as_ref().map(ViewMut::len), rank)?;
        expect_some(kernel, "d row_scale", g.row_scale.as_ref().map(ViewMut::len), self.outputs)?;
        let invalid = |why: &str| Err(Error::Invalid { kernel, why: why.into() });
        match low_rank {
            None if g.a.is_some() || g.b.is_some() || g.per_rank.is_some() || g.row_scale.is_some() => {
                return invalid("a gradient of the low-rank part was asked for where there is none");
            }
            Some(l) if g.per_rank.is_some() && l.per_rank.is_none() => {
                return invalid("'d per_rank' without 'per_rank'");
            }
            Some(l) if g.row_scale.is_some() && l.row_scale.is_none() => {
                return invalid("'d row_scale' without 'row_scale'");
            }
            Some(l) if g.weight.is_some() && l.row_scale.is_some() => return invalid("'d weight' beside 'row_scale'"),
            _ => {}
        }
        match w {
            Weight::Quantized(_) if g.weight.is_some() => invalid("a quantised weight has no gradient"),
            _ => Ok(()),
        }
    }
}
