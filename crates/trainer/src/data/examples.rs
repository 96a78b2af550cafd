//! Files to examples: what a model is shown, and which of it it is taught.
//!
//! | file | an example is | taught |
//! |---|---|---|
//! | any but `.jsonl` | the whole file | every token |
//! | `.jsonl`, `{"text": …}` | a line | every token |
//! | `.jsonl`, `{"prompt": …, "completion": …}` | a line | the completion |
//! | `.jsonl`, `{"messages": […]}`, perhaps with `"tools"` | a line | the assistant's turns |
//!
//! Every example ends with the end-of-text token, taught too, unless it ends with one already (white space after it
//! is then dropped). A text and a prompt begin with what the tokenizer puts before a text; a chat template writes
//! its own. Prompt and completion are encoded apart and joined, so that the boundary is one of tokens.
//!
//! **Held out** are the examples of the evaluation files where there are any. Otherwise the last tenth: of every plain
//! text, by characters, cut after the last line end (or else space) before nine tenths if there is one in the tenth
//! before; and of the examples of all JSONL files together, in their order, at least one where there are two.

use crate::data::chat;
use crate::data::template::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

const SHAPES: &str = "expected an object with \"text\", or \"prompt\" and \"completion\", or \"messages\"";
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// A document in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Its tokens, the end of text last.
    pub ids: Vec<u32>,
    /// Those that are taught, in order, disjoint.
    pub taught: Vec<Range<usize>>,
    /// Whether it is running text, which any window of it represents: longer than a row it is split, not cut off.
    pub running: bool,
    /// Characters that are taught, which tell a loss a token from a loss a character.
    pub characters: usize,
}

/// Where text comes from.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// A file, JSONL if its name ends so.
    File(PathBuf),
    /// Plain text in memory, with the name that errors give it.
    Text {
        /// The name.
        name: &'a str,
        /// The text.
        text: &'a str,
    },
}

/// What to train on and what to hold out.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// Never empty.
    pub train: Vec<Example>,
    /// Empty where the data are too small to be split.
    pub held_out: Vec<Example>,
}

impl Data {
    /// Read `data`, holding out all of `eval`, or a tenth of `data` where `eval` is empty.
    ///
    /// Errors: a file that cannot be read, is not UTF-8, or is empty; a line that is not an example.
    pub fn load(tokenizer: &Tokenizer, data: &[Source], eval: &[Source]) -> Result<Self> {
        let mut reader = Reader { tokenizer, template: None };
        let mut all = Self::default();
        let mut lines = Vec::new();
        for source in data {
            match reader.read(source)? {
                Content::Examples(examples) => lines.extend(examples),
                Content::Text(text) if eval.is_empty() => {
                    let (train, held_out) = text.split_at(last_tenth(&text));
                    all.train.push(reader.text(train)?);
                    if !held_out.is_empty() {
                        all.held_out.push(reader.text(held_out)?);
                    }
                }
                Content::Text(text) => all.train.push(reader.text(&text)?),
            }
        }
        if eval.is_empty() && lines.len() >= 2 {
            all.held_out.extend(lines.split_off(lines.len() - (lines.len() / 10).max(1)));
        }
        all.train.extend(lines);
        for source in eval {
            match reader.read(source)? {
                Content::Examples(examples) => all.held_out.extend(examples),
                Content::Text(text) => all.held_out.push(reader.text(&text)?),
            }
        }
        Ok(all)
    }

    /// All of `sources` as examples, nothing held out.
    ///
    /// Errors: as [`Data::load`].
    pub fn read(tokenizer: &Tokenizer, sources: &[Source]) -> Result<Vec<Example>> {
        let mut reader = Reader { tokenizer, template: None };
        let mut examples = Vec::new();
        for source in sources {
            match reader.read(source)? {
                Content::Examples(lines) => examples.extend(lines),
                Content::Text(text) => examples.push(reader.text(&text)?),
            }
        }
        Ok(examples)
    }
}

impl Source<'_> {
    /// The plain text of a source: a whole file, or of JSONL every line's `text`, joined by line ends.
    ///
    /// For training a tokenizer. Errors: as [`Data::load`], and a line without `text`.
    pub fn plain_text(&self) -> Result<String> {
        match self {
            Self::Text { text, .. } => Ok((*text).to_owned()),
            Self::File(path) if is_jsonl(path) => {
                let mut texts = Vec::new();
                for_lines(path, |line, object| {
                    let text = object.get("text").and_then(Value::as_str);
                    texts.push(text.ok_or_else(|| at(path, line, "expected an object with \"text\", a string"))?.to_owned());
                    Ok(())
                })?;
                Ok(texts.join("\n"))
            }
            Self::File(path) => read_text(path),
        }
    }
}

enum Content {
    Text(String),
    Examples(Vec<Example>),
}

/// Sources to examples; the template is compiled when the first conversation asks for it.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
}

impl Reader<'_> {
    fn read(&mut self, source: &Source) -> Result<Content> {
        let (path, text) = match source {
            Source::File(path) if is_jsonl(path) => {
                let mut examples = Vec::new();
                for_lines(path, |line, object| {
                    examples.push(self.line(&object).map_err(|error| match error {
                        Error::ChatTemplate { .. } | Error::Tokenizer { .. } => at(path, line, error.to_string()),
                        other => other,
                    })?);
                    Ok(())
                })
                .map_err(|error| match error {
                    // What `line` says of the shape has no place yet.
                    Error::Line { line, why, .. } => at(path, line, why),
                    other => other,
                })?;
                if examples.is_empty() {
                    return Err(Error::NoExamples { path: path.clone() });
                }
                return Ok(Content::Examples(examples));
            }
            Source::File(path) => (path.clone(), read_text(path)?),
            Source::Text { name, text } => (PathBuf::from(name), (*text).to_owned()),
        };
        if text.trim().is_empty() { Err(Error::NoExamples { path }) } else { Ok(Content::Text(text)) }
    }

    fn text(&self, text: &str) -> Result<Example> {
        let ids = self.tokenizer.encode(text, true)?;
        Ok(self.ended(ids, vec![], true, text.chars().count()))
    }

    fn line(&mut self, object: &Map<String, Value>) -> Result<Example> {
        let has = |key| object.contains_key(key);
        match (has("text"), has("prompt") || has("completion"), has("messages")) {
            (true, false, false) => self.text(string(object, "text")?),
            (false, true, false) => {
                let (prompt, completion) = (string(object, "prompt")?, string(object, "completion")?);
                let mut ids = self.tokenizer.encode(prompt, true)?;
                let start = ids.len();
                ids.extend(self.tokenizer.encode(completion, false)?);
                let taught = start..ids.len();
                Ok(self.ended(ids, vec![taught], false, completion.chars().count()))
            }
            (false, false, true) => {
                let messages = object["messages"].as_array().filter(|list| list.iter().all(Value::is_object));
                let messages = messages.ok_or_else(|| shape("\"messages\": expected a list of objects"))?;
                let template = match &mut self.template {
                    Some(template) => template,
                    none => none.insert(self.tokenizer.chat_template()?),
                };
                let tools = object.get("tools").unwrap_or(&Value::Null);
                let chat = chat::encode(self.tokenizer, template, messages, tools)?;
                Ok(self.ended(chat.ids, chat.answers, false, chat.characters))
            }
            (false, false, false) => Err(shape(SHAPES)),
            _ => Err(shape("more than one of \"text\", \"prompt\" with \"completion\", and \"messages\": expected one")),
        }
    }

    /// The example with the end of text at its end and taught; running text is taught whole.
    fn ended(&self, mut ids: Vec<u32>, mut taught: Vec<Range<usize>>, running: bool, characters: usize) -> Example {
        let end = self.tokenizer.end_of_text();
        let last = ids.iter().rposition(|&id| id == end);
        match last.filter(|&at| self.tokenizer.decode(&ids[at + 1..], true).is_ok_and(|text| text.trim().is_empty())) {
            Some(at) => ids.truncate(at + 1),
            None => ids.push(end),
        }
        if running {
            taught = vec![0..ids.len()];
        }
        for range in &mut taught {
            range.end = range.end.min(ids.len());
        }
        let closing = ids.len() - 1;
        match taught.last_mut() {
            Some(range) if range.end >= closing => range.end = ids.len(),
            _ => taught.push(closing..ids.len()),
        }
        Example { ids, taught, running, characters }
    }
}

/// The byte where the held-out tenth of a text begins: its end where the text is too short to be split.
fn last_tenth(text: &str) -> usize {
    let characters = text.chars().count();
    let byte = |character: usize| text.char_indices().nth(character).map_or(text.len(), |(byte, _)| byte);
    let (from, to) = (byte(characters * 8 / 10), byte(characters * 9 / 10));
    if from == 0 || to == from {
        return text.len();
    }
    let after = |separator| text[from..to].rfind(separator).map(|at| from + at + 1);
    after('\n').or_else(|| after(' ')).unwrap_or(to)
}

fn is_jsonl(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"))
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to() as u64;
        Error::Utf8 { path: path.to_owned(), offset }
    })?;
    Ok(text.strip_prefix(BYTE_ORDER_MARK).map(str::to_owned).unwrap_or(text))
}

/// Call `take` with the number, from 1, and the object of every line that is not blank.
fn for_lines(path: &Path, mut take: impl FnMut(usize, Map<String, Value>) -> Result<()>) -> Result<()> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let (mut bytes, mut offset) = (Vec::new(), 0);
    for line in 1.. {
        bytes.clear();
        if file.read_until(b'\n', &mut bytes).map_err(Error::io(path))? == 0 {
            break;
        }
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            let offset = offset + e.valid_up_to() as u64;
            Error::Utf8 { path: path.to_owned(), offset }
        })?;
        offset += bytes.len() as u64;
        let text = if line == 1 { text.trim_start_matches(BYTE_ORDER_MARK) } else { text };
        if text.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => take(line, object)?,
            Ok(_) => return Err(at(path, line, SHAPES)),
            Err(e) => {
                // The parser's own "at line 1" would contradict the file's line number.
                let what = e.to_string();
                let what = what.split(" at line ").next().unwrap_or(&what);
                return Err(at(path, line, format!("not JSON: {what} at column {}: {SHAPES}", e.column())));
            }
        }
    }
    Ok(())
}

fn at(path: &Path, line: usize, why: impl Into<String>) -> Error {
    Error::Line { path: path.to_owned(), line, why: why.into() }
}
