//! A run's checkpoints: `checkpoints/step-000010/`, each whole or not there.
//!
//! A checkpoint is the product as it then was (an adapter folder, or the whole model's in f32), the optimiser's
//! moments in `optimizer.safetensors`, as they are: `NAME.m` and `NAME.v`, where in 8 bits with `NAME.m.absmax` and
//! `NAME.v.absmax`; and `state.json`. It is written into a temporary folder that is given its name when everything in
//! it is on the disk, so that a name is a promise.

use crate::optimizer::{AdamW, Moments, Named, Slot};
use crate::product::Product;
use crate::{Error, Result};
use rankfold_autograd::Parameter;
use rankfold_backend::{Backend, Buffer};
use rankfold_files::{Checkpoint, Spec, StagedFolder, Writer, write_atomically};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    step: usize,
    #[serde(default)]
    moments: Moments,
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
        product: &Product,
        optimizer: &AdamW,
        backend: &dyn Backend,
        keep: usize,
    ) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let path = self.folder.join(format!("step-{step:06}"));
        let staged = StagedFolder::create(&path)?;
        product.save(staged.path(), true)?;
        write_moments(&staged.path().join(OPTIMIZER), optimizer, backend)?;
        let state = serde_json::to_vec(&State { step, moments: optimizer.moments() })
            .map_err(|e| Error::file(&path, e.to_string()))?;
        write_atomically(&staged.path().join(STATE), &state)?;
        staged.commit()?;
        let list = self.list()?;
        for (_, old) in &list[..list.len().saturating_sub(keep.max(1))] {
            std::fs::remove_dir_all(old).map_err(Error::io(old))?;
        }
        Ok(path)
    }

    /// Put the last whole checkpoint back into the parameters and the optimiser: its step, or 0 where there is none.
    ///
    /// Errors: moments of another kind than the optimiser's; a file that is not whole.
    pub fn restore(&self, product: &Product, optimizer: &mut AdamW, backend: &dyn Backend) -> Result<usize> {
        let Some((_, path)) = self.list()?.pop() else { return Ok(0) };
        let state_path = path.join(STATE);
        let state = std::fs::read(&state_path).map_err(Error::io(&state_path))?;
        let state: State = serde_json::from_slice(&state).map_err(|e| Error::file(&state_path, e.to_string()))?;
        if state.moments != optimizer.moments() {
            let (found, expected) = (state.moments, optimizer.moments());
            let why = format!("the optimiser's moments are in {found}, expected {expected}, which this run's are in");
            return Err(Error::file(&state_path, why));
        }
        let moments = Checkpoint::open(&path.join(OPTIMIZER))?;
        let weights = Checkpoint::open(&product.weights(&path))?;
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
