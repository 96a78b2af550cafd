//! Examples to rows of one length, and rows to a batch.
//!
//! A **segment** is a stretch of one example that a row holds; a row is segments one after another, then padding. A
//! token sees only its own segment: `starts` says where that begins, `positions` count from there. Running text longer
//! than a row is split into windows of `seq` tokens; any other example is cut off at `seq`. Segments are never split
//! further: each goes into the first row, in order, that still has room for it (first fit: Johnson 1974), rows
//! being found in O(log n) in a tree of the largest room below each node.
//!
//! Labels are not shifted: the label at t is the token at t, or [`IGNORED`], and the loss compares it with the logits
//! at t − 1. So the first token of every segment, which nothing in its segment predicts, is ignored, and so is padding.

use crate::data::examples::Example;
use rankfold_backend::params::IGNORED;
use std::ops::Range;

/// Rows of tokens, as a model takes them. All four vectors are row-major [rows, seq].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The token itself where it is taught, else [`IGNORED`]; the shift by one is the loss's.
    pub labels: Vec<i64>,
    /// The token's place in its segment, from 0.
    pub positions: Vec<u32>,
    /// The place in its row of its segment's first token.
    pub starts: Vec<u32>,
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub seq: usize,
}

impl Batch {
    /// Labels that count towards the loss: those kept, the first of each row aside, which no logits predict.
    pub fn targets(&self) -> usize {
        self.labels.chunks(self.seq.max(1)).map(|row| row[1..].iter().filter(|&&label| label != IGNORED).count()).sum()
    }
}

/// Tokens `range` of example `example`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The example's index.
    pub example: usize,
    /// Its tokens: at least two, at most a row's.
    pub range: Range<usize>,
}

/// The segments of `examples`, in order, those without a target left out.
///
/// `offset(i, seq)` is the length, below `seq`, of example i's first window where it is split at all; 0 stands for a
/// whole one.
pub fn segments(examples: &[Example], seq: usize, offset: impl Fn(usize, usize) -> usize) -> Vec<Segment> {
    let mut segments = Vec::new();
    for (example, Example { ids, running, .. }) in examples.iter().enumerate() {
        if ids.len() <= seq || !running {
            segments.push(Segment { example, range: 0..ids.len().min(seq) });
            continue;
        }
        let first = offset(example, seq);
        let bounds = std::iter::once(0).chain((first..ids.len()).step_by(seq).filter(|&at| at > 0));
        let bounds: Vec<usize> = bounds.chain([ids.len()]).collect();
        segments.extend(bounds.windows(2).map(|w| Segment { example, range: w[0]..w[1] }));
    }
    segments.retain(|segment| {
        let targets = segment.range.start + 1..segment.range.end;
        examples[segment.example].taught.iter().any(|t| t.start.max(targets.start) < t.end.min(targets.end))
    });
    segments
}

/// What a row may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// As many segments as fit.
    Whole,
    /// One segment, for a model whose rows all begin with something that each document must see.
    Alone,
}

impl Packing {
    /// Put segments into rows of `seq` tokens.
    pub fn pack(self, segments: Vec<Segment>, seq: usize) -> Vec<Vec<Segment>> {
        match self {
            Self::Whole => pack(segments, seq),
            Self::Alone => segments.into_iter().map(|segment| vec![segment]).collect(),
        }
    }
}

/// Put segments into rows of `seq` tokens, first fit; rows and the segments of a row in the order they came.
pub fn pack(segments: Vec<Segment>, seq: usize) -> Vec<Vec<Segment>> {
    // Every segment might need a row of its own; rows not begun are whole, and lie to the right of those begun.
    let leaves = segments.len().next_power_of_two();
    let mut room = vec![seq; 2 * leaves];
    let mut rows: Vec<Vec<Segment>> = Vec::new();
    for segment in segments {
        let len = segment.range.len();
        let mut node = 1;
        while node < leaves {
            node = if room[2 * node] >= len { 2 * node } else { 2 * node + 1 };
        }
        room[node] -= len;
        let row = node - leaves;
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(segment);
    }
    rows
}

/// Write rows as a batch, padded with `padding` under ignored labels and in a segment of its own.
pub fn batch<'a>(
    examples: &[Example],
    rows: impl IntoIterator<Item = &'a [Segment]>,
    seq: usize,
    padding: u32,
) -> Batch {
    let mut batch = Batch { ids: vec![], labels: vec![], positions: vec![], starts: vec![], rows: 0, seq };
    for row in rows {
        batch.rows += 1;
        let end = batch.rows * seq;
        let row_start = end - seq;
        let begin = |batch: &mut Batch, len: usize| {
            let start = (batch.ids.len() - row_start) as u32;
            batch.positions.extend(0..len as u32);
            batch.starts.extend(std::iter::repeat_n(start, len));
        };
        for Segment { example, range } in row {
            begin(&mut batch, range.len());
            let Example { ids, taught, .. } = &examples[*example];
            let first = batch.labels.len();
            batch.ids.extend(&ids[range.clone()]);
            batch.labels.extend(std::iter::repeat_n(IGNORED, range.len()));
            for t in taught {
                let kept = t.start.max(range.start + 1)..t.end.min(range.end);
                if !kept.is_empty() {
                    let labels = &mut batch.labels[first..][kept.start - range.start..kept.end - range.start];
                    labels.iter_mut().zip(&ids[kept]).for_each(|(label, &id)| *label = i64::from(id));
                }
            }
        }
        let rest = end - batch.ids.len();
        begin(&mut batch, rest);
        batch.ids.extend(std::iter::repeat_n(padding, rest));
        batch.labels.extend(std::iter::repeat_n(IGNORED, rest));
    }
    batch
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn example(ids: impl IntoIterator<Item = u32>, taught: Range<usize>, running: bool) -> Example {
        Example { ids: ids.into_iter().collect(), taught: vec![taught], running, characters: 0 }
    }

    /// Examples in which every token is its own number, so that a token tells where it comes from.
    pub(crate) fn examples() -> impl Strategy<Value = Vec<Example>> {
        let one = (1usize..60, any::<bool>(), 0usize..60, 1usize..20);
        proptest::collection::vec(one, 1..12).prop_map(|list| {
            let mut next = 1;
            let one = |(len, running, from, taught): (usize, bool, usize, usize)| {
                let ids = next..next + len as u32;
                next += len as u32;
                let from = from.min(len - 1);
                let taught = if running { 0..len } else { from..(from + taught).min(len) };
                example(ids, taught, running)
            };
            list.into_iter().map(one).collect()
        })
    }

    /// First fit as it is defined.
    fn naive_pack(segments: &[Segment], seq: usize) -> Vec<Vec<Segment>> {
        let mut rows: Vec<Vec<Segment>> = Vec::new();
        for segment in segments {
            let fits =
                |row: &&mut Vec<Segment>| row.iter().map(|s| s.range.len()).sum::<usize>() + segment.range.len() <= seq;
            match rows.iter_mut().find(fits) {
                Some(row) => row.push(segment.clone()),
                None => rows.push(vec![segment.clone()]),
            }
        }
        rows
    }

    proptest! {
        #[test]
        fn packing_is_first_fit(examples in examples(), seq in 2usize..40) {
            let segments = segments(&examples, seq, |_, _| 0);
            prop_assert_eq!(pack(segments.clone(), seq), naive_pack(&segments, seq));
        }

        #[test]
        fn windows_cover_running_text_once_and_cut_other_examples_off(
            examples in examples(), seq in 2usize..40, offset in 0usize..40
        ) {
            let offset = offset % seq;
            let segments = segments(&examples, seq, |_, _| offset);
            for (i, example) in examples.iter().enumerate() {
                let mine: Vec<_> = segments.iter().filter(|s| s.example == i).map(|s| s.range.clone()).collect();
                let covered: usize = mine.iter().map(Range::len).sum();
                if example.running {
                    // Windows of a single token predict nothing and are left out: at most the first and the last.
                    prop_assert!(mine.windows(2).all(|w| w[0].end == w[1].start));
                    prop_assert!(covered + 2 >= example.ids.len() && mine.iter().all(|r| (2..=seq).contains(&r.len())));
                    if offset >= 2 && example.ids.len() > seq {
                        prop_assert_eq!(mine[0].clone(), 0..offset);
                    }
                } else {
                    let targets = (example.taught[0].start.max(1)..example.taught[0].end.min(seq)).len();
                    prop_assert_eq!(covered, if targets > 0 { example.ids.len().min(seq) } else { 0 });
                }
            }
        }

        #[test]
        fn a_batch_says_of_every_token_what_it_sees_and_teaches(examples in examples(), seq in 2usize..40) {
            let rows = pack(segments(&examples, seq, |_, _| 0), seq);
            let batch = batch(&examples, rows.iter().map(Vec::as_slice), seq, 0);
            prop_assert_eq!(batch.rows, rows.len());
            for part in [batch.ids.len(), batch.labels.len(), batch.positions.len(), batch.starts.len()] {
                prop_assert_eq!(part, batch.rows * seq);
            }
            let document = |id: u32| examples.iter().position(|e| e.ids.contains(&id));
            let mut targets = 0;
            for i in 0..batch.ids.len() {
                let (at, start) = (i % seq, batch.starts[i] as usize);
                prop_assert_eq!(start + batch.positions[i] as usize, at);
                // Consecutive tokens of one document, or padding, from its start to here.
                for k in start..at {
                    let (a, b) = (batch.ids[i - at + k], batch.ids[i - at + k + 1]);
                    prop_assert!(b == a + 1 || (a == 0 && b == 0));
                    prop_assert_eq!(document(a), document(b));
                }
                let taught = document(batch.ids[i]).is_some_and(|d| {
                    let example = &examples[d];
                    example.taught[0].contains(&((batch.ids[i] - example.ids[0]) as usize))
                });
                let label = if taught && at > start { i64::from(batch.ids[i]) } else { IGNORED };
                prop_assert_eq!(batch.labels[i], label);
                targets += usize::from(label != IGNORED);
            }
            prop_assert_eq!(batch.targets(), targets);
        }
    }

    #[test]
    fn a_packed_row_reads_as_written() {
        let examples = [example([5, 6, 7], 1..3, false), example([8, 9], 0..2, false)];
        let rows = pack(segments(&examples, 7, |_, _| 0), 7);
        let expected = Batch {
            ids: vec![5, 6, 7, 8, 9, 0, 0],
            labels: vec![IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED],
            positions: vec![0, 1, 2, 0, 1, 0, 1],
            starts: vec![0, 0, 0, 3, 3, 5, 5],
            rows: 1,
            seq: 7,
        };
        assert_eq!(batch(&examples, rows.iter().map(Vec::as_slice), 7, 0), expected);
    }
}
