//! Writing a safetensors file.

use super::{disk::Disk, save_id, stored::encode};
use crate::{
    device::{AnyRef, Cpu, DType, each_dtype},
    error::{Error, Result, same_size},
    shard::Shape,
};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    io,
    path::Path,
};

/// The maximal number of elements that are encoded at once.
const CHUNK: usize = 1 << 16;

/// The maximal length of a header in the format, in bytes.
const MAX_HEADER: usize = 100_000_000;

/// What is written of a tensor.
pub(super) enum Content<'a> {
    /// Its elements.
    Elements(AnyRef<'a, Cpu>),
    /// The bytes of elements of this type, as they were read from a file.
    Bytes(Dtype, &'a [u8]),
}

impl Content<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Bytes(dtype, _) => *dtype,
            Self::Elements(elements) => match elements.dtype() {
                DType::F64 => Dtype::F64,
                DType::F32 => Dtype::F32,
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
            },
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Bytes(_, bytes) => bytes.len(),
            Self::Elements(elements) => elements.len() * elements.dtype().size(),
        }
    }
}

/// Writes tensors to a safetensors file. Each tensor is a name, a shape and the elements in
/// row-major order.
///
/// Atomically replaces an existing file. If `path` is a symbolic link, replaces the link, not its
/// target. The file has the default mode of the umask, and is on the disk when this function
/// returns.
///
/// # Errors
/// [`Error::Sizes`] when the lengths of a tensor and of its shape differ; [`Error::Invalid`] when a
/// name occurs twice or is reserved by the format; [`Error::Checkpoint`] when the header exceeds
/// the format's limit; [`Error::Io`] when the file cannot be written.
pub fn write<'a, N: Into<String>, D: Into<Shape>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, D, AnyRef<'a, Cpu>)>,
) -> Result<()> {
    let path = path.as_ref();
    let Some(name) = path.file_name() else {
        return Err(Error::io(path, &io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file")));
    };
    // The name differs from the names of a save's files, because a concurrent save to the folder
    // would remove such a file.
    let temporary = path.with_file_name(format!(".write-{}-{}", save_id::random()?, name.to_string_lossy()));
    let disk = Disk::default();
    let tensors =
        tensors.into_iter().map(|(name, shape, elements)| (name, shape, Content::Elements(elements)));
    let written = write_tensors(&disk, &temporary, None, tensors)
        .and_then(|()| disk.rename(&temporary, path))
        .and_then(|()| {
            disk.sync_folder(path.parent().filter(|folder| *folder != "").unwrap_or(Path::new(".")))
        });
    written.map_err(|error| {
        // Ignore the error, because the file may not exist.
        let _ = disk.remove(&temporary);
        match error {
            Error::Io { kind, reason, .. } => Error::Io { path: path.into(), kind, reason },
            other => other,
        }
    })
}

/// Writes a new file of tensors, with the id of a save in its header if one is given.
pub(super) fn write_tensors<'a, N: Into<String>, D: Into<Shape>>(
    disk: &Disk,
    path: &Path,
    id: Option<&str>,
    tensors: impl IntoIterator<Item = (N, D, Content<'a>)>,
) -> Result<()> {
    let mut names = HashSet::new();
    let mut all = Vec::new();
    for (name, shape, content) in tensors {
        let (name, shape) = (name.into(), shape.into());
        if name == "__metadata__" || !names.insert(name.clone()) {
            return Err(Error::invalid(
                "write weights",
                format!("the name `{name}` occurs twice or is reserved"),
            ));
        }
        same_size(
            "write weights",
            &format!("the elements of `{name}`"),
            content.bytes() * 8 / content.dtype().bitsize(),
            "the elements of its shape",
            shape.len(),
        )?;
        all.push((name, shape, content));
    }
    // The widest elements come first, so that all tensors are aligned.
    all.sort_by(|(a, _, x), (b, _, y)| {
        (Reverse(x.dtype().bitsize()), a).cmp(&(Reverse(y.dtype().bitsize()), b))
    });
    let header = header(id, &all).map_err(|reason| Error::Checkpoint { path: path.into(), reason })?;
    disk.write(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, _, content) in all {
            match content {
                Content::Bytes(_, bytes) => out.write_all(bytes)?,
                Content::Elements(elements) => each_dtype!(AnyRef, elements, elements => {
                    for chunk in elements.chunks(CHUNK) {
                        out.write_all(&encode(chunk))?;
                    }
                }),
            }
        }
        Ok(())
    })
}

/// Returns the text of the header, padded to a multiple of 8 bytes.
fn header(id: Option<&str>, tensors: &[(String, Shape, Content<'_>)]) -> Result<Vec<u8>, String> {
    let mut end = 0;
    let info = |(name, shape, content): &(String, Shape, Content<'_>)| {
        let start = end;
        end += content.bytes();
        let (dtype, shape) = (content.dtype(), shape.dims().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    };
    let infos = tensors.iter().map(info).collect();
    // Older versions of transformers reject a file without a format.
    let mut free = HashMap::from([("format".to_string(), "pt".to_string())]);
    free.extend(id.map(|id| (save_id::KEY.to_string(), id.to_string())));
    let metadata = Metadata::new(Some(free), infos).map_err(|error| error.to_string())?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    // Pad the header, so that the data that follow are aligned.
    text.resize(text.len().next_multiple_of(8), b' ');
    let len = text.len();
    if len > MAX_HEADER {
        return Err(format!("the header has {len} bytes, but the format allows {MAX_HEADER}"));
    }
    Ok(text)
}
