//! Reads the header of a GGUF file, and checks it against the length of the file.
//!
//! A file has, little endian and without padding: `GGUF`, the version (u32), the numbers of tensors
//! and of metadata values (u64); for each value a key, a type and the value; for each tensor a
//! name, the dimensions (fastest first), a type and an offset. The data follow at the next multiple
//! of `general.alignment`, and so does each tensor in the data.

use super::super::file::DataFile;
use super::{
    cursor::Cursor,
    metadata::{self, GgufValue},
    types::Type,
};
use crate::{error::Result, shard::Shape};
use std::collections::BTreeMap;

/// The maximal length of a key in bytes.
const MAX_KEY: u64 = u16::MAX as u64;

/// The maximal length of the name of a tensor in bytes.
const MAX_NAME: u64 = 64;

/// The fewest bytes of a metadata value: a key of no bytes, the type, and one byte.
const LEAST_VALUE: u64 = 8 + 4 + 1;

/// The fewest bytes of the description of a tensor: a name of no bytes, no dimensions, type and
/// offset.
const LEAST_TENSOR: u64 = 8 + 4 + 4 + 8;

/// The key of the alignment of tensors.
const ALIGNMENT: &str = "general.alignment";

/// The checked description of a tensor.
pub(super) struct Entry {
    /// The type by the number in the file.
    pub(super) number: u32,
    /// The shape, slowest dimension first.
    pub(super) shape: Vec<usize>,
    /// The offset of the tensor's data in the file.
    pub(super) start: u64,
}

/// The checked header of a file.
pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, Entry>,
    /// The offset of each metadata value's type.
    pub(super) values: BTreeMap<String, u64>,
}

/// Reads the header of a file, but no data and no metadata values.
pub(super) fn read(file: &DataFile) -> Result<Header> {
    let mut cursor = Cursor::new(file, 0);
    check_version(&mut cursor)?;
    let tensors = cursor.count(LEAST_TENSOR, "the number of tensors")?;
    let count = cursor.count(LEAST_VALUE, "the number of metadata values")?;
    let mut values = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.text(MAX_KEY, "a key")?;
        let at = cursor.at();
        metadata::skip(&mut cursor).map_err(|error| in_value(file, &key, error))?;
        if values.contains_key(&key) {
            return Err(file.bad(format!("the key `{}` occurs twice", key.escape_debug())));
        }
        values.insert(key, at);
    }
    let alignment = alignment(file, &values)?;
    let mut entries = BTreeMap::new();
    for _ in 0..tensors {
        let name = cursor.text(MAX_NAME, "the name of a tensor")?;
        let entry = entry(&mut cursor, alignment)?.map_err(|reason| file.bad(about(&name, &reason)))?;
        if entries.contains_key(&name) {
            return Err(file.bad(about(&name, "the name occurs twice")));
        }
        entries.insert(name, entry);
    }
    // The data begin after the position, which is in the file, so the sum does not overflow.
    let data = cursor.at().next_multiple_of(alignment);
    check(&mut entries, data, file.len()).map_err(|reason| file.bad(reason))?;
    Ok(Header { tensors: entries, values })
}

fn check_version(cursor: &mut Cursor<'_>) -> Result<()> {
    let file = cursor.file();
    if cursor.bytes::<4>("the magic number")? != *b"GGUF" {
        return Err(file.bad("this is no GGUF file: it does not begin with `GGUF`"));
    }
    match cursor.u32("the version")? {
        2 | 3 => Ok(()),
        version if (1..=3).contains(&version.swap_bytes()) => {
            Err(file.bad("the GGUF file is big-endian; only little-endian files can be read"))
        }
        version => Err(file.bad(format!("GGUF of version {version} is not known; known are 2 and 3"))),
    }
}

fn alignment(file: &DataFile, values: &BTreeMap<String, u64>) -> Result<u64> {
    let Some(&at) = values.get(ALIGNMENT) else { return Ok(32) };
    let value = metadata::value(&mut Cursor::new(file, at))?;
    let alignment = value.integer().and_then(|value| u32::try_from(value).ok());
    match alignment {
        Some(alignment) if alignment.is_power_of_two() => Ok(alignment.into()),
        _ => {
            let found =
                if let GgufValue::Integer(value) = value { value.to_string() } else { "no integer".into() };
            Err(file.bad(format!("`{ALIGNMENT}` is {found}; it has to be a power of two")))
        }
    }
}

/// Reads what follows the name of a tensor. The entry's `start` counts from the start of the data.
fn entry(cursor: &mut Cursor<'_>, alignment: u64) -> Result<Result<Entry, String>> {
    let rank = cursor.u32("the number of dimensions")?;
    if rank as usize > Shape::MAX_RANK {
        return Ok(Err(format!("it has {rank} dimensions; at most {} are allowed", Shape::MAX_RANK)));
    }
    let dims = (0..rank).map(|_| cursor.u64("a dimension")).collect::<Result<Vec<_>>>()?;
    let (number, start) = (cursor.u32("the type of a tensor")?, cursor.u64("the offset of a tensor")?);
    let shape = dims.iter().rev().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>();
    let Ok(shape) = shape else { return Ok(Err(overflows(&dims))) };
    if !start.is_multiple_of(alignment) {
        return Ok(Err(format!("its offset {start} is not a multiple of the alignment {alignment}")));
    }
    Ok(Ok(Entry { number, shape, start }))
}

/// Checks that the data of the tensors are in the file and do not overlap. Changes `start` to the
/// offset in the file.
fn check(entries: &mut BTreeMap<String, Entry>, data: u64, len: u64) -> Result<(), String> {
    let mut ranges = Vec::with_capacity(entries.len());
    for (name, entry) in entries.iter_mut() {
        let bytes = bytes(entry).map_err(|reason| about(name, &reason))?;
        let start = data.checked_add(entry.start);
        let Some((start, end)) = start.and_then(|start| Some((start, start.checked_add(bytes)?))) else {
            return Err(about(name, &format!("its offset {} overflows", entry.start)));
        };
        if end > len {
            let reason = format!("its data end at byte {end}, but the file has {len} bytes");
            return Err(about(name, &reason));
        }
        entry.start = start;
        if bytes > 0 {
            ranges.push((start, end, name));
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let ((_, end, before), (start, _, name)) = (&pair[0], &pair[1]);
        if start < end {
            let reason = format!(
                "its data begin at byte {start}, but those of `{}` end at byte {end}",
                before.escape_debug()
            );
            return Err(about(name, &reason));
        }
    }
    Ok(())
}

/// Returns the size of a tensor in bytes, and 0 for a type of unknown size. The overflow check
/// counts a dimension of 0 as 1, because the strides must not overflow either.
fn bytes(entry: &Entry) -> Result<u64, String> {
    let shape = &entry.shape;
    let Some(of) = Type::of(entry.number) else { return Ok(0) };
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(of.weights) {
        return Err(format!(
            "its rows have {row} elements, which are not whole blocks of {} ({})",
            of.weights, of.name
        ));
    }
    let strides = shape.iter().try_fold(of.bytes, |bytes, &size| bytes.checked_mul(size.max(1)));
    let Some(strides) = strides else { return Err(overflows(shape)) };
    Ok(if shape.contains(&0) { 0 } else { (strides / of.weights) as u64 })
}

fn overflows(dims: &[impl std::fmt::Debug]) -> String {
    format!("its size {dims:?} overflows")
}

fn about(name: &str, reason: &str) -> String {
    format!("tensor `{}`: {reason}", name.escape_debug())
}

/// Adds the key to an error in its value.
fn in_value(file: &DataFile, key: &str, error: crate::Error) -> crate::Error {
    match error {
        crate::Error::Checkpoint { reason, .. } => {
            file.bad(format!("the key `{}`: {reason}", key.escape_debug()))
        }
        other => other,
    }
}
