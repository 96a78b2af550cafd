//! AdamW's update: parameters, gradients and moments all on the pager, each touched once a step. Hardly any arithmetic:
//! under pressure the disk is all there is.

use crate::work::{Failure, Step, draw};
use rankfold_autograd::{Gradients, Parameter, Variable};
use rankfold_backend::Backend;
use rankfold_trainer::optimizer::{AdamW, Hyper, Moments, Named};
use std::sync::Arc;

/// The update of so many tensors of so many elements.
pub fn make(backend: Arc<dyn Backend>, moments: Moments, tensors: usize, elements: usize) -> Result<Step, Failure> {
    let values = draw(elements, 1, 1.0);
    let mut gradients = Gradients::new(backend.clone());
    let mut parameters = Vec::new();
    for i in 0..tensors {
        let parameter = Parameter::new(backend.upload(&values)?, [1, elements])?;
        gradients.put(Variable::Parameter(parameter.id()), backend.upload(&values)?);
        parameters.push(Named { name: format!("tensor {i}"), parameter });
    }
    let mut adamw = AdamW::new(backend, moments, Hyper::default(), parameters)?;
    Ok(Box::new(move |_| Ok(adamw.update(&gradients, 1e-4, 1.0)?)))
}
