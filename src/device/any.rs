//! Views and buffers whose element is known at run time: the single bridge from static to run-time element types.

use super::{DType, Device, Element};
use half::{bf16, f16};

/// A shared view whose element is known at run time.
pub enum AnyRef<'a, B: Device> {
    /// f64 elements.
    F64(B::Slice<'a, f64>),
    /// f32 elements.
    F32(B::Slice<'a, f32>),
    /// bf16 elements.
    BF16(B::Slice<'a, bf16>),
    /// f16 elements.
    F16(B::Slice<'a, f16>),
}

/// An exclusive view whose element is known at run time.
pub enum AnyMut<'a, B: Device> {
    /// f64 elements.
    F64(B::SliceMut<'a, f64>),
    /// f32 elements.
    F32(B::SliceMut<'a, f32>),
    /// bf16 elements.
    BF16(B::SliceMut<'a, bf16>),
    /// f16 elements.
    F16(B::SliceMut<'a, f16>),
}

/// A buffer whose element is known at run time.
pub enum AnyBuffer<B: Device> {
    /// f64 elements.
    F64(B::Buffer<f64>),
    /// f32 elements.
    F32(B::Buffer<f32>),
    /// bf16 elements.
    BF16(B::Buffer<bf16>),
    /// f16 elements.
    F16(B::Buffer<f16>),
}

/// Runs the same expression for whichever element a run-time view has.
///
/// ```
/// use shardwise::device::{AnyRef, Cpu, each_dtype};
/// let any: AnyRef<'_, Cpu> = AnyRef::F32(&[1.0_f32, 2.0][..]);
/// assert_eq!(each_dtype!(AnyRef, any, x => x.len()), 2);
/// ```
#[macro_export]
macro_rules! each_dtype {
    ($kind:ident, $any:expr, $x:ident => $body:expr) => {
        match $any {
            $crate::device::$kind::F64($x) => $body,
            $crate::device::$kind::F32($x) => $body,
            $crate::device::$kind::BF16($x) => $body,
            $crate::device::$kind::F16($x) => $body,
        }
    };
}

impl<'a, B: Device> Clone for AnyRef<'a, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<'a, B: Device> Copy for AnyRef<'a, B> {}

impl<'a, B: Device> AnyRef<'a, B> {
    /// The element of the view.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::BF16(_) => DType::BF16,
            Self::F16(_) => DType::F16,
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        each_dtype!(AnyRef, *self, slice => B::len(slice))
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The view, if `T` is its element.
    pub fn of<T: Element>(self) -> Option<B::Slice<'a, T>> {
        T::of_ref::<B>(self)
    }
}

impl<'a, B: Device> AnyMut<'a, B> {
    /// The element of the view.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::BF16(_) => DType::BF16,
            Self::F16(_) => DType::F16,
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        each_dtype!(AnyMut, self, slice => B::len_mut(slice))
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A shared view of the same elements.
    pub fn shared(&self) -> AnyRef<'_, B> {
        match self {
            Self::F64(slice) => AnyRef::F64(B::shared(slice)),
            Self::F32(slice) => AnyRef::F32(B::shared(slice)),
            Self::BF16(slice) => AnyRef::BF16(B::shared(slice)),
            Self::F16(slice) => AnyRef::F16(B::shared(slice)),
        }
    }

    /// The view, if `T` is its element.
    pub fn of<T: Element>(self) -> Option<B::SliceMut<'a, T>> {
        T::of_mut::<B>(self)
    }
}

impl<B: Device> AnyBuffer<B> {
    /// A view of the whole buffer.
    pub fn as_ref(&self) -> AnyRef<'_, B> {
        match self {
            Self::F64(buffer) => AnyRef::F64(B::slice(buffer)),
            Self::F32(buffer) => AnyRef::F32(B::slice(buffer)),
            Self::BF16(buffer) => AnyRef::BF16(B::slice(buffer)),
            Self::F16(buffer) => AnyRef::F16(B::slice(buffer)),
        }
    }

    /// An exclusive view of the whole buffer.
    pub fn as_mut(&mut self) -> AnyMut<'_, B> {
        match self {
            Self::F64(buffer) => AnyMut::F64(B::slice_mut(buffer)),
            Self::F32(buffer) => AnyMut::F32(B::slice_mut(buffer)),
            Self::BF16(buffer) => AnyMut::BF16(B::slice_mut(buffer)),
            Self::F16(buffer) => AnyMut::F16(B::slice_mut(buffer)),
        }
    }

    /// The buffer, if `T` is its element.
    pub fn of<T: Element>(self) -> Option<B::Buffer<T>> {
        T::of_buffer::<B>(self)
    }
}
