//! What is audited: formats, blocks, and which tensors of a checkpoint count as weights to quantise.

use crate::{Error, Result};
use rankfold_backend::{DType, Format, check_block};
use rankfold_files::{Checkpoint, TensorInfo};
use std::collections::BTreeSet;

/// Every block size that the formats have.
pub const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The block whose figures stand for a format where one number must: the default of QLoRA and of bitsandbytes.
const USUAL_BLOCK: usize = 64;

/// What to audit, and on how many threads.
#[derive(Clone, Debug)]
pub struct Options {
    formats: Vec<Format>,
    blocks: Vec<usize>,
    /// Threads of the statistics; never changes a figure.
    pub threads: usize,
    /// Which tensors.
    pub selection: Selection,
}

impl Options {
    /// Formats and blocks in any order; those named twice are audited once.
    ///
    /// Errors: no format, no block, or a block that the formats do not have.
    pub fn new(formats: &[Format], blocks: &[usize], threads: usize, selection: Selection) -> Result<Self> {
        let formats: Vec<_> = Format::ALL.into_iter().filter(|format| formats.contains(format)).collect();
        let mut blocks = blocks.to_vec();
        blocks.sort_unstable();
        blocks.dedup();
        if formats.is_empty() || blocks.is_empty() {
            return Err(Error::Options("expected at least one format and one block to audit".into()));
        }
        for &block in &blocks {
            check_block(block).map_err(|e| Error::Options(e.to_string()))?;
        }
        Ok(Self { formats, blocks, threads: threads.max(1), selection })
    }

    /// The formats, in the order of [`Format::ALL`].
    pub fn formats(&self) -> &[Format] {
        &self.formats
    }

    /// The blocks, ascending.
    pub fn blocks(&self) -> &[usize] {
        &self.blocks
    }

    /// The block of histograms and of figures by layer: 64 where it is audited, else the smallest.
    pub fn shown_block(&self) -> usize {
        if self.blocks.contains(&USUAL_BLOCK) { USUAL_BLOCK } else { self.blocks[0] }
    }
}

/// Which tensors of a checkpoint are weights to quantise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// These, of a model's folder: the weights of its linear layers.
    Linear(BTreeSet<String>),
    /// Of a file without a model's configuration: every matrix but embeddings and heads, told by their names.
    Matrices,
}

impl Selection {
    /// The rule in words.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Linear(_) => "the weight of every linear layer but the head",
            Self::Matrices => "every f32, bf16 or f16 matrix that is not named as an embedding or an output head",
        }
    }

    /// The audited tensors' names in the order of layers, and the names of the other matrices.
    pub(crate) fn split(&self, checkpoint: &Checkpoint) -> (Vec<String>, Vec<String>) {
        let matrices = checkpoint.names().filter(|name| checkpoint.get(name).is_some_and(is_matrix));
        let (mut audited, mut left): (Vec<String>, Vec<String>) =
            matrices.map(String::from).partition(|name| self.takes(name, checkpoint.get(name)));
        audited.sort_by_cached_key(|name| natural(name));
        left.sort_by_cached_key(|name| natural(name));
        (audited, left)
    }

    fn takes(&self, name: &str, info: Option<&TensorInfo>) -> bool {
        let is_served = info
            .is_some_and(|info| matches!(info.dtype(), Some(DType::F32 | DType::Bf16 | DType::F16)) && info.bytes > 0);
        is_served
            && match self {
                Self::Linear(names) => names.contains(name),
                Self::Matrices => !is_embedding_or_head(name),
            }
    }
}

fn is_matrix(info: &TensorInfo) -> bool {
    info.shape.len() == 2
}

/// By the names that Hugging Face models and the original LLaMA files use.
fn is_embedding_or_head(name: &str) -> bool {
    let is_known = |part: &str| part.contains("embed") || ["wte", "wpe", "lm_head"].contains(&part);
    name.split('.').any(is_known) || name == "output.weight"
}

/// A key under which layer 2 comes before layer 10: runs of digits are compared as numbers.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (words, after) = rest.split_at(text);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        // Words first, then the number that follows them; a number beyond u64 sorts last.
        key.push((0, words.to_owned()));
        key.push((number.parse().unwrap_or(u64::MAX), String::new()));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_in_the_order_of_their_numbers() {
        let mut names = ["layers.10.b", "layers.2.b", "layers.2.a", "layers.x", "a9"].map(String::from);
        names.sort_by_cached_key(|name| natural(name));
        assert_eq!(names, ["a9", "layers.2.a", "layers.2.b", "layers.10.b", "layers.x"]);
    }

    #[test]
    fn embeddings_and_heads_are_told_by_their_names() {
        let heads = ["model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight", "output.weight"];
        assert!(heads.into_iter().all(is_embedding_or_head));
        let linears = ["model.layers.0.mlp.up_proj.weight", "encoder.layer.0.output.dense.weight", "h.0.attn.weight"];
        assert!(!linears.into_iter().any(is_embedding_or_head));
    }

    #[test]
    fn options_that_name_nothing_or_no_block_of_the_formats_are_refused() {
        let options = |formats: &[Format], blocks: &[usize]| Options::new(formats, blocks, 1, Selection::Matrices);
        assert!(options(&[], &[64]).is_err() && options(&[Format::Nf4], &[]).is_err());
        let error = options(&[Format::Nf4], &[64, 48]).unwrap_err().to_string();
        assert!(error.contains("48") && error.contains("32 to 4096"), "{error}");
        let found = options(&[Format::Int4, Format::Nf4, Format::Int4], &[128, 64, 128]).unwrap();
        assert_eq!((found.formats(), found.blocks()), (&[Format::Nf4, Format::Int4][..], &[64, 128][..]));
        assert_eq!(options(&[Format::Nf4], &[512, 128]).unwrap().shown_block(), 128);
    }
}
