//! Everything that the crate promises, one program: linking a dozen would take longer than running them.

mod algebra;
mod bad_folders;
mod bad_methods;
mod common;
mod config;
mod forms;
mod fuzz_seeds;
mod golden;
mod layer;
mod learned_tokens;
mod odd_fields;
mod relatives;
mod remade;
mod saved;
mod start;
mod targets;
