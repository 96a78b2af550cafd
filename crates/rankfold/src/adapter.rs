//! The adapter of a run: its configuration, from the run's options.

use crate::choices::{Biases, Method, Start};
use crate::error::{Error, Result};
use crate::options::Options;
use rankfold_adapters::adalora::AdaLora;
use rankfold_adapters::bottleneck::Placement;
use rankfold_adapters::virtual_tokens::Kind;
use rankfold_adapters::{
    AdapterConfig, Bias, Form, Init, LoraSpec, PeftConfig, Relative, RelativeConfig, Targets, VirtualConfig,
};
use std::str::FromStr;

/// The adapter that the options ask for: a new one, or a folder's; `None` for `--method full`.
pub fn asked_for(options: &Options) -> Result<Option<PeftConfig>> {
    if let Some(saved) = &options.init_adapter {
        let config = PeftConfig::open(saved)?;
        let (lora, is_diff) = (
            config.lora(),
            matches!(&config, PeftConfig::Relative(RelativeConfig { method: Relative::Diff { .. }, .. })),
        );
        let strangers = [
            ("lora-plus", "low-rank update", lora.is_none() && options.lora_plus.is_some_and(|ratio| ratio != 1.0)),
            (
                "adalora-prune",
                "triplets of AdaLoRA",
                lora.is_none_or(|lora| lora.adalora.is_none()) && options.adalora_prune.is_some(),
            ),
            ("diff-gate-lr", "gates of diff pruning", !is_diff && options.diff_gate_lr.is_some()),
        ];
        if let Some((flag, what, _)) = strangers.iter().find(|(.., given)| *given) {
            let why = format!("it has no {what}, expected no --{flag}");
            return Err(Error::Path { path: saved.clone(), why });
        }
        return Ok(Some(config));
    }
    let base_model = options.model.clone();
    let relative = |method| {
        let targets = options.targets.as_deref().map_or(Targets::Default, Targets::parse);
        PeftConfig::Relative(RelativeConfig { targets, base_model: base_model.clone(), ..RelativeConfig::new(method) })
    };
    let bottleneck = |placement| Relative::Bottleneck { placement, bottleneck: options.bottleneck.unwrap_or_default() };
    let learned = |kind| {
        let config = VirtualConfig::new(kind, options.virtual_tokens.unwrap_or_default());
        PeftConfig::Virtual(VirtualConfig { base_model: base_model.clone(), ..config })
    };
    Ok(Some(match options.method.unwrap_or(Method::Lora) {
        Method::Full => return Ok(None),
        Method::Lora => low_rank(options, Form::Plain, base_model)?,
        Method::Dora => low_rank(options, Form::Dora, base_model)?,
        Method::Adalora => low_rank(options, Form::AdaLora, base_model)?,
        Method::Ia3 => relative(Relative::Ia3 { feed_forward: None }),
        Method::Bitfit => relative(Relative::BitFit),
        Method::Houlsby => relative(bottleneck(Placement::Houlsby)),
        Method::Pfeiffer => relative(bottleneck(Placement::Pfeiffer)),
        Method::Diff => relative(Relative::Diff { penalty: options.diff_penalty.unwrap_or_default() }),
        Method::Prompt => learned(Kind::Prompt),
        Method::Prefix => learned(Kind::Prefix { projection: options.prefix_projection.unwrap_or_default() }),
    }))
}

/// A new low-rank update.
fn low_rank(options: &Options, form: Form, base_model: Option<String>) -> Result<PeftConfig> {
    Ok(PeftConfig::Lora(AdapterConfig {
        spec: LoraSpec {
            form,
            rank: options.rank.unwrap_or(1),
            alpha: options.alpha.unwrap_or(1.0),
            rslora: options.rslora.unwrap_or_default(),
            dropout: options.dropout.unwrap_or_default(),
        },
        adalora: (form == Form::AdaLora).then(|| adalora(options)),
        targets: Targets::parse(options.targets.as_deref().unwrap_or_default()),
        rank_pattern: pattern("rank-pattern", options.rank_pattern.as_deref())?,
        alpha_pattern: pattern("alpha-pattern", options.alpha_pattern.as_deref())?,
        init: match options.init {
            None | Some(Start::Kaiming) => Init::Kaiming,
            Some(Start::Gaussian) => Init::Gaussian,
            Some(Start::Pissa) => Init::Pissa,
            Some(Start::Olora) => Init::Olora,
            Some(Start::Loftq) => Init::Loftq { iterations: options.loftq_iter.unwrap_or(1) },
        },
        bias: match options.bias {
            None | Some(Biases::None) => Bias::None,
            Some(Biases::All) => Bias::All,
            Some(Biases::LoraOnly) => Bias::LoraOnly,
        },
        modules_to_save: list(options.modules_to_save.as_deref()).map(str::to_owned).collect(),
        base_model,
        ..AdapterConfig::default()
    }))
}

/// The parts of a text with commas.
fn list(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// 'KEY=NUMBER,…' of `flag`, in its order.
fn pattern<T: FromStr>(flag: &str, text: Option<&str>) -> Result<Vec<(String, T)>> {
    let pair = |part: &str| {
        let pair = part.rsplit_once('=').and_then(|(key, value)| Some((key.trim(), value.trim().parse().ok()?)));
        match pair.filter(|(key, _)| !key.is_empty()) {
            Some((key, value)) => Ok((key.to_owned(), value)),
            None => Err(Error::Usage(format!("--{flag} '{part}': expected NAME=NUMBER, with commas between"))),
        }
    };
    list(text).map(pair).collect()
}

/// AdaLoRA's own hyper-parameters.
fn adalora(o: &Options) -> AdaLora {
    let default = AdaLora::default();
    AdaLora {
        target_rank: o.adalora_target.unwrap_or(default.target_rank),
        tinit: o.adalora_tinit.unwrap_or(default.tinit),
        tfinal: o.adalora_tfinal.unwrap_or(default.tfinal),
        delta_t: o.adalora_delta.unwrap_or(default.delta_t),
        beta1: o.adalora_beta1.unwrap_or(default.beta1),
        beta2: o.adalora_beta2.unwrap_or(default.beta2),
        orthogonality: o.adalora_orthogonality.unwrap_or(default.orthogonality),
        squared: o.adalora_squared.unwrap_or(default.squared),
        total_step: o.steps,
        pattern: Vec::new(),
    }
}
