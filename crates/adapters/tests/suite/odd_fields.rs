//! Every field that a configuration has, with values that none expects.

use crate::common::{all, layers, reference};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use rankfold_adapters::virtual_tokens::Dimensions;
use rankfold_adapters::{PeftConfig, Values};
use serde_json::{Map, Value, json};

const METHODS: [&str; 8] = [
    r#"{"peft_type": "LORA"}"#,
    r#"{"peft_type": "ADALORA", "total_step": 9, "orth_reg_squared": true}"#,
    r#"{"peft_type": "IA3"}"#,
    r#"{"peft_type": "BITFIT"}"#,
    r#"{"peft_type": "BOTTLENECK", "bottleneck": 2, "placement": "houlsby"}"#,
    r#"{"peft_type": "DIFF_PRUNING", "diff_penalty": 1}"#,
    r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}"#,
    r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "prefix_projection": true}"#,
];

/// All fields of a method, as they are written.
fn fields(method: &str) -> Map<String, Value> {
    serde_json::from_str(&PeftConfig::from_json(method).unwrap().to_json()).unwrap()
}

fn odd() -> impl Strategy<Value = Value> {
    let numbers = [json!(0), json!(1), json!(-1), json!(1.5), json!(1 << 20), json!(10u64.pow(18)), json!(u64::MAX)];
    let texts = ["", "all-linear", "pissa", "loftq", "lora_only", "pfeiffer", "q_proj", "(", ".*"].map(Value::from);
    let others = [json!(null), json!(true), json!([]), json!({}), json!(1e300), json!(-1e-300)];
    let one = select([&numbers[..], &texts, &others].concat());
    let keys = select(vec!["q_proj", "loftq_iter", "loftq_bits", "a.q_proj.lora_E", "("]);
    prop_oneof![
        3 => one.clone(),
        1 => prop::collection::vec(one.clone(), 1..3).prop_map(Value::from),
        1 => (keys.clone(), one).prop_map(|(key, value)| json!({ key: value })),
        1 => (keys, prop::collection::vec(any::<bool>(), 0..13)).prop_map(|(key, kept)| json!({ key: kept })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// What is taken is written and read again, and goes onto a model, or is refused by it.
    #[test]
    fn no_value_of_a_known_field_is_a_panic(
        method in select(METHODS.to_vec()), odd in prop::collection::vec((any::<Index>(), odd()), 1..4),
    ) {
        let mut written = fields(method);
        for (index, value) in odd {
            let field = index.get(&written.keys().cloned().collect::<Vec<_>>()).clone();
            written.insert(field, value);
        }
        let Ok(config) = PeftConfig::from_json(&Value::Object(written).to_string()) else { return Ok(()) };
        prop_assert_eq!(&PeftConfig::from_json(&config.to_json()).unwrap(), &config);
        let backend = reference();
        let mut model = layers(backend.as_ref(), [3, 4], &["a.q_proj", "a.v_proj", "a.o_proj", "a.down_proj"]);
        let _ = match config.virtual_tokens() {
            Some(learned) => {
                let dimensions = Dimensions { width: 2, heads: 1, kv_heads: 1, head_dim: 2, layers: 1 };
                learned.tokens(backend.as_ref(), &dimensions, Values::New(0)).map(drop)
            }
            None => config.attach(backend.as_ref(), &mut all(&mut model), "llama", Values::New(0)).map(drop),
        };
    }
}

/// Of a rank that no memory holds, nothing is made before it is refused.
#[test]
fn counts_that_no_memory_holds_are_refused_by_name() {
    let most = "expected 1048576 or less";
    for (fields, named) in [
        (json!({"peft_type": "LORA", "r": 10u64.pow(18)}), "'r' is"),
        (json!({"peft_type": "LORA", "rank_pattern": {"q_proj": 10u64.pow(18)}}), "'rank_pattern: q_proj' is"),
        (json!({"peft_type": "ADALORA", "init_r": 10u64.pow(18)}), "'init_r' is"),
        (json!({"peft_type": "BOTTLENECK", "placement": "houlsby", "bottleneck": 10u64.pow(18)}), "'bottleneck' is"),
        (json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10u64.pow(18)}), "'num_virtual_tokens' is"),
        (
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1, "encoder_hidden_size": 10u64.pow(18)}),
            "'encoder_hidden_size' is",
        ),
    ] {
        let message = PeftConfig::from_json(&fields.to_string()).unwrap_err().to_string();
        assert_eq!(message, format!("{named} 1000000000000000000, {most}"));
    }
}
