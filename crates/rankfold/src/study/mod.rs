//! The claims about low-rank finetuning that Rankfold was written to check, each run again on the embedded base and
//! text: `rankfold study NAME`.
//!
//! A study is a file: what is claimed and by whom, what is done, and the verdict, which is computed from the figures.
//! Everything but what the machine's clock measured is a function of the seeds, whatever the threads (on one
//! instruction set). In reading order:
//! - [`spread`]: seeds, intervals, verdicts;
//! - [`training`]: the embedded base and text, and a run; [`tuning`]: its rate;
//! - [`lora_vs_full`], [`where_to_adapt`], [`adalora_finds_ranks`] with its [`planted`] task, [`four_bit_formats`],
//!   [`paging_changes_nothing`]: the studies;
//! - [`plot`]: their drawings.

pub mod adalora_finds_ranks;
pub mod four_bit_formats;
pub mod lora_vs_full;
pub mod paging_changes_nothing;
pub mod planted;
pub mod plot;
pub mod spread;
pub mod training;
pub mod tuning;
pub mod where_to_adapt;

use crate::error::Result;
use clap::ValueEnum;
use plot::Plot;
use serde_json::Value;
use spread::Verdict;
use training::Bench;

/// The least difference of losses that counts, nat a token: a hundredth of the perplexity. A method whose loss is not
/// above another's by more is as good.
pub const MARGIN: f64 = 0.01;

/// A study by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Name {
    /// Does LoRA reach full finetuning with under 2 % of the parameters?
    LoraVsFull,
    /// At one budget, which matrices; and which ranks?
    WhereToAdapt,
    /// Does AdaLoRA give ranks to the layers that need them?
    AdaloraFindsRanks,
    /// Which 4-bit format loses least, and does finetuning make up for it?
    FourBitFormats,
    /// Are the bits of a run under a memory limit those of one without?
    PagingChangesNothing,
}

/// What a study found.
#[derive(Debug)]
pub struct Report {
    /// What is claimed, by whom.
    pub claim: &'static str,
    /// The figures, a row of heads first.
    pub table: Vec<Vec<String>>,
    /// The same for programs.
    pub results: Value,
    /// Figures of this machine and this run, which another run may have otherwise: as a table; empty if there are none.
    pub measured: Vec<Vec<String>>,
    /// Drawings.
    pub plots: Vec<Plot>,
    /// What became of the claim.
    pub verdict: Verdict,
    /// Why, in words that are made of the figures: what follows the verdict and a colon.
    pub because: String,
}

impl Name {
    /// The study itself.
    pub fn run(self, bench: &Bench) -> Result<Report> {
        match self {
            Self::LoraVsFull => lora_vs_full::run(bench),
            Self::WhereToAdapt => where_to_adapt::run(bench),
            Self::AdaloraFindsRanks => adalora_finds_ranks::run(bench),
            Self::FourBitFormats => four_bit_formats::run(bench),
            Self::PagingChangesNothing => paging_changes_nothing::run(bench),
        }
    }

    /// Seeds and steps of a run, if nobody says. Where differences as small as [`MARGIN`] are judged, whose deviation
    /// from seed to seed is about 0.012, nine seeds give an interval that is narrower than it.
    pub fn extent(self) -> (usize, usize) {
        match self {
            Self::LoraVsFull => (4, 200),
            Self::WhereToAdapt => (9, 60),
            Self::AdaloraFindsRanks => (5, 300),
            Self::FourBitFormats => (9, 100),
            Self::PagingChangesNothing => (3, 20),
        }
    }
}

/// Cells of a row.
fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}
