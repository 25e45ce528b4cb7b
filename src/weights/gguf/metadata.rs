//! The values of the metadata. They stay in the file until they are asked for, because the lists of
//! a tokenizer are larger than the rest of the header.

use super::cursor::Cursor;
use crate::error::Result;

/// The largest number of elements of a list that can be read.
const MAX_ELEMENTS: u64 = 1 << 22;

/// The maximal length of a text in bytes.
const MAX_TEXT: u64 = 1 << 24;

/// A value of the metadata of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue {
    /// An integer of 8 to 64 bits, signed or not.
    Integer(i128),
    /// A number of 32 bits.
    F32(f32),
    /// A number of 64 bits.
    F64(f64),
    /// True or false.
    Bool(bool),
    /// A text.
    String(String),
    /// A list of values of one type.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// Returns the value if it is an integer.
    pub fn integer(&self) -> Option<i128> {
        if let Self::Integer(value) = self { Some(*value) } else { None }
    }

    /// Returns the value if it is a text.
    pub fn text(&self) -> Option<&str> {
        if let Self::String(value) = self { Some(value) } else { None }
    }

    /// Returns the elements if the value is a list.
    pub fn array(&self) -> Option<&[Self]> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// The size in bytes of the values of a type, or `None` for texts, lists and unknown types.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Moves over a value, which starts with the number of its type, and checks its length.
pub(super) fn skip(cursor: &mut Cursor<'_>) -> Result<()> {
    let kind = cursor.u32("the type of a value")?;
    if kind != ARRAY {
        return skip_values(cursor, kind, 1);
    }
    let (kind, count) = list(cursor)?;
    skip_values(cursor, kind, count)
}

fn skip_values(cursor: &mut Cursor<'_>, kind: u32, count: u64) -> Result<()> {
    match size(kind) {
        Some(size) => cursor.skip(size.saturating_mul(count), "a value"),
        // Each text is visited, so their number is limited, whatever the length of the file.
        None if kind == STRING && count > MAX_ELEMENTS => Err(too_long(cursor, count, MAX_ELEMENTS)),
        None if kind == STRING => (0..count).try_for_each(|_| {
            let len = cursor.u64("the length of a text")?;
            cursor.skip(len, "a text")
        }),
        None => Err(unknown(cursor, kind)),
    }
}

/// Reads the type and the number of the elements of a list.
fn list(cursor: &mut Cursor<'_>) -> Result<(u32, u64)> {
    let kind = cursor.u32("the type of a list")?;
    if kind == ARRAY {
        return Err(cursor.file().bad(format!("the list at byte {} has lists as elements", cursor.at())));
    }
    let count = cursor.count(size(kind).unwrap_or(8), "the number of elements of a list")?;
    Ok((kind, count))
}

/// Reads a value, which starts with the number of its type.
pub(super) fn value(cursor: &mut Cursor<'_>) -> Result<GgufValue> {
    short_value(cursor, MAX_ELEMENTS)
}

/// Reads a value, which may be a list of at most `most` elements.
pub(super) fn short_value(cursor: &mut Cursor<'_>, most: u64) -> Result<GgufValue> {
    let kind = cursor.u32("the type of a value")?;
    if kind != ARRAY {
        return one(cursor, kind);
    }
    let (kind, count) = list(cursor)?;
    if count > most {
        return Err(too_long(cursor, count, most));
    }
    (0..count).map(|_| one(cursor, kind)).collect::<Result<_>>().map(GgufValue::Array)
}

fn one(cursor: &mut Cursor<'_>, kind: u32) -> Result<GgufValue> {
    let what = "a value";
    Ok(match kind {
        0 => GgufValue::Integer(u8::from_le_bytes(cursor.bytes(what)?).into()),
        1 => GgufValue::Integer(i8::from_le_bytes(cursor.bytes(what)?).into()),
        2 => GgufValue::Integer(u16::from_le_bytes(cursor.bytes(what)?).into()),
        3 => GgufValue::Integer(i16::from_le_bytes(cursor.bytes(what)?).into()),
        4 => GgufValue::Integer(cursor.u32(what)?.into()),
        5 => GgufValue::Integer(i32::from_le_bytes(cursor.bytes(what)?).into()),
        6 => GgufValue::F32(f32::from_le_bytes(cursor.bytes(what)?)),
        7 => match cursor.bytes(what)? {
            [bit @ (0 | 1)] => GgufValue::Bool(bit == 1),
            [byte] => return Err(cursor.file().bad(format!("{byte} is neither true (1) nor false (0)"))),
        },
        STRING => GgufValue::String(cursor.text(MAX_TEXT, "a text")?),
        10 => GgufValue::Integer(cursor.u64(what)?.into()),
        11 => GgufValue::Integer(i64::from_le_bytes(cursor.bytes(what)?).into()),
        12 => GgufValue::F64(f64::from_le_bytes(cursor.bytes(what)?)),
        _ => return Err(unknown(cursor, kind)),
    })
}

fn too_long(cursor: &Cursor<'_>, count: u64, most: u64) -> crate::Error {
    cursor.file().bad(format!("a list of {count} elements is too long; at most {most} are read"))
}

fn unknown(cursor: &Cursor<'_>, kind: u32) -> crate::Error {
    cursor.file().bad(format!("the value at byte {} has the unknown type {kind}", cursor.at()))
}
