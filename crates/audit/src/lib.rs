//! The audit of a model's quantisation: what every 4-bit format would do to every weight, measured and bounded.
//!
//! A model's linear weights are read one at a time, quantised and dequantised by a backend's own kernels in every
//! format, block size and kind of scales, and compared with what they were. Nothing is estimated: each figure is of
//! all weights, and each error is held against the bound that the formats promise.
//!
//! In reading order:
//! - [`Options`], [`Selection`]: what is audited;
//! - [`tally`]: errors summed up, the worst weight kept;
//! - [`certificate`]: the bound of every weight's error, derived;
//! - [`size`]: bits a parameter;
//! - [`normality`]: the shape of the weights, and whether NF4 is made for it;
//! - [`audit()`]: tensor by tensor into a [`Report`], which is also what `audit.json` holds;
//! - [`table()`], [`html()`]: the report for a terminal and for a browser;
//! - [`page`], [`svg`]: pages that need nothing else and their plots, for reports of other kinds too.
#![forbid(unsafe_code)]

mod audit;
pub mod certificate;
mod chunks;
mod error;
mod html;
pub mod normality;
mod number;
mod options;
pub mod page;
mod report;
pub mod size;
pub mod svg;
mod table;
pub mod tally;

pub use audit::audit;
pub use error::{Error, Result};
pub use html::html;
pub use options::{BLOCKS, Options, Selection};
pub use report::{Figures, Report, TensorReport, Totals, Worst};
pub use table::table;
