//! A run's checkpoints: `checkpoints/step-000010/`, each whole or not there.
//!
//! A checkpoint is the product as it then was (an adapter folder, with what the adapter took out of its base in
//! `start.safetensors`, or the whole model's in f32), the optimiser's moments in `optimizer.safetensors`, as they are:
//! `NAME.m` and `NAME.v`, where in 8 bits with `NAME.m.absmax` and `NAME.v.absmax`; with AdaLoRA its sensitivities in
//! `allocator.safetensors`; and `state.json`. It is written into a temporary folder that is given its name when
//! everything in it is on the disk, so that a name is a promise.

use crate::model::Model;
use crate::optimizer::{AdamW, Moments, Named, Slot};
use crate::product::{Kind, Product};
use crate::{Error, Result};
use rankfold_adapters::adalora::{Allocator, AllocatorRecord};
use rankfold_autograd::Parameter;
use rankfold_backend::{Backend, Buffer};
use rankfold_files::{Checkpoint, Spec, StagedFolder, Writer, write_atomically};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const ALLOCATOR: &str = "allocator.safetensors";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    step: usize,
    #[serde(default)]
    moments: Moments,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allocator: Option<AllocatorRecord>,
}

/// The folder of a run's checkpoints.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// Those of the run in `run`.
    pub fn of(run: &Path) -> Self {
        Self { folder: run.join("checkpoints") }
    }

    /// Whole checkpoints by step, ascending.
    pub fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
            let path = entry.map_err(Error::io(&self.folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Write a checkpoint of step `step`, and drop the oldest so that `keep` remain.
    pub fn save(
        &self,
        step: usize,
        product: Product,
        optimizer: &AdamW,
        allocator: Option<&Allocator>,
        keep: usize,
    ) -> Result<PathBuf> {
        let backend = product.model.backend().as_ref();
        std::fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let path = self.folder.join(format!("step-{step:06}"));
        let staged = StagedFolder::create(&path)?;
        product.save(staged.path(), true)?;
        write_moments(&staged.path().join(OPTIMIZER), optimizer, backend)?;
        if let Some(allocator) = allocator {
            write_sensitivities(&staged.path().join(ALLOCATOR), allocator, backend)?;
        }
        let allocator = allocator.map(Allocator::record);
        let state = serde_json::to_vec(&State { step, moments: optimizer.moments(), allocator })
            .map_err(|e| Error::file(&path, e.to_string()))?;
        write_atomically(&staged.path().join(STATE), &state)?;
        staged.commit()?;
        let list = self.list()?;
        for (_, old) in &list[..list.len().saturating_sub(keep.max(1))] {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(path)
    }

    /// Put the last whole checkpoint back into the parameters, the optimiser and the allocator: its step, or 0 where
    /// there is none. Tensors that were cut before it are other parameters afterwards.
    ///
    /// Errors: moments of another kind than the optimiser's; a file that is not whole.
    pub fn restore(
        &self,
        model: &mut Model,
        kind: Kind,
        optimizer: &mut AdamW,
        allocator: Option<&mut Allocator>,
    ) -> Result<usize> {
        let backend = model.backend().clone();
        let backend = backend.as_ref();
        let Some((_, path)) = self.list()?.pop() else { return Ok(0) };
        let state_path = path.join(STATE);
        let state = std::fs::read(&state_path).map_err(Error::io(&state_path))?;
        let state: State = serde_json::from_slice(&state).map_err(|e| Error::file(&state_path, e.to_string()))?;
        if state.moments != optimizer.moments() {
            let (found, expected) = (state.moments, optimizer.moments());
            let why = format!("the optimiser's moments are in {found}, expected {expected}, which this run's are in");
            return Err(Error::file(&state_path, why));
        }
        match (allocator, state.allocator) {
            (Some(allocator), Some(record)) => {
                let within = |e| Error::file(&state_path, format!("{e}"));
                allocator.restore(backend, record, &mut model.linears_mut()).map_err(within)?;
                read_sensitivities(&path.join(ALLOCATOR), allocator, backend)?;
                optimizer.begin_again(model.parameters())?;
            }
            (Some(_), None) => return Err(Error::file(&state_path, "it has no AdaLoRA budget, which this run has")),
            (None, _) => {}
        }
        let moments = Checkpoint::open(&path.join(OPTIMIZER))?;
        let weights = Checkpoint::open(&Product { model, kind }.weights(&path))?;
        for slot in &mut optimizer.slots {
            let Named { name, parameter } = &slot.named;
            let read = |file: &Checkpoint, name: &str, like: &Buffer| -> Result<Buffer> {
                file.expect(name, &[like.dtype()], &shape_of(like, parameter))?;
                Ok(file.load(name, backend)?)
            };
            for (end, buffer) in slot.state.tensors_mut() {
                *buffer = read(&moments, &format!("{name}.{end}"), buffer)?;
            }
            let value = read(&weights, name, parameter.tensor().buffer())?;
            parameter.update(|buffer| {
                *buffer = value;
                Ok(())
            })?;
        }
        optimizer.step = state.step as u64;
        Ok(state.step)
    }
}

/// That of a buffer with an element for each of the parameter's; else of a vector: scales.
fn shape_of(buffer: &Buffer, parameter: &Parameter) -> Vec<usize> {
    let shape = parameter.shape();
    if buffer.len() == shape.elements() { shape.dims().to_vec() } else { vec![buffer.len()] }
}

fn write_moments(path: &Path, optimizer: &AdamW, backend: &dyn Backend) -> Result<()> {
    let tensors = |slot| {
        let Slot { named: Named { name, parameter }, state }: &Slot = slot;
        let tensors = state.tensors().into_iter();
        tensors.map(move |(end, buffer)| (format!("{name}.{end}"), buffer, shape_of(buffer, parameter)))
    };
    let tensors = || optimizer.slots.iter().flat_map(tensors);
    let specs = tensors().map(|(name, buffer, shape)| Spec::new(name, buffer.dtype(), shape));
    let mut writer = Writer::create(path, specs.collect())?;
    for (name, buffer, _) in tensors() {
        writer.write_view(&name, backend, buffer.view())?;
    }
    Ok(writer.finish()?)
}

fn write_sensitivities(path: &Path, allocator: &Allocator, backend: &dyn Backend) -> Result<()> {
    let tensors = allocator.tensors();
    let spec = |(name, buffer): &(String, &Buffer)| Spec::new(&**name, buffer.dtype(), [buffer.len()]);
    let mut writer = Writer::create(path, tensors.iter().map(spec).collect())?;
    for (name, buffer) in tensors {
        writer.write_view(&name, backend, buffer.view())?;
    }
    Ok(writer.finish()?)
}

fn read_sensitivities(path: &Path, allocator: &mut Allocator, backend: &dyn Backend) -> Result<()> {
    let file = Checkpoint::open(path)?;
    for (name, buffer) in allocator.tensors_mut() {
        file.expect(&name, &[buffer.dtype()], &[buffer.len()])?;
        *buffer = file.load(&name, backend)?;
    }
    Ok(())
}
