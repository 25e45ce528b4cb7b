//! The tensors that a save writes, and those that it copies from a quantized checkpoint.

use super::super::{Packed, folder::Folder, write::Content};
use super::owners::{Owned, Whole};
use crate::{
    device::{Cpu, Element, zeroed},
    error::{Error, Result},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, WeightSource},
};
use safetensors::Dtype;
use std::collections::BTreeMap;

/// A tensor of a file.
pub(super) struct Written {
    pub(super) name: String,
    pub(super) shape: Shape,
    /// The bytes of its elements.
    pub(super) size: usize,
    /// The type of its elements, if it is copied from a quantized checkpoint.
    pub(super) copied: Option<Dtype>,
    /// The owners of its elements, if it is not copied.
    pub(super) owned: Vec<Owned>,
}

/// Checks that the quantized matrices have the formats and shapes of the checkpoint that they are
/// copied from.
pub(super) fn check_formats<T: Element, B: Backend>(
    packed: Option<&Packed>,
    params: &[Param<T, B>],
) -> Result<()> {
    for param in params {
        let rows = param.quantized();
        // A rank may hold nothing of a tensor, and then no row has its format.
        for own in param.regions().iter().filter(|own| !own.region.extent().is_empty()) {
            let format = rows.as_ref().and_then(|rows| rows.format(own.row));
            let copied = packed.and_then(|packed| packed.format(&own.tensor));
            if let (Some(packed), Some(_)) = (packed, copied) {
                packed.check(&own.tensor, &own.region)?;
            }
            let reason = match (format, copied) {
                _ if format == copied => continue,
                (Some(format), None) if packed.is_some() => {
                    format!(
                        "`{}` is quantized in {format}, but not in the checkpoint of `Save::packed`",
                        own.tensor
                    )
                }
                (Some(format), None) => format!(
                    "`{}` is quantized in {format}: set the checkpoint by `Save::packed`, or load the model \
                     dequantized to save it",
                    own.tensor
                ),
                (Some(format), Some(other)) => {
                    format!("`{}` is in {format}, but the checkpoint has it in {other}", own.tensor)
                }
                (None, _) => format!(
                    "`{}` is not quantized, but it is in the checkpoint of `Save::packed`",
                    own.tensor
                ),
            };
            return Err(Error::Unsupported { op: "save", reason });
        }
    }
    Ok(())
}

/// Returns the tensors that are written for a tensor of the model.
pub(super) fn written<T: Element>(packed: Option<&Packed>, tensor: Whole) -> Vec<Written> {
    let Whole { name, shape, owned } = tensor;
    if let Some(packed) = packed.filter(|packed| packed.format(&name).is_some()) {
        let of = |(name, dtype, dims): (String, Dtype, &[usize])| {
            let shape = Shape::new(dims);
            Written {
                name,
                shape,
                size: shape.len() * dtype.bitsize() / 8,
                copied: Some(dtype),
                owned: Vec::new(),
            }
        };
        return packed.parts(&name).map(of).collect();
    }
    let size = shape.len().saturating_mul(size_of::<T>());
    vec![Written { name, shape, size, copied: None, owned }]
}

/// Allocates the tensors of a file, except those that are copied.
pub(super) fn allocate<T: Element>(file: &[Written]) -> Result<Vec<Vec<T>>> {
    let len = |of: &Written| if of.copied.is_some() { 0 } else { of.shape.len() };
    file.iter().map(|of| zeroed(len(of))).collect()
}

/// Tensors that are copied from a quantized checkpoint, as they are stored.
type Copied = BTreeMap<String, (Dtype, Vec<u8>)>;

/// Reads the tensors of a file that are copied.
pub(super) fn copied(packed: Option<&Packed>, file: &[Written]) -> Result<Copied> {
    let mut copied = Copied::new();
    for Written { name, shape, size, copied: dtype, .. } in file {
        if let (Some(dtype), Some(packed)) = (dtype, packed) {
            let mut bytes = zeroed(*size)?;
            packed.read_part(name, *shape, &mut bytes)?;
            copied.insert(name.clone(), (*dtype, bytes));
        }
    }
    Ok(copied)
}

/// Writes one of several files, with name `shard`, or the only file if `shard` is `None`. Takes the
/// bytes of `copied` instead of the elements of these tensors.
pub(super) fn write_file<T: Element>(
    folder: &Folder,
    shard: Option<&str>,
    has_config: bool,
    (mut tensors, copied): (Vec<(String, Shape, Vec<T>, bool)>, &Copied),
) -> Result<()> {
    for (name, shape, elements, transposed) in &mut tensors {
        if let (&[rows, cols], true) = (shape.dims(), *transposed && !copied.contains_key(name)) {
            *elements = transpose(elements, rows, cols);
            *shape = [cols, rows].into();
        }
    }
    let views = tensors.iter().map(|(name, shape, elements, _)| {
        let content = match copied.get(name) {
            Some((dtype, bytes)) => Content::Bytes(*dtype, bytes),
            None => Content::Elements(T::any_ref::<Cpu>(elements.as_slice())),
        };
        (name.clone(), *shape, content)
    });
    match shard {
        Some(shard) => folder.write_shard(shard, views),
        None => folder.write_single(has_config, views),
    }
}

fn transpose<T: Element>(from: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| from[row * cols + col])).collect()
}

/// Assigns tensors, in order, to files of at most `max` bytes of tensors.
pub(super) fn assign_files(tensors: Vec<Written>, max: usize) -> Vec<Vec<Written>> {
    let mut files = vec![Vec::new()];
    let mut bytes = 0_usize;
    for tensor in tensors {
        let more = bytes.saturating_add(tensor.size);
        if more > max && bytes > 0 {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes = bytes.saturating_add(tensor.size);
        files.last_mut().expect("there is always a file").push(tensor);
    }
    files
}
