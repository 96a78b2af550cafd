//! Which rows each step sees: a pure function of (examples, shape, seed, step).
//!
//! An epoch is every segment once. Epoch e splits running text at its own seeded offset, so that a full training sees
//! other windows each time; shuffles the segments (Fisher & Yates 1938; Durstenfeld 1964) and packs them in that
//! order. Both draw from Philox keyed by (seed, e):
//!
//! ```text
//! for i = n − 1 … 1:   j = ⌊u_i (i + 1) / 2⁶⁴⌋,   swap i and j,       u_i the 64-bit word i of the stream SHUFFLE + e
//! offset of example i  =  ⌊u_i seq / 2⁶⁴⌋,                           u_i the 64-bit word i of the stream OFFSET + e
//! ```
//!
//! Rows are numbered through all epochs; micro-batch m of step s holds rows (s · accumulate + m) · rows and on. Packing
//! may fill another number of rows each epoch, so finding a row means packing the epochs before it: once, in order,
//! as a run does anyway; a resumed run packs again those that it skips.

use crate::data::examples::Example;
use crate::data::packing::{self, Batch, Packing, Segment};
use crate::{Error, Result};
use rankfold_backend::philox;

/// Philox streams of the shuffles and offsets, an epoch each: far from those that a model's dropouts count up.
const SHUFFLE: u64 = 1 << 62;
const OFFSET: u64 = 3 << 61;

/// The tokens that a step takes: `accumulate` batches of `rows` rows of `seq` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Tokens a row: at least 2.
    pub seq: usize,
    /// Micro-batches a step.
    pub accumulate: usize,
}

/// Training batches, by step.
#[derive(Debug)]
pub struct Loader {
    examples: Vec<Example>,
    shape: Shape,
    seed: u64,
    padding: u32,
    packing: Packing,
    /// The first row of each epoch packed so far, and of the next.
    epochs: Vec<u64>,
    /// The epoch packed last, and its rows: all of the state, and recomputed from the rest when it does not serve.
    packed: (usize, Vec<Vec<Segment>>),
}

impl Loader {
    /// A loader of `examples`; `padding` is the end-of-text token.
    ///
    /// Errors: rows or accumulate 0, seq below 2; nothing taught within the first `seq` tokens of any example.
    pub fn new(examples: Vec<Example>, shape: Shape, seed: u64, padding: u32) -> Result<Self> {
        let at_least_1 = |setting, found: usize| {
            let error = || Error::Setting { setting, found: found.to_string(), expected: "at least 1" };
            if found == 0 { Err(error()) } else { Ok(()) }
        };
        at_least_1("batch", shape.rows)?;
        at_least_1("accumulate", shape.accumulate)?;
        check(&examples, shape.seq)?;
        let rows = epoch_rows(&examples, shape.seq, seed, 0, Packing::Whole);
        let epochs = vec![0, rows.len() as u64];
        Ok(Self { examples, shape, seed, padding, packing: Packing::Whole, epochs, packed: (0, rows) })
    }

    /// The same with rows of one document each.
    pub fn unpacked(self) -> Self {
        let packing = Packing::Alone;
        let rows = epoch_rows(&self.examples, self.shape.seq, self.seed, 0, packing);
        Self { packing, epochs: vec![0, rows.len() as u64], packed: (0, rows), ..self }
    }

    /// Micro-batch `micro` of step `step`, both from 0. `mut` only to remember the epoch that was packed last.
    pub fn batch(&mut self, step: u64, micro: usize) -> Batch {
        let Shape { rows, seq, accumulate } = self.shape;
        let first = (step * accumulate as u64 + micro as u64) * rows as u64;
        let rows: Vec<Vec<Segment>> = (first..first + rows as u64).map(|row| self.row(row)).collect();
        packing::batch(&self.examples, rows.iter().map(Vec::as_slice), seq, self.padding)
    }

    /// The tokens that a step takes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Rows of the first epoch; later ones differ by their offsets and order, if at all by a few.
    pub fn rows_an_epoch(&self) -> u64 {
        self.epochs[1]
    }

    /// Examples that are longer than a row, and cut off there.
    pub fn truncated(&self) -> usize {
        self.examples.iter().filter(|e| !e.running && e.ids.len() > self.shape.seq).count()
    }

    /// Examples that are left out, for nothing within their first `seq` tokens is taught.
    pub fn dropped(&self) -> usize {
        let mut used = vec![false; self.examples.len()];
        for segment in packing::segments(&self.examples, self.shape.seq, |_, _| 0) {
            used[segment.example] = true;
        }
        used.iter().filter(|&&used| !used).count()
    }

    fn row(&mut self, row: u64) -> Vec<Segment> {
        // The last epoch that begins at or before the row; every epoch has a row, so this ends.
        let mut epoch = self.epochs.partition_point(|&first| first <= row) - 1;
        while epoch + 1 == self.epochs.len() {
            self.pack(epoch);
            self.epochs.push(self.epochs[epoch] + self.packed.1.len() as u64);
            epoch = self.epochs.partition_point(|&first| first <= row) - 1;
        }
        if self.packed.0 != epoch {
            self.pack(epoch);
        }
        self.packed.1[(row - self.epochs[epoch]) as usize].clone()
    }

    fn pack(&mut self, epoch: usize) {
        self.packed = (epoch, epoch_rows(&self.examples, self.shape.seq, self.seed, epoch as u64, self.packing));
    }
}

/// Examples as they are, in order, each once: for a held-out loss.
#[derive(Debug)]
pub struct Evaluation {
    examples: Vec<Example>,
    rows: Vec<Vec<Segment>>,
    seq: usize,
    padding: u32,
}

impl Evaluation {
    /// Rows of `seq` tokens of `examples`; `padding` is the end-of-text token.
    ///
    /// Errors: seq below 2; nothing taught within the first `seq` tokens of any example.
    pub fn new(examples: Vec<Example>, seq: usize, padding: u32) -> Result<Self> {
        check(&examples, seq)?;
        let rows = Packing::Whole.pack(packing::segments(&examples, seq, |_, _| 0), seq);
        Ok(Self { examples, rows, seq, padding })
    }

    /// The same with rows of one document each.
    pub fn unpacked(self) -> Self {
        let rows = Packing::Alone.pack(self.rows.into_iter().flatten().collect(), self.seq);
        Self { rows, ..self }
    }

    /// All rows, `rows` (at least 1) at a time; the last batch may have fewer.
    pub fn batches(&self, rows: usize) -> impl Iterator<Item = Batch> {
        let chunks = self.rows.chunks(rows.max(1));
        chunks.map(|rows| packing::batch(&self.examples, rows.iter().map(Vec::as_slice), self.seq, self.padding))
    }

    /// Tokens and characters that the examples teach: their quotient turns a loss a token into one a character.
    pub fn tokens_and_characters(&self) -> (usize, usize) {
        let tokens = self.examples.iter().flat_map(|e| &e.taught).map(|range| range.len()).sum();
        (tokens, self.examples.iter().map(|e| e.characters).sum())
    }
}

fn check(examples: &[Example], seq: usize) -> Result<()> {
    if seq < 2 {
        let expected = "at least 2: a token and the one that follows it";
        return Err(Error::Setting { setting: "seq", found: seq.to_string(), expected });
    }
    if packing::segments(examples, seq, |_, _| 0).is_empty() {
        return Err(Error::NoTargets { examples: examples.len(), seq });
    }
    Ok(())
}

fn epoch_rows(examples: &[Example], seq: usize, seed: u64, epoch: u64, packing: Packing) -> Vec<Vec<Segment>> {
    let offset = |i: usize, seq: usize| below(seq, seed, OFFSET + epoch, i as u64);
    let mut segments = packing::segments(examples, seq, offset);
    shuffle(&mut segments, seed, SHUFFLE + epoch);
    packing.pack(segments, seq)
}

/// Put `items` into the order that (seed, stream) says.
fn shuffle<T>(items: &mut [T], seed: u64, stream: u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(i + 1, seed, stream, i as u64));
    }
}

/// A number below `n`, from 64 bits: each as likely as another to within n / 2⁶⁴ of its share.
fn below(n: usize, seed: u64, stream: u64, position: u64) -> usize {
    let [low, high, ..] = philox::words(seed, stream, position);
    let word = u64::from(high) << 32 | u64::from(low);
    ((u128::from(word) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::packing::tests::{example, examples};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn loader(examples: &[Example], shape: Shape, seed: u64) -> Option<Loader> {
        Loader::new(examples.to_vec(), shape, seed, 0).ok()
    }

    fn running(len: u32) -> Example {
        example(1..=len, 0..len as usize, true)
    }

    proptest! {
        #[test]
        fn a_shuffle_is_a_permutation(n in 0usize..200, seed: u64, epoch in 0u64..9) {
            let mut items: Vec<usize> = (0..n).collect();
            shuffle(&mut items, seed, SHUFFLE + epoch);
            prop_assert_eq!(items.iter().copied().collect::<BTreeSet<_>>(), (0..n).collect());
        }

        #[test]
        fn any_step_gives_the_batch_of_a_run_that_came_to_it(
            examples in examples(), seed: u64, rows in 1usize..4, seq in 2usize..40, accumulate in 1usize..3,
            steps in proptest::collection::vec(0u64..12, 1..6)
        ) {
            let shape = Shape { rows, seq, accumulate };
            let Some(mut run) = loader(&examples, shape, seed) else { return Ok(()) };
            let all: Vec<Vec<Batch>> = (0..12).map(|s| (0..accumulate).map(|m| run.batch(s, m)).collect()).collect();
            for step in steps {
                let mut resumed = loader(&examples, shape, seed).unwrap();
                for (micro, expected) in all[step as usize].iter().enumerate() {
                    prop_assert_eq!(&resumed.batch(step, micro), expected);
                    prop_assert_eq!(&run.batch(step, micro), expected);
                }
            }
        }

        #[test]
        fn an_epoch_is_every_token_once(examples in examples(), seed: u64, seq in 2usize..40) {
            let Some(mut loader) = loader(&examples, Shape { rows: 1, seq, accumulate: 1 }, seed) else { return Ok(()) };
            let mut first = 0;
            for epoch in 0..3 {
                let rows = epoch_rows(&examples, seq, seed, epoch, Packing::Whole).len() as u64;
                let mut seen = Vec::new();
                for row in first..first + rows {
                    let batch = loader.batch(row, 0);
                    prop_assert!(batch.targets() > 0);
                    seen.extend(batch.ids.into_iter().filter(|&id| id != 0));
                }
                first += rows;
                let kept = seen.len();
                let seen: BTreeSet<u32> = seen.into_iter().collect();
                prop_assert_eq!(seen.len(), kept);
                for example in examples.iter().filter(|e| e.running && e.ids.len() > 1) {
                    let missing = example.ids.iter().filter(|&id| !seen.contains(id)).count();
                    prop_assert!(missing <= 2, "only first and last windows of a single token are left out");
                }
            }
        }

        #[test]
        fn an_unpacked_row_is_one_document(examples in examples(), seed: u64, seq in 2usize..40) {
            let Some(loader) = loader(&examples, Shape { rows: 1, seq, accumulate: 1 }, seed) else { return Ok(()) };
            let mut loader = loader.unpacked();
            for row in 0..2 * loader.rows_an_epoch() {
                let batch = loader.batch(row, 0);
                prop_assert!(batch.targets() > 0);
                // Padding alone begins later than the row.
                prop_assert!(batch.ids.iter().zip(&batch.starts).all(|(&id, &start)| (id == 0) == (start != 0)));
            }
            let evaluation = Evaluation::new(examples.clone(), seq, 0).unwrap().unpacked();
            prop_assert!(evaluation.rows.iter().all(|row| row.len() == 1));
        }

        #[test]
        fn an_evaluation_is_every_segment_once_in_order(examples in examples(), seq in 2usize..40, rows in 1usize..4) {
            let Ok(evaluation) = Evaluation::new(examples.clone(), seq, 0) else { return Ok(()) };
            let batches: Vec<Batch> = evaluation.batches(rows).collect();
            prop_assert!(batches.iter().rev().skip(1).all(|b| b.rows == rows));
            let mut ids: Vec<u32> = batches.iter().flat_map(|b| b.ids.clone()).filter(|&id| id != 0).collect();
            ids.sort_unstable();
            let segments = packing::segments(&examples, seq, |_, _| 0);
            let expected: Vec<u32> = segments.iter().flat_map(|s| examples[s.example].ids[s.range.clone()].to_vec()).collect();
            prop_assert_eq!(ids, expected);
        }
    }

    #[test]
    fn epochs_see_other_windows_in_another_order_and_seeds_differ() {
        let examples = [running(1000)];
        let epochs: BTreeSet<Vec<u32>> = (0..4)
            .flat_map(|epoch| [7, 8].map(|seed| epoch_rows(&examples, 50, seed, epoch, Packing::Whole)))
            .map(|rows| packing::batch(&examples, rows.iter().map(Vec::as_slice), 50, 0).ids)
            .collect();
        assert_eq!(epochs.len(), 8);
    }

    #[test]
    fn every_order_of_three_is_as_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for stream in 0..6000 {
            let mut items = [0, 1, 2];
            shuffle(&mut items, 1, stream);
            *counts.entry(items).or_insert(0i32) += 1;
        }
        // 6000 draws of probability 1/6: mean 1000, standard deviation √(6000 · 5/36) ≈ 29; five of them are 145.
        assert!(counts.len() == 6 && counts.values().all(|count| (count - 1000).abs() < 145), "{counts:?}");
    }

    #[test]
    fn what_cannot_be_trained_is_said() {
        let untaught = example(1..=9, 8..9, false);
        let shape = Shape { rows: 1, seq: 4, accumulate: 1 };
        let message =
            |examples: &[Example], shape| Loader::new(examples.to_vec(), shape, 0, 0).unwrap_err().to_string();
        let expected = "none of 1 examples has a trained token within the first 4 tokens: expected a longer --seq";
        assert_eq!(message(std::slice::from_ref(&untaught), shape), expected);
        let one = Shape { seq: 1, ..shape };
        assert_eq!(message(&[running(9)], one), "seq 1: expected at least 2: a token and the one that follows it");
        assert_eq!(message(&[running(9)], Shape { rows: 0, ..shape }), "batch 0: expected at least 1");
        assert_eq!(message(&[running(9)], Shape { accumulate: 0, ..shape }), "accumulate 0: expected at least 1");
        let taught = example(1..=9, 2..9, false);
        let loader = Loader::new(vec![running(9), untaught, taught], shape, 0, 0).unwrap();
        assert_eq!((loader.truncated(), loader.dropped(), loader.rows_an_epoch() > 1), (2, 1, true));
    }
}
