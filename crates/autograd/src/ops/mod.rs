//! The operations, one a file. Each is a method of [`Tape`](crate::Tape).

mod activate;
mod add;
mod attention;
mod checkpoint;
mod divide;
mod dropout;
mod embedding;
mod gated;
mod linear;
mod linear_cross_entropy;
mod orthogonality;
mod part;
mod prepend;
mod rms_norm;
mod rope;
mod scale_columns;
mod silu_mul;

pub use attention::AttentionShape;
pub use linear::LinearAdapter;
