//! A run without values: load, a held-out loss, two steps, a held-out loss.
//!
//! Two steps, for the first one alone does not show what the pool holds when the second begins; and at most two
//! micro-batches each, for a third is like the second.

use super::counting::{CountingBackend, buffers, piece};
use super::ledger::{Ledger, Record};
use super::{Category, Phase, Setup};
use crate::model::{DeviceBatch, Model};
use crate::objective::Terms;
use crate::optimizer::{AdamW, Hyper, PIECE};
use crate::{Error, Result};
use rankfold_adapters::adalora::{AdaLora, Allocator, Prune};
use rankfold_adapters::{AttachedPeft, DropoutKey, Forward, PeftConfig, Values, VirtualTokens};
use rankfold_autograd::{Base, Gradients, Tape};
use rankfold_backend::{Backend, Buffer};
use std::sync::Arc;

/// What was counted.
pub(super) struct Replayed {
    pub record: Record,
    pub attached: Option<AttachedPeft>,
    /// Numbers that are trained.
    pub trained: usize,
}

/// Errors: those of the run's own code; more memory than can be counted.
pub(super) fn replay(setup: &Setup) -> Result<Replayed> {
    let counting = CountingBackend::default();
    let ledger = counting.ledger.clone();
    run(setup, Arc::new(counting), &ledger).map_err(|error| if ledger.is_full() { setup.too_large() } else { error })
}

fn run(setup: &Setup, backend: Arc<dyn Backend>, ledger: &Ledger) -> Result<Replayed> {
    ledger.begin(Phase::Load);
    let (model, attached) = load(setup, &backend, ledger)?;
    let optimizer = optimizer(setup, &model, ledger)?;
    let allocator = allocator(setup, &model, ledger)?;
    let evaluate = || -> Result<()> {
        for rows in setup.evaluated() {
            ledger.begin(Phase::Evaluation);
            let batch = batch(rows, setup.seq, ledger, &model)?;
            let tape = Tape::inference(backend.clone());
            model.loss(&tape, &batch, 1.0, &Forward::evaluation(setup.compute), false)?;
        }
        Ok(())
    };
    evaluate()?;
    step(setup, &model, &optimizer, ledger)?;
    step(setup, &model, &optimizer, ledger)?;
    evaluate()?;
    let record = ledger.close();
    let trained = optimizer.slots.iter().map(|slot| slot.named.parameter.shape().elements()).sum();
    drop((model, optimizer, allocator));
    Ok(Replayed { record, attached, trained })
}

/// The model with its adapters, every buffer labelled.
fn load(setup: &Setup, backend: &Arc<dyn Backend>, ledger: &Ledger) -> Result<(Model, Option<AttachedPeft>)> {
    let Setup { config, stored, precision, seq, .. } = setup;
    let learned = setup.adapter.and_then(|adapter| adapter.virtual_tokens()).map_or(0, |learned| learned.tokens);
    let positions = seq + learned;
    let mut model = Model::blank(backend.clone(), (*config).clone(), *stored, *precision, positions)?;
    let attached = setup.adapter.map(|adapter| model.attach(adapter, Values::Blank)).transpose()?;
    if let Some(lora) = setup.adapter.and_then(PeftConfig::lora) {
        let adapted = model.linears().filter(|linear| linear.adapter().is_some());
        let bytes = adapted.map(|linear| {
            let in_4_bits = matches!(linear.base(), Base::Quantized(_));
            lora.init.working_bytes([linear.outputs(), linear.inputs()], in_4_bits)
        });
        ledger.passed(bytes.max().unwrap_or(0) as u64);
    }
    let label = |buffer: &Buffer, category, name: &str| -> Result<()> {
        let piece = piece(buffer)?;
        ledger.label(piece, category);
        ledger.name(piece, name);
        Ok(())
    };
    let trained = if setup.is_full() { Category::Weights } else { Category::Adapters };
    for (name, value) in model.values() {
        let category = if value.parameter().is_some() { trained } else { Category::Dense };
        label(value.tensor().buffer(), category, &name)?;
    }
    for linear in model.linears() {
        match linear.base() {
            Base::Quantized(q) => {
                for (buffer, category) in
                    buffers(&q).into_iter().zip([Category::Codes, Category::Scales, Category::Scales])
                {
                    label(buffer, category, linear.path())?;
                }
            }
            Base::Dense(w) => {
                let category = if w.variable().is_some() { trained } else { Category::Dense };
                label(w.buffer(), category, linear.path())?;
            }
        }
        for (name, parameter) in linear.parameters() {
            label(parameter.tensor().buffer(), trained, &name)?;
        }
        for (name, first) in linear.adapter().and_then(|lora| lora.start()).iter().flat_map(|start| start.parameters())
        {
            label(first.tensor().buffer(), Category::Adapters, name)?;
        }
        if let Some(bias) = linear.bias().filter(|bias| bias.parameter().is_none()) {
            label(bias.tensor().buffer(), Category::Dense, linear.path())?;
        }
    }
    for (name, parameter) in model.virtual_tokens().into_iter().flat_map(VirtualTokens::parameters) {
        label(parameter.tensor().buffer(), trained, name)?;
    }
    let (cos, sin) = model.rotary(positions)?;
    // Without a name: every layer touches them.
    for table in [cos, sin] {
        ledger.label(piece(table.buffer())?, Category::Batch);
    }
    Ok((model, attached))
}

/// The optimiser, its states labelled.
fn optimizer(setup: &Setup, model: &Model, ledger: &Ledger) -> Result<AdamW> {
    let optimizer = AdamW::new(model.backend().clone(), setup.moments, Hyper::default(), model.parameters())?;
    for (_, buffer) in optimizer.slots.iter().flat_map(|slot| slot.state.tensors()) {
        ledger.label(piece(buffer)?, Category::Optimizer);
    }
    Ok(optimizer)
}

/// AdaLoRA's sensitivities, which are as much memory as the optimiser's moments in f32.
fn allocator(setup: &Setup, model: &Model, ledger: &Ledger) -> Result<Option<Allocator>> {
    let Some(adalora) = setup.adapter.and_then(PeftConfig::lora).and_then(|lora| lora.adalora.as_ref()) else {
        return Ok(None);
    };
    // As short as any that has a step between its phases and one before the last choice.
    let steps = adalora.tinit.saturating_add(adalora.tfinal).saturating_add(2);
    let adalora = AdaLora { total_step: None, ..adalora.clone() };
    let allocator = Allocator::new(model.backend().as_ref(), &adalora, Prune::Mask, steps, model.linears())?;
    for (_, buffer) in allocator.tensors() {
        ledger.label(piece(buffer)?, Category::Optimizer);
    }
    Ok(Some(allocator))
}

fn batch(rows: usize, seq: usize, ledger: &Ledger, model: &Model) -> Result<DeviceBatch> {
    let batch = model.blank_batch(rows, seq)?;
    for buffer in batch.buffers() {
        ledger.label(piece(buffer)?, Category::Batch);
    }
    Ok(batch)
}

/// Micro-batches after which another takes what the last one took: no draw of thousands needed more, and some three.
const MICRO_BATCHES: usize = 4;

/// One optimiser step, as `crate::step` makes it.
fn step(setup: &Setup, model: &Model, optimizer: &AdamW, ledger: &Ledger) -> Result<()> {
    let backend = model.backend();
    let mut gradients = Gradients::new(backend.clone());
    for _ in 0..setup.accumulate.min(MICRO_BATCHES) {
        ledger.begin(Phase::Forward);
        let mode = Forward { compute: setup.compute, dropout: Some(DropoutKey { seed: 0, draw: 0 }) };
        let batch = batch(setup.rows, setup.seq, ledger, model)?;
        let tape = Tape::saving(backend.clone(), setup.saved_as);
        let (root, _) = model.loss(&tape, &batch, 1.0, &mode, setup.checkpointing)?;
        ledger.begin(Phase::Backward);
        tape.backward_from_loss(&root, &mut gradients).map_err(Error::from)?;
    }
    setup.adapter.map(Terms::of).unwrap_or_default().add_to(backend, model.linears(), &mut gradients)?;
    ledger.begin(Phase::Update);
    for slot in &optimizer.slots {
        let Some(gradient) = gradients.of(&slot.named.parameter) else { continue };
        // One piece of each tensor: the others need as much.
        let touched = |buffer: &Buffer| Ok((piece(buffer)?, buffer.bytes().min(PIECE * buffer.dtype().size()) as u64));
        let value = slot.named.parameter.tensor();
        let buffers = slot.state.tensors().into_iter().map(|(_, buffer)| buffer).chain([gradient, value.buffer()]);
        ledger.call("adamw", buffers.map(touched).collect::<Result<_>>()?);
    }
    Ok(())
}
