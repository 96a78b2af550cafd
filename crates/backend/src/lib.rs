//! The kernel contract of Rankfold.
//!
//! [`Backend`] is one object-safe trait of kernels on plain buffers. Each kernel is documented with its shapes,
//! its formula and its exactness; `rankfold-reference` implements it as the book, every other backend as fast as
//! its machine allows, and the suite in `conformance` decides whether they agree.
//!
//! In reading order:
//! - [`DType`], [`Shape`]: element types and shapes;
//! - [`Buffer`], [`View`], [`ViewMut`]: memory that only its backend can read; [`HostBytes`]: lent to the host;
//! - [`params`]: the parameter structs, with the checks that every backend runs first;
//! - [`Backend`]: the trait;
//! - [`Format`], [`Quantized`]: 4-bit weights, their tables, and the one way to make them;
//! - [`philox`], [`rope`]: numbers that are the same on every backend;
//! - [`Error`]: everything that can be wrong with a call.
#![forbid(unsafe_code)]

mod backend;
mod buffer;
#[cfg(feature = "conformance")]
pub mod conformance;
mod dtype;
mod dynamic_map;
mod error;
mod format;
mod host_bytes;
pub mod params;
pub mod philox;
mod quantized;
pub mod rope;
mod shape;

pub use backend::Backend;
pub use buffer::{Buffer, Storage, View, ViewMut};
pub use dtype::{DType, Element};
pub use dynamic_map::{DynamicMap, NESTED_BLOCK};
pub use error::{Error, Result};
pub use format::{Format, Thresholds, linspace_f32};
pub use host_bytes::HostBytes;
pub use params::{AttentionGrads, AttentionSaved, Compute, LinearGrads, LowRank, Weight};
pub use quantized::{Quantized, Scales, check_block};
pub use shape::Shape;
