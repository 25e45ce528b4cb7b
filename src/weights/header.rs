//! Reads the header of a safetensors file, and checks the header against the file.
//!
//! A file has the length of the header (8 bytes, little endian), the header in JSON, and the data:
//!
//! ```text
//! {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
//!  "__metadata__": {"format": "pt"}}
//! ```
//!
//! Offsets count from the end of the header. The tensors are stored without gaps up to the end of
//! the file. Each tensor is row-major and little endian.

use super::{
    file::DataFile,
    json::{LIMIT, duplicate, object, value, whole_object},
    save_id,
};
use crate::{device::DType, error::Result};
use safetensors::{Dtype, tensor::TensorInfo};
use std::collections::BTreeMap;

/// The maximum length of a header, in bytes: the format's limit for one header, and this crate's
/// limit for the headers of a folder together.
const MAX_HEADER: u64 = 100_000_000;

/// The maximum number of dimensions in a header, as in PyTorch and NumPy. Only tensors of at most
/// [`Shape::MAX_RANK`](crate::shard::Shape::MAX_RANK) dimensions can be read.
const MAX_RANK: usize = 64;

/// The checked header entry of one tensor.
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// The offset of the tensor's data in the file.
    pub(super) start: u64,
}

impl Entry {
    /// Returns the element type, or `None` if this crate does not support it.
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

/// Returns the text of the header, and the number of bytes that the file has after its first 8
/// bytes. `before` is the total length of the headers of this checkpoint that were read before.
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
            "the header length is {len} bytes, but {after} bytes follow, and the format allows {MAX_HEADER}"
        );
        return Err(file.bad(reason));
    }
    if len.saturating_add(before) > MAX_HEADER {
        let reason = format!(
            "the header has {len} bytes and the headers before it {before}, but at most {MAX_HEADER} are read together"
        );
        return Err(file.bad(reason));
    }
    let mut text = vec![0; len as usize];
    file.read_at(&mut text, 8)?;
    Ok((text, after))
}

/// Reads the header of a file, but none of its data. Adds the header's length to `total`, the
/// length of all headers of this checkpoint.
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

/// Detects some other file formats by their first bytes.
fn other_format(file: &DataFile) -> Result<Option<&'static str>> {
    let mut first = [0; 16];
    let len = first.len().min(file.len() as usize);
    file.read_at(&mut first[..len], 0)?;
    first.make_ascii_lowercase();
    let known: [(&[u8], _); 6] = [
        (b"version https://", "a Git LFS pointer, not the file itself: `git lfs pull` fetches the file"),
        (b"<!doctype html", "a web page, not the file"),
        (b"<html", "a web page, not the file"),
        (b"gguf", "a GGUF file, which `weights::Gguf` reads"),
        (b"pk\x03\x04", "a PyTorch or zip file; only safetensors can be read"),
        (b"\x80\x02", "a Python pickle; only safetensors can be read"),
    ];
    Ok(known.into_iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, what)| what))
}

/// Returns the id of the save that wrote the file, from the file's metadata; see [`super::folder`].
/// Returns `None` without an id.
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
            if key == save_id::KEY {
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
            // Skip the metadata, which is free text.
            if std::mem::replace(&mut metadata, true) {
                return Err(duplicate(&key));
            }
            if text.starts_with(b"null") {
                return Ok(4);
            }
            return object(text, |_, text| Ok(value!(String, text, usize::MAX)?.1));
        }
        let (info, len) = value!(TensorInfo, text, LIMIT).map_err(|reason| about(&key, &reason))?;
        if info.shape.len() > MAX_RANK {
            return Err(about(&key, &format!("{} dimensions exceed {MAX_RANK}", info.shape.len())));
        }
        if infos.contains_key(&key) {
            return Err(duplicate(&key));
        }
        infos.insert(key, info);
        Ok(len)
    })?;
    Ok(infos)
}

/// Checks that the offsets of each tensor match its shape and element type, and that the tensors
/// fill all `data` bytes after the header without gaps.
fn check(infos: &BTreeMap<String, TensorInfo>, data: u64) -> Result<(), String> {
    let mut ranges = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        let bytes = bytes(info).ok_or_else(|| {
            about(
                name,
                &format!(
                    "shape {:?} of {:?} is not a whole number of bytes, or overflows",
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
            let reason =
                format!("its data begin at byte {start}, but the previous data end at byte {filled}");
            return Err(about(name, &reason));
        }
        filled = end;
    }
    if filled as u64 != data {
        return Err(format!("the tensors have {filled} bytes of data, but the file has {data}"));
    }
    Ok(())
}

/// Returns the size of a tensor in bytes, or `None` if the size overflows or is not a whole number.
/// The overflow check counts a dimension of 0 as 1, because `[0, 2⁶³, 2⁶³]` has no elements but its
/// strides overflow.
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
    use crate::rng::Philox;
    use safetensors::SafeTensors;

    /// The number of headers of each test.
    const CASES: u64 = 2000;

    fn accepts(header: &str, data: usize) -> Result<(), String> {
        check(&parse(header.as_bytes())?, data as u64)
    }

    /// Reproducible random choices. The test name and the case number are the seed.
    struct Choices {
        stream: Philox,
        next: u64,
    }

    impl Choices {
        fn new(test: &str, case: u64) -> Self {
            Self { stream: Philox::named(case, test), next: 0 }
        }

        /// Returns a number below `count`.
        fn below(&mut self, count: usize) -> usize {
            let uniform = self.stream.uniform(self.next);
            self.next += 1;
            ((uniform * count as f64) as usize).min(count - 1)
        }

        /// Returns the name of a tensor and its entry.
        fn tensor(&mut self) -> (String, String) {
            let dims: Vec<usize> = (0..self.below(4)).map(|_| self.below(4)).collect();
            let (dtype, size) = [("F32", 4), ("F16", 2), ("I64", 8), ("U8", 1)][self.below(4)];
            // Nine of ten lengths match the shape, so that most headers reach the later checks.
            let wrong = usize::from(self.below(10) == 0);
            let start = self.below(12);
            let end = start + dims.iter().product::<usize>() * size + wrong;
            (
                format!("t{}", self.below(4)),
                format!(r#"{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{end}]}}"#),
            )
        }
    }

    /// This module accepts the same headers as the `safetensors` crate, except headers with
    /// duplicate keys.
    #[test]
    fn agrees_with_the_format() {
        let mut accepted = 0;
        for case in 0..CASES {
            let mut choices = Choices::new("format", case);
            let mut tensors: Vec<_> = (0..choices.below(3)).map(|_| choices.tensor()).collect();
            if choices.below(2) == 0 {
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
            let end = |info: &str| serde_json::from_str::<TensorInfo>(info).unwrap().data_offsets.1;
            let last = tensors.iter().map(|(_, info)| end(info)).max();
            // In one case of four the last byte is missing.
            let data = last.unwrap_or(0).saturating_sub(usize::from(choices.below(4) == 0));
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.bytes());
            file.resize(file.len() + data, 0);
            let mut names: Vec<_> = tensors.iter().map(|(name, _)| name).collect();
            names.sort();
            let unique = names.windows(2).all(|pair| pair[0] != pair[1]);
            let expected = SafeTensors::read_metadata(&file).is_ok() && unique;
            let found = accepts(&header, data);
            assert_eq!(found.is_ok(), expected, "case {case}: {header} with {data} bytes: {found:?}");
            accepted += u64::from(expected);
        }
        assert!((CASES / 10..CASES * 9 / 10).contains(&accepted), "{accepted} of {CASES} are accepted");
    }

    /// Parsing random bytes, or a header with a random edit, does not panic.
    #[test]
    fn survives_nonsense() {
        let valid = br#"{"__metadata__":{"a":"b"},"t":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        for case in 0..CASES {
            let mut choices = Choices::new("nonsense", case);
            let text: Vec<u8> = (0..choices.below(60)).map(|_| choices.below(256) as u8).collect();
            let data = choices.below(9);
            _ = accepts(&String::from_utf8_lossy(&text), data);
            let mut header = valid.to_vec();
            let at = choices.below(90).min(header.len());
            header.splice(at..(at + 1).min(header.len()), text.into_iter().take(2));
            if let Ok(infos) = parse(&header) {
                _ = check(&infos, data as u64);
            }
        }
    }
}
