//! Text to token ids and back: the `tokenizers` crate, with what a model folder says beside its `tokenizer.json`.
//!
//! Three things are asked of a tokenizer that its own file does not tell:
//! - the end of text: `eos_token` of `tokenizer_config.json`, else `eos_token_id` (a number or a list) of
//!   `config.json`, else of `generation_config.json`; generation stops at every id that any of the three names;
//! - the chat template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`;
//! - the start: the ids that its post-processor puts before a text (Llama's `<|begin_of_text|>`), if any.
//!
//! A long text is encoded in pieces, for the crate keeps about a hundred bytes a token until it returns. A piece may
//! end at a line end between two characters that are not white space, and only where the text around the cut gives
//! the same ids whole and cut; where a tokenizer never allows that, the text is encoded whole.

use crate::data::bpe;
use crate::data::template::ChatTemplate;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Bytes of text that are encoded at once, about.
const PIECE: usize = 1 << 16;
/// Bytes on either side of a cut that decide whether it changes the ids.
const CONTEXT: usize = 256;
/// Cuts that are tried before a text is encoded whole.
const TRIES: usize = 8;

/// A tokenizer and what its folder says of it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    config: Map<String, Value>,
    chat_template: Option<String>,
    start: Vec<u32>,
    stops: Vec<u32>,
    vocab_size: usize,
    piece: usize,
}

impl Tokenizer {
    /// The tokenizer of a model folder, or of a `tokenizer.json` with its neighbours.
    ///
    /// Errors: a file that is missing or does not parse; no end of text in any of the three files.
    pub fn from_file(path: &Path) -> Result<Self> {
        let (folder, file) = if path.is_dir() {
            (path, path.join("tokenizer.json"))
        } else {
            (path.parent().unwrap_or(Path::new("")), path.to_owned())
        };
        let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let jinja = folder.join("chat_template.jinja");
        let template = match std::fs::read_to_string(&jinja) {
            Ok(template) => Some(template),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(&jinja)(e)),
        };
        let mut ends = Vec::new();
        for name in ["config.json", "generation_config.json"] {
            ends.extend(id_list(read_json(&folder.join(name))?.get("eos_token_id")));
        }
        Self::new(&file, &bytes, config, template, &ends)
    }

    /// The tokenizer that the bytes of a `tokenizer.json` and of a `tokenizer_config.json` describe.
    ///
    /// Errors: as [`Tokenizer::from_file`].
    pub fn from_bytes(tokenizer: &[u8], config: &[u8]) -> Result<Self> {
        let path = Path::new("tokenizer_config.json");
        let config = serde_json::from_slice(config).map_err(|e| Error::file(path, e.to_string()))?;
        Self::new(Path::new("tokenizer.json"), tokenizer, config, None, &[])
    }

    /// Train a byte-level BPE of at most `vocab` tokens on `text`: see [`bpe::train`].
    pub fn train_bpe(text: &str, vocab: usize) -> Result<Self> {
        let json = bpe::train(pieces(text), vocab)?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": false,
            "clean_up_tokenization_spaces": false,
            "eos_token": bpe::END_OF_TEXT
        });
        let config = config.as_object().cloned().unwrap_or_default();
        Self::new(Path::new("tokenizer.json"), json.to_string().as_bytes(), config, None, &[])
    }

    fn new(
        path: &Path,
        bytes: &[u8],
        config: Map<String, Value>,
        template: Option<String>,
        ends: &[u32],
    ) -> Result<Self> {
        let wrong = |e: tokenizers::Error| Error::file(path, e.to_string());
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(wrong)?;
        // A truncation or padding that its maker left switched on would change texts without a word.
        inner.with_truncation(None).map_err(wrong)?.with_padding(None);
        let mut stops = Vec::new();
        if let Some(token) = special(&config, "eos_token") {
            let missing =
                || Error::file(path, format!("no token {token:?}: tokenizer_config.json's eos_token names it"));
            stops.push(inner.token_to_id(&token).ok_or_else(missing)?);
        }
        stops.extend(ends);
        let mut seen = std::collections::BTreeSet::new();
        stops.retain(|id| seen.insert(*id));
        if stops.is_empty() {
            let why = "no end-of-text token: expected eos_token in tokenizer_config.json beside it, or eos_token_id in \
                       config.json or generation_config.json";
            return Err(Error::file(path, why));
        }
        let template = template.or_else(|| default_template(&config));
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let mut tokenizer =
            Self { inner, config, chat_template: template, start: vec![], stops, vocab_size, piece: PIECE };
        tokenizer.start = tokenizer.find_start()?;
        Ok(tokenizer)
    }

    /// The ids before those of a letter, when the post-processor may add its own.
    fn find_start(&self) -> Result<Vec<u32>> {
        let plain = self.raw("a", false)?;
        let framed = self.raw("a", true)?;
        let at = framed.windows(plain.len().max(1)).position(|w| w == plain);
        Ok(framed[..at.unwrap_or(0)].to_vec())
    }

    fn raw(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| Error::Tokenizer { why: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text`; with `start`, after those that this tokenizer puts before a text.
    ///
    /// A special token spelt out in the text becomes that token, as in Hugging Face's tokenizers.
    pub fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let mut ids = if start { self.start.clone() } else { Vec::new() };
        let mut rest = text;
        while let Some(cut) = self.safe_cut(rest)? {
            let (piece, tail) = rest.split_at(cut);
            ids.extend(self.raw(piece, false)?);
            rest = tail;
        }
        ids.extend(self.raw(rest, false)?);
        Ok(ids)
    }

    /// Where a long text may be cut without changing its ids.
    fn safe_cut(&self, text: &str) -> Result<Option<usize>> {
        if text.len() < 2 * self.piece {
            return Ok(None);
        }
        for cut in cuts(text, self.piece).take(TRIES) {
            let from = text.floor_char_boundary(cut.saturating_sub(CONTEXT));
            let to = text.ceil_char_boundary((cut + CONTEXT).min(text.len()));
            let mut parts = self.raw(&text[from..cut], false)?;
            parts.extend(self.raw(&text[cut..to], false)?);
            if parts == self.raw(&text[from..to], false)? {
                return Ok(Some(cut));
            }
        }
        Ok(None)
    }

    /// The text of `ids`; with `specials`, special tokens are spelt out, otherwise they are left out.
    ///
    /// Errors: an id that the vocabulary lacks.
    pub fn decode(&self, ids: &[u32], specials: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            let why = format!("token id {id} is beyond the vocabulary of {}", self.vocab_size);
            return Err(Error::Tokenizer { why });
        }
        self.inner.decode(ids, !specials).map_err(|e| Error::Tokenizer { why: e.to_string() })
    }

    /// One more than the largest id: what a model's vocabulary must at least be.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends every document.
    pub fn end_of_text(&self) -> u32 {
        self.stops[0]
    }

    /// Every token at which generation stops, [`Tokenizer::end_of_text`] first.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The chat template, compiled with this tokenizer's special tokens as its variables.
    ///
    /// Errors: the model has none, or it does not compile.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let why = "this tokenizer has none: expected chat_template.jinja, or chat_template in tokenizer_config.json";
        let source = self.chat_template.as_ref().ok_or_else(|| Error::ChatTemplate { why: why.into() })?;
        let names = self.config.keys().filter(|key| key.ends_with("_token"));
        let tokens = names.filter_map(|name| Some((name.clone(), special(&self.config, name)?)));
        ChatTemplate::new(source, tokens.collect())
    }

    /// Its `tokenizer.json` and `tokenizer_config.json`, as text: what Hugging Face's `AutoTokenizer` loads.
    pub fn files(&self) -> Result<[(&'static str, String); 2]> {
        let tokenizer = self.inner.to_string(true).map_err(|e| Error::Tokenizer { why: e.to_string() })?;
        let mut config = self.config.clone();
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".into(), template.as_str().into());
        }
        if special(&config, "eos_token").is_none() {
            config.insert("eos_token".into(), self.inner.id_to_token(self.end_of_text()).into());
        }
        Ok([("tokenizer.json", tokenizer), ("tokenizer_config.json", format!("{:#}\n", Value::Object(config)))])
    }
}

/// Line ends from byte `from` on that stand between two characters that are not white space.
fn cuts(text: &str, from: usize) -> impl Iterator<Item = usize> {
    let bytes = text.as_bytes();
    let from = text.floor_char_boundary(from);
    text[from..].match_indices('\n').map(move |(i, _)| from + i + 1).filter(move |&cut| {
        let before = text[..cut - 1].chars().next_back();
        let inside = cut < bytes.len() && before.is_some_and(|c| !c.is_whitespace());
        inside && text[cut..].chars().next().is_some_and(|c| !c.is_whitespace())
    })
}

/// A text in pieces of about [`PIECE`] bytes, cut where GPT-2's pattern cuts too: before and after a lone line end.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = cuts(rest, PIECE.min(rest.len())).next().unwrap_or(rest.len());
        let (piece, tail) = rest.split_at(cut);
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A JSON object, empty where the file does not exist.
fn read_json(path: &Path) -> Result<Map<String, Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::file(path, e.to_string())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// A special token of `tokenizer_config.json`: a string, or an object with its `content`.
fn special(config: &Map<String, Value>, name: &str) -> Option<String> {
    let value = config.get(name)?;
    Some(value.as_str().or_else(|| value.get("content")?.as_str())?.to_owned())
}

/// One id or a list of them.
fn id_list(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// `chat_template` as a string, or the one named "default" of a list.
fn default_template(config: &Map<String, Value>) -> Option<String> {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    match config.get("chat_template")? {
        Value::Array(list) => text(list.iter().find(|t| t["name"] == "default")?.get("template")?),
        one => text(one),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n";

    fn trained() -> Tokenizer {
        Tokenizer::train_bpe(TEXT, 300).unwrap()
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(text in "\\PC{0,40}") {
            let tokenizer = trained();
            let ids = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }

        #[test]
        fn pieces_give_the_ids_of_the_whole(text in "([ab.,é]{1,6}|[ \n]{1,3}|<\\|endoftext\\|>){0,80}") {
            let mut tokenizer = trained();
            let whole = tokenizer.raw(&text, false).unwrap();
            tokenizer.piece = 16;
            prop_assert_eq!(tokenizer.encode(&text, false).unwrap(), whole);
        }

        #[test]
        fn training_pieces_are_the_text(text in "[ab \n]{0,200}") {
            prop_assert_eq!(pieces(&text).collect::<String>(), text);
        }
    }

    #[test]
    fn a_long_text_is_cut_and_a_tokenizer_that_marks_beginnings_is_not() {
        let mut tokenizer = trained();
        tokenizer.piece = 16;
        let text = "hear me speak.\nhear me speak.\n".repeat(3);
        assert_eq!(tokenizer.safe_cut(&text).unwrap(), Some(30));
        // Llama 2's normalizer writes "▁" before every text it is given, so a cut adds a token.
        let mut json: Value = serde_json::from_str(&tokenizer.files().unwrap()[0].1).unwrap();
        json["normalizer"] = json!({ "type": "Prepend", "prepend": "x" });
        let config = tokenizer.files().unwrap()[1].1.clone();
        let mut marking = Tokenizer::from_bytes(json.to_string().as_bytes(), config.as_bytes()).unwrap();
        marking.piece = 16;
        assert_eq!(marking.safe_cut(&text).unwrap(), None);
        assert_eq!(marking.encode(&text, false).unwrap(), marking.raw(&text, false).unwrap());
    }

    #[test]
    fn training_is_deterministic() {
        assert_eq!(trained().files().unwrap(), trained().files().unwrap());
    }

    #[test]
    fn the_files_give_the_tokenizer_back() {
        let tokenizer = trained();
        let [(a, json), (b, config)] = tokenizer.files().unwrap();
        let dir = folder(&[(a, &json), (b, &config)]);
        for again in [Tokenizer::from_file(dir.path()), Tokenizer::from_file(&dir.path().join(a))] {
            let again = again.unwrap();
            assert_eq!(again.encode(TEXT, true).unwrap(), tokenizer.encode(TEXT, true).unwrap());
            assert_eq!((again.end_of_text(), again.vocab_size()), (0, tokenizer.vocab_size()));
            assert_eq!(again.files().unwrap(), tokenizer.files().unwrap());
        }
    }

    #[test]
    fn the_end_of_text_comes_from_the_first_file_that_names_it() {
        let json = &trained().files().unwrap()[0].1;
        let end = |config: &str, model: &str, generation: &str| {
            let dir = folder(&[
                ("tokenizer.json", json),
                ("tokenizer_config.json", config),
                ("config.json", model),
                ("generation_config.json", generation),
            ]);
            Tokenizer::from_file(dir.path()).map(|t| t.stops().to_vec()).map_err(|e| e.to_string())
        };
        let (model, generation) = (r#"{"eos_token_id": [7, 8]}"#, r#"{"eos_token_id": 9}"#);
        assert_eq!(end(r#"{"eos_token": {"content": "a"}}"#, model, generation).unwrap()[1..], [7, 8, 9]);
        assert_eq!(end(r#"{"eos_token": null}"#, model, generation).unwrap(), [7, 8, 9]);
        assert_eq!(end("{}", r#"{"eos_token_id": null}"#, generation).unwrap(), [9]);
        assert!(
            end("{}", "{}", "{}").unwrap_err().contains("tokenizer.json: no end-of-text token: expected eos_token")
        );
        assert!(end(r#"{"eos_token": "</s>"}"#, model, "{}").unwrap_err().contains("no token \"</s>\""));
        assert!(end("{", model, "{}").unwrap_err().contains("tokenizer_config.json: EOF"));
    }

    #[test]
    fn the_start_is_what_the_post_processor_puts_before_a_text() {
        let mut json: Value = serde_json::from_str(&trained().files().unwrap()[0].1).unwrap();
        let token = json!({ "SpecialToken": { "id": "<|endoftext|>", "type_id": 0 } });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let specials = json!({ "<|endoftext|>": { "id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"] } });
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [token, text, token], "pair": [text, text], "special_tokens": specials
        });
        let config = br#"{"eos_token": "<|endoftext|>"}"#;
        let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), config).unwrap();
        let plain = tokenizer.encode("a", false).unwrap();
        assert_eq!(plain, trained().encode("a", true).unwrap());
        assert_eq!(tokenizer.encode("a", true).unwrap(), [vec![0], plain].concat());
    }

    #[test]
    fn an_id_beyond_the_vocabulary_does_not_decode() {
        let tokenizer = trained();
        let error = tokenizer.decode(&[1, 9999], false).unwrap_err().to_string();
        assert_eq!(error, format!("tokenizer: token id 9999 is beyond the vocabulary of {}", tokenizer.vocab_size()));
        assert_eq!(tokenizer.decode(&[0], false).unwrap(), "");
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = folder(&[]);
        assert!(Tokenizer::from_file(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
        let dir = folder(&[("tokenizer.json", "{\"version\": \"1.0\"")]);
        assert!(Tokenizer::from_file(dir.path()).unwrap_err().to_string().contains("tokenizer.json: "));
    }
}
