//! Where token ids come in and go out: the embedding and the cross-entropy.

use super::{elements, expect};
use crate::{Error, Result, View, ViewMut};

/// Rows of a table [vocab, width], picked by token ids.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    /// Ids, and rows of the output.
    pub tokens: usize,
    /// Rows of the table.
    pub vocab: usize,
    /// Columns of the table.
    pub width: usize,
}

impl Embedding {
    /// Lengths for `embedding`.
    pub fn check(&self, ids: &View, table: &View, rows: &ViewMut) -> Result<()> {
        expect("embedding", "ids", ids.len(), self.tokens)?;
        expect("embedding", "table", table.len(), elements(&[self.vocab, self.width]))?;
        expect("embedding", "rows", rows.len(), elements(&[self.tokens, self.width]))
    }

    /// Lengths for `embedding_grad`.
    pub fn check_grad(&self, ids: &View, drows: &View, dtable: &ViewMut) -> Result<()> {
        expect("embedding_grad", "ids", ids.len(), self.tokens)?;
        expect("embedding_grad", "drows", drows.len(), elements(&[self.tokens, self.width]))?;
        expect("embedding_grad", "dtable", dtable.len(), elements(&[self.vocab, self.width]))
    }
}

/// Softmax cross-entropy over rows of logits [rows, vocab]; a label of [`IGNORED`] has no loss and no gradient.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Rows of logits; one label each.
    pub rows: usize,
    /// Columns of logits.
    pub vocab: usize,
}

/// The label of a position that does not count.
pub const IGNORED: i64 = -100;

impl CrossEntropy {
    /// Lengths for `cross_entropy`, and with its logits' for `cross_entropy_grad_in_place`.
    pub fn check(&self, kernel: &'static str, logits: usize, labels: &View, losses: &ViewMut) -> Result<()> {
        expect(kernel, "logits", logits, elements(&[self.rows, self.vocab]))?;
        expect(kernel, "labels", labels.len(), self.rows)?;
        expect(kernel, "losses", losses.len(), self.rows)
    }

    /// The label as a column, `None` where ignored. For backends, a row at a time.
    pub fn column(&self, row: usize, label: i64) -> Result<Option<usize>> {
        match usize::try_from(label) {
            _ if label == IGNORED => Ok(None),
            Ok(column) if column < self.vocab => Ok(Some(column)),
            _ => Err(Error::TokenId { position: row, id: label, vocab: self.vocab }),
        }
    }
}
