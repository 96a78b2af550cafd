//! Where token ids come in and go out: the embedding, and the cross-entropy of a chunk of tokens.

use crate::meter::{Cost, Meter};
use crate::sizes::{Numbers, Size};
use rankfold_backend::params::{CrossEntropy, Embedding};
use rankfold_backend::{Backend, DType, Result};

/// A step through the vocabulary that comes to every id before it comes to one again.
const STRIDE: usize = 7919;

pub fn measure(b: &dyn Backend, meter: &mut Meter, size: &Size, numbers: &Numbers) -> Result<()> {
    let (tokens, vocab, width) = (size.tokens, size.vocab, size.width);
    let (p, n) = (Embedding { tokens, vocab, width }, size.elements());
    let ids: Vec<u32> = (0..tokens).map(|t| (STRIDE * t % vocab) as u32).collect();
    meter.measure("embedding", Cost::f32s(n + tokens, n), || {
        let (ids, table) = (b.upload(&ids)?, numbers.f32(b, vocab * width)?);
        let mut rows = b.alloc(DType::F32, n)?;
        Ok(move || b.embedding(&p, ids.view(), table.view(), rows.view_mut()))
    });
    // Ids that come again are added to the same row: the least is that each row is read and written once.
    let touched = tokens.min(vocab) * width;
    meter.measure("embedding_grad", Cost::f32s(n + tokens + touched, touched), || {
        let (ids, drows) = (b.upload(&ids)?, numbers.f32(b, n)?);
        let mut dtable = b.filled(DType::F32, vocab * width, 0.0)?;
        Ok(move || b.embedding_grad(&p, ids.view(), drows.view(), dtable.view_mut()))
    });

    let (p, n) = (CrossEntropy { rows: size.chunk, vocab }, size.chunk * vocab);
    let labels: Vec<i64> = (0..size.chunk).map(|row| (STRIDE * row % vocab) as i64).collect();
    meter.measure("cross_entropy", Cost::f32s(n, size.chunk), || {
        let (logits, labels) = (numbers.f32(b, n)?, b.upload(&labels)?);
        let mut losses = b.alloc(DType::F32, size.chunk)?;
        Ok(move || b.cross_entropy(&p, logits.view(), labels.view(), losses.view_mut()))
    });
    // Each call takes the gradient that the last one left for logits: numbers like others.
    meter.measure("cross_entropy_grad_in_place", Cost::f32s(n, n + size.chunk), || {
        let (mut logits, labels) = (numbers.f32(b, n)?, b.upload(&labels)?);
        let mut losses = b.alloc(DType::F32, size.chunk)?;
        Ok(move || b.cross_entropy_grad_in_place(&p, 1.0, logits.view_mut(), labels.view(), losses.view_mut()))
    });
    Ok(())
}
