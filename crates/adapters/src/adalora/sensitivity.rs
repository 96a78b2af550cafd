//! What a factor's elements are worth: the smoothed sensitivity Ī and its uncertainty Ū (Zhang et al. 2023, eq. 8–10).

use super::Gather;
use crate::{Lora, Result};
use rankfold_autograd::{Gradients, Parameter};
use rankfold_backend::params::Importance;
use rankfold_backend::{Backend, Buffer, DType};

/// Ī and Ū of a factor.
#[derive(Debug)]
pub(super) struct Sensitivity {
    /// Ī.
    pub mean: Buffer,
    /// Ū.
    pub deviation: Buffer,
}

impl Sensitivity {
    fn zero(backend: &dyn Backend, elements: usize) -> Result<Self> {
        let zeros = || backend.filled(DType::F32, elements, 0.0);
        Ok(Self { mean: zeros()?, deviation: zeros()? })
    }

    /// A step: the mean of Ī·Ū of every triplet.
    pub fn step(
        &mut self,
        backend: &dyn Backend,
        p: &Importance,
        parameter: &Parameter,
        gradients: &Gradients,
    ) -> Result<Vec<f32>> {
        let weight = parameter.tensor();
        let mut scores = backend.alloc(DType::F32, p.split().0)?;
        let none;
        let gradient = match gradients.of(parameter) {
            Some(gradient) => gradient,
            // No loss reached it: it is sensitive to none.
            None => {
                none = backend.filled(DType::F32, weight.shape().elements(), 0.0)?;
                &none
            }
        };
        let (mean, deviation) = (self.mean.view_mut(), self.deviation.view_mut());
        backend.importance(p, weight.view(), gradient.view(), mean, deviation, scores.view_mut())?;
        Ok(backend.download(scores.view())?)
    }

    pub fn cut(&mut self, backend: &dyn Backend, gather: &Gather) -> Result<()> {
        self.mean = gather.of_buffer(backend, &self.mean)?;
        self.deviation = gather.of_buffer(backend, &self.deviation)?;
        Ok(())
    }
}

/// Of A, B and E, all zero.
pub(super) fn sensitivities(backend: &dyn Backend, lora: &Lora) -> Result<Vec<Sensitivity>> {
    lora.parameters().iter().map(|(_, parameter)| Sensitivity::zero(backend, parameter.shape().elements())).collect()
}
