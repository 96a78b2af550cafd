//! What an audit found: the structure of `audit.json`.
//!
//! ```text
//! { version, model, backend, selection, left_out: [NAME],
//!   shown_block,                                           the block of weight histograms and of layer figures
//!   totals:  { tensors, parameters, fits: [[FIT, count]], histogram: [100 counts], results: [FIGURES] },
//!   tensors: [ { name, dtype, shape: [rows, columns], weights: SHAPE, histogram: [100 counts],
//!                results: [FIGURES] } ] }
//! ```
//!
//! FIGURES ([`Figures`]) are of one format, block and kind of scales; results come by block, then plain before
//! double, then format. SHAPE is [`Shape`]. A histogram counts w/absmax of its block in 100 equal bins over [−1, 1].
//! Numbers that do not exist (the signal-to-noise ratio of no noise) are null.

use crate::normality::{Fit, Shape};
use crate::size::Size;
use crate::tally::Tally;
use rankfold_backend::Format;
use serde::{Deserialize, Serialize};

/// Bins of a histogram of block-normalised weights.
pub(crate) const BINS: usize = 100;

/// An audit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Of this structure.
    pub version: u32,
    /// The model or file, as it was named.
    pub model: String,
    /// Whose kernels quantised and dequantised.
    pub backend: String,
    /// Which tensors were audited, in words.
    pub selection: String,
    /// Matrices that were not.
    pub left_out: Vec<String>,
    /// The block of histograms and of figures by layer.
    pub shown_block: usize,
    /// Over all tensors.
    pub totals: Totals,
    /// By tensor, in the order of layers.
    pub tensors: Vec<TensorReport>,
}

/// All tensors together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// How many tensors.
    pub tensors: usize,
    /// How many weights.
    pub parameters: u64,
    /// How many tensors have which shape.
    pub fits: Vec<(Fit, usize)>,
    /// Block-normalised weights at the shown block.
    pub histogram: Vec<u64>,
    /// A line for each format, block and kind of scales.
    pub results: Vec<Figures>,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorReport {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its element type there.
    pub dtype: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The distribution of its weights.
    pub weights: Shape,
    /// Block-normalised weights at the shown block.
    pub histogram: Vec<u64>,
    /// A line for each format, block and kind of scales.
    pub results: Vec<Figures>,
}

/// What one format, block and kind of scales does to weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The format.
    #[serde(with = "format_name")]
    pub format: Format,
    /// Weights that share a scale.
    pub block: usize,
    /// Whether the scales are quantised too.
    pub double: bool,
    /// Mean of |ŵ − w|.
    pub mean_error: f64,
    /// Largest |ŵ − w|.
    pub max_error: f64,
    /// Mean of |ŵ − w| / (|w| + 10⁻⁸).
    pub mean_relative_error: f64,
    /// √(mean (ŵ − w)²).
    pub rms_error: f64,
    /// 10·log₁₀(Σw²/Σ(ŵ − w)²), null where either is zero.
    pub snr_db: Option<f64>,
    /// Bits.
    pub size: Size,
    /// How many weights have each of the sixteen codes.
    pub code_counts: [u64; 16],
    /// −Σ p log₂ p over the codes, in bits.
    pub code_entropy: f64,
    /// The weight with the largest error.
    pub worst: Worst,
    /// The largest part of its bound that any weight's error takes.
    pub bound_used: f64,
    /// Whether every weight keeps its bound.
    pub certified: bool,
}

/// The weight with the largest error, and its certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Worst {
    /// Its tensor.
    pub tensor: String,
    /// Its row.
    pub row: usize,
    /// Its column.
    pub column: usize,
    /// The weight.
    pub w: f64,
    /// What its code stands for.
    pub decoded: f64,
    /// decoded − w
    pub error: f64,
    /// What |error| cannot pass, derived in [`crate::certificate`].
    pub bound: f64,
    /// bound − |error|
    pub margin: f64,
}

impl Figures {
    /// From sums over weights; `worst` is where the sums' worst weight is.
    pub(crate) fn new(format: Format, block: usize, double: bool, size: Size, tally: &Tally, worst: Worst) -> Self {
        let n = tally.count as f64;
        Self {
            format,
            block,
            double,
            mean_error: tally.sum_error / n,
            max_error: worst.error.abs(),
            mean_relative_error: tally.sum_relative / n,
            rms_error: (tally.sum_square / n).sqrt(),
            snr_db: tally.snr_db(),
            size,
            code_counts: tally.codes,
            code_entropy: tally.code_entropy(),
            worst,
            bound_used: tally.bound_used,
            certified: tally.bound_used <= 1.0,
        }
    }

    /// "single" or "double", as the literature names plain and quantised scales.
    pub fn scales(&self) -> &'static str {
        if self.double { "double" } else { "single" }
    }

    /// √(Σe²/Σw²): the error's share of the weights, both root mean squares; 0 where there is no error.
    pub fn noise(&self) -> f64 {
        self.snr_db.map_or(0.0, |snr| 10f64.powf(-snr / 20.0))
    }
}

/// The line of a format, block and kind of scales, where it was audited.
pub(crate) fn find(results: &[Figures], format: Format, block: usize, double: bool) -> Option<&Figures> {
    results.iter().find(|found| (found.format, found.block, found.double) == (format, block, double))
}

impl Report {
    /// The formats that were audited.
    pub(crate) fn formats(&self) -> Vec<Format> {
        let has = |format| self.totals.results.iter().any(|figures| figures.format == format);
        Format::ALL.into_iter().filter(|format| has(*format)).collect()
    }

    /// The lines with the lowest mean error of those that take the same bits: one for each block and kind of scales.
    pub(crate) fn is_best(&self, figures: &Figures) -> bool {
        let rivals = self.totals.results.iter().filter(|r| (r.block, r.double) == (figures.block, figures.double));
        rivals.map(|rival| rival.mean_error).fold(f64::INFINITY, f64::min) == figures.mean_error
    }

    /// Whether every weight keeps its bound in every format.
    pub fn certified(&self) -> bool {
        self.totals.results.iter().all(|figures| figures.certified)
    }

    /// `audit.json`, pretty, with a line end.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }
}

/// A [`Format`] as its name.
mod format_name {
    use rankfold_backend::Format;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(format: &Format, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(format)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
