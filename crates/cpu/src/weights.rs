//! Weights and what lies beside them, from the contract's views to slices.

use crate::gemm::{QuantSlice, WeightSlice};
use crate::linear::LowRankSlice;
use crate::quantize4::ScaleSlice;
use crate::slices::Slices;
use rankfold_backend::params::{LowRank, Weight};
use rankfold_backend::{Result, Scales};

/// The scales of a weight whose lengths have been checked.
pub(crate) fn scale_slice<'s>(s: &'s Slices, scales: &'s Scales) -> Result<ScaleSlice<'s>> {
    Ok(match scales {
        Scales::Plain(absmax) => ScaleSlice::Plain(s.get("absmax", absmax.view())?),
        Scales::Nested { codes, absmax, offset } => {
            ScaleSlice::nested(s.get("scale codes", codes.view())?, s.get("nested absmax", absmax.view())?, *offset)
        }
    })
}

/// A weight whose lengths have been checked.
pub(crate) fn weight_slice<'s>(s: &'s Slices, w: &Weight<'s>) -> Result<WeightSlice<'s>> {
    Ok(match w {
        Weight::Dense(w) => WeightSlice::Dense(s.floats("weight", *w)?),
        Weight::Quantized(q) => WeightSlice::Quantized(QuantSlice {
            codes: s.get("codes", q.codes.view())?,
            scales: scale_slice(s, &q.scales)?,
            format: q.format,
            block: q.block,
        }),
    })
}

/// The low-rank part beside it.
pub(crate) fn low_rank_slice<'s>(s: &'s Slices, l: Option<&LowRank<'s>>) -> Result<Option<LowRankSlice<'s>>> {
    let Some(l) = l else { return Ok(None) };
    Ok(Some(LowRankSlice {
        rank: l.rank,
        a: s.get("a", l.a)?,
        b: s.get("b", l.b)?,
        scale: l.scale,
        per_rank: l.per_rank.map(|x| s.get("per_rank", x)).transpose()?,
        row_scale: l.row_scale.map(|x| s.get("row_scale", x)).transpose()?,
        dropout: l.dropout,
    }))
}
