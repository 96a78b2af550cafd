//! A 4-bit weight in a checkpoint: bitsandbytes' tensors into a [`Quantized`] and back.
//!
//! For a weight NAME of shape \[outputs, inputs\] and e = outputs·inputs elements, in b = ⌈e / block⌉ blocks:
//!
//! | tensor | plain | double-quantised |
//! |---|---|---|
//! | `NAME` | u8 \[⌈e/2⌉, 1\] | the same |
//! | `NAME.absmax` | f32 \[b\] | u8 \[b\]: codes |
//! | `NAME.quant_map` | f32 \[16\]: the format's values | the same |
//! | `NAME.nested_absmax` | | f32 \[⌈b/256⌉\] |
//! | `NAME.nested_quant_map` | | f32 \[256\]: the signed dynamic map |
//! | `NAME.quant_state.MAKER__FORMAT` | u8: [`QuantState`] | the same |
//!
//! Nothing is taken on trust: a map that differs in one bit from the format's, or scales that are not finite, would
//! be used for every product of a run.

use crate::quant_state::MAX_TEXT;
use crate::{Checkpoint, Error, QuantState, Result, Spec, Writer};
use rankfold_backend::{Backend, DType, DynamicMap, Format, NESTED_BLOCK, Quantized, Scales};
use std::path::Path;

/// A 4-bit weight as it was read.
#[derive(Debug)]
pub struct Loaded {
    /// Codes and scales in the backend's memory.
    pub weight: Quantized,
    /// f32, bf16 or f16: to which the checkpoint wants dequantised values rounded.
    pub dtype: DType,
}

/// The names of the tensors beside a 4-bit weight `name`, its state last.
pub fn side_names(name: &str, format: Format, double: bool) -> Vec<String> {
    let nested: &[&str] = if double { &["nested_absmax", "nested_quant_map"] } else { &[] };
    let sides = ["absmax", "quant_map"].into_iter().chain(nested.iter().copied()).map(String::from);
    sides.chain([QuantState::key(format)]).map(|side| format!("{name}.{side}")).collect()
}

/// The name of the weight beside which a tensor of this name would stand; `None` for a name of no such form.
fn weight_of(name: &str) -> Option<&str> {
    let ends = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];
    let by_end = ends.iter().find_map(|end| name.strip_suffix(end));
    by_end.or_else(|| name.split_once(".quant_state.").map(|(weight, _)| weight))
}

/// A checkpoint's tensors but those beside 4-bit weights, in order.
///
/// Errors: those of [`state`]; a tensor named as if it stood beside a 4-bit weight that does not have it.
pub fn names(checkpoint: &Checkpoint) -> Result<Vec<&str>> {
    let mut names = Vec::new();
    for name in checkpoint.names() {
        let Some(weight) = weight_of(name) else {
            names.push(name);
            continue;
        };
        let state = state(checkpoint, weight)?.filter(|_| checkpoint.contains(weight));
        if !state.is_some_and(|s| side_names(weight, s.format, s.offset.is_some()).iter().any(|side| side == name)) {
            let why = format!("'{name}' stands beside it, but is no part of a 4-bit weight of that name");
            return Err(wrong(checkpoint.file(name), weight, why));
        }
    }
    Ok(names)
}

/// The names of a checkpoint's 4-bit weights.
pub fn weights(checkpoint: &Checkpoint) -> Vec<&str> {
    let ends = Format::ALL.map(|format| format!(".{}", QuantState::key(format)));
    let mut names: Vec<&str> =
        checkpoint.names().filter_map(|name| ends.iter().find_map(|end| name.strip_suffix(end.as_str()))).collect();
    names.dedup();
    names
}

/// The state of a weight, `None` where it is not stored in 4 bits.
///
/// Errors: a state that cannot be parsed, contradicts its name, or stands beside another.
pub fn state(checkpoint: &Checkpoint, name: &str) -> Result<Option<QuantState>> {
    let mut found = None;
    for format in Format::ALL {
        let key = format!("{name}.{}", QuantState::key(format));
        if !checkpoint.contains(&key) {
            continue;
        }
        let path = checkpoint.file(&key);
        let json = checkpoint.read::<u8>(&key)?;
        let state = QuantState::parse(&json).map_err(|why| wrong(path, name, why))?;
        if state.format != format {
            return Err(wrong(path, name, format!("quant_type {}, expected {format} as in '{key}'", state.format)));
        }
        if found.replace(state).is_some() {
            return Err(wrong(path, name, "it has the states of two formats".into()));
        }
    }
    Ok(found)
}

/// Read a 4-bit weight into `backend`, `None` where `name` is not stored in 4 bits.
///
/// Errors: those of [`state`]; a tensor of the table above that is missing, too many, or of another element type or
/// number of elements than the state's shape and block ask for; a map that is not the format's; a scale that is
/// negative or not finite, as stored or as decoded.
pub fn load(checkpoint: &Checkpoint, name: &str, backend: &dyn Backend) -> Result<Option<Loaded>> {
    let Some(state) = state(checkpoint, name)? else { return Ok(None) };
    let side = |end: &str| format!("{name}.{end}");
    let blocks = (state.shape[0] * state.shape[1]).div_ceil(state.block);
    expect_map(checkpoint, name, "quant_map", state.format.values())?;
    let scales = if let Some(offset) = state.offset {
        checkpoint.expect(&side("absmax"), &[DType::U8], &[blocks])?;
        expect_map(checkpoint, name, "nested_quant_map", DynamicMap::Signed.values())?;
        let codes = checkpoint.load(&side("absmax"), backend)?;
        let absmax = magnitudes(checkpoint, name, "nested_absmax", blocks.div_ceil(NESTED_BLOCK))?;
        Scales::Nested { codes, absmax: upload(checkpoint, name, backend, &absmax)?, offset }
    } else {
        for nested in ["nested_absmax", "nested_quant_map"].map(side) {
            if checkpoint.contains(&nested) {
                let why = format!("its state has no nested fields, but there is '{nested}'");
                return Err(wrong(checkpoint.file(&nested), name, why));
            }
        }
        Scales::Plain(upload(checkpoint, name, backend, &magnitudes(checkpoint, name, "absmax", blocks)?)?)
    };
    let codes = load_codes(checkpoint, name, &state, backend)?;
    let weight = Quantized { codes, scales, format: state.format, block: state.block, shape: state.shape };
    let sound = weight.check().and_then(|()| weight.check_scales(backend));
    sound.map_err(Error::backend(checkpoint.file(name), name))?;
    Ok(Some(Loaded { weight, dtype: state.dtype }))
}

/// The codes, whose own shape is of no meaning: bitsandbytes has written both \[n, 1\] and \[1, n\].
fn load_codes(
    checkpoint: &Checkpoint,
    name: &str,
    state: &QuantState,
    backend: &dyn Backend,
) -> Result<rankfold_backend::Buffer> {
    let expected = (state.shape[0] * state.shape[1]).div_ceil(2);
    let info = checkpoint.info(name)?;
    if checkpoint.dtype(name)? != DType::U8 || info.bytes != expected {
        let why = format!(
            "its codes are {} {:?}, expected {expected} bytes of U8 for shape {:?}",
            info.stored, info.shape, state.shape
        );
        return Err(wrong(checkpoint.file(name), name, why));
    }
    checkpoint.load(name, backend)
}

fn expect_map(checkpoint: &Checkpoint, name: &str, side: &str, values: &[f32]) -> Result<()> {
    let key = format!("{name}.{side}");
    checkpoint.expect(&key, &[DType::F32], &[values.len()])?;
    let found = checkpoint.read::<f32>(&key)?;
    match found.iter().zip(values).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(i) => {
            let why = format!("'{side}' holds {} at {i}, expected {}", found[i], values[i]);
            Err(wrong(checkpoint.file(&key), name, why))
        }
    }
}

/// Largest magnitudes: finite, and never negative.
fn magnitudes(checkpoint: &Checkpoint, name: &str, side: &str, len: usize) -> Result<Vec<f32>> {
    let key = format!("{name}.{side}");
    checkpoint.expect(&key, &[DType::F32], &[len])?;
    let scales = checkpoint.read::<f32>(&key)?;
    match scales.iter().position(|scale| !scale.is_finite() || *scale < 0.0) {
        None => Ok(scales),
        Some(i) => {
            let why = format!("'{side}' holds {} at {i}, expected finite numbers of at least 0", scales[i]);
            Err(wrong(checkpoint.file(&key), name, why))
        }
    }
}

fn upload(checkpoint: &Checkpoint, name: &str, backend: &dyn Backend, x: &[f32]) -> Result<rankfold_backend::Buffer> {
    backend.upload(x).map_err(Error::backend(checkpoint.file(name), name))
}

/// What [`write()`] will write for a weight, to be declared to [`Writer::create`].
pub fn specs(name: &str, shape: [usize; 2], format: Format, block: usize, double: bool) -> Vec<Spec> {
    let elements = shape[0] * shape[1];
    let blocks = elements.div_ceil(block);
    let side = |end: &str| format!("{name}.{end}");
    let mut specs = vec![
        Spec::new(name, DType::U8, [elements.div_ceil(2), 1]),
        Spec::new(side("absmax"), if double { DType::U8 } else { DType::F32 }, [blocks]),
        Spec::new(side("quant_map"), DType::F32, [16]),
        Spec::text(side(&QuantState::key(format)), MAX_TEXT),
    ];
    if double {
        specs.push(Spec::new(side("nested_absmax"), DType::F32, [blocks.div_ceil(NESTED_BLOCK)]));
        specs.push(Spec::new(side("nested_quant_map"), DType::F32, [256]));
    }
    specs
}

/// Write a 4-bit weight and the tensors beside it; `dtype` (f32, bf16 or f16) is what it was quantised from.
///
/// Errors: a weight that contradicts itself or its declaration; another `dtype`; an offset that is not finite.
pub fn write(writer: &mut Writer, name: &str, backend: &dyn Backend, weight: &Quantized, dtype: DType) -> Result<()> {
    weight.check().map_err(Error::backend(writer.path(), name))?;
    if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
        return Err(wrong(writer.path(), name, format!("dtype {dtype}, expected f32, bf16 or f16")));
    }
    let side = |end: &str| format!("{name}.{end}");
    writer.write_view(name, backend, weight.codes.view())?;
    writer.write(&side("quant_map"), bytemuck::cast_slice(weight.format.values()))?;
    let offset = match &weight.scales {
        Scales::Plain(absmax) => {
            writer.write_view(&side("absmax"), backend, absmax.view())?;
            None
        }
        Scales::Nested { codes, absmax, offset } => {
            if !offset.is_finite() {
                return Err(wrong(writer.path(), name, format!("the mean of its scales is {offset}")));
            }
            writer.write_view(&side("absmax"), backend, codes.view())?;
            writer.write_view(&side("nested_absmax"), backend, absmax.view())?;
            writer.write(&side("nested_quant_map"), bytemuck::cast_slice(DynamicMap::Signed.values()))?;
            Some(*offset)
        }
    };
    let state = QuantState { format: weight.format, block: weight.block, dtype, shape: weight.shape, offset };
    writer.write(&side(&QuantState::key(weight.format)), state.to_json().as_bytes())
}

fn wrong(path: &Path, tensor: &str, why: String) -> Error {
    Error::QuantState { path: path.into(), tensor: tensor.into(), why }
}
