//! The operations, one a file. Each is a method of [`Tape`](crate::Tape).

mod add;
mod attention;
mod checkpoint;
mod dropout;
mod embedding;
mod linear;
mod linear_cross_entropy;
mod rms_norm;
mod rope;
mod silu_mul;

pub use attention::AttentionShape;
pub use linear::LinearAdapter;
