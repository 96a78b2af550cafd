//! One batch of given token ids: for comparing a run with another program's, step by step.
//!
//! A safetensors file with `ids` and `labels`, i64 [N, T]; a label is [`IGNORED`] or the token that the logits one
//! position before it should predict (the shift by one is the loss's). Rows are whole contexts: positions 0 … T − 1,
//! starts 0.

use crate::data::packing::Batch;
use crate::{Error, Result};
use rankfold_backend::DType;
use rankfold_backend::params::IGNORED;
use rankfold_files::Checkpoint;
use std::path::Path;

/// Read the batch of `path` for a model of `vocab` tokens.
///
/// Errors: a file that is missing or damaged; a tensor that is missing, or of another type or shape; an id or a label
/// beyond the vocabulary; nothing to predict.
pub fn read(path: &Path, vocab: usize) -> Result<Batch> {
    let file = Checkpoint::open(path)?;
    let shape = file.info("ids")?.shape.clone();
    let &[rows, seq] = shape.as_slice() else {
        return Err(Error::file(path, format!("'ids' has shape {shape:?}, expected [N, T]")));
    };
    if rows == 0 || seq < 2 {
        return Err(Error::file(path, format!("'ids' has shape {shape:?}, expected [N, T] with T at least 2")));
    }
    file.expect("ids", &[DType::I64], &shape)?;
    file.expect("labels", &[DType::I64], &shape)?;
    let (ids, labels) = (file.read::<i64>("ids")?, file.read::<i64>("labels")?);
    let known = |i: usize, id: i64| match u32::try_from(id) {
        Ok(id) if (id as usize) < vocab => Ok(id),
        _ => Err(Error::TokenId { path: path.to_owned(), row: i / seq, position: i % seq, id, vocab }),
    };
    let ids = ids.into_iter().enumerate().map(|(i, id)| known(i, id)).collect::<Result<Vec<u32>>>()?;
    for (i, &label) in labels.iter().enumerate().filter(|&(_, &label)| label != IGNORED) {
        known(i, label)?;
    }
    let positions = (0..rows).flat_map(|_| 0..seq as u32).collect();
    let batch = Batch { ids, labels, positions, starts: vec![0; rows * seq], rows, seq };
    if batch.targets() == 0 {
        return Err(Error::file(path, "every label is ignored: expected at least one after the first of its row"));
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rankfold_files::{Spec, Writer};
    use tempfile::TempDir;

    /// A file of the two tensors, each with its shape.
    fn file(ids: (&[i64], &[usize]), labels: (&[i64], &[usize])) -> (TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let spec = |name, shape: &[usize]| Spec::new(name, DType::I64, shape);
        let mut writer = Writer::create(&path, vec![spec("ids", ids.1), spec("labels", labels.1)]).unwrap();
        for (name, values) in [("ids", ids.0), ("labels", labels.0)] {
            writer.write(name, bytemuck::cast_slice(values)).unwrap();
        }
        writer.finish().unwrap();
        (dir, path)
    }

    fn message(ids: (&[i64], &[usize]), labels: (&[i64], &[usize])) -> String {
        let (dir, path) = file(ids, labels);
        read(&path, 10).unwrap_err().to_string().replace(&format!("{}/", dir.path().display()), "")
    }

    #[test]
    fn rows_are_whole_contexts() {
        let (_dir, path) = file((&[1, 2, 3, 4, 5, 9], &[2, 3]), (&[-100, 2, 3, 4, -100, 9], &[2, 3]));
        let expected = Batch {
            ids: vec![1, 2, 3, 4, 5, 9],
            labels: vec![-100, 2, 3, 4, -100, 9],
            positions: vec![0, 1, 2, 0, 1, 2],
            starts: vec![0; 6],
            rows: 2,
            seq: 3,
        };
        let batch = read(&path, 10).unwrap();
        assert_eq!(batch, expected);
        // The 4 begins its row: nothing predicts it.
        assert_eq!(batch.targets(), 3);
    }

    #[test]
    fn bad_tokens_are_placed() {
        let (two, fine): (&[usize], &[i64]) = (&[2, 2], &[1, 2, 3, 4]);
        let beyond = |row, position, id| {
            format!("t.safetensors: row {row}, position {position}: token id {id} is beyond the vocabulary of 10")
        };
        assert_eq!(message((&[1, 2, 3, 10], two), (fine, two)), beyond(1, 1, 10));
        assert_eq!(message((&[1, -1, 3, 4], two), (fine, two)), beyond(0, 1, -1));
        assert_eq!(message((fine, two), (&[1, 2, -7, 4], two)), beyond(1, 0, -7));
        let ignored = "t.safetensors: every label is ignored: expected at least one after the first of its row";
        assert_eq!(message((fine, two), (&[1, -100, 3, -100], two)), ignored);
    }

    #[test]
    fn bad_shapes_are_named() {
        let fine: &[i64] = &[1, 2, 3, 4];
        assert_eq!(message((fine, &[4]), (fine, &[4])), "t.safetensors: 'ids' has shape [4], expected [N, T]");
        let expected = "t.safetensors: 'ids' has shape [4, 1], expected [N, T] with T at least 2";
        assert_eq!(message((fine, &[4, 1]), (fine, &[4, 1])), expected);
        assert!(message((fine, &[2, 2]), (fine, &[1, 4])).contains("'labels'"));
        let missing = read(Path::new("missing.safetensors"), 10).unwrap_err().to_string();
        assert!(missing.contains("missing.safetensors"), "{missing}");
    }
}
