//! Elements as bytes of a file, little endian on every machine.

use crate::device::{Cpu, DType, Element};
use half::{bf16, f16};

/// An element type that files can have.
pub(super) trait Stored: Element {
    /// Decodes an element from its bytes.
    fn from_bytes(bytes: &[u8]) -> Self;

    /// Appends the bytes of the element.
    fn push_bytes(self, bytes: &mut Vec<u8>);

    /// Converts to another element type, rounding to nearest at most once.
    fn convert<T: Element>(self) -> T;
}

macro_rules! stored {
    ($type:ty, $self:ident => $convert:expr) => {
        impl Stored for $type {
            #[inline(always)]
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("the chunk has the size of an element"))
            }
            fn push_bytes(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
            #[inline(always)]
            fn convert<T: Element>($self) -> T {
                $convert
            }
        }
    };
}

// f32 holds every bf16 and f16, and both accumulator types hold every f32. So the conversion of an
// f32, bf16 or f16 rounds only in `narrow`, which is fast.
stored!(f64, self => T::from_f64(self));
stored!(f32, self => T::narrow(T::Acc::from_f64(self.to_f64())));
stored!(bf16, self => self.to_f32().convert());
stored!(f16, self => self.to_f32().convert());

/// Fills `out` with converted elements. If `S` and `T` are the same type, the elements keep their
/// bits.
fn decode<S: Stored, T: Element>(bytes: &[u8], out: &mut [T]) {
    let elements = bytes.chunks_exact(size_of::<S>()).map(S::from_bytes);
    if let Some(same) = T::any_mut::<Cpu>(&mut *out).of::<S>() {
        same.iter_mut().zip(elements).for_each(|(to, from)| *to = from);
    } else {
        out.iter_mut().zip(elements).for_each(|(to, from)| *to = from.convert());
    }
}

/// Fills `out` with converted elements, which are stored as `dtype`.
pub(super) fn decode_as<T: Element>(dtype: DType, bytes: &[u8], out: &mut [T]) {
    match dtype {
        DType::F64 => decode::<f64, _>(bytes, out),
        DType::F32 => decode::<f32, _>(bytes, out),
        DType::BF16 => decode::<bf16, _>(bytes, out),
        DType::F16 => decode::<f16, _>(bytes, out),
    }
}

/// Returns the bytes of elements.
pub(super) fn encode<S: Stored>(elements: &[S]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(elements));
    elements.iter().for_each(|element| element.push_bytes(&mut bytes));
    bytes
}

/// Fills `out` with converted numbers.
pub(super) fn convert<T: Element>(numbers: &[f32], out: &mut [T]) {
    out.iter_mut().zip(numbers).for_each(|(to, from)| *to = from.convert());
}
