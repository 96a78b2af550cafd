//! Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.
//!
//! That is Jinja2 with `trim_blocks`, `lstrip_blocks` and loop controls; the methods of Python's strings and
//! dictionaries; `raise_exception`; a `tojson` that writes as Python's `json.dumps` does, with no HTML escapes; and the
//! variables `messages`, `tools`, `add_generation_prompt` and the special tokens (`bos_token`, `eos_token`, …).
//!
//! `{% generation %}` blocks, which only mark the assistant's text, are rendered as if the marks were not there: the
//! mask comes from elsewhere (see [`chat`](crate::data::chat)). `strftime_now` is left undefined, since training data
//! must not depend on the day: templates that ask whether it is defined write their own date.

use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::Value as Json;

const NAME: &str = "chat_template";

/// A compiled chat template with its tokenizer's special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compile `source`; `tokens` are special tokens by the name of their variable.
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(wrong)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", python_json);
        environment.set_formatter(|out, state, value| match python_constant(value) {
            Some(constant) => Ok(out.write_str(constant)?),
            None => minijinja::escape_formatter(out, state, value),
        });
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(wrong)?;
        Ok(Self { environment, tokens })
    }

    /// The conversation as one text, ending, with `prompt`, where the assistant's next answer begins.
    ///
    /// A field of a message that is null is as if it were not there.
    pub fn render(&self, messages: &[Json], tools: &Json, prompt: bool) -> Result<String> {
        let mut variables: Vec<(String, Value)> =
            self.tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
        variables.push(("messages".into(), messages.iter().map(message).collect::<Vec<_>>().into()));
        variables.push(("tools".into(), value(tools)));
        variables.push(("add_generation_prompt".into(), prompt.into()));
        let template = self.environment.get_template(NAME).map_err(wrong)?;
        template.render(Value::from_pairs(variables)).map_err(wrong)
    }
}

fn wrong(error: minijinja::Error) -> Error {
    Error::ChatTemplate { why: error.to_string() }
}

/// How Python writes the constants that Jinja2 spells otherwise.
fn python_constant(value: &Value) -> Option<&'static str> {
    match bool::try_from(value.clone()) {
        _ if value.is_none() => Some("None"),
        Ok(bool) if value.kind() == ValueKind::Bool => Some(if bool { "True" } else { "False" }),
        _ => None,
    }
}

/// A message without its null fields: tables of conversations have one for whatever other messages have.
fn message(json: &Json) -> Value {
    match json {
        Json::Object(map) => {
            let present = map.iter().filter(|(_, item)| !item.is_null());
            Value::from_pairs(present.map(|(key, item)| (key.as_str(), value(item))))
        }
        other => value(other),
    }
}

/// JSON as a template's value; objects keep the order of their keys.
fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(bool) => Value::from(*bool),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => list.iter().map(value).collect::<Vec<_>>().into(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), value(item)))),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn python_json(value: &Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let why = "tojson(ensure_ascii=true): expected false, as in Hugging Face's templates";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
    }
    kwargs.assert_all_used()?;
    // The engine's own filter knows every value but escapes HTML; parsing undoes the escapes.
    let escaped = minijinja::filters::tojson(value, None, Kwargs::from_iter([] as [(&str, Value); 0]))?;
    let broken = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let json: Json = serde_json::from_str(&escaped.to_string()).map_err(broken)?;
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(broken)?;
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)).map_err(broken)?,
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Python's default separators: ", " and ": ".
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` … `{% endgeneration %}` as `{% if true %}` … `{% endif %}`, white-space control kept.
fn without_generation_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|i| open + i) else { break };
        let inside = &rest[open + 2..close];
        let word = inside.trim_matches(['-', '+']).trim();
        text.push_str(&rest[..open + 2]);
        match word {
            "generation" => text.push_str(&inside.replace(word, " if true ")),
            "endgeneration" => text.push_str(&inside.replace(word, " endif ")),
            _ => text.push_str(inside),
        }
        rest = &rest[close..];
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &Json) -> Result<String> {
        let tokens = vec![("eos_token".into(), "</s>".into())];
        let template = ChatTemplate::new(source, tokens)?;
        template.render(messages.as_array().unwrap(), &Json::Null, true)
    }

    /// Expected texts here are what transformers 5 renders.
    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let source = "{% for m in messages %}\n    {% if m['role'].startswith('us') %}\n{{ m.content.strip() }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\n>\n{% endif %}\n";
        let text = render(source, &json!([{ "role": "user", "content": " hi " }])).unwrap();
        assert_eq!(text, "hi</s>\n>\n");
    }

    #[test]
    fn json_is_pythons() {
        let message = json!([{ "role": "tool", "content": { "z": [1, 2.5, null], "a": "<é's \\u003c>", "e": {} } }]);
        let text = render("{{ messages[0].content | tojson }}", &message).unwrap();
        assert_eq!(text, r#"{"z": [1, 2.5, null], "a": "<é's \\u003c>", "e": {}}"#);
        let text =
            render("{{ messages[0].content | tojson(indent=2) }}", &json!([{ "content": { "b": [1] } }])).unwrap();
        assert_eq!(text, "{\n  \"b\": [\n    1\n  ]\n}");
    }

    #[test]
    fn nulls_and_constants_are_pythons() {
        let message = json!([{ "content": null, "b": true, "l": [null] }]);
        let source = "{{ messages[0].content is defined }}{{ messages[0].b }}{{ messages[0].l[0] }}{{ none }}";
        assert_eq!(render(source, &message).unwrap(), "FalseTrueNoneNone");
    }

    #[test]
    fn generation_marks_leave_the_text_alone() {
        let marked = "{% for m in messages %}a {%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}";
        assert_eq!(render(marked, &json!([{ "content": "x" }])).unwrap(), "ax");
    }

    #[test]
    fn what_a_template_raises_is_the_error() {
        let error = render("{{ raise_exception('roles must alternate') }}", &json!([])).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("roles must alternate"), "{error}");
        let error = render("{% for m in %}", &json!([])).unwrap_err().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
    }

    #[test]
    fn a_date_is_written_only_by_templates_that_can_do_without() {
        let guarded = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}";
        assert_eq!(render(guarded, &json!([])).unwrap(), "26 Jul 2024");
        let error = render("{{ strftime_now('%d') }}", &json!([])).unwrap_err().to_string();
        assert!(error.contains("strftime_now"), "{error}");
    }
}
