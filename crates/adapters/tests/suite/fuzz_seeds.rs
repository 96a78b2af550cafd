//! The seeds of the fuzz target that reads configurations.

#[macro_use]
#[path = "../../../../fuzz/seeds.rs"]
mod seeds;
#[path = "../../../../fuzz/src/adapter_config.rs"]
mod adapter_config;

seeds! { config: adapter_config of adalora bitfit bottleneck diff digits dora ia3 lora patterns prefix prompt }
