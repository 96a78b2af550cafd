//! The three products with a weight, dense or quantised, and a low-rank update beside it.
//!
//! Their formulas and the derivation of their gradients are those of `rankfold-reference`. In reading order: [`parts`]
//! turns what a call is given into addresses; [`products`] is the contract's three kernels, as products one after
//! another; for a weight in 4 bits [`few`] and [`tensor`] do several of them in one launch.

mod few;
mod parts;
mod products;
mod tensor;

pub(crate) use products::{linear, linear_grad_input, linear_grad_weight};
