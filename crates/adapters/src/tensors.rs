//! The two files of an adapter's folder, whatever the method.

use crate::config::CONFIG_FILE;
use crate::folder::TENSORS_FILE;
use crate::{Error, Result};
use rankfold_autograd::{Parameter, Tensor};
use rankfold_backend::{Backend, DType};
use rankfold_files::{Checkpoint, Spec, Writer, write_atomically};
use std::fs;
use std::path::Path;

/// A file of an adapter's tensors, of which the header is read.
#[derive(Debug)]
pub(crate) struct SavedTensors(Checkpoint);

impl SavedTensors {
    pub(crate) fn open(file: &Path) -> Result<Self> {
        Ok(Self(Checkpoint::open(file)?))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// Whether any tensor's name ends so.
    pub(crate) fn has_any(&self, end: &str) -> bool {
        self.0.names().any(|name| name.ends_with(end))
    }

    /// The values of a tensor that `module` needs; the dimension of number `rank` is the configuration's to say, the
    /// others are the model's.
    ///
    /// Errors: it is missing, has another shape, another type than f32, bf16 or f16, or a number that is not finite.
    pub(crate) fn values(&self, name: &str, module: &str, expected: &[usize], rank: Option<usize>) -> Result<Vec<f32>> {
        let (path, tensor) = (|| self.0.path().to_owned(), || name.to_owned());
        let Some(info) = self.0.get(name) else {
            return Err(Error::MissingTensor { path: path(), tensor: tensor(), module: module.into() });
        };
        let found = info.shape.clone();
        let differs = |at: usize| found.get(at) != expected.get(at);
        if found.len() != expected.len() || (0..expected.len()).any(|at| Some(at) != rank && differs(at)) {
            let expected = expected.to_vec();
            return Err(Error::OtherBase { path: path(), tensor: tensor(), module: module.into(), found, expected });
        }
        if let Some(rank) = rank.filter(|&rank| differs(rank)) {
            let (found, expected) = (found[rank], expected[rank]);
            return Err(Error::OtherRank { path: path(), tensor: tensor(), found, expected });
        }
        let values = self.0.read_f32(name)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NonFinite { path: path(), tensor: tensor(), index, value: values[index] });
        }
        Ok(values)
    }

    /// The same as a parameter, none of its dimensions the configuration's.
    pub(crate) fn parameter(
        &self,
        backend: &dyn Backend,
        name: &str,
        module: &str,
        expected: &[usize],
    ) -> Result<Parameter> {
        Ok(Parameter::new(backend.upload(&self.values(name, module, expected, None)?)?, expected)?)
    }

    /// That it holds no tensor but those that are known.
    pub(crate) fn check_no_more(&self, is_known: impl Fn(&str) -> bool) -> Result<()> {
        match self.0.names().find(|name| !is_known(name)) {
            Some(name) => Err(Error::ExtraTensor { path: self.0.path().into(), tensor: name.into() }),
            None => Ok(()),
        }
    }
}

/// Write both files, each whole or not at all, the configuration last; the folder is made where it is missing.
pub(crate) fn write(backend: &dyn Backend, folder: &Path, config: &str, tensors: &[(String, Tensor)]) -> Result<()> {
    write_file(backend, &folder.join(TENSORS_FILE), tensors)?;
    Ok(write_atomically(&folder.join(CONFIG_FILE), config.as_bytes())?)
}

/// Write a file of tensors, in f32, whole or not at all; its folder is made where it is missing.
pub(crate) fn write_file(backend: &dyn Backend, path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder, "create the folder"))?;
    }
    let spec = |(name, value): &(String, Tensor)| Spec::new(name, DType::F32, value.shape().dims());
    let mut writer = Writer::create(path, tensors.iter().map(spec).collect())?;
    for (name, value) in tensors {
        writer.write_view(name, backend, value.view())?;
    }
    Ok(writer.finish()?)
}
