//! What a message is made of: byte strings one after another, each after its length, aligned for every element.

use std::rc::Rc;

/// The words of a message.
pub(super) fn pack(parts: &[&[u8]]) -> Rc<Vec<u64>> {
    let len = |part: &[u8]| 1 + part.len().div_ceil(8);
    let mut words = vec![0; parts.iter().map(|part| len(part)).sum()];
    let mut rest = &mut words[..];
    for part in parts {
        let (place, after) = rest.split_at_mut(len(part));
        place[0] = part.len() as u64;
        bytemuck::cast_slice_mut(&mut place[1..])[..part.len()].copy_from_slice(part);
        rest = after;
    }
    Rc::new(words)
}

/// A message that has arrived.
pub(super) struct Message(pub(super) Vec<u64>);

impl Message {
    /// The part of that number.
    pub(super) fn part(&self, number: usize) -> Option<&[u8]> {
        part(&self.0, number)
    }

    /// A part that is elements of a tensor.
    pub(super) fn data<T: bytemuck::Pod>(&self, number: usize) -> Option<&[T]> {
        bytemuck::try_cast_slice(self.part(number)?).ok()
    }

    /// A part that is text.
    pub(super) fn text(&self, number: usize) -> Option<String> {
        self.part(number).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }
}

/// The part of that number of a message.
pub(super) fn part(mut words: &[u64], number: usize) -> Option<&[u8]> {
    for _ in 0..number {
        let (len, rest) = words.split_first()?;
        words = rest.get((*len as usize).div_ceil(8)..)?;
    }
    let (len, rest) = words.split_first()?;
    bytemuck::cast_slice(rest).get(..*len as usize)
}

/// A part that is numbers.
pub(super) fn numbers<const N: usize>(part: &[u8]) -> Option<[u64; N]> {
    bytemuck::try_cast_slice(part).ok()?.try_into().ok()
}
