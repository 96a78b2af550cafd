//! What every triplet is worth, which are masked, and which go.
//!
//! After step t, while t < T − t_final, with the weights after it and its gradient (Zhang et al. 2023, eq. 8–10; the
//! kernel `importance`): Ī and Ū, elementwise, of A, B and E, and
//!
//! ```text
//! score_i = Ī·Ū of E_i  +  mean of Ī·Ū over row i of A  +  mean of Ī·Ū over column i of B        (eq. 6)
//! ```
//!
//! A mask zeroes E_i wherever score_i is not above the (b₀ − b(t))-th smallest of all: of equal ones all, so that the
//! budget may not be spent whole. At T − t_final the scores of the step before rank, and that choice is the last.
//!
//! With [`Prune::Shrink`] a triplet also goes before it, when every mask of the last [`patience`] steps, three at the
//! least, has hit it: by then less than a twentieth is left of what its sensitivity was, and the "possibility of
//! recovery" (§3.2) has been given. A triplet that goes counts as masked from then on.

use super::sensitivity::{Sensitivity, sensitivities};
use super::{AdaLora, Budget, Cut, Prune};
use crate::lora::{Lora, Part};
use crate::{Error, Linear, Result};
use rankfold_autograd::Gradients;
use rankfold_backend::params::{Importance, Triplets};
use rankfold_backend::{Backend, Buffer};
use serde::{Deserialize, Serialize};

/// Masks in a row that a triplet survives, whatever the time between them.
const LEAST_MASKS: usize = 3;

/// The factors in the order of [`Lora::parameters`], with where their triplets are.
const FACTORS: [(&str, Triplets); 3] = [("A", Triplets::Rows), ("B", Triplets::Columns), ("E", Triplets::Rows)];

/// Steps after which less than a twentieth is left of a sensitivity that decays by β1 a step: 19 for 0.85.
fn patience(beta1: f64) -> usize {
    (0.05f64.ln() / beta1.ln()).ceil() as usize
}

/// Spends the budget of a run.
#[derive(Debug)]
pub struct Allocator {
    config: AdaLora,
    prune: Prune,
    total: usize,
    /// b₀ and b*.
    ends: [usize; 2],
    modules: Vec<Module>,
    /// Whether the last choice is made.
    is_final: bool,
}

/// A layer's triplets.
#[derive(Debug)]
struct Module {
    path: String,
    /// Of A, B and E; empty when there is nothing more to choose.
    sensitivities: Vec<Sensitivity>,
    triplets: Vec<Triplet>,
}

/// A triplet that there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Triplet {
    /// Its number among those that its layer had at first.
    index: usize,
    /// What it is worth.
    score: f64,
    /// Masks in a row that hit it, to the last.
    masks: usize,
    /// The step of the first of them.
    since: usize,
}

impl Triplet {
    /// A mask of step `t`, which hits it or does not.
    fn mask(&mut self, t: usize, is_hit: bool) {
        self.since = if self.masks == 0 { t } else { self.since };
        self.masks = if is_hit { self.masks + 1 } else { 0 };
    }

    /// Whether, after step `t`, masks have hit it without a break for as long as it is given to recover.
    fn is_forgotten(&self, t: usize, patience: usize) -> bool {
        self.masks >= LEAST_MASKS && t.saturating_sub(self.since) >= patience
    }
}

/// What a checkpoint keeps of an [`Allocator`] beside its [tensors](Allocator::tensors).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocatorRecord {
    is_final: bool,
    modules: Vec<(String, Vec<Triplet>)>,
}

/// What was done after a step.
#[derive(Debug, Default)]
pub struct Allocation {
    /// b(t).
    pub budget: usize,
    /// Triplets with E ≠ 0, by layer.
    pub ranks: Vec<(String, usize)>,
    /// Tensors that became smaller.
    pub cuts: Vec<Cut>,
}

impl Allocator {
    /// For the layers of a model that have triplets, and a run of `steps` steps where the configuration does not say.
    ///
    /// Layers from which triplets were cut make the choice final: it is an earlier run's.
    ///
    /// Errors: no layer with triplets; a schedule that [`AdaLora::check_total`] refuses.
    pub fn new<'a>(
        backend: &dyn Backend,
        config: &AdaLora,
        prune: Prune,
        steps: usize,
        layers: impl IntoIterator<Item = &'a Linear>,
    ) -> Result<Self> {
        let total = config.total_step.unwrap_or(steps);
        let (mut modules, mut first, mut is_final) = (Vec::new(), 0, false);
        for (path, lora, kept) in layers.into_iter().filter_map(triplets_of) {
            first += kept.len();
            is_final |= lora.rank() < kept.len();
            let indices = (0..kept.len()).filter(|&index| kept[index]);
            let triplets = indices.map(|index| Triplet { index, ..Triplet::default() }).collect();
            modules.push(Module { path: path.into(), sensitivities: sensitivities(backend, lora)?, triplets });
        }
        if modules.is_empty() {
            return Err(Error::field("peft_type", "ADALORA", "a model with triplets in some layer"));
        }
        if is_final {
            modules.iter_mut().for_each(|module| module.sensitivities.clear());
        } else {
            config.check_total(total)?;
        }
        let ends = [first, config.target_rank * modules.len()];
        Ok(Self { config: config.clone(), prune, total, ends, modules, is_final })
    }

    /// The step of the last choice, where it is not made yet: a run that ends before it ends over budget.
    pub fn last_choice(&self) -> Option<usize> {
        (!self.is_final).then(|| self.total.saturating_sub(self.config.tfinal))
    }

    /// Triplets that there are, those that are masked too.
    pub fn triplets(&self) -> usize {
        self.modules.iter().map(|module| module.triplets.len()).sum()
    }

    /// Triplets that the budget ends with.
    pub fn target(&self) -> usize {
        self.ends[1]
    }

    /// What is due after step `t`, whose update is done and whose gradients were multiplied by `grad_scale`.
    ///
    /// `layers` are those that it was made for. Errors: others.
    pub fn after_step(
        &mut self,
        backend: &dyn Backend,
        t: usize,
        gradients: &Gradients,
        grad_scale: f64,
        layers: &mut [&mut Linear],
    ) -> Result<Allocation> {
        let mut layers = self.layers(layers)?;
        let last = self.total.saturating_sub(self.config.tfinal);
        let Budget { triplets, masks } = self.config.budget(t, self.total, self.ends);
        let mut done = Allocation { budget: triplets, ..Allocation::default() };
        if self.is_final {
            done.budget = self.modules.iter().flat_map(|module| &module.triplets).filter(|t| t.masks == 0).count();
        } else {
            if t < last {
                self.score(backend, gradients, grad_scale, &layers)?;
            }
            if masks {
                self.choose(t, triplets);
                self.is_final = t == last;
            }
        }
        if masks || self.is_final {
            for (module, layer) in self.modules.iter().zip(&layers) {
                module.mask(backend, layer)?;
            }
        }
        if self.prune == Prune::Shrink && (masks || self.is_final) {
            let (is_final, patience) = (self.is_final, patience(self.config.beta1));
            let goes = |triplet: &Triplet| if is_final { triplet.masks > 0 } else { triplet.is_forgotten(t, patience) };
            done.cuts = self.cut(backend, &mut layers, goes)?;
        }
        if self.is_final {
            self.modules.iter_mut().for_each(|module| module.sensitivities.clear());
        }
        for layer in &layers {
            let living = lambda(backend, layer)?.iter().filter(|e| **e != 0.0).count();
            done.ranks.push((layer.path().into(), living));
        }
        Ok(done)
    }

    /// At a run's end: cut what the last mask hit and no step has revived.
    pub fn finish(&mut self, backend: &dyn Backend, layers: &mut [&mut Linear]) -> Result<Vec<Cut>> {
        let mut layers = self.layers(layers)?;
        for (module, layer) in self.modules.iter_mut().zip(&layers) {
            for (triplet, e) in module.triplets.iter_mut().zip(lambda(backend, layer)?) {
                triplet.masks = if e == 0.0 { triplet.masks } else { 0 };
            }
        }
        self.cut(backend, &mut layers, |triplet| triplet.masks > 0)
    }

    /// The layers with triplets: those that this was made for.
    fn layers<'a>(&self, layers: &'a mut [&mut Linear]) -> Result<Vec<&'a mut Linear>> {
        let layers: Vec<&mut Linear> =
            layers.iter_mut().map(|layer| &mut **layer).filter(|layer| triplets_of(layer).is_some()).collect();
        let ours = self.modules.iter().map(|module| module.path.as_str());
        if ours.eq(layers.iter().map(|layer| layer.path())) {
            return Ok(layers);
        }
        Err(Error::field("layers with triplets", layers.len(), "those that the budget was made for"))
    }

    /// New scores.
    fn score(
        &mut self,
        backend: &dyn Backend,
        gradients: &Gradients,
        grad_scale: f64,
        layers: &[&mut Linear],
    ) -> Result<()> {
        let (beta1, beta2) = (self.config.beta1, self.config.beta2);
        for (module, layer) in self.modules.iter_mut().zip(layers) {
            let Some(lora) = layer.adapter() else { continue };
            let mut sums = vec![0.0; module.triplets.len()];
            let parameters = lora.parameters();
            for (((_, parameter), (_, triplets)), sensitivity) in
                parameters.iter().zip(FACTORS).zip(&mut module.sensitivities)
            {
                let (rows, width) = (parameter.shape().rows(), parameter.shape().width());
                let p = Importance { rows, width, triplets, beta1, beta2, grad_scale };
                for (sum, score) in sums.iter_mut().zip(sensitivity.step(backend, &p, parameter, gradients)?) {
                    *sum += f64::from(score);
                }
            }
            for (triplet, score) in module.triplets.iter_mut().zip(sums) {
                triplet.score = score;
            }
        }
        Ok(())
    }

    /// The mask of step `t`, for `budget` triplets.
    fn choose(&mut self, t: usize, budget: usize) {
        let mut scores: Vec<f64> = self.all().map(|triplet| triplet.score).collect();
        let hit = scores.len().saturating_sub(budget);
        let threshold = (hit > 0).then(|| *scores.select_nth_unstable_by(hit - 1, f64::total_cmp).1);
        for triplet in self.modules.iter_mut().flat_map(|module| &mut module.triplets) {
            triplet.mask(t, threshold.is_some_and(|threshold| triplet.score <= threshold));
        }
    }

    fn all(&self) -> impl Iterator<Item = &Triplet> {
        self.modules.iter().flat_map(|module| &module.triplets)
    }

    /// Cut the triplets that `goes` names, out of everything that has a part for each. Smaller tensors are made beside
    /// larger ones: what earlier work has left behind goes back to the system first.
    fn cut(
        &mut self,
        backend: &dyn Backend,
        layers: &mut [&mut Linear],
        goes: impl Fn(&Triplet) -> bool,
    ) -> Result<Vec<Cut>> {
        let mut all = Vec::new();
        for (module, layer) in self.modules.iter_mut().zip(layers) {
            let keep: Vec<bool> = module.triplets.iter().map(|triplet| !goes(triplet)).collect();
            if keep.iter().all(|keep| *keep) {
                continue;
            }
            let Some(lora) = layer.adapter() else { continue };
            if all.is_empty() {
                backend.trim()?;
            }
            let (smaller, cuts) = lora.cut(backend, &module.path, &keep)?;
            layer.set_adapter(smaller)?;
            for (sensitivity, Cut { gather, .. }) in module.sensitivities.iter_mut().zip(&cuts) {
                sensitivity.cut(backend, gather)?;
            }
            let mut keep = keep.into_iter();
            module.triplets.retain(|_| keep.next().unwrap_or(true));
            all.extend(cuts);
        }
        Ok(all)
    }

    /// The sensitivities by name, to be kept in a checkpoint: `PATH.A.mean` and so on, shaped as vectors.
    pub fn tensors(&self) -> Vec<(String, &Buffer)> {
        let mut tensors = Vec::new();
        for module in &self.modules {
            for (sensitivity, (factor, _)) in module.sensitivities.iter().zip(FACTORS) {
                tensors.push((format!("{}.{factor}.mean", module.path), &sensitivity.mean));
                tensors.push((format!("{}.{factor}.deviation", module.path), &sensitivity.deviation));
            }
        }
        tensors
    }

    /// The same, to be read back.
    pub fn tensors_mut(&mut self) -> Vec<(String, &mut Buffer)> {
        let mut tensors = Vec::new();
        for Module { path, sensitivities, .. } in &mut self.modules {
            for (sensitivity, (factor, _)) in sensitivities.iter_mut().zip(FACTORS) {
                tensors.push((format!("{path}.{factor}.mean"), &mut sensitivity.mean));
                tensors.push((format!("{path}.{factor}.deviation"), &mut sensitivity.deviation));
            }
        }
        tensors
    }

    /// The rest of what a checkpoint keeps.
    pub fn record(&self) -> AllocatorRecord {
        let modules = self.modules.iter().map(|module| (module.path.clone(), module.triplets.clone()));
        AllocatorRecord { is_final: self.is_final, modules: modules.collect() }
    }

    /// Back to a record: the layers' tensors and the sensitivities get its shapes; their values are for the caller to
    /// read.
    ///
    /// Errors: a record of other layers, or of triplets that there are not.
    pub fn restore(
        &mut self,
        backend: &dyn Backend,
        record: AllocatorRecord,
        layers: &mut [&mut Linear],
    ) -> Result<()> {
        let mut layers = self.layers(layers)?;
        let ours = self.modules.iter().map(|module| &module.path);
        let is_known = |(module, (_, then)): (&Module, &(String, Vec<Triplet>))| {
            then.is_sorted_by(|a, b| a.index < b.index)
                && then.iter().all(|triplet| module.triplets.iter().any(|now| now.index == triplet.index))
        };
        if !ours.eq(record.modules.iter().map(|(path, _)| path))
            || !self.modules.iter().zip(&record.modules).all(is_known)
        {
            return Err(Error::field("allocator", "of other triplets", "those of the run's own adapter"));
        }
        for (module, (_, then)) in self.modules.iter_mut().zip(&record.modules) {
            for triplet in &mut module.triplets {
                triplet.masks = usize::from(!then.iter().any(|then| then.index == triplet.index));
            }
        }
        self.cut(backend, &mut layers, |triplet| triplet.masks > 0)?;
        for (module, (_, then)) in self.modules.iter_mut().zip(record.modules) {
            module.triplets = then;
        }
        self.is_final = record.is_final;
        if self.is_final {
            self.modules.iter_mut().for_each(|module| module.sensitivities.clear());
        }
        Ok(())
    }
}

impl Module {
    /// E of the masked triplets becomes 0.
    fn mask(&self, backend: &dyn Backend, layer: &Linear) -> Result<()> {
        let Some((_, lora, _)) = triplets_of(layer) else { return Ok(()) };
        let Part::Triplets { lambda: parameter, .. } = lora.part() else { return Ok(()) };
        if self.triplets.iter().all(|triplet| triplet.masks == 0) {
            return Ok(());
        }
        let mut e = lambda(backend, layer)?;
        for (e, _) in e.iter_mut().zip(&self.triplets).filter(|(_, triplet)| triplet.masks > 0) {
            *e = 0.0;
        }
        let bytes: Vec<u8> = e.iter().flat_map(|e| e.to_le_bytes()).collect();
        Ok(parameter.update(|buffer| Ok(backend.write(&bytes, buffer.view_mut())?))?)
    }
}

/// A layer's path, update and pattern, where it has triplets.
fn triplets_of(layer: &Linear) -> Option<(&str, &Lora, &[bool])> {
    let lora = layer.adapter()?;
    match lora.part() {
        Part::Triplets { kept, .. } => Some((layer.path(), lora, kept)),
        _ => None,
    }
}

/// E.
fn lambda(backend: &dyn Backend, layer: &Linear) -> Result<Vec<f32>> {
    match layer.adapter().map(Lora::part) {
        Some(Part::Triplets { lambda, .. }) => Ok(backend.download(lambda.tensor().view())?),
        _ => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests;
