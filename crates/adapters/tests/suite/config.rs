//! `adapter_config.json`: what is taken, what is passed over, what is refused.

use proptest::prelude::*;
use rankfold_adapters::adalora::AdaLora;
use rankfold_adapters::{AdapterConfig, Bias, Error, Form, Init, LoraSpec, Names, PeftConfig, Targets};
use serde_json::{Value, json};

/// A configuration with some fields on top of the method's.
fn read(fields: Value) -> Result<AdapterConfig, Error> {
    let mut all = json!({ "peft_type": "LORA" });
    for (field, value) in fields.as_object().unwrap() {
        all[field] = value.clone();
    }
    AdapterConfig::from_json(&all.to_string())
}

fn refusal(fields: Value) -> String {
    read(fields).unwrap_err().to_string()
}

#[test]
fn what_is_not_there_is_pefts_default() {
    let config = read(json!({})).unwrap();
    assert_eq!(config, AdapterConfig { task_type: None, ..AdapterConfig::default() });
    assert_eq!((config.spec.rank, config.spec.alpha, config.init), (8, 8.0, Init::Kaiming));
}

#[test]
fn fields_that_would_change_the_mathematics_are_refused_by_name_and_value() {
    for (field, value) in [
        ("use_bdlora", json!(true)),
        ("use_qalora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("ensure_weight_tying", json!(true)),
        ("layer_replication", json!([[0, 4], [2, 5]])),
        ("layers_to_transform", json!([0])),
        ("layers_to_transform", json!(0)),
        ("layers_pattern", json!("layers")),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["experts"])),
        ("alora_invocation_tokens", json!([5])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("corda_config", json!({"beta": 1})),
        ("eva_config", json!({"rho": 2.0})),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"a": 1})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!(null)),
        ("a_field_of_next_year", json!(0.5)),
        ("a_field_of_next_year", json!(0)),
    ] {
        assert_eq!(refusal(json!({ field: value })), format!("'{field}' is {value}: not supported yet"));
    }
}

#[test]
fn fields_that_say_nothing_are_passed_over() {
    for value in [json!(null), json!(false), json!([]), json!({}), json!("")] {
        let fields = json!({ "a_field_of_next_year": value, "layers_to_transform": value, "exclude_modules": value });
        assert_eq!(read(fields).unwrap().exclude, None, "{value}");
    }
    let fields = json!({
        "peft_version": "9.9", "inference_mode": true, "megatron_core": "megatron.core", "megatron_config": {"a": 1},
        "qalora_group_size": 32, "auto_mapping": {"base_model_class": "X"}, "runtime_config": {"x": true},
        "bias": "none",
    });
    assert_eq!(read(fields).unwrap(), read(json!({})).unwrap());
}

#[test]
fn fields_with_impossible_values_say_what_was_expected() {
    for (field, value, expected) in [
        ("r", json!(0), "1 or more"),
        ("r", json!(-1), "a whole number, 1 or more"),
        ("r", json!(1.5), "a whole number, 1 or more"),
        ("r", json!(null), "a whole number, 1 or more"),
        ("lora_alpha", json!("16"), "a number"),
        ("lora_dropout", json!(1.0), "at least 0 and below 1"),
        ("use_rslora", json!("yes"), "true or false"),
        ("target_modules", json!(7), "a list of names or a regular expression"),
        ("target_modules", json!(["q_proj", 7]), "a list of names or a regular expression"),
        ("exclude_modules", json!([7]), "a list of names or a regular expression"),
        ("rank_pattern", json!(["q_proj"]), "an object of names and numbers"),
        ("bias", json!("some"), "none, all or lora_only"),
        ("bias", json!(true), "none, all or lora_only"),
        ("modules_to_save", json!("lm_head"), "a list of names"),
        ("modules_to_save", json!([1]), "a list of names"),
        ("modules_to_save", json!(["norm", ""]), "a list of names"),
        ("task_type", json!(1), "a text or null"),
    ] {
        let shown = if field == "lora_dropout" { "1".into() } else { value.to_string() };
        assert_eq!(refusal(json!({ field: value })), format!("'{field}' is {shown}, expected {expected}"));
    }
    for (turns, found) in
        [(json!({"loftq_iter": 0}), "loftq_iter' is 0"), (json!({"loftq_bits": 8}), "loftq_bits' is 8")]
    {
        let message = refusal(json!({ "loftq_config": turns, "init_lora_weights": "loftq" }));
        assert!(message.starts_with(&format!("'loftq_config: {found}, expected ")), "{message}");
    }
    for alpha in [json!({ "lora_alpha": 0 }), json!({ "alpha_pattern": {"q_proj": -1} })] {
        for init in ["pissa", "olora", "loftq"] {
            let mut fields = alpha.clone();
            fields["init_lora_weights"] = init.into();
            assert!(refusal(fields).ends_with("expected a positive number with this start"));
        }
    }
    let message = refusal(json!({ "peft_type": "ADALORA", "init_lora_weights": "pissa" }));
    assert_eq!(message, "'init_lora_weights' is pissa, expected a start that AdaLoRA has");
    let message = refusal(json!({ "peft_type": "ADALORA", "alpha_pattern": {"q_proj": 4} }));
    assert_eq!(message, "'alpha_pattern' is 4 for q_proj, expected none with AdaLoRA, where PEFT passes over it");
    for alpha in [0, -2] {
        let message = refusal(json!({ "peft_type": "ADALORA", "lora_alpha": alpha }));
        assert_eq!(message, format!("'lora_alpha' is {alpha}, expected a positive number with AdaLoRA"));
    }
    let message = refusal(json!({ "rank_pattern": {"q_proj": 0} }));
    assert_eq!(message, "'rank_pattern: q_proj' is 0, expected 1 or more");
    let message = refusal(json!({ "rank_pattern": {"q_proj": [true]} }));
    assert_eq!(message, "'rank_pattern: q_proj' is [true], expected a whole number, 1 or more");
    let message = refusal(json!({ "alpha_pattern": {"q_proj": null} }));
    assert_eq!(message, "'alpha_pattern: q_proj' is null, expected a number");
}

#[test]
fn other_methods_and_other_texts_are_refused() {
    let message = |text: &str| PeftConfig::from_json(text).unwrap_err().to_string();
    let known = "LORA, ADALORA, IA3, PROMPT_TUNING, PREFIX_TUNING, BITFIT, BOTTLENECK or DIFF_PRUNING";
    assert_eq!(message(r#"{"peft_type": "VERA"}"#), format!("peft_type 'VERA' is not supported yet, expected {known}"));
    assert_eq!(message("{}"), format!("'peft_type' is null, expected {known}"));
    assert_eq!(message(r#"{"peft_type": 3}"#), format!("'peft_type' is 3, expected {known}"));
    for text in
        ["", "[]", "{\"peft_type\": \"LORA\"", "{\"peft_type\": \"LORA\", \"lora_alpha\": NaN}", "{\"r\": 1e999}"]
    {
        assert!(message(text).starts_with("not an adapter's configuration: "), "{text}");
    }
}

#[test]
fn a_file_is_named_in_its_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_config.json");
    let message = || AdapterConfig::read(&path).unwrap_err().to_string();
    assert!(message().starts_with(&format!("{}: cannot read: ", path.display())));
    std::fs::write(&path, r#"{"peft_type": "LORA", "use_qalora": true}"#).unwrap();
    assert_eq!(message(), format!("{}: 'use_qalora' is true: not supported yet", path.display()));
}

#[test]
fn keys_are_written_in_pefts_order() {
    let text = AdapterConfig::default().to_json();
    let Value::Object(fields) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
    assert!(fields.keys().is_sorted(), "Python's sort_keys");
}

fn names() -> impl Strategy<Value = Names> {
    prop_oneof![
        prop::collection::btree_set("[a-z_.]{1,8}", 1..5).prop_map(Names::List),
        "[a-z.*|]{1,12}".prop_map(Names::Pattern),
    ]
}

fn forms() -> impl Strategy<Value = (Form, Option<AdaLora>)> {
    let schedule = (any::<usize>(), 0..1000usize, 0..1000usize, 1..50usize, prop::option::of(2001..9999usize));
    let squared = any::<bool>();
    let pattern = prop::collection::btree_map("[a-z]{1,8}", prop::collection::vec(any::<bool>(), 1..4), 0..4);
    let numbers = prop::array::uniform3(1..1000u32);
    let adalora = (schedule, numbers, pattern, squared).prop_map(
        |((target_rank, tinit, tfinal, delta_t, total_step), n, pattern, squared)| {
            let [beta1, beta2, orthogonality] = n.map(|n| f64::from(n) / 1000.0);
            let pattern = pattern.into_iter().collect();
            AdaLora { target_rank, tinit, tfinal, delta_t, beta1, beta2, orthogonality, squared, total_step, pattern }
        },
    );
    prop_oneof![
        Just((Form::Plain, None)),
        Just((Form::Dora, None)),
        adalora.prop_map(|adalora| (Form::AdaLora, Some(adalora))),
    ]
}

fn inits() -> impl Strategy<Value = Init> {
    prop_oneof![
        prop::sample::select(vec![Init::Kaiming, Init::Gaussian, Init::Random, Init::Pissa, Init::Olora]),
        (1..9usize).prop_map(|iterations| Init::Loftq { iterations }),
    ]
}

prop_compose! {
    fn configs()(
        rank in 1..100_000usize,
        alpha in -4000..4000i32,
        dropout in 0..1000u32,
        rslora: bool,
        init in inits(),
        bias in prop::sample::select(vec![Bias::None, Bias::All, Bias::LoraOnly]),
        modules_to_save in prop::collection::vec("[a-z_.]{1,8}", 0..3),
        targets in prop_oneof![
            Just(Targets::Default), Just(Targets::AllLinear), names().prop_map(Targets::Named),
        ],
        exclude in prop::option::of(names()),
        rank_pattern in prop::collection::hash_map("[a-z.*]{1,8}", 1..64usize, 0..4),
        alpha_pattern in prop::collection::hash_map("[a-z.*]{1,8}", -4000..4000i32, 0..4),
        [base_model, revision, task_type] in prop::array::uniform3(prop::option::of("\\PC{0,12}")),
        (form, adalora) in forms(),
    ) -> AdapterConfig {
        let init = if adalora.is_some() && init.changes_the_base() { Init::Kaiming } else { init };
        // A start out of the base asks for positive ones, and so does AdaLoRA.
        let is_positive = init.changes_the_base() || adalora.is_some();
        let eighths = |alpha: i32| f64::from(if is_positive { alpha.abs() + 1 } else { alpha }) / 8.0;
        let rslora = rslora && form != Form::AdaLora;
        let adalora = adalora.map(|adalora| AdaLora { target_rank: 1 + adalora.target_rank % rank, ..adalora });
        let rank_pattern = if adalora.is_none() { rank_pattern } else { Default::default() };
        let alpha_pattern = if adalora.is_none() { alpha_pattern } else { Default::default() };
        AdapterConfig {
            adalora,
            spec: LoraSpec {
                form, rslora, dropout: f64::from(dropout) / 1000.0, ..LoraSpec::new(rank, eighths(alpha)) },
            init, targets, exclude, bias, modules_to_save,
            rank_pattern: rank_pattern.into_iter().collect(),
            alpha_pattern: alpha_pattern.into_iter().map(|(key, alpha)| (key, eighths(alpha))).collect(),
            base_model, revision, task_type,
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(config in configs()) {
        prop_assert_eq!(AdapterConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn no_text_is_a_panic(text in "\\PC{0,64}") {
        let _ = AdapterConfig::from_json(&text);
    }
}
