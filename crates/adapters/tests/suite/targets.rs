//! Which layers, and which rank and alpha each.

use crate::common::{all, layers, reference};
use proptest::prelude::*;
use rankfold_adapters::patterns::{Patterns, Specs};
use rankfold_adapters::targets::select;
use rankfold_adapters::{AdapterConfig, Error, Linear, LoraSpec, Names, Targets, attach_new};

const PATHS: [&str; 5] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
];

fn list(names: &[&str]) -> Names {
    Names::List(names.iter().map(|name| name.to_string()).collect())
}

fn pattern(text: &str) -> Names {
    Names::Pattern(text.into())
}

fn selected(paths: &[&str], targets: &Names, exclude: Option<&Names>) -> Result<Vec<usize>, Error> {
    let layers = layers(reference().as_ref(), [1, 1], paths);
    select(&layers.iter().collect::<Vec<_>>(), targets, exclude)
}

fn named(paths: &[&str], targets: Targets, architecture: &str) -> Result<Names, Error> {
    let layers = layers(reference().as_ref(), [1, 1], paths);
    targets.named(&layers.iter().collect::<Vec<_>>(), architecture)
}

#[test]
fn a_list_names_whole_paths_or_their_last_parts() {
    let select = |names: &[&str]| selected(&PATHS, &list(names), None).unwrap();
    assert_eq!(select(&["q_proj"]), [0, 2]);
    assert_eq!(select(&["self_attn.q_proj", "up_proj"]), [0, 2, 4]);
    assert_eq!(select(&["model.layers.1.self_attn.v_proj"]), [3]);
    assert_eq!(select(&["layers.1.self_attn.v_proj", "v_proj"]), [1, 3]);
}

#[test]
fn a_string_is_a_regular_expression_for_the_whole_path() {
    let select = |text: &str| selected(&PATHS, &pattern(text), None);
    assert_eq!(select(r".*\.(q|v)_proj").unwrap(), [0, 1, 2, 3]);
    assert_eq!(select(r"model\.layers\.0\..*").unwrap(), [0, 1]);
    assert_eq!(select(r".*q_proj|.*up_proj").unwrap(), [0, 2, 4]);
    assert!(matches!(select("q_proj"), Err(Error::NoMatch { .. })), "not the whole path");
    let message = select("(").unwrap_err().to_string();
    assert_eq!(message, "'target_modules': '(' is not a regular expression: unclosed group");
    let message = select("(?=q)").unwrap_err().to_string();
    assert!(message.contains("look-around"), "{message}");
}

#[test]
fn each_target_must_match() {
    let message = selected(&PATHS, &list(&["q_proj", "proj"]), None).unwrap_err().to_string();
    let expected = "target 'proj' matches no linear layer of the model, which has model.layers.0.self_attn.q_proj, \
                    model.layers.0.self_attn.v_proj, model.layers.1.mlp.up_proj and 2 more";
    assert_eq!(message, expected);
    for targets in [list(&["q_pro"]), list(&[""]), list(&["_proj"]), list(&[]), pattern("x")] {
        assert!(matches!(selected(&PATHS, &targets, None), Err(Error::NoMatch { .. })), "{targets}");
    }
    assert!(selected(&[], &list(&["a"]), None).unwrap_err().to_string().ends_with("which has none"));
}

#[test]
fn an_adapter_of_the_embedding_or_the_head_is_refused_as_such() {
    for target in ["lm_head", "embed_tokens", "model.embed_tokens"] {
        let message = selected(&PATHS, &list(&["q_proj", target]), None).unwrap_err().to_string();
        let why = "is the model's embedding or head: not supported yet, expected layers of its blocks";
        assert_eq!(message, format!("target '{target}' {why}"));
    }
}

#[test]
fn exclusions_beat_targets_and_may_not_leave_nothing() {
    let select = |exclude: Names| selected(&PATHS, &list(&["q_proj", "v_proj"]), Some(&exclude));
    assert_eq!(select(list(&["v_proj"])).unwrap(), [0, 2]);
    assert_eq!(select(pattern(r".*\.1\..*")).unwrap(), [0, 1]);
    assert_eq!(select(list(&["nothing"])).unwrap(), [0, 1, 2, 3]);
    let message = select(pattern(".*")).unwrap_err().to_string();
    assert_eq!(message, "'exclude_modules' leaves none of the 4 linear layers that 'target_modules' matches");
    assert!(select(pattern("[")).unwrap_err().to_string().starts_with("'exclude_modules': '[' is not"));
}

#[test]
fn all_linear_in_any_case_is_every_layer_of_the_blocks() {
    for text in ["all-linear", "ALL-LINEAR", "All-Linear"] {
        assert_eq!(Targets::parse(text), Targets::AllLinear);
        let json = format!(r#"{{"peft_type": "LORA", "target_modules": "{text}"}}"#);
        assert_eq!(AdapterConfig::from_json(&json).unwrap().targets, Targets::AllLinear);
    }
    let names = named(&PATHS, Targets::AllLinear, "any").unwrap();
    assert_eq!(names, list(&["q_proj", "v_proj", "up_proj"]));
    assert_eq!(selected(&PATHS, &names, None).unwrap(), [0, 1, 2, 3, 4]);
    assert!(matches!(named(&[], Targets::AllLinear, "any"), Err(Error::NoMatch { .. })));
}

#[test]
fn without_targets_the_architecture_decides() {
    for architecture in ["llama", "mistral", "qwen2", "qwen3"] {
        assert_eq!(named(&PATHS, Targets::Default, architecture).unwrap(), list(&["q_proj", "v_proj"]));
    }
    let message = named(&PATHS, Targets::Default, "gpt9").unwrap_err().to_string();
    assert_eq!(message, "'target_modules' is not given, and architecture 'gpt9' has no default");
}

#[test]
fn a_command_line_text_is_a_list_unless_it_has_signs_that_no_path_has() {
    assert_eq!(Targets::parse("q_proj"), Targets::Named(list(&["q_proj"])));
    assert_eq!(Targets::parse("q_proj, v_proj"), Targets::Named(list(&["q_proj", "v_proj"])));
    assert_eq!(Targets::parse("layers.0.q,k_proj"), Targets::Named(list(&["layers.0.q", "k_proj"])));
    for text in [r".*\.q_proj", "(a|b)", "a{1,2}", "q_proj$"] {
        assert_eq!(Targets::parse(text), Targets::Named(pattern(text)));
    }
    assert_eq!(Targets::parse("peft-default"), Targets::Default);
    assert_eq!(Targets::parse("peft-default,q_proj"), Targets::Named(list(&["peft-default", "q_proj"])));
}

#[test]
fn the_first_pattern_in_the_files_order_that_matches_counts() {
    let keys = |pairs: &[(&str, usize)]| pairs.iter().map(|(key, rank)| (key.to_string(), *rank)).collect::<Vec<_>>();
    let of = |pairs: &[(&str, usize)], path: &str| Patterns::new("rank_pattern", &keys(pairs)).unwrap().of(path);
    let path = "model.layers.10.self_attn.q_proj";
    assert_eq!(of(&[("q_proj", 4), ("self_attn.q_proj", 2)], path), Some(4));
    assert_eq!(of(&[("self_attn.q_proj", 2), ("q_proj", 4)], path), Some(2));
    assert_eq!(of(&[("proj", 1), ("k_proj", 2)], path), None, "a key begins at a point or at the start");
    assert_eq!(of(&[("attn.q_proj", 1)], path), None);
    assert_eq!(of(&[("model.layers.1.*q_proj", 3)], path), Some(3), "keys are expressions");
    assert_eq!(of(&[(r"^model\.layers\.10\..*", 5)], path), Some(5));
    assert_eq!(of(&[("k_proj|q_proj", 6)], path), Some(6));
    assert_eq!(of(&[("layers.10", 7)], path), None, "to the path's end");
    for broken in ["(", "a)|(b"] {
        let message = Patterns::new("rank_pattern", &keys(&[(broken, 1)])).unwrap_err().to_string();
        assert!(message.starts_with(&format!("'rank_pattern': '{broken}' is not a regular expression")), "{message}");
    }
}

#[test]
fn patterns_override_rank_and_alpha_by_layer_and_unused_ones_are_told() {
    let config = AdapterConfig {
        spec: LoraSpec { rslora: true, dropout: 0.1, ..LoraSpec::new(8, 16.0) },
        targets: Targets::Named(list(&["q_proj", "v_proj"])),
        exclude: Some(list(&["up_proj", "norm"])),
        rank_pattern: vec![("layers.0.self_attn.q_proj".into(), 2), ("o_proj".into(), 3)],
        alpha_pattern: vec![("v_proj".into(), 1.5), ("lm_head".into(), 2.0)],
        ..AdapterConfig::default()
    };
    let specs = Specs::new(&config).unwrap();
    assert_eq!(specs.of(PATHS[0]), LoraSpec { rank: 2, ..config.spec });
    assert_eq!(specs.of(PATHS[2]), config.spec);

    let backend = reference();
    let mut model = layers(backend.as_ref(), [3, 5], &PATHS);
    let attached = attach_new(backend.as_ref(), &mut all(&mut model), &config, "llama", 1).unwrap();
    assert_eq!(attached.unused, ["rank_pattern: o_proj", "alpha_pattern: lm_head", "exclude_modules: norm"]);
    let ranks: Vec<(usize, f64, usize, bool)> = attached
        .modules
        .iter()
        .map(|module| (module.spec.rank, module.spec.alpha, module.parameters, module.is_wasteful))
        .collect();
    assert_eq!(ranks, [(2, 16.0, 16, false), (8, 1.5, 64, true), (8, 16.0, 64, true), (8, 1.5, 64, true)]);
    assert_eq!(attached.parameters(), 208);
    assert_eq!(attached.config, config);
    let trained = |layer: &Linear| layer.parameters().iter().map(|(_, p)| p.shape().elements()).sum::<usize>();
    assert_eq!(model.iter().map(trained).sum::<usize>(), attached.parameters());
    assert_eq!(
        model[1].parameters().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["lora_A", "lora_B"].map(|part| format!("base_model.model.{}.{part}.weight", PATHS[1]))
    );
    let scale = model[1].adapter().unwrap().spec().scale();
    assert_eq!(scale, (1.5 / 8f64.sqrt()) as f32);
}

#[test]
fn a_failure_attaches_nothing() {
    let backend = reference();
    let mut model = layers(backend.as_ref(), [3, 5], &PATHS);
    let with = |config: AdapterConfig| AdapterConfig { targets: Targets::AllLinear, ..config };
    let mut configs = [AdapterConfig::default(), AdapterConfig::default(), AdapterConfig::default()].map(with);
    configs[0].spec.rank = 0;
    configs[1].rank_pattern = vec![("layers.1.self_attn.v_proj".into(), 0)];
    configs[2].alpha_pattern = vec![("v_proj".into(), f64::NAN)];
    for config in &configs {
        assert!(attach_new(backend.as_ref(), &mut all(&mut model), config, "llama", 1).is_err());
        assert!(model.iter().all(|layer| layer.adapter().is_none()));
    }
    let message = attach_new(backend.as_ref(), &mut all(&mut model), &configs[1], "llama", 1).unwrap_err().to_string();
    assert_eq!(message, "'rank_pattern: layers.1.self_attn.v_proj' is 0, expected 1 or more");
}

fn paths() -> impl Strategy<Value = Vec<String>> {
    prop::collection::btree_set("[ab](\\.[ab]{1,2}){0,3}", 1..8).prop_map(|paths| paths.into_iter().collect())
}

proptest! {
    #[test]
    fn a_list_selects_what_the_rule_says(paths in paths(), names in paths(), exclude in paths()) {
        let means = |names: &[String], path: &str| {
            names.iter().any(|name| path == name || path.ends_with(&format!(".{name}")))
        };
        let chosen = |path: &str| means(&names, path) && !means(&exclude, path);
        let expected: Vec<usize> = (0..paths.len()).filter(|&i| chosen(&paths[i])).collect();
        let unmatched = names.iter().find(|name| !paths.iter().any(|path| means(&[name.to_string()], path)));
        let borrowed: Vec<&str> = paths.iter().map(String::as_str).collect();
        match selected(&borrowed, &Names::List(names.iter().cloned().collect()), Some(&Names::List(exclude.iter().cloned().collect()))) {
            Ok(found) => {
                prop_assert!(unmatched.is_none());
                prop_assert_eq!(found, expected);
            }
            Err(Error::NoMatch { target, .. }) => prop_assert_eq!(Some(&target), unmatched),
            Err(Error::AllExcluded { .. }) => prop_assert!(expected.is_empty() && unmatched.is_none()),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_list_and_its_regular_expression_select_the_same(paths in paths(), names in paths()) {
        let regex = format!(r"(.*\.)?({})", names.iter().map(|n| n.replace('.', r"\.")).collect::<Vec<_>>().join("|"));
        let borrowed: Vec<&str> = paths.iter().map(String::as_str).collect();
        if let Ok(by_name) = selected(&borrowed, &Names::List(names.into_iter().collect()), None) {
            prop_assert_eq!(by_name, selected(&borrowed, &Names::Pattern(regex), None).unwrap());
        }
    }
}
