//! Triplets that go: the tensors that remain, and what must be done to everything of their shapes.

use crate::lora::Part;
use crate::{Error, Lora, Result};
use rankfold_autograd::{Parameter, ParameterId};
use rankfold_backend::params::Triplets;
use rankfold_backend::{Backend, Buffer};

/// Which elements of a matrix [rows, width] remain: those of the triplets that are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gather {
    rows: usize,
    width: usize,
    triplets: Triplets,
    /// Of each triplet, whether it stays.
    keep: Vec<bool>,
}

impl Gather {
    /// Of a matrix whose triplets are as many as `keep`.
    pub fn new([rows, width]: [usize; 2], triplets: Triplets, keep: &[bool]) -> Self {
        Self { rows, width, triplets, keep: keep.to_vec() }
    }

    /// The shape of what remains.
    pub fn dims(&self) -> [usize; 2] {
        let kept = self.keep.iter().filter(|keep| **keep).count();
        match self.triplets {
            Triplets::Rows => [kept, self.width],
            Triplets::Columns => [self.rows, kept],
        }
    }

    /// What remains of the matrix's elements.
    pub fn of<T: Copy>(&self, values: &[T]) -> Vec<T> {
        let stays = |i: usize| match self.triplets {
            Triplets::Rows => self.keep[i / self.width],
            Triplets::Columns => self.keep[i % self.width],
        };
        values.iter().enumerate().filter(|&(i, _)| stays(i)).map(|(_, value)| *value).collect()
    }

    /// What remains of a buffer in f32.
    pub fn of_buffer(&self, backend: &dyn Backend, buffer: &Buffer) -> Result<Buffer> {
        Ok(backend.upload(&self.of(&backend.download::<f32>(buffer.view())?))?)
    }
}

/// One tensor that became smaller.
#[derive(Clone, Debug)]
pub struct Cut {
    /// The parameter that it was.
    pub before: ParameterId,
    /// The parameter that it is.
    pub after: Parameter,
    /// What is left of everything of its shape.
    pub gather: Gather,
}

impl Lora {
    /// The update without the triplets that `keep` (one entry a triplet there is) does not name, and what became of
    /// its tensors: A, B, E. An update without triplets has none to cut.
    ///
    /// Errors: an entry too many or too few.
    pub fn cut(&self, backend: &dyn Backend, module: &str, keep: &[bool]) -> Result<(Self, Vec<Cut>)> {
        let Part::Triplets { lambda, kept } = self.part() else { return Ok((self.clone(), Vec::new())) };
        if keep.len() != self.rank() {
            return Err(Error::field(format!("{module}: triplets to keep"), keep.len(), "one entry a triplet"));
        }
        let smaller = |parameter: &Parameter, triplets| -> Result<Cut> {
            let shape = parameter.shape();
            let gather = Gather::new([shape.rows(), shape.width()], triplets, keep);
            let value = gather.of_buffer(backend, parameter.tensor().buffer())?;
            Ok(Cut { before: parameter.id(), after: Parameter::new(value, gather.dims())?, gather })
        };
        let [a, b] = [smaller(self.a(), Triplets::Rows)?, smaller(self.b(), Triplets::Columns)?];
        let e = smaller(lambda, Triplets::Rows)?;
        let mut stays = keep.iter();
        let kept = kept.iter().map(|&was| was && *stays.next().unwrap_or(&false)).collect();
        let part = Part::Triplets { lambda: e.after.clone(), kept };
        let update = Self::new(module, a.after.clone(), b.after.clone(), part, *self.spec())?;
        Ok((update, vec![a, b, e]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_or_columns_of_the_kept_triplets_remain() {
        let matrix = [0, 1, 2, 10, 11, 12];
        let rows = Gather::new([2, 3], Triplets::Rows, &[false, true]);
        assert_eq!((rows.of(&matrix), rows.dims()), (vec![10, 11, 12], [1, 3]));
        let columns = Gather::new([2, 3], Triplets::Columns, &[true, false, true]);
        assert_eq!((columns.of(&matrix), columns.dims()), (vec![0, 2, 10, 12], [2, 2]));
        let none = Gather::new([2, 3], Triplets::Columns, &[false; 3]);
        assert_eq!((none.of(&matrix), none.dims()), (vec![], [2, 0]));
    }
}
