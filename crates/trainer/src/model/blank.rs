//! A model of a configuration alone: buffers of the right sizes, without values. For what counts memory.

use super::weights::{Reader, Source};
use super::{DeviceBatch, Model, ModelConfig, Precision, Quantization};
use crate::Result;
use crate::plan::Stored;
use rankfold_adapters::VirtualTokens;
use rankfold_autograd::Tensor;
use rankfold_backend::params::elements;
use rankfold_backend::{Backend, Buffer, DType, NESTED_BLOCK, Quantized, Scales};
use std::path::Path;
use std::sync::{Arc, Mutex};

impl Model {
    /// A model of `config` as [`Model::load`] makes it of files that store their tensors so, with rotary tables for
    /// `positions` positions.
    pub(crate) fn blank(
        backend: Arc<dyn Backend>,
        config: ModelConfig,
        stored: Stored,
        precision: Precision,
        positions: usize,
    ) -> Result<Self> {
        let mut model = Reader { backend: backend.clone(), source: &stored, precision }.model(config)?;
        let (made, half) = (super::llama::table_rows(positions), model.config.head_dim / 2);
        let table = || -> Result<Tensor> {
            Ok(Tensor::constant(backend.alloc(DType::F32, elements(&[made, half]))?, [made, half])?)
        };
        model.tables = Mutex::new(Some((made, table()?, table()?)));
        Ok(model)
    }
}

impl Model {
    /// A batch of `rows` rows of `seq` tokens, several documents in a row, behind the model's learned tokens.
    pub(crate) fn blank_batch(&self, rows: usize, seq: usize) -> Result<DeviceBatch> {
        let learned = self.virtual_tokens.as_ref();
        let own = learned.filter(|tokens| tokens.embeddings().is_some()).map_or(0, VirtualTokens::count);
        let alloc = |dtype, seq| self.backend.alloc(dtype, rows * seq);
        Ok(DeviceBatch {
            ids: Arc::new(alloc(DType::U32, seq)?),
            positions: Arc::new(alloc(DType::U32, own + seq)?),
            starts: Some(Arc::new(alloc(DType::U32, own + seq)?)),
            targets: alloc(DType::I64, own + seq)?,
            rows,
            reach: seq + learned.map_or(0, VirtualTokens::count),
            kept: rows * seq,
        })
    }
}

impl DeviceBatch {
    /// Its buffers.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        [&*self.ids, &*self.positions, &self.targets].into_iter().chain(self.starts.as_deref())
    }
}

impl Source for Stored {
    fn stored(&self, backend: &dyn Backend, _: &str, shape: [usize; 2]) -> Result<Option<Quantized>> {
        let make = |q: Quantization| {
            let codes = backend.alloc(DType::U8, shape.iter().product::<usize>().div_ceil(2))?;
            Ok(Quantized { codes, scales: scales(backend, shape, q)?, format: q.format, block: q.block, shape })
        };
        self.four_bits.map(make).transpose()
    }

    fn dense(&self, backend: &dyn Backend, _: &str, shape: &[usize]) -> Result<Buffer> {
        Ok(backend.alloc(self.dense, shape.iter().product())?)
    }

    /// What [`Quantized::quantize`] allocates, in its order, without the values that it looks at.
    fn quantize(&self, backend: &dyn Backend, name: &str, shape: [usize; 2], q: Quantization) -> Result<Quantized> {
        q.check()?;
        let dense = self.dense(backend, name, &shape)?;
        let mut codes = backend.alloc(DType::U8, dense.len().div_ceil(2))?;
        let mut absmax = backend.alloc(DType::F32, dense.len().div_ceil(q.block))?;
        backend.quantize_4bit(q.format, q.block, dense.view(), codes.view_mut(), absmax.view_mut())?;
        let scales = match q.double {
            false => Scales::Plain(absmax),
            true => {
                let mut made = scales(backend, shape, q)?;
                if let Scales::Nested { codes, absmax: nested, .. } = &mut made {
                    backend.quantize_scales(absmax.view(), codes.view_mut(), nested.view_mut())?;
                }
                made
            }
        };
        Ok(Quantized { codes, scales, format: q.format, block: q.block, shape })
    }

    fn file(&self, _: &str) -> &Path {
        Path::new("config.json")
    }
}

fn scales(backend: &dyn Backend, shape: [usize; 2], q: Quantization) -> Result<Scales> {
    let blocks = shape.iter().product::<usize>().div_ceil(q.block);
    Ok(match q.double {
        false => Scales::Plain(backend.alloc(DType::F32, blocks)?),
        true => Scales::Nested {
            codes: backend.alloc(DType::U8, blocks)?,
            absmax: backend.alloc(DType::F32, blocks.div_ceil(NESTED_BLOCK))?,
            offset: 0.0,
        },
    })
}
