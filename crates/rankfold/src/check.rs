//! What no run may be told: numbers out of range, and options that contradict each other, wherever each was given.

use crate::choices::{Method, Quantize, Start};
use crate::error::{Error, Result};
use crate::options::Options;
use clap::ValueEnum;
use rankfold_adapters::Targets;

/// The most of a count: beyond it, a typing error is likelier than a machine that could do it.
const MOST: usize = 1 << 20;

/// Check the options of a run: those given on the command line and in the file, and the defaults of the rest.
pub fn check(options: &Options) -> Result<()> {
    ranges(options)?;
    conflicts(options)
}

fn ranges(o: &Options) -> Result<()> {
    let counts = [
        ("rank", o.rank),
        ("steps", o.steps),
        ("batch", o.batch),
        ("seq", o.seq),
        ("accumulate", o.accumulate),
        ("keep", o.keep),
        ("loftq-iter", o.loftq_iter),
        ("bottleneck", o.bottleneck),
        ("virtual-tokens", o.virtual_tokens),
    ];
    for (name, value) in counts {
        count(name, value)?;
    }
    let number = |name: &str, value: Option<f64>, fits: fn(f64) -> bool, expected: &str| match value {
        Some(value) if !fits(value) => Err(Error::Usage(format!("--{name} {value}: expected {expected}"))),
        _ => Ok(()),
    };
    // Before the rate, which is made of it.
    number("lora-plus", o.lora_plus, |x| x > 0.0 && x.is_finite(), "a positive number")?;
    number("lr", o.lr, |x| x > 0.0 && x.is_finite(), "a positive number")?;
    number("clip", o.clip, |x| x >= 0.0, "0 or more")?;
    number("weight-decay", o.weight_decay, |x| x >= 0.0 && x.is_finite(), "0 or more")?;
    number("diff-gate-lr", o.diff_gate_lr, |x| x > 0.0 && x.is_finite(), "a positive number")?;
    number("diff-penalty", o.diff_penalty, |x| x >= 0.0 && x.is_finite(), "0 or more")?;
    number("beta2", o.beta2, |x| (0.0..1.0).contains(&x), "at least 0 and below 1")?;
    match (o.warmup, o.steps) {
        (Some(warmup), Some(steps)) if warmup > steps => {
            Err(Error::Usage(format!("--warmup {warmup}: expected no more than the {steps} steps")))
        }
        _ => Ok(()),
    }
}

/// That a count is one that a machine could do.
pub fn count(name: &str, value: Option<usize>) -> Result<()> {
    let least = if name == "seq" { 2 } else { 1 };
    let most = if name == "steps" { usize::MAX } else { MOST };
    match value {
        Some(n) if n < least => Err(Error::Usage(format!("--{name} {n}: expected at least {least}"))),
        Some(n) if n > most => Err(Error::Usage(format!("--{name} {n}: expected at most {most}"))),
        _ => Ok(()),
    }
}

fn conflicts(o: &Options) -> Result<()> {
    let text = [("data", !o.data.is_empty()), ("eval-data", !o.eval_data.is_empty())];
    let rows = [("batch", o.batch.is_some()), ("seq", o.seq.is_some())];
    let lora = [
        ("rank", o.rank.is_some()),
        ("alpha", o.alpha.is_some()),
        ("dropout", o.dropout.is_some()),
        ("rslora", o.rslora.is_some()),
        ("rank-pattern", o.rank_pattern.is_some()),
        ("alpha-pattern", o.alpha_pattern.is_some()),
        ("init", o.init.is_some()),
        ("loftq-iter", o.loftq_iter.is_some()),
        ("bias", o.bias.is_some()),
        ("modules-to-save", o.modules_to_save.is_some()),
    ];
    let plus = [("lora-plus", o.lora_plus.is_some())];
    let targets = [("targets", o.targets.is_some())];
    // Each with the methods that it belongs to.
    let own: [(&str, bool, &[Method]); 4] = [
        ("bottleneck", o.bottleneck.is_some(), &[Method::Houlsby, Method::Pfeiffer]),
        ("virtual-tokens", o.virtual_tokens.is_some(), &[Method::Prompt, Method::Prefix]),
        ("prefix-projection", o.prefix_projection.is_some(), &[Method::Prefix]),
        ("diff-penalty", o.diff_penalty.is_some(), &[Method::Diff]),
    ];
    let no_adaloras = [
        ("rank-pattern", o.rank_pattern.is_some()),
        ("alpha-pattern", o.alpha_pattern.is_some()),
        ("init", o.init.is_some_and(|init| init != Start::Kaiming)),
    ];
    let gates = [("diff-gate-lr", o.diff_gate_lr.is_some())];
    let adalora = [
        ("adalora-prune", o.adalora_prune.is_some()),
        ("adalora-target", o.adalora_target.is_some()),
        ("adalora-tinit", o.adalora_tinit.is_some()),
        ("adalora-tfinal", o.adalora_tfinal.is_some()),
        ("adalora-delta", o.adalora_delta.is_some()),
        ("adalora-beta1", o.adalora_beta1.is_some()),
        ("adalora-beta2", o.adalora_beta2.is_some()),
        ("adalora-orthogonality", o.adalora_orthogonality.is_some()),
        ("adalora-squared", o.adalora_squared.is_some()),
    ];
    let beside = |given: bool, what: &str, others: &[(&str, bool)], why: &str| match others.iter().find(|(_, on)| *on) {
        Some((other, _)) if given => Err(Error::Usage(format!("--{other} beside {what}: {why}"))),
        _ => Ok(()),
    };
    let full = o.method == Some(Method::Full);
    let quantized = [("quantize", o.quantize.is_some_and(|format| format != Quantize::None))];
    let starts = [("init-adapter", o.init_adapter.is_some())];
    let dense = [("quantize", o.quantize == Some(Quantize::None))];
    let loftq = o.init == Some(Start::Loftq);
    let its_own = "the folder has its own, expected none";
    beside(o.tokens.is_some(), "--tokens", &text, "one batch is the whole data, expected one of the two")?;
    beside(o.tokens.is_some(), "--tokens", &rows, "the file's shape is the batch's, expected none")?;
    beside(o.init_adapter.is_some(), "--init-adapter", &[("method", o.method.is_some())], its_own)?;
    beside(o.init_adapter.is_some(), "--init-adapter", &lora, its_own)?;
    beside(o.init_adapter.is_some(), "--init-adapter", &targets, its_own)?;
    beside(o.init_adapter.is_some(), "--init-adapter", &adalora[1..], its_own)?;
    let no_adalora = o.init_adapter.is_none() && o.method != Some(Method::Adalora);
    beside(no_adalora, "no --method adalora", &adalora, "it is AdaLoRA's, expected none")?;
    let no_diff = o.init_adapter.is_none() && o.method != Some(Method::Diff);
    beside(no_diff, "no --method diff", &gates, "it is diff pruning's, expected none")?;
    let adaloras = o.method == Some(Method::Adalora);
    beside(adaloras, "--method adalora", &no_adaloras, "AdaLoRA gives ranks and begins by itself, expected none")?;
    beside(!loftq, "no --init loftq", &[("loftq-iter", o.loftq_iter.is_some())], "it is LoftQ's, expected none")?;
    beside(loftq, "--init loftq", &dense, "LoftQ makes up for what 4 bits lose, expected nf4, fp4 or int4")?;
    if let Some(method) = o.method {
        let named = method.to_possible_value().map_or(String::new(), |value| format!("--method {}", value.get_name()));
        let why = "it has no low-rank update, expected none";
        beside(!method.is_low_rank(), &named, &lora, why)?;
        beside(!method.is_low_rank(), &named, &plus, why)?;
        beside(!method.has_targets(), &named, &targets, "its layers are not to be chosen, expected none")?;
    }
    for (name, given, methods) in own {
        let stranger = o.init_adapter.is_some() || !o.method.is_some_and(|method| methods.contains(&method));
        let what = if o.init_adapter.is_some() { "--init-adapter" } else { "a method that has no such thing" };
        beside(stranger, what, &[(name, given)], "expected none")?;
    }
    let pefts =
        [("targets peft-default", o.targets.as_deref().is_some_and(|text| Targets::parse(text) == Targets::Default))];
    let without = matches!(o.method, Some(Method::Bitfit | Method::Diff));
    beside(without, "--method bitfit or diff", &pefts, "PEFT has no such method, expected names or all-linear")?;
    beside(full, "--method full", &starts, "there is no adapter, expected none")?;
    beside(full, "--method full", &quantized, "4-bit weights cannot be trained, expected none")?;
    let pages = [("page-folder", o.page_folder.is_some()), ("page-io", o.page_io.is_some())];
    let is_paged = o.memory_limit.is_some() || o.optimizer.unwrap_or_default().is_paged();
    let why = "nothing is paged, expected one of the two or none of this";
    beside(!is_paged, "no --memory-limit and no paged optimiser", &pages, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(toml: &str) -> String {
        check(&toml::from_str(toml).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn contradictions_are_refused_by_name_whichever_way_the_options_came() {
        for (toml, words) in [
            ("tokens = 't'\ndata = ['a']", ["--data", "--tokens"]),
            ("tokens = 't'\nseq = 8", ["--seq", "--tokens"]),
            ("init-adapter = 'a'\nrank = 3", ["--rank", "--init-adapter"]),
            ("init-adapter = 'a'\nmethod = 'lora'", ["--method", "--init-adapter"]),
            ("method = 'full'\nrank = 3", ["--rank", "--method full"]),
            ("method = 'dora'\nadalora-delta = 3", ["--adalora-delta", "--method adalora"]),
            ("init-adapter = 'a'\nadalora-delta = 3", ["--adalora-delta", "--init-adapter"]),
            ("method = 'ia3'\nrank = 3", ["--rank", "--method ia3"]),
            ("method = 'houlsby'\ntargets = 'q_proj'", ["--targets", "--method houlsby"]),
            ("method = 'prompt'\nprefix-projection = true", ["--prefix-projection", "a method"]),
            ("init-adapter = 'a'\nbottleneck = 3", ["--bottleneck", "--init-adapter"]),
            ("virtual-tokens = 3", ["--virtual-tokens", "a method"]),
            ("method = 'ia3'\ndiff-gate-lr = 0.5", ["--diff-gate-lr", "--method diff"]),
            ("method = 'full'\nquantize = 'nf4'", ["--quantize", "--method full"]),
            ("page-folder = '/tmp'", ["--page-folder", "--memory-limit"]),
            ("page-io = 'direct'\noptimizer = 'adamw8bit'", ["--page-io", "paged optimiser"]),
            ("init-adapter = 'a'\ninit = 'pissa'", ["--init", "--init-adapter"]),
            ("init-adapter = 'a'\nmodules-to-save = 'lm_head'", ["--modules-to-save", "--init-adapter"]),
            ("method = 'adalora'\ninit = 'pissa'", ["--init", "--method adalora"]),
            ("method = 'adalora'\nrank-pattern = 'q_proj=3'", ["--rank-pattern", "--method adalora"]),
            ("init = 'loftq'\nquantize = 'none'", ["--quantize", "nf4, fp4 or int4"]),
            ("init = 'gaussian'\nloftq-iter = 3", ["--loftq-iter", "--init loftq"]),
            ("method = 'diff'\ntargets = 'peft-default'", ["--targets peft-default", "--method bitfit or diff"]),
            ("method = 'full'\nlora-plus = 4.0", ["--lora-plus", "--method full"]),
            ("method = 'ia3'\nlora-plus = 4.0", ["--lora-plus", "--method ia3"]),
            ("method = 'prefix'\nlora-plus = 4.0", ["--lora-plus", "--method prefix"]),
        ] {
            let why = refused(toml);
            assert!(words.iter().all(|word| why.contains(word)), "{toml}: {why}");
        }
        check(&toml::from_str("method = 'full'\nquantize = 'none'\nblock = 64\ndouble-quant = false").unwrap())
            .unwrap();
        for paged in ["memory-limit = '1GiB'", "optimizer = 'paged-adamw'"] {
            check(&toml::from_str(&format!("page-folder = '/tmp'\npage-io = 'direct'\n{paged}")).unwrap()).unwrap();
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for toml in [
            "rank = 0",
            "lora-plus = 0.0",
            "init = 'loftq'\nloftq-iter = 0",
            "diff-penalty = -1.0",
            "diff-gate-lr = 0.0",
            "bottleneck = 0",
            "virtual-tokens = 0",
            "batch = 1000000000000",
            "seq = 1",
            "lr = -1.0",
            "beta2 = 1.0",
            "steps = 2\nwarmup = 3",
        ] {
            refused(toml);
        }
    }
}
