//! Gradients on their way: of the tape's nodes while the walk goes, of parameters until the optimiser's step.

use crate::{Parameter, ParameterId, Result, Tensor, Variable};
use rankfold_backend::{Backend, Buffer, DType, ViewMut};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Gradients by variable.
///
/// A buffer may be the gradient of two variables at once (both terms of a sum have the sum's gradient); it is
/// copied only if one of them must be added to while the other is still wanted.
#[derive(Debug)]
pub struct Gradients {
    backend: Arc<dyn Backend>,
    pub(crate) nodes: Vec<Option<Arc<Buffer>>>,
    pub(crate) parameters: BTreeMap<ParameterId, Arc<Buffer>>,
}

/// A gradient taken out to be written: add to what it holds, or overwrite it.
#[derive(Debug)]
pub struct Taken {
    /// The gradient so far, or memory of unspecified value.
    pub buffer: Buffer,
    /// Whether it holds a gradient already.
    pub accumulate: bool,
}

/// A gradient that a kernel is to form, with the variable whose it is; `None` for a constant, so that no memory is
/// taken for its gradient and no kernel asked for it.
pub(crate) type Slot = Option<(Variable, Buffer)>;

/// A slot as a kernel takes it.
pub(crate) fn output(slot: &mut Slot) -> Option<ViewMut<'_>> {
    slot.as_mut().map(|(_, buffer)| buffer.view_mut())
}

impl Gradients {
    /// None yet.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend, nodes: Vec::new(), parameters: BTreeMap::new() }
    }

    /// The gradient of a parameter, where any loss reached it.
    pub fn of(&self, parameter: &Parameter) -> Option<&Buffer> {
        self.parameters.get(&parameter.id()).map(Arc::as_ref)
    }

    /// Put a gradient (back) as the whole gradient of a variable.
    pub fn put(&mut self, variable: Variable, gradient: impl Into<Arc<Buffer>>) {
        match variable {
            Variable::Node(node) => self.nodes[node] = Some(gradient.into()),
            Variable::Parameter(id) => drop(self.parameters.insert(id, gradient.into())),
        }
    }

    /// Take a gradient out, to be written by a kernel that can add as well as overwrite, and put back.
    pub fn take(&mut self, variable: Variable, dtype: DType, len: usize) -> Result<Taken> {
        Ok(match self.take_present(variable)? {
            Some(buffer) => Taken { buffer, accumulate: true },
            None => Taken { buffer: self.backend.alloc(dtype, len)?, accumulate: false },
        })
    }

    /// Take a gradient out, where there is one: copied if another variable shares it.
    fn take_present(&mut self, variable: Variable) -> Result<Option<Buffer>> {
        let shared = match variable {
            Variable::Node(node) => self.nodes[node].take(),
            Variable::Parameter(id) => self.parameters.remove(&id),
        };
        shared
            .map(|shared| match Arc::try_unwrap(shared) {
                Ok(own) => Ok(own),
                Err(shared) => {
                    let mut copy = self.backend.alloc(shared.dtype(), shared.len())?;
                    self.backend.copy(shared.view(), copy.view_mut())?;
                    Ok(copy)
                }
            })
            .transpose()
    }

    /// Take a gradient out for a kernel that only adds: zeros where there is none yet.
    pub fn take_for_adding(&mut self, variable: Variable, dtype: DType, len: usize) -> Result<Buffer> {
        let mut taken = self.take(variable, dtype, len)?;
        if !taken.accumulate {
            self.backend.fill(0.0, taken.buffer.view_mut())?;
        }
        Ok(taken.buffer)
    }

    /// [`Gradients::take_for_adding`] where there is a variable; what is in the slot is put back.
    pub(crate) fn slot_for_adding(&mut self, variable: Option<Variable>, dtype: DType, len: usize) -> Result<Slot> {
        variable.map(|variable| Ok((variable, self.take_for_adding(variable, dtype, len)?))).transpose()
    }

    /// Memory for x's gradient, for a kernel that only overwrites; what it wrote goes to [`Gradients::add_slot`].
    pub(crate) fn slot(&self, x: &Tensor) -> Result<Slot> {
        let len = x.shape().elements();
        x.variable().map(|variable| Ok((variable, self.backend.alloc(x.dtype(), len)?))).transpose()
    }

    /// [`Gradients::add`] of what a kernel wrote into a slot.
    pub(crate) fn add_slot(&mut self, slot: Slot) -> Result<()> {
        slot.map_or(Ok(()), |(variable, gradient)| self.add(variable, gradient))
    }

    /// Add a finished gradient to a variable's.
    pub fn add(&mut self, variable: Variable, gradient: impl Into<Arc<Buffer>>) -> Result<()> {
        let gradient = gradient.into();
        let total = match self.take_present(variable)? {
            None => gradient,
            Some(mut sum) => {
                self.backend.add_in_place(gradient.view(), sum.view_mut())?;
                Arc::new(sum)
            }
        };
        self.put(variable, total);
        Ok(())
    }
}
