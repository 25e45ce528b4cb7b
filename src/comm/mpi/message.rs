//! The encoding of messages. A message is a sequence of byte strings, each preceded by its length
//! and aligned for every element type.

use crate::error::LostReason;
use std::rc::Rc;

/// Encodes byte strings as u64 values.
pub(super) fn pack(fields: &[&[u8]]) -> Rc<Vec<u64>> {
    let len = |field: &[u8]| 1 + field.len().div_ceil(8);
    let mut numbers = vec![0; fields.iter().map(|field| len(field)).sum()];
    let mut rest = &mut numbers[..];
    for field in fields {
        let (slot, after) = rest.split_at_mut(len(field));
        slot[0] = field.len() as u64;
        bytemuck::cast_slice_mut(&mut slot[1..])[..field.len()].copy_from_slice(field);
        rest = after;
    }
    Rc::new(numbers)
}

/// A message that has arrived.
pub(super) struct Message(pub(super) Vec<u64>);

impl Message {
    /// Returns the field with this index.
    pub(super) fn field(&self, number: usize) -> Option<&[u8]> {
        field(&self.0, number)
    }

    /// Returns a field of tensor elements.
    pub(super) fn data<T: bytemuck::Pod>(&self, number: usize) -> Option<&[T]> {
        bytemuck::try_cast_slice(self.field(number)?).ok()
    }

    /// Returns a field of text.
    pub(super) fn text(&self, number: usize) -> Option<String> {
        self.field(number).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }
}

/// Returns a message's field with this index.
pub(super) fn field(mut numbers: &[u64], number: usize) -> Option<&[u8]> {
    for _ in 0..number {
        let (len, rest) = numbers.split_first()?;
        numbers = rest.get((*len as usize).div_ceil(8)..)?;
    }
    let (len, rest) = numbers.split_first()?;
    bytemuck::cast_slice(rest).get(..*len as usize)
}

/// Decodes a field that holds numbers.
pub(super) fn numbers<const N: usize>(field: &[u8]) -> Option<[u64; N]> {
    bytemuck::try_cast_slice(field).ok()?.try_into().ok()
}

/// Encodes the reason of a loss.
pub(super) fn code_of(loss: LostReason) -> u64 {
    match loss {
        LostReason::Left => 0,
        LostReason::Failed => 1,
        LostReason::Panicked => 2,
        LostReason::Disconnected => 3,
    }
}

/// Decodes the reason of a loss.
pub(super) fn loss_of(code: u64) -> LostReason {
    [LostReason::Left, LostReason::Failed, LostReason::Panicked]
        .get(code as usize)
        .copied()
        .unwrap_or(LostReason::Disconnected)
}

/// Decodes the numbers at the head of a message.
pub(super) fn head<const N: usize>(message: &[u64]) -> Option<[u64; N]> {
    numbers(field(message, 0)?)
}
