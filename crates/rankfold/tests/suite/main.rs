//! The program as its users run it; one program of tests, for linking a dozen would take longer than running them.

mod adalora;
mod audit;
mod cli;
mod common;
mod device;
mod lora_family;
mod merge;
mod methods;
mod paging;
mod plan;
mod profile;
mod quantize;
mod study;
