//! `rank_pattern` and `alpha_pattern`: values that hold for some layers only.
//!
//! A key means a layer where the regular expression `(.*\.)?(KEY)$` matches its path from the start; of several
//! that do, the first in the file's order counts.

use crate::targets::compile;
use crate::{AdapterConfig, LoraSpec, Result};
use regex::Regex;

/// Values by pattern, in the file's order.
#[derive(Debug)]
pub struct Patterns<'a, T> {
    keys: Vec<(&'a str, Regex, T)>,
}

impl<'a, T: Copy> Patterns<'a, T> {
    /// Compile the keys of `field`, which is for the message.
    pub fn new(field: &'static str, keys: &'a [(String, T)]) -> Result<Self> {
        let compiled = keys
            .iter()
            .map(|(key, value)| Ok((key.as_str(), compile(field, key, &format!(r"(.*\.)?({key})"))?, *value)));
        Ok(Self { keys: compiled.collect::<Result<_>>()? })
    }

    /// The value for a layer, where any key means it.
    pub fn of(&self, path: &str) -> Option<T> {
        self.keys.iter().find(|(_, regex, _)| regex.is_match(path)).map(|(_, _, value)| *value)
    }

    /// The keys that mean none of `paths`: for a warning.
    pub fn unmatched(&self, paths: &[&str]) -> Vec<String> {
        let meant = |regex: &Regex| paths.iter().any(|path| regex.is_match(path));
        self.keys.iter().filter(|(_, regex, _)| !meant(regex)).map(|(key, _, _)| key.to_string()).collect()
    }
}

/// The hyper-parameters of every layer that a configuration targets.
#[derive(Debug)]
pub struct Specs<'a> {
    config: &'a AdapterConfig,
    /// `rank_pattern`.
    pub ranks: Patterns<'a, usize>,
    /// `alpha_pattern`.
    pub alphas: Patterns<'a, f64>,
}

impl<'a> Specs<'a> {
    /// Of a configuration. Errors: a key that is no regular expression.
    pub fn new(config: &'a AdapterConfig) -> Result<Self> {
        let ranks = Patterns::new("rank_pattern", &config.rank_pattern)?;
        Ok(Self { config, ranks, alphas: Patterns::new("alpha_pattern", &config.alpha_pattern)? })
    }

    /// Of the layer at `path`.
    pub fn of(&self, path: &str) -> LoraSpec {
        let spec = self.config.spec;
        LoraSpec {
            rank: self.ranks.of(path).unwrap_or(spec.rank),
            alpha: self.alphas.of(path).unwrap_or(spec.alpha),
            ..spec
        }
    }
}
