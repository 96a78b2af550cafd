//! Byte-pair encoding on bytes (Sennrich et al. 2016, algorithm 1; on bytes: Radford et al. 2019, §2.2).
//!
//! The text is split into words by GPT-2's pattern and every byte is written as one printable character, so that any
//! text can be encoded and nothing is unknown. Starting from the 256 bytes, the commonest adjacent pair of tokens
//! within words becomes a token, again and again:
//!
//! ```text
//! count[(a, b)] = Σ_words frequency · occurrences of (a, b)
//! repeat: (a, b) = argmax count;  new token ab;  replace a b by ab in every word that holds it, adjust its counts
//! ```
//!
//! A pair's words are kept beside its count, so that a merge visits only those. The largest count comes from a heap
//! with stale entries: one whose count has changed since is put back with its present count. Ties go to the pair of
//! the smaller ids, and every merge visits all of its words, so that the result depends on the text alone (the
//! `tokenizers` crate's own trainer breaks some ties by hash order).

use crate::{Error, Result};
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// The one special token, with id 0: the end of a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The smallest vocabulary: the end of text and 256 bytes.
pub const SMALLEST: usize = 257;

type Pair = (u32, u32);

/// A vocabulary of at most `vocab` tokens (fewer where the text has no more pairs to merge), as a `tokenizer.json`.
///
/// Ids: 0 is [`END_OF_TEXT`], 1 … 256 the bytes in the order of their characters, then the merges in their order.
/// `texts` are separate: no pair spans two. Errors: a vocabulary below [`SMALLEST`].
pub fn train<'a>(texts: impl IntoIterator<Item = &'a str>, vocab: usize) -> Result<Value> {
    if vocab < SMALLEST {
        let expected = "at least 257: the end-of-text token and 256 bytes";
        return Err(Error::Setting { setting: "vocab", found: vocab.to_string(), expected });
    }
    let alphabet: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    let mut tokens = vec![END_OF_TEXT.to_owned()];
    tokens.extend(alphabet.iter().map(char::to_string));
    let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();

    let mut merger = Merger::new(count_words(texts)?, ids);
    let mut merges: Vec<[String; 2]> = Vec::new();
    while tokens.len() < vocab {
        let Some((a, b)) = merger.commonest() else { break };
        let (left, right) = (tokens[a as usize].clone(), tokens[b as usize].clone());
        let merged = format!("{left}{right}");
        let id = *merger.ids.entry(merged.clone()).or_insert(tokens.len() as u32);
        // Two different pairs may spell one token: then it has two rules and one id.
        if id as usize == tokens.len() {
            tokens.push(merged);
        }
        merger.merge((a, b), id);
        merges.push([left, right]);
    }
    Ok(tokenizer_json(&tokens, &merges))
}

/// Words with their frequencies, a byte a character; sorted, so that nothing later depends on hash order.
fn count_words<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<BTreeMap<String, i64>> {
    let pre_tokenizer = ByteLevel::new(false, false, true);
    let mut words = BTreeMap::new();
    for text in texts {
        let mut split = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut split).map_err(|e| Error::Tokenizer { why: e.to_string() })?;
        for (word, _, _) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match words.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(words.insert(word.to_owned(), 1)),
            }
        }
    }
    Ok(words)
}

/// The words as tokens, and for every adjacent pair its count and its words.
struct Merger {
    words: Vec<(Vec<u32>, i64)>,
    counts: HashMap<Pair, i64>,
    places: HashMap<Pair, HashSet<usize>>,
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
    ids: HashMap<String, u32>,
}

impl Merger {
    fn new(words: BTreeMap<String, i64>, ids: HashMap<String, u32>) -> Self {
        let mut buffer = [0; 4];
        let words = words
            .into_iter()
            .map(|(word, count)| {
                let tokens = word.chars().filter_map(|c| ids.get(c.encode_utf8(&mut buffer) as &str).copied());
                (tokens.collect(), count)
            })
            .collect();
        let mut merger = Self { words, counts: HashMap::new(), places: HashMap::new(), heap: BinaryHeap::new(), ids };
        for word in 0..merger.words.len() {
            merger.count(word, 1);
        }
        merger.heap = merger.counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
        merger
    }

    /// Add (`sign` 1) or take away (−1) the pairs of a word.
    fn count(&mut self, word: usize, sign: i64) {
        let (tokens, frequency) = &self.words[word];
        for pair in tokens.windows(2).map(|w| (w[0], w[1])) {
            *self.counts.entry(pair).or_default() += sign * frequency;
            if sign > 0 {
                self.places.entry(pair).or_default().insert(word);
            }
        }
    }

    /// The pair of the largest count, the smallest of them where several have it; `None` where no pair is left.
    fn commonest(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            let now = self.counts.get(&pair).copied().unwrap_or(0);
            if now == count && now > 0 {
                return Some(pair);
            }
            if now > 0 {
                self.heap.push((now, Reverse(pair)));
            }
        }
        None
    }

    /// Replace `pair` by `id` in every word that holds it.
    fn merge(&mut self, pair: Pair, id: u32) {
        let mut fresh = BTreeSet::new();
        for word in self.places.remove(&pair).unwrap_or_default() {
            // Places are never taken away, so a word may have lost the pair to an earlier merge: harmless.
            self.count(word, -1);
            let tokens = &mut self.words[word].0;
            let (mut read, mut write) = (0, 0);
            while read < tokens.len() {
                let found = read + 1 < tokens.len() && (tokens[read], tokens[read + 1]) == pair;
                tokens[write] = if found { id } else { tokens[read] };
                read += 1 + usize::from(found);
                write += 1;
            }
            tokens.truncate(write);
            fresh.extend(tokens.windows(2).map(|w| (w[0], w[1])).filter(|&(a, b)| a == id || b == id));
            self.count(word, 1);
        }
        self.counts.remove(&pair);
        self.heap.extend(fresh.into_iter().map(|pair| (self.counts[&pair], Reverse(pair))));
    }
}

/// The file that the `tokenizers` crate and Hugging Face's `AutoTokenizer` read.
fn tokenizer_json(tokens: &[String], merges: &[[String; 2]]) -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), Value::from(id))).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 0, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn merges(json: &Value) -> Vec<(String, String)> {
        let pair = |m: &Value| (m[0].as_str().unwrap().to_owned(), m[1].as_str().unwrap().to_owned());
        json["model"]["merges"].as_array().unwrap().iter().map(pair).collect()
    }

    /// Algorithm 1 as the paper writes it: recount everything before every merge.
    fn naive(text: &str, merges: usize) -> Vec<(String, String)> {
        let order: HashMap<String, usize> = ByteLevel::alphabet()
            .into_iter()
            .collect::<BTreeSet<_>>()
            .iter()
            .enumerate()
            .map(|(i, c)| (c.to_string(), i))
            .collect();
        let mut ids = order;
        let mut words: Vec<(Vec<String>, i64)> = count_words([text])
            .unwrap()
            .into_iter()
            .map(|(w, n)| (w.chars().map(|c| c.to_string()).collect(), n))
            .collect();
        let mut rules = Vec::new();
        while ids.len() < 256 + merges {
            let mut counts: HashMap<(String, String), i64> = HashMap::new();
            for (word, n) in &words {
                for w in word.windows(2) {
                    *counts.entry((w[0].clone(), w[1].clone())).or_default() += n;
                }
            }
            let best = counts.into_iter().max_by_key(|((a, b), n)| (*n, Reverse((ids[a], ids[b]))));
            let Some(((a, b), _)) = best else { break };
            let next = ids.len();
            ids.entry(format!("{a}{b}")).or_insert(next);
            for (word, _) in &mut words {
                let mut i = 0;
                while i + 1 < word.len() {
                    if word[i] == a && word[i + 1] == b {
                        word[i] = format!("{a}{b}");
                        word.remove(i + 1);
                    }
                    i += 1;
                }
            }
            rules.push((a, b));
        }
        rules
    }

    proptest! {
        #[test]
        fn merges_are_those_of_the_naive_algorithm(text in "[ab]{0,12}( [abc]{1,9}){0,12}", count in 0usize..30) {
            prop_assert_eq!(merges(&train([text.as_str()], SMALLEST + count).unwrap()), naive(&text, count));
        }
    }

    #[test]
    fn the_commonest_pair_merges_first() {
        let json = train(["low low low lower lowest new new"], SMALLEST + 2).unwrap();
        // "lo" and "ow" both occur five times: the pair with the smaller first id wins, then "low".
        assert_eq!(merges(&json), [("l".into(), "o".into()), ("lo".into(), "w".into())]);
        assert_eq!(json["model"]["vocab"][END_OF_TEXT], 0);
        assert_eq!(json["model"]["vocab"]["low"], SMALLEST + 1);
    }

    #[test]
    fn a_text_without_pairs_gives_the_bytes_alone() {
        let json = train(["a", ""], 300).unwrap();
        assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), SMALLEST);
    }

    #[test]
    fn a_vocabulary_below_the_bytes_is_an_error() {
        let error = train(["text"], 256).unwrap_err().to_string();
        assert_eq!(error, "vocab 256: expected at least 257: the end-of-text token and 256 bytes");
    }
}
