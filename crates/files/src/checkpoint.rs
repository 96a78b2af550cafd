//! A checkpoint: one safetensors file, or a Hugging Face folder of one or of many shards.
//!
//! Opening reads headers only. Tensors are then read by position (`pread`), straight into the memory that keeps
//! them: a mapping of a file that is truncated meanwhile would kill the process, and mapped pages would blur every
//! memory figure. In a sharded folder `model.safetensors.index.json` says which file holds a tensor; what a shard
//! holds beyond that is not part of the checkpoint. A file that is a part of the program is read like any other.

use crate::finite::first_not_finite;
use crate::header::{self, MAX_HEADER};
use crate::pairs::{Object, Pairs};
use crate::{Error, PART, Result, TensorInfo, parts};
use half::{bf16, f16};
use rankfold_backend::{Backend, Buffer, DType, Element};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Named tensors in files, read one at a time.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<(PathBuf, Source)>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where a file's bytes are.
#[derive(Debug)]
enum Source {
    Disk(File),
    Program(&'static [u8]),
}

impl Source {
    fn read_exact_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Disk(file) => file.read_exact_at(out, at),
            Self::Program(bytes) => {
                let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..out.len()));
                out.copy_from_slice(rest.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: Pairs<String>,
}

impl Checkpoint {
    /// Open a `.safetensors` file, an `.index.json`, or a folder that holds `model.safetensors` or
    /// `model.safetensors.index.json` (the first where both are there).
    ///
    /// Errors: a file that cannot be read, is truncated, or breaks a rule of [`header`]; an index that names a file
    /// outside its folder, names a tensor twice, or names one that its shard lacks.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let is_index = path.to_string_lossy().ends_with(".index.json");
            return if is_index { Self::open_shards(path, path) } else { Self::open_file(path, path) };
        }
        let (file, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        if file.exists() {
            Self::open_file(path, &file)
        } else if index.exists() {
            Self::open_shards(path, &index)
        } else {
            Err(Error::NoCheckpoint { path: path.into() })
        }
    }

    /// The safetensors file of these bytes, which are a part of the program; `path` is for messages.
    ///
    /// Errors: as [`Checkpoint::open`].
    pub fn embedded(path: &Path, bytes: &'static [u8]) -> Result<Self> {
        let tensors = header::read(path, &mut { bytes }, bytes.len() as u64)?;
        Ok(Self { path: path.into(), files: vec![(path.into(), Source::Program(bytes))], tensors })
    }

    fn open_file(path: &Path, file: &Path) -> Result<Self> {
        let (opened, tensors) = open_header(file)?;
        Ok(Self { path: path.into(), files: vec![(file.into(), Source::Disk(opened))], tensors })
    }

    fn open_shards(path: &Path, index: &Path) -> Result<Self> {
        let invalid = |why: String| Error::Index { path: index.into(), why };
        let (source, len) = open_regular(index)?;
        if len > MAX_HEADER {
            return Err(invalid(format!("{len} bytes, expected at most {MAX_HEADER}")));
        }
        let mut json = Vec::new();
        source.take(MAX_HEADER).read_to_end(&mut json).map_err(Error::io(index, "read"))?;
        let Object(Index { weight_map: Pairs(places) }) =
            serde_json::from_slice(&json).map_err(|e| invalid(e.to_string()))?;

        let mut files = Vec::new();
        let mut shards: BTreeMap<String, (usize, BTreeMap<String, TensorInfo>)> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in places {
            let file = index.with_file_name(&shard);
            let (number, held) = match shards.entry(shard) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    if Path::new(new.key()).file_name() != Some(OsStr::new(new.key())) {
                        return Err(invalid(format!("shard '{}': expected the name of a file beside it", new.key())));
                    }
                    let (opened, held) = open_header(&file)?;
                    files.push((file.clone(), Source::Disk(opened)));
                    new.insert((files.len() - 1, held))
                }
            };
            if tensors.contains_key(&tensor) {
                return Err(Error::Duplicate { path: index.into(), tensor });
            }
            let Some(info) = held.remove(&tensor) else {
                return Err(Error::ShardLacks { path: file, index: index.into(), tensor });
            };
            tensors.insert(tensor, TensorInfo { file: *number, ..info });
        }
        Ok(Self { path: path.into(), files, tensors })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// That the elements of a tensor from number `first` on, whose bytes these are, are finite; integers always are.
    pub fn check_finite(&self, name: &str, first: usize, bytes: &[u8]) -> Result<()> {
        match first_not_finite(self.dtype(name)?, bytes) {
            None => Ok(()),
            Some(i) => Err(Error::NotFinite { path: self.file(name).into(), tensor: name.into(), index: first + i }),
        }
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What the header says of a tensor, of whatever element type.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The same, or [`Error::Missing`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name).ok_or_else(|| Error::Missing { path: self.path.clone(), tensor: name.into() })
    }

    /// The file that holds a tensor; the checkpoint's own path where none does.
    pub fn file(&self, name: &str) -> &Path {
        self.get(name).map_or(&self.path, |info| &self.files[info.file].0)
    }

    /// A tensor's element type.
    ///
    /// Errors: no such tensor; an element type that no kernel serves.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        let info = self.info(name)?;
        info.dtype().ok_or_else(|| Error::UnservedDType {
            path: self.file(name).into(),
            tensor: name.into(),
            dtype: info.stored,
        })
    }

    /// That a tensor has this shape and one of these element types, which is returned.
    pub fn expect(&self, name: &str, dtypes: &[DType], shape: &[usize]) -> Result<DType> {
        let dtype = self.expect_dtype(name, dtypes)?;
        let info = self.info(name)?;
        if info.shape != shape {
            let (path, tensor) = (self.file(name).into(), name.into());
            return Err(Error::Shape { path, tensor, found: info.shape.clone(), expected: shape.into() });
        }
        Ok(dtype)
    }

    fn expect_dtype(&self, name: &str, dtypes: &[DType]) -> Result<DType> {
        let found = self.dtype(name)?;
        if !dtypes.contains(&found) {
            let expected = dtypes.iter().map(DType::to_string).collect::<Vec<_>>().join(" or ");
            return Err(Error::DType { path: self.file(name).into(), tensor: name.into(), found, expected });
        }
        Ok(found)
    }

    /// All of a tensor's bytes (little-endian, row-major) into `out`, which must have their length.
    pub fn read_into(&self, name: &str, out: &mut [u8]) -> Result<()> {
        let bytes = self.info(name)?.bytes;
        if out.len() != bytes {
            let (path, tensor) = (self.file(name).into(), name.into());
            return Err(Error::Range { path, tensor, offset: 0, len: out.len(), bytes });
        }
        self.read_range_into(name, 0, out)
    }

    /// The tensor's bytes from byte `offset` on into `out`.
    pub fn read_range_into(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<()> {
        let info = self.info(name)?;
        let (path, file) = &self.files[info.file];
        if offset.checked_add(out.len()).is_none_or(|end| end > info.bytes) {
            let (path, tensor) = (path.clone(), name.into());
            return Err(Error::Range { path, tensor, offset, len: out.len(), bytes: info.bytes });
        }
        file.read_exact_at(out, info.start + offset as u64).map_err(Error::io(path, "read a tensor"))
    }

    /// A tensor's values, whose element type must be `T`.
    pub fn read<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        self.expect_dtype(name, &[T::DTYPE])?;
        let mut values = vec![T::zeroed(); self.info(name)?.elements()];
        self.read_into(name, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// A tensor's values as f32, exactly; its element type must be f32, bf16 or f16.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(match self.expect_dtype(name, &[DType::F32, DType::Bf16, DType::F16])? {
            DType::Bf16 => self.read::<bf16>(name)?.into_iter().map(f32::from).collect(),
            DType::F16 => self.read::<f16>(name)?.into_iter().map(f32::from).collect(),
            _ => self.read(name)?,
        })
    }

    /// A tensor straight into a new buffer of `backend`, its element type kept.
    pub fn load(&self, name: &str, backend: &dyn Backend) -> Result<Buffer> {
        self.load_checked(name, backend, |_, _| Ok(()))
    }

    /// The same of a tensor every value of which is finite.
    pub fn load_finite(&self, name: &str, backend: &dyn Backend) -> Result<Buffer> {
        self.load_checked(name, backend, |first, bytes| self.check_finite(name, first, bytes))
    }

    /// The same where `check` finds nothing wrong with what was read: elements from a number on, as bytes.
    fn load_checked(
        &self,
        name: &str,
        backend: &dyn Backend,
        check: impl Fn(usize, &[u8]) -> Result<()>,
    ) -> Result<Buffer> {
        let dtype = self.dtype(name)?;
        let info = self.info(name)?;
        let mut buffer = backend.alloc(dtype, info.elements()).map_err(Error::backend(self.file(name), name))?;
        let refused = Error::backend(self.file(name), name);
        if let Some(mut bytes) = backend.host_bytes_mut(&mut buffer).map_err(refused)? {
            self.read_into(name, &mut bytes)?;
            check(0, &bytes)?;
        } else {
            self.load_by_parts(name, backend, &mut buffer, check)?;
        }
        Ok(buffer)
    }

    /// Where the host cannot write the backend's memory itself.
    fn load_by_parts(
        &self,
        name: &str,
        backend: &dyn Backend,
        buffer: &mut Buffer,
        check: impl Fn(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let (bytes, size) = (self.info(name)?.bytes, buffer.dtype().size());
        let mut part = vec![0; PART.min(bytes)];
        for range in parts(bytes) {
            let part = &mut part[..range.len()];
            self.read_range_into(name, range.start, part)?;
            check(range.start / size, part)?;
            let place = buffer.slice_mut(range.start / size, range.len() / size);
            place.and_then(|place| backend.write(part, place)).map_err(Error::backend(self.file(name), name))?;
        }
        Ok(())
    }
}

fn open_header(path: &Path) -> Result<(File, BTreeMap<String, TensorInfo>)> {
    let (mut file, len) = open_regular(path)?;
    let tensors = header::read(path, &mut file, len)?;
    Ok((file, tensors))
}

/// The file and its length. A pipe or a device has no length to check a header against.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let facts = path.metadata().map_err(Error::io(path, "open"))?;
    if !facts.is_file() {
        return Err(Error::Header { path: path.into(), why: "expected a regular file".into() });
    }
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    // Asked of the opened file: what the path names may have been replaced since.
    let len = file.metadata().map_err(Error::io(path, "measure"))?.len();
    Ok((file, len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Spec, Writer};
    use rankfold_reference::ReferenceBackend;

    /// Two parts and a rest, as a backend of unreachable memory gets them.
    #[test]
    fn a_tensor_loaded_by_parts_is_the_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let values: Vec<u32> = (0..2 * (PART as u32 / 4) + 3).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let mut writer = Writer::create(&path, vec![Spec::new("x", DType::U32, [values.len()])]).unwrap();
        writer.write("x", bytemuck::cast_slice(&values)).unwrap();
        writer.finish().unwrap();
        let backend: &dyn Backend = &ReferenceBackend;
        let mut buffer = backend.filled(DType::U32, values.len(), 0.0).unwrap();
        Checkpoint::open(&path).unwrap().load_by_parts("x", backend, &mut buffer, |_, _| Ok(())).unwrap();
        assert!(backend.download::<u32>(buffer.view()).unwrap() == values);
    }

    #[test]
    fn a_file_in_the_program_is_the_file_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let specs = vec![Spec::new("x", DType::F32, [3, 2]), Spec::new("y", DType::U8, [5])];
        let mut writer = Writer::create(&path, specs).unwrap();
        writer.write("x", bytemuck::cast_slice(&[1.0f32, -2.0, 3.5, 0.0, 4.0, 5.0])).unwrap();
        writer.write("y", &[1, 2, 3, 4, 5]).unwrap();
        writer.finish().unwrap();
        let bytes: &'static [u8] = std::fs::read(&path).unwrap().leak();
        let both = [Checkpoint::open(&path).unwrap(), Checkpoint::embedded(&path, bytes).unwrap()];
        let [disk, program] = both.each_ref().map(|file| {
            let mut part = [0; 3];
            file.read_range_into("y", 2, &mut part).unwrap();
            assert!(matches!(file.read_range_into("y", 3, &mut part), Err(Error::Range { .. })));
            (file.read::<f32>("x").unwrap(), part, file.info("x").unwrap().clone(), file.file("x").to_owned())
        });
        assert_eq!(disk, program);
        let cut = Checkpoint::embedded(&path, &bytes[..bytes.len() - 1]);
        assert!(matches!(cut, Err(Error::Truncated { .. })));
    }

    #[test]
    fn what_is_not_finite_is_named_by_its_number_whichever_way_it_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let (mut values, bad) = (vec![1.0f32; PART / 4 + 3], PART / 4 + 1);
        values[bad] = f32::NAN;
        let mut writer = Writer::create(&path, vec![Spec::new("x", DType::F32, [values.len()])]).unwrap();
        writer.write("x", bytemuck::cast_slice(&values)).unwrap();
        writer.finish().unwrap();
        let (file, backend): (_, &dyn Backend) = (Checkpoint::open(&path).unwrap(), &ReferenceBackend);
        file.load("x", backend).unwrap();
        let mut buffer = backend.alloc(DType::F32, values.len()).unwrap();
        let check = |first, bytes: &[u8]| file.check_finite("x", first, bytes);
        let by_parts = file.load_by_parts("x", backend, &mut buffer, check);
        for error in [file.load_finite("x", backend).unwrap_err(), by_parts.unwrap_err()] {
            assert!(matches!(error, Error::NotFinite { index, .. } if index == bad), "{error}");
        }
    }
}
