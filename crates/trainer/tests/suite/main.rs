//! What needs no process of its own; one program, for linking a dozen would take longer than running them.

mod accumulation;
mod adalora;
mod convert;
mod families;
mod merge;
mod optimizer;
mod peft;
mod plan;
mod saved_activations;
mod virtual_tokens;
