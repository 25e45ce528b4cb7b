//! The header of a safetensors file, checked against the file before anything believes it.
//!
//! A file is the length of the header (8 bytes, little endian), the header in JSON, and the data:
//!
//! ```text
//! {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {"format": "pt"}}
//! ```
//!
//! Offsets count from the end of the header. The tensors' data lie one behind the other, without gaps, to the end of
//! the file, each row-major and little endian.

use super::{
    file::DataFile,
    folder::ID,
    json::{LIMIT, duplicate, object, value, whole_object},
};
use crate::{device::DType, error::Result};
use safetensors::{Dtype, tensor::TensorInfo};
use std::collections::BTreeMap;

/// The longest header that the format allows, in bytes; and the most of all headers of a folder.
const MAX_HEADER: u64 = 100_000_000;

/// The most dimensions that a tensor may have: as many as PyTorch and NumPy have. Few of them can be read.
const MAX_RANK: usize = 64;

/// What a header says of one tensor, checked.
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Where its data begin in the file.
    pub(super) start: u64,
}

impl Entry {
    /// The element, if it is one of ours.
    pub(super) fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F64 => Some(DType::F64),
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::BF16),
            Dtype::F16 => Some(DType::F16),
            _ => None,
        }
    }
}

/// The text of a file's header, and the number of bytes behind its length. `before` is how many bytes
/// of headers of this checkpoint have been read already.
fn text(file: &DataFile, before: u64) -> Result<(Vec<u8>, u64)> {
    let Some(after) = file.len().checked_sub(8) else {
        return Err(file.bad(format!("{} bytes are too few for a safetensors file", file.len())));
    };
    let mut len = [0; 8];
    file.read_at(&mut len, 0)?;
    let len = u64::from_le_bytes(len);
    if len > after.min(MAX_HEADER) {
        if let Some(what) = other_format(file)? {
            return Err(file.bad(format!("this is {what}")));
        }
        let reason = format!(
            "the header is said to have {len} bytes; {after} follow, and the format allows {MAX_HEADER}"
        );
        return Err(file.bad(reason));
    }
    if len.saturating_add(before) > MAX_HEADER {
        let reason = format!(
            "the header has {len} bytes and those before it {before}; together at most {MAX_HEADER} are read"
        );
        return Err(file.bad(reason));
    }
    let mut text = vec![0; len as usize];
    file.read_at(&mut text, 8)?;
    Ok((text, after))
}

/// Reads a file's header: the only bytes of the file that this reads. Adds its length to `total`, the
/// bytes of headers of this checkpoint.
pub(super) fn read(file: &DataFile, total: &mut u64) -> Result<BTreeMap<String, Entry>> {
    let (text, after) = text(file, *total)?;
    let len = text.len() as u64;
    *total += len;
    let infos = parse(&text).map_err(|reason| file.bad(format!("header: {reason}")))?;
    drop(text);
    check(&infos, after - len).map_err(|reason| file.bad(reason))?;
    let entry = |info: TensorInfo| Entry {
        dtype: info.dtype,
        shape: info.shape,
        start: 8 + len + info.data_offsets.0 as u64,
    };
    Ok(infos.into_iter().map(|(name, info)| (name, entry(info))).collect())
}

/// What a file is by its first bytes, if it is none that begins with the length of a header.
fn other_format(file: &DataFile) -> Result<Option<&'static str>> {
    let mut first = [0; 16];
    let len = first.len().min(file.len() as usize);
    file.read_at(&mut first[..len], 0)?;
    first.make_ascii_lowercase();
    let known: [(&[u8], _); 6] = [
        (b"version https://", "a Git LFS pointer, not the file itself: `git lfs pull` fetches that"),
        (b"<!doctype html", "a web page, not the file"),
        (b"<html", "a web page, not the file"),
        (b"gguf", "a GGUF file; safetensors can be read"),
        (b"pk\x03\x04", "a PyTorch or zip file; safetensors can be read"),
        (b"\x80\x02", "a Python pickle; safetensors can be read"),
    ];
    Ok(known.into_iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, what)| what))
}

/// The id of the save that wrote a file, where a save of ours did: see [`super::folder`].
pub(super) fn id(file: &DataFile) -> Result<Option<String>> {
    let (text, _) = text(file, 0)?;
    let mut id = None;
    let read = whole_object(&text, |key, text| {
        if key != "__metadata__" {
            return Ok(value!(serde_json::Value, text, LIMIT)?.1);
        }
        if text.starts_with(b"null") {
            return Ok(4);
        }
        object(text, |key, text| {
            let (value, len) = value!(String, text, usize::MAX)?;
            if key == ID {
                id = Some(value);
            }
            Ok(len)
        })
    });
    read.map_err(|reason| file.bad(format!("header: {reason}")))?;
    Ok(id)
}

fn parse(text: &[u8]) -> Result<BTreeMap<String, TensorInfo>, String> {
    let mut infos = BTreeMap::new();
    let mut metadata = false;
    whole_object(text, |key, text| {
        if key == "__metadata__" {
            // Free text, which nothing here uses.
            let is_duplicate = std::mem::replace(&mut metadata, true);
            let strings = |_, text: &[u8]| Ok(value!(String, text, usize::MAX)?.1);
            return match is_duplicate {
                true => Err(duplicate(&key)),
                false if text.starts_with(b"null") => Ok(4),
                false => object(text, strings),
            };
        }
        let (info, len) = value!(TensorInfo, text, LIMIT).map_err(|reason| about(&key, &reason))?;
        if info.shape.len() > MAX_RANK {
            return Err(about(&key, &format!("{} dimensions", info.shape.len())));
        }
        if infos.contains_key(&key) {
            return Err(duplicate(&key));
        }
        infos.insert(key, info);
        Ok(len)
    })?;
    Ok(infos)
}

/// Each tensor's offsets are those of its shape and element, and together they are the `data` bytes of data.
fn check(infos: &BTreeMap<String, TensorInfo>, data: u64) -> Result<(), String> {
    let mut ranges = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        let bytes = bytes(info).ok_or_else(|| {
            about(
                name,
                &format!(
                    "shape {:?} of {:?} is not a whole number of bytes, or too many",
                    info.shape, info.dtype
                ),
            )
        })?;
        if end.checked_sub(start) != Some(bytes) {
            let reason = format!(
                "offsets {start}..{end}, but shape {:?} of {:?} takes {bytes} bytes",
                info.shape, info.dtype
            );
            return Err(about(name, &reason));
        }
        ranges.push((start, end, name));
    }
    ranges.sort_unstable();
    let mut filled = 0;
    for (start, end, name) in ranges {
        if start != filled {
            let reason = format!("its data begin at byte {start}, but those before it end at byte {filled}");
            return Err(about(name, &reason));
        }
        filled = end;
    }
    if filled as u64 != data {
        return Err(format!("the tensors have {filled} bytes of data, but the file has {data}"));
    }
    Ok(())
}

/// The bytes that a tensor takes; none if that cannot be. A dimension of 0 counts as 1 until the end: `[0, 2⁶³, 2⁶³]` has
/// no elements, but strides that no one can compute with.
fn bytes(info: &TensorInfo) -> Option<usize> {
    let strides =
        info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size.max(1)))?;
    let bits = if info.shape.contains(&0) { 0 } else { strides };
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn about(name: &str, reason: &str) -> String {
    format!("tensor `{}`: {reason}", name.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    fn accepts(header: &str, data: usize) -> Result<(), String> {
        check(&parse(header.as_bytes())?, data as u64)
    }

    fn tensor() -> impl Strategy<Value = (String, String)> {
        let dims = prop::collection::vec(0_usize..4, 0..4);
        (
            0..4,
            dims,
            prop::sample::select(vec![("F32", 4), ("F16", 2), ("I64", 8), ("U8", 1)]),
            0..12_usize,
            0..10,
        )
            .prop_map(|(name, dims, (dtype, size), start, extra)| {
                // Most lengths are right, so that headers get past that check.
                let end = start + dims.iter().product::<usize>() * size + usize::from(extra == 0);
                (
                    format!("t{name}"),
                    format!(r#"{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{end}]}}"#),
                )
            })
    }

    proptest! {
        /// What passes here is what the format's own crate lets pass, but for keys that occur twice.
        #[test]
        fn agrees_with_the_format(
            mut tensors in prop::collection::vec(tensor(), 0..3),
            contiguous in any::<bool>(),
            missing in 0..4_usize,
        ) {
            if contiguous {
                let mut at = 0;
                for (_, info) in &mut tensors {
                    let mut parsed: TensorInfo = serde_json::from_str(info).unwrap();
                    let len = parsed.data_offsets.1 - parsed.data_offsets.0;
                    parsed.data_offsets = (at, at + len);
                    at += len;
                    *info = serde_json::to_string(&parsed).unwrap();
                }
            }
            let entries: Vec<_> = tensors.iter().map(|(name, info)| format!("\"{name}\":{info}")).collect();
            let header = format!("{{{}}}", entries.join(","));
            let last = tensors.iter().map(|(_, info)| serde_json::from_str::<TensorInfo>(info).unwrap().data_offsets.1).max();
            let data = last.unwrap_or(0).saturating_sub(missing / 3);
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.bytes());
            file.resize(file.len() + data, 0);
            let mut names: Vec<_> = tensors.iter().map(|(name, _)| name).collect();
            names.sort();
            let unique = names.windows(2).all(|pair| pair[0] != pair[1]);
            prop_assert_eq!(accepts(&header, data).is_ok(), SafeTensors::read_metadata(&file).is_ok() && unique);
        }

        /// Nonsense is refused, or accepted, but nothing breaks.
        #[test]
        fn survives_nonsense(text in prop::collection::vec(any::<u8>(), 0..60), cut in 0..90_usize, data in 0..9_usize) {
            let mut header = br#"{"__metadata__":{"a":"b"},"t":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#.to_vec();
            _ = accepts(&String::from_utf8_lossy(&text), data);
            let at = cut.min(header.len());
            header.splice(at..(at + 1).min(header.len()), text.into_iter().take(2));
            if let Ok(infos) = parse(&header) {
                _ = check(&infos, data as u64);
            }
        }
    }
}
