//! The keys and values of the tokens so far, one pair of buffers a layer: what makes a generated token cost one
//! row instead of all of them.

use crate::Result;
use rankfold_autograd::Tensor;
use rankfold_backend::{Backend, Buffer, DType, params};
use std::sync::Arc;

/// The KV cache of one sequence.
#[derive(Debug)]
pub struct Cache {
    backend: Arc<dyn Backend>,
    layers: Vec<Layer>,
    capacity: usize,
    /// Tokens held.
    pub len: usize,
}

/// keys and values [capacity, kv_heads · head_dim].
#[derive(Debug)]
struct Layer {
    keys: Buffer,
    values: Buffer,
}

impl Cache {
    /// Room for `capacity` tokens of `width` = kv_heads · head_dim in each of `layers`.
    pub fn new(backend: Arc<dyn Backend>, layers: usize, capacity: usize, width: usize) -> Result<Self> {
        let buffer = || backend.alloc(DType::F32, params::elements(&[capacity, width]));
        let layers = (0..layers).map(|_| Ok(Layer { keys: buffer()?, values: buffer()? })).collect::<Result<_>>()?;
        Ok(Self { backend, layers, capacity, len: 0 })
    }

    /// Tokens that still fit.
    pub fn free(&self) -> usize {
        self.capacity - self.len
    }

    /// Write k and v of `tokens` behind those of `layer` that are there.
    pub fn put(&mut self, layer: usize, tokens: usize, kv: [&Tensor; 2]) -> Result<()> {
        let Layer { keys, values } = &mut self.layers[layer];
        for (cache, new) in [&mut *keys, values].into_iter().zip(kv) {
            let width = new.shape().width();
            self.backend.copy(new.view(), cache.slice_mut(self.len * width, tokens * width)?)?;
        }
        Ok(())
    }

    /// Append k and v of new tokens to `layer`, and let q attend to all of it. `self.len` moves on when every layer
    /// has been through.
    pub fn attend(&mut self, layer: usize, p: &params::Attention, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        self.put(layer, p.queries, [k, v])?;
        let p = params::Attention { keys: self.len + p.queries, query_offset: self.len, ..*p };
        let Layer { keys, values } = &self.layers[layer];
        let (keys, values) = (keys.slice(0, p.key_elements())?, values.slice(0, p.key_elements())?);
        let mut out = self.backend.alloc(DType::F32, p.query_elements())?;
        let mut lse = self.backend.alloc(DType::F32, p.lse_elements())?;
        self.backend.attention(&p, q.view(), keys, values, None, out.view_mut(), lse.view_mut())?;
        Ok(Tensor::constant(out, q.shape().clone())?)
    }
}
