//! The header of a safetensors file, and what is checked before any of it is believed.
//!
//! A file is a length n (u64, little-endian), n bytes of JSON, and the tensors' bytes without a gap:
//!
//! ```text
//! {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
//! ```
//!
//! Nothing is allocated by a number from the file before that number was compared with the file's own length. The
//! rules are those of the format: every tensor's bytes are its shape's, the tensors fill the data from its first
//! byte to the file's last, none overlap. One rule is ours: a name may stand in the header once only.

use crate::pairs::{Object, Pairs};
use crate::{Error, Result};
use rankfold_backend::DType;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// The longest header the format allows.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// Bytes of the length before the header.
pub(crate) const PREFIX: u64 = 8;

/// What a header says of one tensor, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The element type in the file, of which a checkpoint may hold more than kernels serve.
    pub stored: Dtype,
    /// The dimensions; none for a scalar.
    pub shape: Vec<usize>,
    /// Bytes of all elements.
    pub bytes: usize,
    /// The first byte's position in the file.
    pub(crate) start: u64,
    /// Which of the checkpoint's files.
    pub(crate) file: usize,
}

impl TensorInfo {
    /// The element type where kernels serve it.
    pub fn dtype(&self) -> Option<DType> {
        Some(match self.stored {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            Dtype::F64 => DType::F64,
            Dtype::U8 => DType::U8,
            Dtype::U32 => DType::U32,
            Dtype::I64 => DType::I64,
            _ => return None,
        })
    }

    /// The number of elements; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The name of an element type in a file.
pub(crate) fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F64 => Dtype::F64,
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I64 => Dtype::I64,
    }
}

/// A tensor's entry as the JSON has it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Read the header from the start of `source`, a file of `len` bytes that messages call `path`.
///
/// Errors: a length, a JSON text or an entry that the format does not allow; a file shorter or longer than what its
/// header describes; a name that appears twice.
pub fn read(path: &Path, source: &mut impl Read, len: u64) -> Result<BTreeMap<String, TensorInfo>> {
    if len < PREFIX {
        return Err(Error::Truncated { path: path.into(), expected: PREFIX, found: len });
    }
    let mut prefix = [0; PREFIX as usize];
    source.read_exact(&mut prefix).map_err(Error::io(path, "read the header's length"))?;
    let n = u64::from_le_bytes(prefix);
    if n > MAX_HEADER {
        let why = format!("its header claims {n} bytes, expected at most {MAX_HEADER}");
        return Err(Error::Header { path: path.into(), why });
    }
    let data_start = PREFIX + n;
    if data_start > len {
        return Err(Error::Truncated { path: path.into(), expected: data_start, found: len });
    }
    // n is at most the file's length and MAX_HEADER, so the allocation and the cast are safe.
    let mut json = vec![0; n as usize];
    source.read_exact(&mut json).map_err(Error::io(path, "read the header"))?;
    let Pairs(entries) = serde_json::from_slice::<Pairs<Object<Entry>>>(&json)
        .map_err(|e| Error::Header { path: path.into(), why: e.to_string() })?;
    check(path, entries, data_start, len)
}

fn check(
    path: &Path,
    mut entries: Vec<(String, Object<Entry>)>,
    data_start: u64,
    len: u64,
) -> Result<BTreeMap<String, TensorInfo>> {
    entries.sort_by_key(|(_, Object(entry))| entry.data_offsets);
    let mut tensors = BTreeMap::new();
    let mut filled = 0;
    for (name, Object(entry)) in entries {
        let [begin, end] = entry.data_offsets;
        let (stored, bytes) = measure(path, &name, &entry)?;
        let lying = |why: String| Error::Lying { path: path.into(), tensor: name.clone(), why };
        if begin > end || end - begin != bytes as u64 {
            return Err(lying(format!(
                "data_offsets {begin}..{end}, expected {bytes} bytes for {stored} {:?}",
                entry.shape
            )));
        }
        if begin != filled {
            return Err(lying(format!(
                "its data begins at byte {begin}, expected {filled}, where the one before ends"
            )));
        }
        if end > len - data_start {
            return Err(Error::Truncated { path: path.into(), expected: data_start.saturating_add(end), found: len });
        }
        filled = end;
        let info = TensorInfo { stored, shape: entry.shape, bytes, start: data_start + begin, file: 0 };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(Error::Duplicate { path: path.into(), tensor: name });
        }
    }
    let beyond = len - data_start - filled;
    if beyond != 0 {
        let why = format!("{beyond} bytes follow the last tensor, expected none");
        return Err(Error::Header { path: path.into(), why });
    }
    Ok(tensors)
}

/// The element type, and the bytes that type and shape ask for.
fn measure(path: &Path, name: &str, entry: &Entry) -> Result<(Dtype, usize)> {
    let text: StrDeserializer<ValueError> = entry.dtype.as_str().into_deserializer();
    let Ok(stored) = Dtype::deserialize(text) else {
        return Err(Error::UnknownDType { path: path.into(), tensor: name.into(), dtype: entry.dtype.clone() });
    };
    let bits = entry.shape.iter().try_fold(stored.bitsize(), |bits, &dim| bits.checked_mul(dim));
    match bits {
        Some(bits) if bits.is_multiple_of(8) => Ok((stored, bits / 8)),
        _ => {
            let why = format!("{stored} {:?} is no whole number of bytes that a machine can hold", entry.shape);
            Err(Error::Lying { path: path.into(), tensor: name.into(), why })
        }
    }
}
