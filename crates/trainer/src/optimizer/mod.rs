//! AdamW over named parameters, and the clip of the gradient's norm.
//!
//! - `state`: what is remembered of a parameter, in 32 bits or in 8.

mod state;

use crate::{Error, Result};
use rankfold_adapters::adalora::Cut;
use rankfold_adapters::diff::is_gate;
use rankfold_adapters::linear::is_b;
use rankfold_autograd::{Gradients, Parameter};
use rankfold_backend::{Backend, params};
use std::sync::Arc;
use tracing::debug_span;

pub use state::{Coded, LEAST_IN_8_BITS, Moments, State};

/// Elements that a kernel updates at a time: whole blocks of 8-bit moments.
///
/// A kernel's operands are in memory all at once, so that this, and not the largest tensor, is what the update needs
/// there: 4 MiB with moments in f32.
pub(crate) const PIECE: usize = 1 << 18;

/// A parameter with the name that its files use.
#[derive(Clone, Debug)]
pub struct Named {
    /// As in the adapter's or the model's file.
    pub name: String,
    /// The parameter.
    pub parameter: Parameter,
}

/// What stays the same from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// β1
    pub beta1: f64,
    /// β2
    pub beta2: f64,
    /// ε
    pub eps: f64,
    /// Decoupled decay, of matrices alone: norms, biases and (IA)³'s scales have none, as is the custom.
    pub weight_decay: f64,
    /// λ of LoRA+ (Hayou et al. 2024, §4): the rate of every B over that of all else.
    pub lora_plus: f64,
    /// The rate of every log α of diff pruning over that of all else.
    pub gates: f64,
}

impl Default for Hyper {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, lora_plus: 1.0, gates: 1.0 }
    }
}

/// Whether a parameter is a matrix: one with a side of 1 is a vector, whatever form its file gives it, but that A and B
/// of rank 1 are what they are at any rank.
fn is_matrix(Named { name, parameter }: &Named) -> bool {
    let sides = parameter.shape().dims().iter().filter(|side| **side > 1).count();
    sides > 1 || is_b(name) || name.ends_with(".lora_A.weight") || name.ends_with(".lora_A")
}

/// One parameter with its moments.
#[derive(Debug)]
pub struct Slot {
    /// The parameter.
    pub named: Named,
    /// Its moments.
    pub state: State,
}

/// AdamW (Loshchilov & Hutter 2019).
#[derive(Debug)]
pub struct AdamW {
    backend: Arc<dyn Backend>,
    hyper: Hyper,
    moments: Moments,
    /// Steps taken.
    pub step: u64,
    /// Parameters in the order of their files.
    pub slots: Vec<Slot>,
}

impl AdamW {
    /// Moments of zero for every parameter.
    pub fn new(backend: Arc<dyn Backend>, moments: Moments, hyper: Hyper, parameters: Vec<Named>) -> Result<Self> {
        let slots = parameters
            .into_iter()
            .map(|named| {
                let state = State::zero(backend.as_ref(), moments, named.parameter.shape().elements())?;
                Ok(Slot { named, state })
            })
            .collect::<Result<_>>()?;
        Ok(Self { backend, hyper, moments, step: 0, slots })
    }

    /// The same optimiser before its first step, of other parameters.
    pub fn begin_again(&mut self, parameters: Vec<Named>) -> Result<()> {
        *self = Self::new(self.backend.clone(), self.moments, self.hyper, parameters)?;
        Ok(())
    }

    /// Go on with the tensors that others became, and with what is left of their moments.
    pub fn cut(&mut self, cuts: &[Cut]) -> Result<()> {
        for Cut { before, after, gather } in cuts {
            for Slot { named, state } in self.slots.iter_mut().filter(|slot| slot.named.parameter.id() == *before) {
                *state = state.cut(self.backend.as_ref(), self.moments, gather)?;
                named.parameter = after.clone();
            }
        }
        Ok(())
    }

    /// What the moments are kept in.
    pub fn moments(&self) -> Moments {
        self.moments
    }

    /// ‖gradient‖₂ over all parameters: the squares summed in f64, parameter by parameter.
    pub fn grad_norm(&self, gradients: &Gradients) -> Result<f64> {
        let _layer = debug_span!("layer", kind = "optimiser").entered();
        let mut sum = 0.0;
        for slot in &self.slots {
            if let Some(grad) = gradients.of(&slot.named.parameter) {
                sum += self.backend.sum_squares(grad.view())?;
            }
        }
        Ok(sum.sqrt())
    }

    /// That every value is finite: what a last update may have broken before any loss could show it.
    pub fn check_finite(&self) -> Result<()> {
        for Slot { named, .. } in &self.slots {
            let squares = self.backend.sum_squares(named.parameter.tensor().view())?;
            if !squares.is_finite() {
                return Err(Error::NotFinite {
                    step: self.step as usize,
                    what: "norm of a trained tensor",
                    value: squares,
                });
            }
        }
        Ok(())
    }

    /// One step at rate `lr` (B's at that times LoRA+'s λ, a gate's at that times its own), every gradient multiplied
    /// by `grad_scale` first. A parameter that no loss reached has no gradient and stays.
    pub fn update(&mut self, gradients: &Gradients, lr: f64, grad_scale: f64) -> Result<()> {
        self.update_by(PIECE, gradients, lr, grad_scale)
    }

    /// The same, `piece` elements at a time: whole blocks of 8-bit moments.
    fn update_by(&mut self, piece: usize, gradients: &Gradients, lr: f64, grad_scale: f64) -> Result<()> {
        let _layer = debug_span!("layer", kind = "optimiser").entered();
        self.step += 1;
        let Hyper { beta1, beta2, eps, weight_decay, lora_plus, gates } = self.hyper;
        for Slot { named, state } in &mut self.slots {
            let Some(grad) = gradients.of(&named.parameter) else { continue };
            let weight_decay = if is_matrix(named) { weight_decay } else { 0.0 };
            let lr = match &*named.name {
                name if is_b(name) => lora_plus * lr,
                name if is_gate(name) => gates * lr,
                _ => lr,
            };
            let p = params::AdamW { lr, beta1, beta2, eps, weight_decay, step: self.step, grad_scale };
            named.parameter.update(|value| {
                for start in (0..value.len()).step_by(piece) {
                    let len = piece.min(value.len() - start);
                    let (grad, value) = (grad.slice(start, len)?, value.slice_mut(start, len)?);
                    state.step(self.backend.as_ref(), &p, start..start + len, grad, value)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// What the gradient is multiplied by so that its norm is at most `clip`; 0 switches the clip off.
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rankfold_autograd::Variable;
    use rankfold_backend::params::MOMENT_BLOCK;
    use rankfold_backend::{Buffer, philox};
    use rankfold_cpu::CpuBackend;

    /// `n` numbers in [−1, 1), others for every `stream`.
    fn numbers(stream: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| philox::unit(philox::word(1, stream, i)) * 2.0 - 1.0).collect()
    }

    fn adamw(moments: Moments, sizes: &[usize]) -> AdamW {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)));
        let named = |(i, n): (usize, &usize)| {
            let value = backend.upload(&numbers(i as u64, *n)).unwrap();
            Named { name: format!("p{i}.lora_A"), parameter: Parameter::new(value, [1, *n]).unwrap() }
        };
        let parameters = sizes.iter().enumerate().map(named).collect();
        let hyper = Hyper { weight_decay: 0.01, ..Hyper::default() };
        AdamW::new(backend, moments, hyper, parameters).unwrap()
    }

    /// The bits of the values and the moments after three steps.
    fn trained(moments: Moments, sizes: &[usize], piece: usize) -> Vec<Vec<u8>> {
        let mut optimizer = adamw(moments, sizes);
        let backend = optimizer.backend.clone();
        for step in 1..4 {
            let mut gradients = Gradients::new(backend.clone());
            for (i, Slot { named, .. }) in optimizer.slots.iter().enumerate() {
                let grad = numbers(100 * step + i as u64, named.parameter.shape().elements());
                gradients.put(Variable::Parameter(named.parameter.id()), backend.upload(&grad).unwrap());
            }
            optimizer.update_by(piece, &gradients, 1e-2, 0.5).unwrap();
        }
        let bits = |buffer: &Buffer| {
            let mut bytes = vec![0; buffer.bytes()];
            backend.read(buffer.view(), &mut bytes).unwrap();
            bytes
        };
        let of = |slot: &Slot| {
            let moments = slot.state.tensors().into_iter().map(|(_, buffer)| bits(buffer));
            [bits(slot.named.parameter.tensor().buffer())].into_iter().chain(moments).collect::<Vec<_>>()
        };
        optimizer.slots.iter().flat_map(of).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn pieces_give_the_bits_of_the_whole(n in 1usize..20_000, blocks in 1usize..40) {
            for moments in [Moments::F32, Moments::Blockwise8] {
                let [whole, pieces] = [PIECE, blocks * MOMENT_BLOCK].map(|piece| trained(moments, &[n, 300], piece));
                prop_assert!(whole == pieces, "in {}", moments);
            }
        }
    }

    /// The bits of a parameter of this name and shape, 300 elements, after three steps.
    fn stepped(name: &str, dims: &[usize], lr: f64, hyper: Hyper) -> Vec<u32> {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Some(1)));
        let parameter = Parameter::new(backend.upload(&numbers(0, 300)).unwrap(), dims).unwrap();
        let named = Named { name: name.into(), parameter: parameter.clone() };
        let mut optimizer = AdamW::new(backend.clone(), Moments::F32, hyper, vec![named]).unwrap();
        for step in 1..4 {
            let mut gradients = Gradients::new(backend.clone());
            gradients.put(Variable::Parameter(parameter.id()), backend.upload(&numbers(step, 300)).unwrap());
            optimizer.update(&gradients, lr, 1.0).unwrap();
        }
        backend.download::<f32>(parameter.tensor().view()).unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// A power of two times the rate is exact.
    #[test]
    fn lora_plus_is_a_higher_rate_of_every_b_a_gates_of_every_log_alpha_and_neither_of_anything_else() {
        let (plain, hyper) = (Hyper::default(), Hyper { lora_plus: 8.0, gates: 16.0, ..Hyper::default() });
        for (end, by) in [
            ("lora_B.weight", 8.0),
            ("lora_B", 8.0),
            ("log_alpha", 16.0),
            ("lora_A.weight", 1.0),
            ("diff", 1.0),
            ("base_layer.bias", 1.0),
            ("weight", 1.0),
        ] {
            let name = format!("base_model.model.m.{end}");
            let of = |lr, hyper| stepped(&name, &[3, 100], lr, Hyper { weight_decay: 0.01, ..hyper });
            assert_eq!(of(1e-3, hyper), of(by * 1e-3, plain), "{name}");
        }
    }

    #[test]
    fn matrices_are_decayed_and_vectors_in_any_form_are_not() {
        for (name, dims, is_decayed) in [
            ("m.weight", &[3, 100][..], true),
            ("m.lora_A.weight", &[1, 300], true),
            ("m.lora_B.weight", &[300, 1], true),
            ("norm.weight", &[300], false),
            ("m.ia3_l", &[300, 1], false),
            ("m.ia3_l", &[1, 300], false),
            ("m.lora_E", &[300, 1], false),
        ] {
            let of = |weight_decay| stepped(name, dims, 1e-2, Hyper { weight_decay, ..Hyper::default() });
            assert_eq!(of(0.1) != of(0.0), is_decayed, "{name} {dims:?}");
        }
    }

    #[test]
    fn a_piece_cuts_no_block() {
        assert_eq!(PIECE % MOMENT_BLOCK, 0);
    }

    #[test]
    fn below_4096_elements_8_bits_are_32_to_the_bit() {
        let small = [LEAST_IN_8_BITS - 1, 1, 256];
        assert!(trained(Moments::Blockwise8, &small, PIECE) == trained(Moments::F32, &small, PIECE));
        let large = [LEAST_IN_8_BITS];
        assert!(trained(Moments::Blockwise8, &large, PIECE) != trained(Moments::F32, &large, PIECE));
    }

    /// 8 bytes an element; 2 and two scales a block.
    #[test]
    fn moments_take_the_bytes_that_are_said() {
        for (moments, elements, bytes) in [
            (Moments::F32, 70_000, 8 * 70_000),
            (Moments::Blockwise8, 70_000, 2 * 70_000 + 8 * 274),
            (Moments::Blockwise8, 65_536, 8 * 65_536 / 4 + 8 * 256),
            (Moments::Blockwise8, 4095, 8 * 4095),
        ] {
            let taken: usize =
                adamw(moments, &[elements]).slots[0].state.tensors().iter().map(|(_, b)| b.bytes()).sum();
            assert_eq!((taken, moments.bytes(elements)), (bytes, bytes), "{elements} elements in {moments}");
        }
    }
}
