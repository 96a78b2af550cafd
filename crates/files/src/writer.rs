//! A safetensors file written one tensor at a time.
//!
//! Names, types and shapes are declared first, so that every tensor's place is known and tensors may come in any
//! order, each written at its place and forgotten: memory stays near the largest of them. The layout is that of the
//! safetensors library (wider element types first, then by name), and so are the bytes: what it would have written
//! for the same tensors with the metadata {"format": "pt"}.
//!
//! A text whose length is known only when it is made (a quantisation state, whose numbers come from the weights)
//! is declared with a bound instead ([`Spec::text`]). Texts follow all other tensors, and where any are shorter than
//! their bound the header ends in spaces, which the format allows.

use crate::atomic::StagedFile;
use crate::finite::first_not_finite;
use crate::header::{MAX_HEADER, PREFIX, stored};
use crate::pairs::METADATA;
use crate::{Checkpoint, Error, PART, Result, parts};
use rankfold_backend::{Backend, DType, View};
use safetensors::tensor::{Metadata, TensorInfo};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The declaration of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    is_text: bool,
}

impl Spec {
    /// A tensor of this name, element type and shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into(), is_text: false }
    }

    /// u8 \[n\] with n ≤ `at_most`, known when the tensor is written.
    pub fn text(name: impl Into<String>, at_most: usize) -> Self {
        Self { name: name.into(), dtype: DType::U8, shape: vec![at_most], is_text: true }
    }
}

/// Writes the declared tensors, then the header, and only then gives the file its name.
///
/// Dropped unfinished, it leaves what was at the path as it was.
#[derive(Debug)]
pub struct Writer {
    file: StagedFile,
    slots: Vec<Slot>,
    by_name: BTreeMap<String, usize>,
    /// The first tensor's position: after the length and a header as long as it can become.
    data_start: u64,
}

/// A tensor's place, in the order of the file.
#[derive(Debug)]
struct Slot {
    spec: Spec,
    /// From the first tensor's first byte.
    start: usize,
    bytes: usize,
    written: bool,
    /// A text's bytes, kept until its place is known.
    text: Vec<u8>,
}

impl Writer {
    /// Begin a file at `path`.
    ///
    /// Errors: a name declared twice; a size beyond what a machine can hold; a folder that cannot be written.
    pub fn create(path: &Path, tensors: Vec<Spec>) -> Result<Self> {
        Self::begin(StagedFile::create(path)?, tensors)
    }

    fn begin(file: StagedFile, tensors: Vec<Spec>) -> Result<Self> {
        let path = file.target();
        let slots = lay_out(path, tensors)?;
        let mut by_name = BTreeMap::new();
        for (i, slot) in slots.iter().enumerate() {
            if by_name.insert(slot.spec.name.clone(), i).is_some() {
                return Err(declared(path, &slot.spec.name, "declared twice".into()));
            }
        }
        let header = header(path, &slots)?.len().next_multiple_of(PREFIX as usize);
        if header as u64 > MAX_HEADER {
            let why = format!("the header would take {header} bytes, expected at most {MAX_HEADER}");
            return Err(Error::Header { path: path.into(), why });
        }
        Ok(Self { file, slots, by_name, data_start: PREFIX + header as u64 })
    }

    /// The path that the file will have.
    pub fn path(&self) -> &Path {
        self.file.target()
    }

    /// All of a tensor's bytes, little-endian and row-major.
    ///
    /// Errors: a tensor not declared or written before, another number of bytes; a full disk.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let i = self.slot(name, None, bytes.len())?;
        if self.slots[i].spec.is_text {
            self.slots[i].text = bytes.into();
        } else {
            self.file.write_all_at(bytes, self.data_start + self.slots[i].start as u64)?;
        }
        self.slots[i].written = true;
        Ok(())
    }

    /// A tensor from a backend's memory, a part at a time.
    ///
    /// Errors: a float that is NaN or infinite, which no reader would take.
    pub fn write_view(&mut self, name: &str, backend: &dyn Backend, x: View) -> Result<()> {
        let dtype = x.dtype();
        self.stream(name, dtype, x.len() * dtype.size(), |path, offset, part| {
            let elements = x.slice(offset / dtype.size(), part.len() / dtype.size());
            elements.and_then(|x| backend.read(x, part)).map_err(Error::backend(path, name))?;
            match first_not_finite(dtype, part) {
                None => Ok(()),
                Some(i) => {
                    let index = offset / dtype.size() + i;
                    Err(Error::NotFinite { path: path.into(), tensor: name.into(), index })
                }
            }
        })
    }

    /// The tensor of that name from another checkpoint as it is, a part at a time.
    ///
    /// Errors: a float that is NaN or infinite.
    pub fn copy(&mut self, name: &str, from: &Checkpoint) -> Result<()> {
        let (dtype, bytes) = (from.dtype(name)?, from.info(name)?.bytes);
        self.stream(name, dtype, bytes, |_, offset, part| {
            from.read_range_into(name, offset, part)?;
            from.check_finite(name, offset / dtype.size(), part)
        })
    }

    /// Finish: the header, the texts, the file's name.
    ///
    /// Errors: a declared tensor that was never written; a full disk.
    pub fn finish(mut self) -> Result<()> {
        let path = self.file.target();
        if let Some(slot) = self.slots.iter().find(|slot| !slot.written) {
            return Err(declared(path, &slot.spec.name, "declared, but never written".into()));
        }
        let mut end = 0;
        for slot in &mut self.slots {
            if slot.spec.is_text {
                (slot.start, slot.bytes, slot.spec.shape) = (end, slot.text.len(), vec![slot.text.len()]);
                self.file.write_all_at(&slot.text, self.data_start + slot.start as u64)?;
            }
            end = slot.start + slot.bytes;
        }
        let header_len = self.data_start - PREFIX;
        let mut head = header_len.to_le_bytes().to_vec();
        head.extend(header(path, &self.slots)?);
        head.resize(self.data_start as usize, b' ');
        self.file.write_all_at(&head, 0)?;
        self.file.commit()
    }

    /// The slot of a tensor that is about to be written, its type and size checked.
    fn slot(&self, name: &str, dtype: Option<DType>, bytes: usize) -> Result<usize> {
        let wrong = |why: String| Err(declared(self.file.target(), name, why));
        let Some(&i) = self.by_name.get(name) else { return wrong("not declared".into()) };
        let slot = &self.slots[i];
        if slot.written {
            return wrong("written twice".into());
        }
        if let Some(found) = dtype.filter(|found| *found != slot.spec.dtype) {
            return wrong(format!("given as {found}, declared as {}", slot.spec.dtype));
        }
        match slot.spec.is_text {
            true if bytes > slot.bytes => wrong(format!("{bytes} bytes, declared as at most {}", slot.bytes)),
            false if bytes != slot.bytes => wrong(format!("{bytes} bytes, declared as {}", slot.bytes)),
            _ => Ok(i),
        }
    }

    /// A tensor of `bytes` bytes whose parts `fill` puts into memory, given the byte offset of each.
    fn stream(
        &mut self,
        name: &str,
        dtype: DType,
        bytes: usize,
        fill: impl Fn(&Path, usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let i = self.slot(name, Some(dtype), bytes)?;
        let mut part = vec![0; PART.min(bytes)];
        for range in parts(bytes) {
            let part = &mut part[..range.len()];
            fill(self.file.target(), range.start, part)?;
            if self.slots[i].spec.is_text {
                self.slots[i].text.extend_from_slice(part);
            } else {
                self.file.write_all_at(part, self.data_start + (self.slots[i].start + range.start) as u64)?;
            }
        }
        self.slots[i].written = true;
        Ok(())
    }
}

/// The tensors in the order of the file, each with its place; texts last, as long as they can become.
fn lay_out(path: &Path, mut tensors: Vec<Spec>) -> Result<Vec<Slot>> {
    tensors.sort_by(|a, b| {
        let key = |spec: &Spec| (spec.is_text, Reverse(stored(spec.dtype)));
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    let mut start = 0usize;
    let mut slots = Vec::with_capacity(tensors.len());
    for spec in tensors {
        if spec.name == METADATA {
            return Err(declared(path, METADATA, "this name is reserved".into()));
        }
        let bytes = spec.shape.iter().try_fold(spec.dtype.size(), |bytes, &dim| bytes.checked_mul(dim));
        let Some((bytes, end)) = bytes.and_then(|bytes| Some((bytes, start.checked_add(bytes)?))) else {
            return Err(declared(path, &spec.name, format!("{:?} is too large", spec.shape)));
        };
        slots.push(Slot { spec, start, bytes, written: false, text: Vec::new() });
        start = end;
    }
    Ok(slots)
}

/// The header's JSON for the slots as they stand.
fn header(path: &Path, slots: &[Slot]) -> Result<Vec<u8>> {
    let entry = |slot: &Slot| {
        let data_offsets = (slot.start, slot.start + slot.bytes);
        let info = TensorInfo { dtype: stored(slot.spec.dtype), shape: slot.spec.shape.clone(), data_offsets };
        (slot.spec.name.clone(), info)
    };
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let unwritable = |why: String| Error::Header { path: path.into(), why };
    let metadata = Metadata::new(Some(format), slots.iter().map(entry).collect());
    serde_json::to_vec(&metadata.map_err(|e| unwritable(e.to_string()))?).map_err(|e| unwritable(e.to_string()))
}

fn declared(path: &Path, tensor: &str, why: String) -> Error {
    Error::Declared { path: path.into(), tensor: tensor.into(), why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic::Disk;
    use std::fs::{self, File};
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A disk with room for so many bytes, which takes what fits of a write and then refuses; with none left at the
    /// end it also fails to synchronise, as a disk that allocates late does.
    #[derive(Debug)]
    struct FullDisk {
        file: File,
        room: AtomicUsize,
    }

    impl Disk for FullDisk {
        fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
            let fits = self.room.load(Ordering::Relaxed).min(bytes.len());
            self.room.fetch_sub(fits, Ordering::Relaxed);
            Disk::write_all_at(&self.file, &bytes[..fits], position)?;
            if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }

        fn sync_all(&self) -> io::Result<()> {
            match self.room.load(Ordering::Relaxed) {
                0 => Err(io::ErrorKind::StorageFull.into()),
                _ => Disk::sync_all(&self.file),
            }
        }
    }

    fn specs() -> Vec<Spec> {
        vec![Spec::new("a", DType::U8, [5]), Spec::new("b", DType::F32, [2]), Spec::text("c", 9)]
    }

    fn write(file: StagedFile) -> Result<()> {
        let mut writer = Writer::begin(file, specs())?;
        writer.write("a", &[1; 5])?;
        writer.write("c", b"{}")?;
        writer.write("b", &[2; 8])?;
        writer.finish()
    }

    #[test]
    fn a_disk_that_fills_up_at_any_byte_leaves_the_previous_file_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write(StagedFile::create(&path).unwrap()).unwrap();
        let (total, previous) = (fs::read(&path).unwrap().len(), b"what was there before");
        fs::write(&path, previous).unwrap();
        for room in 0..=total {
            let disk = |file| Box::new(FullDisk { file, room: room.into() }) as Box<dyn Disk>;
            let error = write(StagedFile::create_on(&path, disk).unwrap()).unwrap_err();
            assert!(error.to_string().contains("model.safetensors: cannot write: "), "{error}");
            assert_eq!(fs::read(&path).unwrap(), previous);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary was left");
        }
        let disk = |file| Box::new(FullDisk { file, room: (total + 1).into() }) as Box<dyn Disk>;
        write(StagedFile::create_on(&path, disk).unwrap()).unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), total);
    }

    #[test]
    fn the_full_device_is_an_error_that_names_the_target() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let Ok(full) = File::options().write(true).open("/dev/full") else { return };
        let error = write(StagedFile::create_on(&path, |_| Box::new(full)).unwrap()).unwrap_err();
        assert!(error.to_string().contains("model.safetensors: cannot write: No space left on device"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_was_not_declared_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let declare = |specs| Writer::create(&path, specs).map(drop).unwrap_err().to_string();
        let twice = vec![Spec::new("a", DType::U8, [1]), Spec::new("a", DType::F32, [1])];
        assert!(declare(twice).contains("'a': declared twice"));
        assert!(declare(vec![Spec::new(METADATA, DType::U8, [1])]).contains("reserved"));
        assert!(declare(vec![Spec::new("a", DType::F32, [usize::MAX / 2])]).contains("too large"));

        let mut writer = Writer::create(&path, specs()).unwrap();
        let mut fail = |name: &str, bytes: &[u8]| writer.write(name, bytes).unwrap_err().to_string();
        assert!(fail("d", &[]).contains("'d': not declared"));
        assert!(fail("a", &[0; 4]).contains("'a': 4 bytes, declared as 5"));
        assert!(fail("c", &[0; 10]).contains("'c': 10 bytes, declared as at most 9"));
        writer.write("a", &[0; 5]).unwrap();
        assert!(writer.write("a", &[0; 5]).unwrap_err().to_string().contains("'a': written twice"));
        assert!(writer.finish().unwrap_err().to_string().contains("'b': declared, but never written"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
