//! The tape: operations in the order in which they ran, walked in reverse.
//!
//! Each is remembered with the span of `tracing` that it ran in, and is in it again on the way back: so whoever listens
//! is told which layer's gradient is formed. Where nobody does, a span is three empty words.

use crate::saved::Roundings;
use crate::{Gradients, Result, SavedAs, Tensor, Variable};
use rankfold_backend::{Backend, Buffer, DType, Shape};
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Span};

/// One operation's backward pass: a struct that holds what it needs, made by the forward pass.
pub trait Op {
    /// Give each input that wants one its gradient, from the gradient of the output.
    ///
    /// Consumes the operation, so that what it saved is freed when it returns.
    fn backward(self: Box<Self>, backend: &dyn Backend, grad: Arc<Buffer>, gradients: &mut Gradients) -> Result<()>;
}

/// What a tensor on the tape came from.
struct Node {
    /// None, where it is a stand-in for a checkpointed part's input.
    op: Option<Box<dyn Op>>,
    /// Where in the model that was.
    span: Span,
}

/// Runs operations and, unless made by [`Tape::inference`], remembers them.
pub struct Tape {
    backend: Arc<dyn Backend>,
    nodes: Option<RefCell<Vec<Node>>>,
    /// What the operations keep activations in.
    pub(crate) saved_as: SavedAs,
    pub(crate) roundings: Roundings,
    /// Whether an operation has had a variable among its inputs, remembered or not.
    trains: Cell<bool>,
}

impl Tape {
    /// A tape that remembers.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self { nodes: Some(RefCell::default()), ..Self::inference(backend) }
    }

    /// The same, with the activations that it remembers kept as `saved_as` says.
    pub fn saving(backend: Arc<dyn Backend>, saved_as: SavedAs) -> Self {
        Self { saved_as, ..Self::new(backend) }
    }

    /// A tape that only runs: nothing is saved, no tensor has a gradient.
    pub fn inference(backend: Arc<dyn Backend>) -> Self {
        let (saved_as, roundings) = (SavedAs::default(), Roundings::default());
        Self { backend, nodes: None, saved_as, roundings, trains: Cell::new(false) }
    }

    /// Where the operations run.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Whether what ran so far had variables among its inputs.
    pub(crate) fn trains(&self) -> bool {
        self.trains.get()
    }

    /// Whether an input's gradient is to be computed on this tape.
    pub(crate) fn wants(&self, variable: Option<Variable>) -> bool {
        self.nodes.is_some() && variable.is_some()
    }

    /// The output of an operation: a variable where any of its inputs is one, else a constant.
    ///
    /// `op` is called with the output, and only where the operation is remembered: so it saves nothing in vain.
    pub(crate) fn record<O: Op + 'static>(
        &self,
        output: Buffer,
        shape: impl Into<Shape>,
        inputs: &[Option<Variable>],
        op: impl FnOnce(&Tensor) -> Result<O>,
    ) -> Result<Tensor> {
        let output = Tensor::constant(output, shape)?;
        if inputs.iter().all(Option::is_none) {
            return Ok(output);
        }
        self.trains.set(true);
        let Some(nodes) = &self.nodes else { return Ok(output) };
        let op = op(&output)?;
        Ok(push(&mut nodes.borrow_mut(), output, Some(Box::new(op))))
    }

    /// [`Tape::record`] of an output that exists as a tensor already, whatever its inputs are.
    pub(crate) fn record_shared<O: Op + 'static>(
        &self,
        output: &Tensor,
        op: impl FnOnce() -> Result<O>,
    ) -> Result<Tensor> {
        self.trains.set(true);
        Ok(match &self.nodes {
            Some(nodes) => {
                let op = op()?;
                push(&mut nodes.borrow_mut(), output.detach(), Some(Box::new(op)))
            }
            None => output.detach(),
        })
    }

    /// A variable with no producer, whose gradient stays in [`Gradients`] after the walk; a constant of a constant.
    pub(crate) fn leaf(&self, tensor: &Tensor) -> Tensor {
        match &self.nodes {
            Some(nodes) if tensor.variable().is_some() => push(&mut nodes.borrow_mut(), tensor.detach(), None),
            _ => tensor.detach(),
        }
    }

    /// Walk back from `root`, whose own gradient is `seed`, adding to `gradients`.
    pub fn backward(self, root: &Tensor, seed: impl Into<Arc<Buffer>>, gradients: &mut Gradients) -> Result<()> {
        let (Some(nodes), Some(variable)) = (self.nodes, root.variable()) else { return Ok(()) };
        let mut nodes = nodes.into_inner();
        gradients.nodes = vec![None; nodes.len()];
        gradients.put(variable, seed);
        for node in (0..nodes.len()).rev() {
            // A leaf has no operation and keeps its gradient; an operation that no loss reached is just dropped.
            let Some(op) = nodes[node].op.take() else { continue };
            if let Some(grad) = gradients.nodes[node].take() {
                let _place = std::mem::replace(&mut nodes[node].span, Span::none()).entered();
                op.backward(self.backend.as_ref(), grad, gradients)?;
            }
        }
        Ok(())
    }

    /// [`Tape::backward`] from a scalar loss.
    pub fn backward_from_loss(self, loss: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let seed = self.backend.filled(loss.dtype(), 1, 1.0)?;
        self.backward(loss, seed, gradients)
    }

    pub(crate) fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        Ok(self.backend.alloc(dtype, len)?)
    }
}

/// The span of the operation that runs; none where nobody listens, which is asked first: it is one comparison.
fn current_span() -> Span {
    if Level::DEBUG <= LevelFilter::current() { Span::current() } else { Span::none() }
}

fn push(nodes: &mut Vec<Node>, tensor: Tensor, op: Option<Box<dyn Op>>) -> Tensor {
    nodes.push(Node { op, span: current_span() });
    Tensor::variable_of(tensor.buffer().clone(), tensor.shape().clone(), Some(Variable::Node(nodes.len() - 1)))
}
