//! The options of a run: one struct, whose fields are flags of `rankfold train` and keys of a TOML file alike.
//!
//! What is given on the command line wins over the file, the file over the defaults; the resolved options are
//! written to the run's `run.toml`, from which `--resume` takes them.

use crate::choices::{Activations, Biases, Method, Optimizer, PageIo, Prune, Quantize, Schedule, Start};
use crate::device::{ComputeType, Device};
use crate::error::{Error, Result};
use crate::open::{BLOCK, BUILTIN};
use crate::size::Size;
use clap::Args;
use rankfold_adapters::{adalora, diff};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Options of a run, each absent where nobody gave it.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// `builtin`, or the folder of a Hugging Face model [default: builtin].
    #[arg(long, value_name = "builtin|DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Text files, or JSONL with `text`, `prompt` and `completion`, or `messages` [default: the built-in text].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
    /// One batch of token ids (safetensors with `ids` and `labels`, i64 [N, T]), used every step.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<PathBuf>,
    /// Held-out data [default: the last tenth of the data].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub eval_data: Vec<PathBuf>,
    /// What is trained [default: lora].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Format of the frozen linear layers [default: nf4 for builtin and with loftq, none with pissa and olora, else
    /// none].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
    /// Quantise the scales too [default: true for builtin, else false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub double_quant: Option<bool>,
    /// Weights that share a scale: a power of two from 32 to 4096 [default: 64].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    /// Rank of the adapters [default: 16].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The adapters are scaled by alpha / rank [default: 2 · rank; rank where they begin as a part of the base].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Dropout on the adapters' input [default: 0].
    #[arg(long, value_name = "P")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Scale by alpha / √rank instead [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
    /// Layers to adapt: names, comma-separated; `all-linear`; `peft-default`, those that PEFT takes for the
    /// architecture if none are given (q_proj and v_proj with the low-rank methods); or a regular expression for whole
    /// paths [default: all-linear; with --method ia3 peft-default].
    #[arg(long, value_name = "q_proj,…|all-linear|peft-default|REGEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
    /// Ranks of some layers, by regular expressions for ends of paths: 'q_proj=4,down_proj=32'.
    #[arg(long, value_name = "NAME=N,…")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_pattern: Option<String>,
    /// Alphas of some layers, likewise.
    #[arg(long, value_name = "NAME=X,…")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_pattern: Option<String>,
    /// Where the adapters begin; loftq, and with --quantize pissa and olora, make a base of their own in 4 bits, which
    /// is left in OUT/base [default: kaiming].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Start>,
    /// LoftQ: turns of quantising and decomposing [default: 1].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_iter: Option<usize>,
    /// LoRA+: the learning rate of every B over that of all else [default: 1].
    #[arg(long, value_name = "RATIO")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_plus: Option<f64>,
    /// Biases to train beside the adapters [default: none].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<Biases>,
    /// Modules to train whole beside the adapters: the embedding, the head, norms [default: none].
    #[arg(long, value_name = "lm_head,embed_tokens,…")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<String>,
    /// AdaLoRA: what becomes of triplets out of budget; shrink ends 0.0002 to 0.0038 nat a token above mask on the
    /// built-in model and text, by default otherwise, over three seeds [default: shrink; mask with --init-adapter].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_prune: Option<Prune>,
    /// AdaLoRA: triplets a layer on average at the end; --rank is what each begins with [default: half of it].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_target: Option<usize>,
    /// AdaLoRA: steps before the budget falls [default: a tenth of the steps].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_tinit: Option<usize>,
    /// AdaLoRA: last steps, with what was chosen [default: a quarter of the steps].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_tfinal: Option<usize>,
    /// AdaLoRA: steps from one choice to the next [default: a hundredth of the steps].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_delta: Option<usize>,
    /// AdaLoRA: decay of the sensitivity's mean [default: 0.85].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_beta1: Option<f64>,
    /// AdaLoRA: decay of its deviation [default: 0.85].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_beta2: Option<f64>,
    /// AdaLoRA: weight of the orthogonality term in the loss [default: 0.5].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_orthogonality: Option<f64>,
    /// AdaLoRA: a term of squared norms, as in the paper, instead of PEFT's norms [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adalora_squared: Option<bool>,
    /// Houlsby, Pfeiffer: width of a bottleneck [default: 64].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bottleneck: Option<usize>,
    /// Prompt, prefix: learned tokens before each row; rows then hold one document each [default: 20].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_tokens: Option<usize>,
    /// Prefix: let it come out of a small network while training [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_projection: Option<bool>,
    /// Diff: what it costs to change all of the weights; the expected share that is changed pays that part of it
    /// [default: 50].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_penalty: Option<f64>,
    /// Diff: the gates' learning rate where --lr is that of all else [default: 0.1].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_gate_lr: Option<f64>,
    /// Start from this PEFT adapter; the method and its hyper-parameters are the folder's.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<PathBuf>,
    /// Optimiser steps [default: 200].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Rows of a micro-batch [default: 8].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Tokens a row [default: 256].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<usize>,
    /// Micro-batches a step [default: 1].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,
    /// Learning rate [default for builtin: 6e-3 for lora, dora, houlsby and pfeiffer, 2e-2 for adalora, 0.1 for ia3,
    /// prompt and prefix (projected, 6e-3), 3e-2 for bitfit, 1e-3 for diff, 5e-4 for full; for other models a
    /// thirtieth of it; with --lora-plus that is B's].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// What follows the warm-up [default: cosine].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Steps of warm-up [default: a twentieth of the steps].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<usize>,
    /// Decoupled weight decay of matrices; 0 for none [default: 0].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// The gradient's largest norm; 0 for none [default: 1].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Of the adapters' start, the data's order and dropout [default: 0].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The optimiser [default: adamw].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// AdamW's β2 [default: 0.999].
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Keep only each block's input and compute the rest again: less memory, a third more time [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpointing: Option<bool>,
    /// What is kept of activations between forward and backward: bf16 takes half the memory, leaves every loss as it is
    /// and rounds what gradients are computed from [default: f32].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved_activations: Option<Activations>,
    /// Steps between held-out evaluations; 0 for only the first and the last [default: 0].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<usize>,
    /// Steps between checkpoints; 0 for none [default: 50].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<usize>,
    /// Checkpoints to keep [default: 2].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// The most memory of the process: what does not fit is paged to a file. With --device cuda, of the GPU: what does
    /// not fit is paged to the machine's memory, and then to the file. Never changes a result.
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Size>,
    /// Where that file is, without a name and gone with the process [default: the system's temporary folder].
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_folder: Option<PathBuf>,
    /// How pages reach it [default: buffered].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_io: Option<PageIo>,
    /// Where to compute [default: cpu].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// Precision of the products' inputs [default: bf16 where the device has units for it, f32 elsewhere and with
    /// --tokens].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute: Option<ComputeType>,
    /// Instruction set, which a result's bits depend on; `doctor` lists them [default: the fastest].
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isa: Option<String>,
}

impl Options {
    /// Read a TOML file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        toml::from_str(&text).map_err(|e| Error::Path { path: path.to_owned(), why: e.to_string() })
    }

    /// As TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Usage(format!("the options cannot be written: {e}")))
    }

    /// These options, and the other's where these say nothing.
    pub fn or(self, other: Self) -> Result<Self> {
        let (mut given, other) = (self.table()?, other.table()?);
        for (key, value) in other {
            given.entry(key).or_insert(value);
        }
        given.try_into().map_err(|e: toml::de::Error| Error::Usage(e.to_string()))
    }

    /// These options, where memory goes as the other says, if it does.
    pub fn paged_as(self, other: &Self) -> Self {
        Self {
            memory_limit: other.memory_limit.clone().or(self.memory_limit),
            page_folder: other.page_folder.clone().or(self.page_folder),
            page_io: other.page_io.or(self.page_io),
            ..self
        }
    }

    /// The first option that is given here and differs in `other`: (name, here, there).
    pub fn first_difference(&self, other: &Self) -> Result<Option<(String, String, String)>> {
        let there = other.table()?;
        let different = |(key, here): (String, toml::Value)| {
            let there = there.get(&key);
            (there != Some(&here)).then(|| (key, here.to_string(), there.map_or("not set".into(), ToString::to_string)))
        };
        Ok(self.table()?.into_iter().find_map(different))
    }

    fn table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|e| Error::Usage(format!("the options cannot be written: {e}")))
    }

    /// The defaults for these options: of a model and a method as they say.
    pub fn defaults(&self) -> Self {
        let model = self.model.clone().unwrap_or_else(|| BUILTIN.into());
        let builtin = model == BUILTIN;
        let full = self.method == Some(Method::Full);
        let method = self.method.or(self.init_adapter.is_none().then_some(Method::Lora));
        let own = method.is_some_and(Method::is_low_rank);
        let is = |methods: &[Method]| method.is_some_and(|method| methods.contains(&method));
        let adalora = self.method == Some(Method::Adalora);
        let adaloras = adalora::AdaLora::default();
        let rate = method.unwrap_or(Method::Lora).rate(builtin, self.prefix_projection == Some(true));
        let steps = self.steps.unwrap_or(200);
        let (rank, device) = (self.rank.unwrap_or(16), self.device.unwrap_or_default());
        // A start out of the base says what the base is in if nobody else does, and is scaled by 1.
        let (quantize, double, alpha) = match self.init {
            Some(Start::Pissa | Start::Olora) => (Quantize::None, false, rank as f64),
            Some(Start::Loftq) => (Quantize::Nf4, false, rank as f64),
            _ => (Quantize::of(builtin && !full), builtin && !full, 2.0 * rank as f64),
        };
        Self {
            quantize: Some(quantize),
            double_quant: Some(double),
            block: Some(BLOCK),
            method: self.init_adapter.is_none().then_some(Method::Lora),
            rank: own.then_some(rank),
            alpha: own.then_some(alpha),
            dropout: own.then_some(0.0),
            rslora: own.then_some(false),
            rank_pattern: None,
            alpha_pattern: None,
            init: own.then_some(Start::Kaiming),
            loftq_iter: (self.init == Some(Start::Loftq)).then_some(1),
            lora_plus: method.is_none_or(Method::is_low_rank).then_some(1.0),
            bias: own.then_some(Biases::None),
            modules_to_save: None,
            targets: (own || is(&[Method::Bitfit, Method::Diff])).then(|| "all-linear".into()),
            bottleneck: is(&[Method::Houlsby, Method::Pfeiffer]).then_some(64),
            virtual_tokens: is(&[Method::Prompt, Method::Prefix]).then_some(20),
            prefix_projection: is(&[Method::Prefix]).then_some(false),
            diff_penalty: is(&[Method::Diff]).then_some(50.0),
            diff_gate_lr: is(&[Method::Diff]).then_some(diff::RATE),
            adalora_prune: adalora.then_some(Prune::Shrink),
            adalora_target: adalora.then_some((rank / 2).max(1)),
            adalora_tinit: adalora.then_some(steps / 10),
            adalora_tfinal: adalora.then_some(steps / 4),
            adalora_delta: adalora.then_some((steps / 100).max(1)),
            adalora_beta1: adalora.then_some(adaloras.beta1),
            adalora_beta2: adalora.then_some(adaloras.beta2),
            adalora_orthogonality: adalora.then_some(adaloras.orthogonality),
            adalora_squared: adalora.then_some(adaloras.squared),
            steps: Some(steps),
            batch: self.tokens.is_none().then_some(8),
            seq: self.tokens.is_none().then_some(256),
            accumulate: Some(1),
            lr: Some(rate / self.lora_plus.unwrap_or(1.0)),
            schedule: Some(Schedule::Cosine),
            warmup: Some(steps / 20),
            weight_decay: Some(0.0),
            clip: Some(1.0),
            seed: Some(0),
            optimizer: Some(Optimizer::default()),
            beta2: Some(0.999),
            checkpointing: Some(false),
            saved_activations: Some(Activations::default()),
            eval_every: Some(0),
            checkpoint_every: Some(50),
            keep: Some(2),
            memory_limit: None,
            device: Some(device),
            isa: device.instruction_sets().first().cloned(),
            compute: Some(match self.tokens {
                Some(_) => ComputeType::F32,
                None => device.computes_in(self.isa.as_deref()),
            }),
            model: Some(model),
            page_folder: None,
            page_io: None,
            data: Vec::new(),
            eval_data: Vec::new(),
            tokens: None,
            init_adapter: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;
    use rankfold_trainer::optimizer::Moments;

    #[test]
    fn what_is_given_wins_and_resolved_options_survive_their_file() {
        let given = Options { lr: Some(0.5), data: vec!["a.txt".into()], ..Options::default() };
        let file: Options = toml::from_str("lr = 0.1\nsteps = 7\nmethod = \"lora\"").unwrap();
        let resolved = given.or(file).unwrap();
        let resolved = resolved.clone().or(resolved.defaults()).unwrap();
        assert_eq!((resolved.lr, resolved.steps, resolved.rank), (Some(0.5), Some(7), Some(16)));
        let again: Options = toml::from_str(&resolved.to_toml().unwrap()).unwrap();
        assert_eq!(again, resolved);
        let other = Options { steps: Some(8), ..Options::default() };
        let difference = other.first_difference(&resolved).unwrap();
        assert_eq!(difference, Some(("steps".into(), "8".into(), "7".into())));
    }

    #[test]
    fn an_optimiser_is_named_alike_by_flag_and_file_and_is_adamw_unless_said() {
        let named = [
            ("adamw", Moments::F32, false),
            ("adamw8bit", Moments::Blockwise8, false),
            ("paged-adamw", Moments::F32, true),
            ("paged-adamw8bit", Moments::Blockwise8, true),
        ];
        assert_eq!(Optimizer::value_variants().len(), named.len());
        for (name, moments, is_paged) in named {
            let flag = Optimizer::from_str(name, false).unwrap();
            let file: Options = toml::from_str(&format!("optimizer = \"{name}\"")).unwrap();
            assert_eq!(file.optimizer, Some(flag));
            assert_eq!((flag.moments(), flag.is_paged()), (moments, is_paged));
        }
        assert_eq!(Options::default().defaults().optimizer, Some(Optimizer::Adamw));
    }

    #[test]
    fn a_method_has_a_rate_of_its_own_and_lora_plus_keeps_it_for_b() {
        let rate = |toml: &str| toml::from_str::<Options>(toml).unwrap().defaults().lr.unwrap();
        assert_eq!((rate(""), rate("model = 'a'")), (6e-3, 2e-4));
        assert_eq!((rate("method = 'prompt'"), rate("lora-plus = 4.0")), (0.1, 1.5e-3));
        assert_eq!(rate("init-adapter = 'a'"), rate(""));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = toml::from_str::<Options>("stepz = 3").unwrap_err();
        assert!(error.to_string().contains("stepz"), "{error}");
    }
}
