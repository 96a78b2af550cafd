//! Tensor by tensor: read, quantise, dequantise, compare.
//!
//! One tensor is in memory at a time, with its f32 values and those of one quantised copy. Quantisation starts from
//! the tensor in the type of its file and goes through [`Quantized::quantize`] and the backend's kernels: what is
//! audited is what runs. Values are decoded to f32, so that no rounding to a narrower type is counted as an error
//! of the format.

use crate::certificate::Certificate;
use crate::normality::{Fit, Shape};
use crate::report::{BINS, Figures, Report, TensorReport, Totals, Worst};
use crate::size::Size;
use crate::tally::{Compared, Tally};
use crate::{Error, Options, Result, chunks};
use rankfold_backend::{Backend, Buffer, DType, Format, Quantized, Scales};
use rankfold_files::{Checkpoint, quantized};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Audit a checkpoint, named `model` in the report. `progress` is told the tensors done, their number and the name
/// of the next, before each.
///
/// Errors: a checkpoint in 4 bits; none of its tensors selected; a weight that is not finite; a file that cannot be
/// read; scales at the end of f32's range.
pub fn audit(
    backend: &Arc<dyn Backend>,
    checkpoint: &Checkpoint,
    model: &str,
    options: &Options,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Report> {
    if let Some(name) = quantized::weights(checkpoint).first() {
        return Err(Error::FourBit { path: checkpoint.file(name).into(), tensor: (*name).into() });
    }
    let (names, left_out) = options.selection.split(checkpoint);
    if names.is_empty() {
        return Err(Error::Nothing { path: checkpoint.path().into(), expected: options.selection.describe() });
    }
    let mut sums: Vec<Sum> = Vec::new();
    let mut tensors = Vec::with_capacity(names.len());
    for (done, name) in names.iter().enumerate() {
        progress(done, names.len(), name);
        let (tensor, parts) = Tensor::load(backend.as_ref(), checkpoint, name)?.audit(options)?;
        if sums.is_empty() {
            sums = parts;
        } else {
            sums.iter_mut().zip(&parts).for_each(|(sum, part)| sum.add(part));
        }
        tensors.push(tensor);
    }
    let mut fits: BTreeMap<Fit, usize> = BTreeMap::new();
    let mut histogram = vec![0; BINS];
    for tensor in &tensors {
        *fits.entry(tensor.weights.fit).or_default() += 1;
        histogram.iter_mut().zip(&tensor.histogram).for_each(|(sum, count)| *sum += count);
    }
    Ok(Report {
        version: 1,
        model: model.into(),
        backend: backend.name(),
        selection: options.selection.describe().into(),
        left_out,
        shown_block: options.shown_block(),
        totals: Totals {
            tensors: tensors.len(),
            parameters: tensors.iter().map(|tensor| tensor.weights.parameters).sum(),
            fits: fits.into_iter().collect(),
            histogram,
            results: sums.iter().map(Sum::figures).collect(),
        },
        tensors,
    })
}

/// One format, block and kind of scales over the tensors so far.
struct Sum {
    format: Format,
    block: usize,
    double: bool,
    size: Size,
    tally: Tally,
    worst: Worst,
}

impl Sum {
    fn add(&mut self, part: &Self) {
        self.size = self.size.plus(&part.size);
        self.tally.add(&part.tally);
        if part.worst.error.abs() > self.worst.error.abs() {
            self.worst = part.worst.clone();
        }
    }

    fn figures(&self) -> Figures {
        Figures::new(self.format, self.block, self.double, self.size, &self.tally, self.worst.clone())
    }
}

/// The tensor in memory.
struct Tensor<'a> {
    backend: &'a dyn Backend,
    checkpoint: &'a Checkpoint,
    name: &'a str,
    shape: [usize; 2],
    dense: Buffer,
    w: Vec<f32>,
}

impl<'a> Tensor<'a> {
    fn load(backend: &'a dyn Backend, checkpoint: &'a Checkpoint, name: &'a str) -> Result<Self> {
        let info = checkpoint.info(name)?;
        let shape = [info.shape[0], info.shape[1]];
        let dense = checkpoint.load(name, backend)?;
        let mut tensor = Self { backend, checkpoint, name, shape, dense, w: Vec::new() };
        tensor.w = tensor.kernel(tensor.widen())?;
        match tensor.w.iter().position(|w| !w.is_finite()) {
            None => Ok(tensor),
            Some(index) => Err(Error::NonFinite {
                path: checkpoint.file(name).into(),
                tensor: name.into(),
                index,
                row: index / shape[1],
                column: index % shape[1],
                value: tensor.w[index],
            }),
        }
    }

    fn widen(&self) -> rankfold_backend::Result<Vec<f32>> {
        if self.dense.dtype() == DType::F32 {
            return self.backend.download(self.dense.view());
        }
        let mut wide = self.backend.alloc(DType::F32, self.dense.len())?;
        self.backend.cast(self.dense.view(), wide.view_mut())?;
        self.backend.download(wide.view())
    }

    /// A kernel's result, with the tensor named where it is an error.
    fn kernel<T>(&self, result: rankfold_backend::Result<T>) -> Result<T> {
        let path = || self.checkpoint.file(self.name).to_owned();
        result.map_err(|source| Error::Kernel { path: path(), tensor: self.name.into(), source })
    }

    fn audit(&self, options: &Options) -> Result<(TensorReport, Vec<Sum>)> {
        let mut sums = Vec::new();
        let mut histogram = Vec::new();
        for &block in options.blocks() {
            let mut doubles = Vec::new();
            for &format in options.formats() {
                let single = self.kernel(self.quantize(format, block, false))?;
                let absmax = self.kernel(self.absmax(&single))?;
                if block == options.shown_block() && histogram.is_empty() {
                    histogram = normalised_histogram(&self.w, &absmax, block, options.threads);
                }
                sums.push(self.compare(&single, &absmax, options.threads)?);
                drop(single);
                let double = self.kernel(self.quantize(format, block, true))?;
                doubles.push(self.compare(&double, &absmax, options.threads)?);
            }
            sums.extend(doubles);
        }
        let report = TensorReport {
            name: self.name.into(),
            dtype: self.dense.dtype().to_string(),
            shape: self.shape,
            weights: Shape::of(&self.w, options.threads),
            histogram,
            results: sums.iter().map(Sum::figures).collect(),
        };
        Ok((report, sums))
    }

    fn quantize(&self, format: Format, block: usize, double: bool) -> rankfold_backend::Result<Quantized> {
        Quantized::quantize(self.backend, self.dense.view(), self.shape, format, block, double)
    }

    /// The scales as the kernels found them, before any second quantisation.
    fn absmax(&self, single: &Quantized) -> rankfold_backend::Result<Vec<f32>> {
        match &single.scales {
            Scales::Plain(absmax) | Scales::Nested { absmax, .. } => self.backend.download(absmax.view()),
        }
    }

    /// A quantised copy against the tensor; `absmax` are the scales before any second quantisation.
    fn compare(&self, q: &Quantized, absmax: &[f32], threads: usize) -> Result<Sum> {
        let (format, block) = (q.format, q.block);
        let certificate = Certificate::new(format);
        let (double, bounds) = match &q.scales {
            Scales::Plain(_) => (false, certificate.blocks(absmax, None)),
            Scales::Nested { absmax: nested, offset, .. } => {
                let nested = self.kernel(self.backend.download::<f32>(nested.view()))?;
                (true, certificate.blocks(absmax, Some((&nested, *offset))))
            }
        };
        let decoded = self.kernel(self.decode(q))?;
        let codes = self.kernel(self.backend.download::<u8>(q.codes.view()))?;
        let compared = Compared { format, block, w: &self.w, decoded: &decoded, codes: &codes, bounds: &bounds };
        let tally = Tally::of(&compared, threads);
        let worst = self.worst(&tally)?;
        Ok(Sum { format, block, double, size: Size::of(self.w.len(), block, double), tally, worst })
    }

    fn decode(&self, q: &Quantized) -> rankfold_backend::Result<Vec<f32>> {
        let mut decoded = self.backend.alloc(DType::F32, q.elements())?;
        self.backend.dequantize_4bit(q, decoded.view_mut())?;
        self.backend.download(decoded.view())
    }

    fn worst(&self, tally: &Tally) -> Result<Worst> {
        // Empty tensors are not selected, so there is a worst element.
        let Some(e) = tally.worst else {
            return Err(Error::Nothing { path: self.checkpoint.path().into(), expected: "tensors with elements" });
        };
        Ok(Worst {
            tensor: self.name.into(),
            row: e.index / self.shape[1],
            column: e.index % self.shape[1],
            w: e.w.into(),
            decoded: e.decoded.into(),
            error: e.error,
            bound: e.bound,
            margin: e.bound - e.error.abs(),
        })
    }
}

/// Counts of w/absmax, each by its own block, in equal bins over \[−1, 1\]; a zero block's weights are 0.
fn normalised_histogram(w: &[f32], absmax: &[f32], block: usize, threads: usize) -> Vec<u64> {
    let parts = chunks::map(threads, w.len(), |range| {
        let mut counts = vec![0u64; BINS];
        for i in range {
            let scale = f64::from(absmax[i / block]);
            let v = if scale > 0.0 { f64::from(w[i]) / scale } else { 0.0 };
            counts[(((v + 1.0) / 2.0 * BINS as f64) as usize).min(BINS - 1)] += 1;
        }
        counts
    });
    let mut total = vec![0; BINS];
    for part in parts {
        total.iter_mut().zip(part).for_each(|(sum, count)| *sum += count);
    }
    total
}
