//! AdaLoRA's own fields of `adapter_config.json`.

use super::AdaLora;
use crate::config::{json_number, number, pattern, rank};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// A field of our own, where the term is of squared norms: PEFT, which has no such thing, passes over it.
const SQUARED: &str = "orth_reg_squared";

/// What PEFT adds to a layer's path in `rank_pattern`.
pub(super) const LAMBDA: &str = ".lora_E";

impl AdaLora {
    /// Take a field, if it is one of these.
    pub(crate) fn take(&mut self, field: &str, value: &Value) -> Result<bool> {
        match field {
            "target_r" => self.target_rank = rank(field, value)?,
            "tinit" => self.tinit = rank(field, value)?,
            "tfinal" => self.tfinal = rank(field, value)?,
            "deltaT" => self.delta_t = rank(field, value)?,
            "beta1" => self.beta1 = number(field, value)?,
            "beta2" => self.beta2 = number(field, value)?,
            "orth_reg_weight" => self.orthogonality = number(field, value)?,
            SQUARED => {
                self.squared = value.as_bool().ok_or_else(|| Error::field(field, value, "true or false"))?;
            }
            "total_step" if value.is_null() => self.total_step = None,
            "total_step" => self.total_step = Some(rank(field, value)?),
            "rank_pattern" => {
                let triplets = pattern(field, value, kept)?;
                let path = |(key, kept): (String, Vec<bool>)| match key.strip_suffix(LAMBDA) {
                    Some(path) => Ok((path.to_owned(), kept)),
                    None => Err(Error::field(format!("{field}: {key}"), "a key", "a layer's path and '.lora_E'")),
                };
                self.pattern = triplets.into_iter().map(path).collect::<Result<_>>()?;
                // In an order of its own, whatever the file's: it says nothing.
                self.pattern.sort();
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Write the fields.
    pub(crate) fn put(&self, fields: &mut Map<String, Value>) {
        let mut pattern: Vec<_> =
            self.pattern.iter().map(|(path, kept)| (format!("{path}{LAMBDA}"), json!(kept))).collect();
        pattern.sort_by(|a, b| a.0.cmp(&b.0));
        let own = [
            ("target_r", self.target_rank.into()),
            ("tinit", self.tinit.into()),
            ("tfinal", self.tfinal.into()),
            ("deltaT", self.delta_t.into()),
            ("beta1", json_number(self.beta1)),
            ("beta2", json_number(self.beta2)),
            ("orth_reg_weight", json_number(self.orthogonality)),
            ("total_step", json!(self.total_step)),
            (
                "rank_pattern",
                if pattern.is_empty() { Value::Null } else { Value::Object(pattern.into_iter().collect()) },
            ),
        ];
        let squared = self.squared.then(|| (SQUARED, true.into()));
        fields.extend(own.into_iter().chain(squared).map(|(name, value)| (name.to_owned(), value)));
    }
}

/// Which of a layer's triplets are left.
fn kept(field: &str, value: &Value) -> Result<Vec<bool>> {
    let kept = value.as_array().and_then(|list| list.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
    kept.ok_or_else(|| Error::field(field, value, "a list of true and false"))
}
