//! Low-rank adapters on linear layers, the methods that they are compared with, and PEFT folders.
//!
//! A [`Linear`] layer is a base matrix, frozen (dense or in 4 bits) or trained, and optionally an [`Adapter`], most
//! often a [`Lora`] beside it.
//! [`attach_new`] and [`attach_folder`] put one on every layer that an [`AdapterConfig`] names; the forward pass is
//! one fused node of the tape.
//!
//! In reading order:
//! - [`lora`], [`init`]: the update in its three forms (LoRA, DoRA, AdaLoRA), and its first values;
//! - [`start`], [`loftq`](mod@loftq), [`remade`], `decompose`: first values that come from the base, and change it;
//! - [`linear`]: the layer;
//! - [`streams`]: which random numbers are whose;
//! - [`adalora`]: AdaLoRA's budget of triplets, and who gets it;
//! - [`merge`]: the update folded into the base, and out again;
//! - [`algebra`]: weighted sums of adapters, and several on one base;
//! - [`targets`], [`patterns`]: which layers, and which rank and alpha each;
//! - [`saved`]: biases and whole modules that are trained beside the updates;
//! - [`config`], [`folder`]: `adapter_config.json` and `adapter_model.safetensors`, both ways;
//! - [`adapter`]: what else can sit on a layer: [`ia3`], [`bitfit`], [`bottleneck`], [`diff`], whose configuration is
//!   [`relatives`];
//! - [`virtual_tokens`]: prompt and prefix tuning, which sit on the model;
//! - [`peft`]: any method's configuration and folder; [`values`]: where its values come from;
//! - [`attach`]: low-rank updates applied to a model's layers;
//! - [`Error`]: everything that can be wrong.
#![forbid(unsafe_code)]

pub mod adalora;
pub mod adapter;
pub mod algebra;
pub mod attach;
pub mod bitfit;
pub mod bottleneck;
pub mod config;
mod decompose;
pub mod diff;
mod error;
pub mod folder;
pub mod ia3;
pub mod init;
pub mod linear;
pub mod loftq;
pub mod lora;
pub mod merge;
pub mod patterns;
pub mod peft;
pub mod relatives;
pub mod remade;
pub mod saved;
pub mod start;
pub mod streams;
pub mod targets;
mod tensors;
pub mod values;
pub mod virtual_tokens;

pub use adapter::Adapter;
pub use attach::{Attached, AttachedModule, attach_blank, attach_folder, attach_new};
pub use config::AdapterConfig;
pub use error::{Error, Result};
pub use folder::{AdapterFolder, Purpose, write_folder};
pub use init::Init;
pub use linear::{DropoutKey, Forward, Linear, Weight, peft_name};
pub use lora::{Form, Lora, LoraSpec, Part};
pub use merge::{Merged, merged, merged_weight};
pub use peft::{AttachedPeft, PeftConfig};
pub use relatives::{Relative, RelativeConfig};
pub use remade::attach_remade;
pub use saved::{Bias, train_modules};
pub use targets::{Names, Targets};
pub use values::Values;
pub use virtual_tokens::{VirtualConfig, VirtualTokens};
