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
    /// Not empty, unless no data were given.
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
                    texts.push(
                        text.ok_or_else(|| at(path, line, "expected an object with \"text\", a string"))?.to_owned(),
                    );
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
                    examples.push(self.line(path, line, &object)?);
                    Ok(())
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
        let taught = 0..ids.len();
        Ok(self.ended(ids, vec![taught], true, text.chars().count()))
    }

    /// The example that line `line` of `path` describes.
    fn line(&mut self, path: &Path, line: usize, object: &Map<String, Value>) -> Result<Example> {
        let wrong = |why: String| at(path, line, why);
        let string = |key: &str| {
            let text = object.get(key).and_then(Value::as_str);
            text.ok_or_else(|| wrong(format!("\"{key}\" is missing or no string: {SHAPES}")))
        };
        let has = |key| object.contains_key(key);
        match (has("text"), has("prompt") || has("completion"), has("messages")) {
            (true, false, false) => self.text(string("text")?),
            (false, true, false) => {
                let (prompt, completion) = (string("prompt")?, string("completion")?);
                let mut ids = self.tokenizer.encode(prompt, true)?;
                let start = ids.len();
                ids.extend(self.tokenizer.encode(completion, false)?);
                let taught = start..ids.len();
                Ok(self.ended(ids, vec![taught], false, completion.chars().count()))
            }
            (false, false, true) => {
                let messages = object["messages"].as_array().filter(|list| list.iter().all(Value::is_object));
                let messages = messages.ok_or_else(|| wrong("\"messages\": expected a list of objects".into()))?;
                let template = match &mut self.template {
                    Some(template) => template,
                    none => none.insert(self.tokenizer.chat_template()?),
                };
                let tools = object.get("tools").unwrap_or(&Value::Null);
                let chat = chat::encode(self.tokenizer, template, messages, tools).map_err(|e| wrong(e.to_string()))?;
                Ok(self.ended(chat.ids, chat.answers, false, chat.characters))
            }
            (false, false, false) => Err(wrong(SHAPES.into())),
            _ => Err(wrong(format!("more than one kind of example: {SHAPES}"))),
        }
    }

    /// The example with the end of text at its end, taught; the last range of `taught` reaches the end of `ids`.
    fn ended(&self, mut ids: Vec<u32>, mut taught: Vec<Range<usize>>, running: bool, characters: usize) -> Example {
        let end = self.tokenizer.end_of_text();
        let from = taught.last().map_or(0, |range| range.start);
        let blank = |ids: &[u32]| self.tokenizer.decode(ids, true).is_ok_and(|text| text.trim().is_empty());
        match ids.iter().rposition(|&id| id == end).filter(|&at| at >= from && blank(&ids[at + 1..])) {
            Some(at) => ids.truncate(at + 1),
            None => ids.push(end),
        }
        if let Some(range) = taught.last_mut() {
            range.end = ids.len();
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
        match serde_json::from_str(text.trim_end()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tempfile::TempDir;

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn tokenizer() -> Tokenizer {
        let trained = Tokenizer::train_bpe("To be, or not to be: that is the question.", 280).unwrap();
        let [(_, json), _] = trained.files().unwrap();
        let config = serde_json::json!({ "eos_token": "<|endoftext|>", "chat_template": CHATML });
        Tokenizer::from_bytes(json.as_bytes(), config.to_string().as_bytes()).unwrap()
    }

    fn file(name: &str, bytes: impl AsRef<[u8]>) -> (TempDir, Source<'static>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, Source::File(path))
    }

    fn load(name: &str, bytes: impl AsRef<[u8]>) -> Result<Data, String> {
        let (dir, source) = file(name, bytes);
        let folder = format!("{}/", dir.path().display());
        Data::load(&tokenizer(), &[source], &[]).map_err(|e| e.to_string().replace(&folder, ""))
    }

    /// Every example's text, with what is taught in brackets.
    fn shown(examples: &[Example]) -> Vec<String> {
        let tokenizer = tokenizer();
        let show = |example: &Example| {
            let (mut text, mut at) = (String::new(), 0);
            for range in &example.taught {
                text += &tokenizer.decode(&example.ids[at..range.start], true).unwrap();
                text += &format!("[{}]", tokenizer.decode(&example.ids[range.clone()], true).unwrap());
                at = range.end;
            }
            text + &tokenizer.decode(&example.ids[at..], true).unwrap()
        };
        examples.iter().map(show).collect()
    }

    #[test]
    fn every_kind_of_line_teaches_what_it_should() {
        let lines = [
            r#"{"text": "to be", "id": 1}"#,
            "",
            r#"{"prompt": "or not", "completion": " to be"}"#,
            r#"{"prompt": "that", "completion": " is<|endoftext|>\n"}"#,
            r#"{"prompt": "the end<|endoftext|>", "completion": ""}"#,
            r#"{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "user", "content": "more"}]}"#,
            r#"{"text": "held out"}"#,
        ];
        let data = load("a.jsonl", lines.join("\n")).unwrap();
        let expected = [
            "[to be<|endoftext|>]",
            "or not[ to be<|endoftext|>]",
            "that[ is<|endoftext|>]",
            "the end<|endoftext|>[<|endoftext|>]",
            "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n[!<|im_end|>\n<|endoftext|>]",
        ];
        assert_eq!(shown(&data.train), expected);
        assert_eq!(shown(&data.held_out), ["[held out<|endoftext|>]"]);
        assert_eq!(data.train.iter().map(|e| e.running).collect::<Vec<_>>(), [true, false, false, false, false]);
        assert_eq!(data.train[1].characters, 6);
    }

    #[test]
    fn a_line_that_is_no_example_is_named() {
        let good = r#"{"text": "to be"}"#;
        for (line, why) in [
            ("{\"text\": ", "not JSON: EOF while parsing a value at column 8: "),
            ("[1]", "expected an object with \"text\", or"),
            (r#"{"id": 1}"#, "expected an object with \"text\", or"),
            (r#"{"text": 1}"#, "\"text\" is missing or no string: expected"),
            (r#"{"prompt": "a"}"#, "\"completion\" is missing or no string: expected"),
            (r#"{"completion": "a"}"#, "\"prompt\" is missing or no string: expected"),
            (r#"{"text": "a", "messages": []}"#, "more than one kind of example: expected"),
            (r#"{"messages": "hello"}"#, "\"messages\": expected a list of objects"),
            (r#"{"messages": [{"role": "user", "content": "?"}]}"#, "chat template: no message has the role"),
        ] {
            let error = load("bad.jsonl", format!("{good}\n\n{line}\n")).unwrap_err();
            assert!(error.starts_with(&format!("bad.jsonl:3: {why}")), "{error}");
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_placed_by_its_byte() {
        let expected = |name: &str, at| format!("{name}: the byte at offset {at} is not UTF-8: expected text in UTF-8");
        assert_eq!(load("a.txt", b"abc\xff").unwrap_err(), expected("a.txt", 3));
        let lines = [&b"{\"text\": \"a\"}\n{\"text\": \"\xc3\""[..], b"\n"].concat();
        assert_eq!(load("a.jsonl", lines).unwrap_err(), expected("a.jsonl", 24));
    }

    #[test]
    fn data_without_examples_are_an_error() {
        for name in ["a.txt", "a.jsonl"] {
            for text in ["", " \n\n"] {
                assert_eq!(load(name, text).unwrap_err(), format!("{name}: no examples: expected at least one"));
            }
        }
        let missing = Source::File("missing.txt".into());
        let error = Data::load(&tokenizer(), &[missing], &[]).unwrap_err().to_string();
        assert!(error.starts_with("missing.txt: "), "{error}");
    }

    #[test]
    fn a_tokenizer_without_a_template_takes_no_conversation() {
        let tokenizer = Tokenizer::train_bpe("", 257).unwrap();
        let (_dir, source) = file("a.jsonl", r#"{"messages": [{"role": "assistant", "content": "!"}]}"#);
        let error = Data::load(&tokenizer, &[source], &[]).unwrap_err().to_string();
        assert!(error.contains("chat template: this tokenizer has none: expected chat_template.jinja"), "{error}");
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        assert_eq!(shown(&load("a.jsonl", "\u{feff}{\"text\": \"a\"}").unwrap().train), ["[a<|endoftext|>]"]);
        assert_eq!(shown(&load("a.txt", "\u{feff}a").unwrap().train), ["[a<|endoftext|>]"]);
    }

    #[test]
    fn evaluation_files_leave_the_data_whole() {
        let (_a, text) = file("a.txt", "one\ntwo\n".repeat(10));
        let (_b, lines) = file("b.jsonl", "{\"text\": \"a\"}\n".repeat(20));
        let eval = Source::Text { name: "built in", text: "eval" };
        let sources = [text, lines];
        let data = Data::load(&tokenizer(), &sources, &[eval]).unwrap();
        assert_eq!((data.train.len(), shown(&data.held_out)), (21, vec!["[eval<|endoftext|>]".to_owned()]));
        assert_eq!(Data::read(&tokenizer(), &sources).unwrap(), data.train);
        let split = Data::load(&tokenizer(), &sources, &[]).unwrap();
        assert_eq!((split.train.len(), split.held_out.len()), (1 + 18, 1 + 2));
        assert_eq!(shown(&split.held_out[..1]), ["[one\ntwo\n<|endoftext|>]"]);
    }

    #[test]
    fn a_lone_example_is_trained_and_a_pair_is_split() {
        let line = "{\"text\": \"a\"}\n";
        assert_eq!(load("a.jsonl", line).unwrap().held_out, []);
        assert_eq!(load("a.jsonl", line.repeat(2)).unwrap().held_out.len(), 1);
        assert_eq!(load("a.txt", "a").unwrap().held_out, []);
    }

    #[test]
    fn the_plain_text_of_lines_is_their_texts() {
        let (_dir, source) = file("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
        assert_eq!(source.plain_text().unwrap(), "a\nb");
        let (_dir, source) = file("a.jsonl", "{\"prompt\": \"a\"}\n");
        assert!(
            source
                .plain_text()
                .unwrap_err()
                .to_string()
                .ends_with("a.jsonl:1: expected an object with \"text\", a string")
        );
    }

    proptest! {
        /// Never more than a fifth is held out, and the last tenth is never trained on.
        #[test]
        fn the_last_tenth_is_held_out_at_a_clean_boundary(text in "[a-zé \n]{0,300}") {
            let cut = last_tenth(&text);
            let (characters, held) = (text.chars().count(), text[cut..].chars().count());
            if characters >= 10 {
                prop_assert!(held * 10 >= characters, "{held} of {characters}");
                prop_assert!(held * 10 <= characters * 2 + 10, "{held} of {characters}");
            } else {
                prop_assert!(held * 2 <= characters.max(2));
            }
            prop_assert!(cut == text.len() || cut > 0);
        }
    }
}
