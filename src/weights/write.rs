//! Writing a checkpoint.

use super::stored::encode;
use crate::{
    device::{AnyRef, Cpu, DType, each_dtype},
    error::{Error, Result, same_size},
    shard::Shape,
};
use safetensors::{Dtype, SafeTensorError, View, serialize_to_file};
use std::{borrow::Cow, collections::HashSet, path::Path};

/// Writes tensors to a safetensors file, each a name, a shape and its elements in row-major order.
///
/// The file appears complete or not at all, replaces one of the same name, and only its owner may read it.
///
/// # Errors
/// [`Error::Sizes`] when a tensor does not have as many elements as its shape; [`Error::Invalid`] when two have the same
/// name, or one has a name that the format keeps for itself; [`Error::Io`] when the file cannot be written.
pub fn write<'a, N: Into<String>, D: Into<Shape>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, D, AnyRef<'a, Cpu>)>,
) -> Result<()> {
    let path = path.as_ref();
    let mut names = HashSet::new();
    let mut views = Vec::new();
    for (name, shape, elements) in tensors {
        let (name, shape) = (name.into(), shape.into());
        if name == "__metadata__" || !names.insert(name.clone()) {
            return Err(Error::invalid("write weights", format!("the name `{name}` is taken")));
        }
        same_size(
            "write weights",
            &format!("elements of `{name}`"),
            elements.len(),
            "elements of its shape",
            shape.len(),
        )?;
        views.push((name, Host { shape, elements }));
    }
    serialize_to_file(views, None, path).map_err(|error| match error {
        SafeTensorError::IoError(error) => Error::Io { path: path.into(), reason: error.to_string() },
        other => Error::Checkpoint { path: path.into(), reason: other.to_string() },
    })
}

/// A tensor on the host as the format's crate wants to see it. Its bytes are made when they are written, one tensor at a
/// time.
struct Host<'a> {
    shape: Shape,
    elements: AnyRef<'a, Cpu>,
}

impl View for Host<'_> {
    fn dtype(&self) -> Dtype {
        match self.elements.dtype() {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(each_dtype!(AnyRef, self.elements, elements => encode(elements)))
    }

    fn data_len(&self) -> usize {
        self.elements.len() * self.elements.dtype().size()
    }
}
