//! Which layers an adapter goes on, by PEFT's rules.
//!
//! A list names a layer where the layer's whole path is an entry or ends in ".entry"; a single string is a regular
//! expression for the whole path, but for "all-linear" in any case, which is every linear layer but the output
//! head. What `exclude_modules` names, by the same two rules, is left out. One rule is ours: each entry must match
//! some layer, where PEFT is content if any of them does. The layers are those of the model's blocks: the embedding and
//! the head take no adapter, and an entry that means them is refused as such.

use crate::{Error, Linear, Result};
use regex::Regex;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;

/// Layers by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    /// Whole paths or their last parts.
    List(BTreeSet<String>),
    /// A regular expression for the whole path.
    Pattern(String),
}

/// The layers that get an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Targets {
    /// PEFT's choice for the architecture.
    #[default]
    Default,
    /// Every linear layer but the output head.
    AllLinear,
    /// Those named.
    Named(Names),
}

/// PEFT's targets where none are given, by the `model_type` of `config.json`.
pub fn default_targets(architecture: &str) -> Option<&'static [&'static str]> {
    match architecture {
        "llama" | "mistral" | "qwen2" | "qwen3" => Some(&["q_proj", "v_proj"]),
        _ => None,
    }
}

impl Targets {
    /// From a command line: "all-linear"; "peft-default"; a list with commas; or a regular expression, which is a text
    /// with any sign that no path has.
    pub fn parse(text: &str) -> Self {
        let in_paths = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
        let names = text.split(',').map(str::trim);
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            Self::AllLinear
        } else if text.eq_ignore_ascii_case(PEFT_DEFAULT) {
            Self::Default
        } else if names.clone().all(|name| name.chars().all(in_paths)) {
            Self::Named(Names::List(names.map(str::to_string).collect()))
        } else {
            Self::Named(Names::Pattern(text.to_string()))
        }
    }

    /// From `target_modules`.
    pub(crate) fn from_json(value: &Value) -> Result<Self> {
        Ok(match value {
            Value::Null => Self::Default,
            Value::String(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Self::AllLinear,
            value => Self::Named(Names::from_json("target_modules", value)?),
        })
    }

    /// As `target_modules`.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Default => Value::Null,
            Self::AllLinear => ALL_LINEAR.into(),
            Self::Named(names) => names.to_json(),
        }
    }

    /// The same layers of this model by name: what PEFT, too, writes for a default and for "all-linear".
    pub fn named(&self, layers: &[&Linear], architecture: &str) -> Result<Names> {
        match self {
            Self::Named(names) => Ok(names.clone()),
            Self::Default => match default_targets(architecture) {
                Some(names) => Ok(Names::List(names.iter().map(|name| name.to_string()).collect())),
                None => Err(Error::NoDefault { architecture: architecture.into() }),
            },
            Self::AllLinear => {
                let names: BTreeSet<String> = layers.iter().map(|layer| last_part(layer.path()).into()).collect();
                if names.is_empty() { Err(no_match(ALL_LINEAR, layers)) } else { Ok(Names::List(names)) }
            }
        }
    }
}

const ALL_LINEAR: &str = "all-linear";
const PEFT_DEFAULT: &str = "peft-default";

/// What PEFT would adapt and no list of linear layers has: they are the embedding's and the loss's own.
const OUTSIDE: [&str; 2] = ["model.embed_tokens", "lm_head"];

impl Names {
    /// From the value of `field`: a list of strings or a string.
    pub(crate) fn from_json(field: &str, value: &Value) -> Result<Self> {
        let wrong = || Error::field(field, value, "a list of names or a regular expression");
        match value {
            Value::String(pattern) => Ok(Self::Pattern(pattern.clone())),
            Value::Array(names) => {
                let names = names.iter().map(|name| name.as_str().map(str::to_string).ok_or_else(wrong));
                Ok(Self::List(names.collect::<Result<_>>()?))
            }
            _ => Err(wrong()),
        }
    }

    /// As a JSON value, a list in alphabetical order.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Pattern(pattern) => pattern.clone().into(),
            Self::List(names) => names.iter().cloned().collect(),
        }
    }

    /// Each entry with the rule that tells whether a path is meant by it. `field` is for the message.
    fn entries(&self, field: &'static str) -> Result<Vec<Entry<'_>>> {
        Ok(match self {
            Self::List(names) => names.iter().map(|name| Entry { text: name, whole: None }).collect(),
            Self::Pattern(text) => vec![Entry { text, whole: Some(compile(field, text, text)?) }],
        })
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(names) => f.write_str(&names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")),
            Self::Pattern(pattern) => f.write_str(pattern),
        }
    }
}

/// One name, or the one regular expression.
struct Entry<'a> {
    text: &'a str,
    whole: Option<Regex>,
}

impl Entry<'_> {
    fn matches(&self, path: &str) -> bool {
        match &self.whole {
            Some(regex) => regex.is_match(path),
            None => is_named(path, self.text),
        }
    }
}

/// The layers that are targeted and not excluded, by their places in `layers`.
///
/// Errors: a target that matches no layer; nothing left; a regular expression that does not compile.
pub fn select(layers: &[&Linear], targets: &Names, exclude: Option<&Names>) -> Result<Vec<usize>> {
    let entries = targets.entries("target_modules")?;
    for entry in &entries {
        if !layers.iter().any(|layer| entry.matches(layer.path())) {
            return Err(no_match(entry.text, layers));
        }
    }
    if entries.is_empty() {
        return Err(no_match("", layers));
    }
    let excluded = exclude.map_or(Ok(Vec::new()), |names| names.entries("exclude_modules"))?;
    let meant = |entries: &[Entry], i: usize| entries.iter().any(|entry| entry.matches(layers[i].path()));
    let targeted: Vec<usize> = (0..layers.len()).filter(|&i| meant(&entries, i)).collect();
    let left: Vec<usize> = targeted.iter().copied().filter(|&i| !meant(&excluded, i)).collect();
    if left.is_empty() { Err(Error::AllExcluded { targeted: targeted.len() }) } else { Ok(left) }
}

/// The exclusions that exclude nothing: for a warning.
pub(crate) fn unmatched(exclude: &Names, layers: &[&Linear]) -> Result<Vec<String>> {
    let mut entries = exclude.entries("exclude_modules")?;
    entries.retain(|entry| !layers.iter().any(|layer| entry.matches(layer.path())));
    Ok(entries.iter().map(|entry| entry.text.to_string()).collect())
}

/// `inner`, which is made from `pattern`, anchored to the whole path. `field` is for the message.
pub(crate) fn compile(field: &'static str, pattern: &str, inner: &str) -> Result<Regex> {
    // Compiled alone first, so that a pattern cannot close the groups that it is put in.
    let compiled = Regex::new(pattern).and_then(|_| Regex::new(&format!(r"\A(?:{inner})\z")));
    compiled.map_err(|error| {
        // The last line says why; those before it draw the pattern.
        let why = error.to_string();
        let why = why.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string();
        Error::Pattern { field, pattern: pattern.into(), why }
    })
}

fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// With one path of each kind of layer, the first few.
fn no_match(target: &str, layers: &[&Linear]) -> Error {
    if OUTSIDE.iter().any(|path| is_named(path, target)) {
        return Error::Outside { target: target.into() };
    }
    const SHOWN: usize = 8;
    let mut examples: Vec<&str> = Vec::new();
    let mut left_out = 0;
    for path in layers.iter().map(|layer| layer.path()) {
        if examples.len() < SHOWN && examples.iter().all(|example| last_part(example) != last_part(path)) {
            examples.push(path);
        } else {
            left_out += 1;
        }
    }
    let mut examples = if examples.is_empty() { "none".into() } else { examples.join(", ") };
    if left_out > 0 {
        examples += &format!(" and {left_out} more");
    }
    Error::NoMatch { target: target.into(), examples }
}
