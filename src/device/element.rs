//! The element types of tensors: f64, f32, bf16 and f16, each with its accumulator type. Also views
//! and buffers whose element type is known only at run time.

use super::{
    Device,
    cpu::{FreeList, FreeLists, math},
};
use half::{bf16, f16};
use std::{
    cell::RefCell,
    fmt,
    ops::{Add, AddAssign, Div, Mul, Neg, Sub},
};

mod sealed {
    pub trait Sealed {}
}

/// The element type of a tensor, as a value. More may be added.
///
/// ```
/// use shardwise::prelude::*;
/// assert_eq!([DType::F64, DType::F32, DType::BF16, DType::F16].map(DType::size), [8, 4, 2, 2]);
/// assert_eq!(<half::bf16 as Element>::DTYPE.to_string(), "bf16");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// The upper 16 bits of a binary32: 8 bits of exponent, 8 of precision.
    BF16,
    /// IEEE 754 binary16: 5 bits of exponent, 11 of precision.
    F16,
}

impl DType {
    /// The size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// The element type of a tensor, as a type: `f64`, `f32`, [`half::bf16`] or [`half::f16`].
///
/// f64 is an element type like the others, so that tests can check every operator at 1e-12. The
/// trait is sealed, because the code of a kernel family serves exactly these four types, which
/// libraries and hardware support.
///
/// ```
/// use half::bf16;
/// use shardwise::prelude::*;
/// // Rounded once, to the nearest bf16. A first rounding to f32 gives a tie, which rounds to 1.
/// let x = <bf16 as Element>::from_f64(1.0 + 2f64.powi(-8) + 2f64.powi(-40));
/// assert_eq!(Element::to_f64(x), 1.0 + <bf16 as Element>::EPSILON);
/// ```
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// The type in which kernels compute sums and non-linear functions of these elements.
    type Acc: Accumulator;
    /// This element type as a value.
    const DTYPE: DType;
    /// The distance from 1 to the next larger number.
    const EPSILON: f64;
    /// Not a number.
    const NAN: Self;

    /// Converts the element to the accumulator type, exactly.
    fn widen(self) -> Self::Acc;
    /// Rounds a number of the accumulator type to the nearest element.
    fn narrow(acc: Self::Acc) -> Self;
    /// Converts the element to f64, exactly.
    fn to_f64(self) -> f64;
    /// Rounds an f64 to the nearest element, in one rounding.
    fn from_f64(value: f64) -> Self;

    /// Converts a view to a view whose element type is known at run time.
    fn any_ref<B: Device>(slice: B::Slice<'_, Self>) -> AnyRef<'_, B>;
    /// Converts an exclusive view to an exclusive view whose element type is known at run time.
    fn any_mut<B: Device>(slice: B::SliceMut<'_, Self>) -> AnyMut<'_, B>;
    /// Converts a buffer to a buffer whose element type is known at run time.
    fn any_buffer<B: Device>(buffer: B::Buffer<Self>) -> AnyBuffer<B>;
    /// Returns the view if its elements have this type, else `None`.
    fn of_ref<'a, B: Device>(any: AnyRef<'a, B>) -> Option<B::Slice<'a, Self>>;
    /// Returns the exclusive view if its elements have this type, else `None`.
    fn of_mut<'a, B: Device>(any: AnyMut<'a, B>) -> Option<B::SliceMut<'a, Self>>;
    /// Returns the buffer if its elements have this type, else `None`.
    fn of_buffer<B: Device>(any: AnyBuffer<B>) -> Option<B::Buffer<Self>>;

    #[doc(hidden)]
    fn free_list(lists: &FreeLists) -> &RefCell<FreeList<Self>>;
}

/// An element type that is its own accumulator type: f64 or f32, with the arithmetic that kernels
/// need.
///
/// In f32, `exp`, `tanh` and `erf` are polynomials without branches, so that the compiler
/// vectorizes them. They are accurate to a few units in the last place. In f64, `erf` is that of
/// `libm`. All other functions are those of the standard library.
pub trait Accumulator:
    Element<Acc = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;

    /// The square root.
    fn sqrt(self) -> Self;
    /// e to the power of this number.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// The larger of two numbers, NaN if either is NaN.
    #[inline(always)]
    fn max_nan(self, other: Self) -> Self {
        // Comparisons with NaN are false. So `self != self` is true for a NaN of `self`, which is
        // returned. If only `other` is NaN, both tests are false, and `other` is returned.
        #[allow(clippy::eq_op)]
        if self > other || self != self { self } else { other }
    }
    /// The smaller of two numbers, NaN if either is NaN.
    #[inline(always)]
    fn min_nan(self, other: Self) -> Self {
        #[allow(clippy::eq_op)]
        if self < other || self != self { self } else { other }
    }
}

macro_rules! element {
    ($type:ty, $acc:ty, $variant:ident, $list:ident, $epsilon:expr, widen: $widen:expr, narrow: $narrow:expr, to: $to:expr, from: $from:expr) => {
        impl sealed::Sealed for $type {}

        impl Element for $type {
            type Acc = $acc;
            const DTYPE: DType = DType::$variant;
            const EPSILON: f64 = $epsilon;
            const NAN: Self = <$type>::NAN;

            #[inline(always)]
            fn widen(self) -> $acc {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(acc: $acc) -> Self {
                $narrow(acc)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $from(value)
            }
            fn any_ref<B: Device>(slice: B::Slice<'_, Self>) -> AnyRef<'_, B> {
                AnyRef::$variant(slice)
            }
            fn any_mut<B: Device>(slice: B::SliceMut<'_, Self>) -> AnyMut<'_, B> {
                AnyMut::$variant(slice)
            }
            fn any_buffer<B: Device>(buffer: B::Buffer<Self>) -> AnyBuffer<B> {
                AnyBuffer::$variant(buffer)
            }
            fn of_ref<'a, B: Device>(any: AnyRef<'a, B>) -> Option<B::Slice<'a, Self>> {
                match any {
                    AnyRef::$variant(slice) => Some(slice),
                    _ => None,
                }
            }
            fn of_mut<'a, B: Device>(any: AnyMut<'a, B>) -> Option<B::SliceMut<'a, Self>> {
                match any {
                    AnyMut::$variant(slice) => Some(slice),
                    _ => None,
                }
            }
            fn of_buffer<B: Device>(any: AnyBuffer<B>) -> Option<B::Buffer<Self>> {
                match any {
                    AnyBuffer::$variant(buffer) => Some(buffer),
                    _ => None,
                }
            }
            fn free_list(lists: &FreeLists) -> &RefCell<FreeList<Self>> {
                &lists.$list
            }
        }
    };
}

fn itself<T>(value: T) -> T {
    value
}

element!(f64, f64, F64, f64, f64::EPSILON, widen: itself, narrow: itself, to: itself, from: itself);
element!(f32, f32, F32, f32, f32::EPSILON as f64, widen: itself, narrow: itself, to: f64::from, from: |value| value as f32);
element!(bf16, f32, BF16, bf16, 0.0078125, widen: |value: bf16| f32::from_bits(u32::from(value.to_bits()) << 16), narrow: bf16::from_f32, to: |value| f64::from(bf16::to_f32(value)), from: |value| bf16::from_f32(math::round_to_odd(value)));
element!(f16, f32, F16, f16, 0.0009765625, widen: math::f32_from_f16, narrow: math::f16_from_f32, to: |value| f64::from(math::f32_from_f16(value)), from: |value| math::f16_from_f32(math::round_to_odd(value)));

impl Accumulator for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn exp(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        self.tanh()
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
}

impl Accumulator for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn exp(self) -> Self {
        math::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        math::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        math::erf(self)
    }
}

/// A shared view whose element type is known at run time.
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

/// An exclusive view whose element type is known at run time.
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

/// A buffer whose element type is known at run time.
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

/// Evaluates an expression with the element type of a run-time view as a static type.
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
    /// The element type of the view.
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

    /// Returns the view if `T` is its element type, else `None`.
    pub fn of<T: Element>(self) -> Option<B::Slice<'a, T>> {
        T::of_ref::<B>(self)
    }
}

impl<'a, B: Device> AnyMut<'a, B> {
    /// The element type of the view.
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

    /// Returns the view if `T` is its element type, else `None`.
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

    /// Returns the buffer if `T` is its element type, else `None`.
    pub fn of<T: Element>(self) -> Option<B::Buffer<T>> {
        T::of_buffer::<B>(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tested numbers lie halfway between two neighbouring bf16 or f16, or slightly above or
    /// below the midpoint. The conversions of `half` round some of them in the wrong direction.
    #[test]
    fn f64_is_rounded_once() {
        let little = 2f64.powi(-40);
        assert_eq!(<bf16 as Element>::from_f64(1.0 + 2f64.powi(-8) + little).to_f32(), 1.0078125);
        assert_eq!(<bf16 as Element>::from_f64(1.0 + 2f64.powi(-8) - little).to_f32(), 1.0);
        assert_eq!(<bf16 as Element>::from_f64(1.0 + 2f64.powi(-8)).to_f32(), 1.0);
        assert_eq!(
            <f16 as Element>::from_f64(-1.0 - 2f64.powi(-11) - little).to_f64(),
            -1.0 - 2f64.powi(-10)
        );
        assert_eq!(<f16 as Element>::from_f64(2f64.powi(-25) + little).to_f64(), 2f64.powi(-24));
        for value in [0.0, -0.0, 1.5, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(<bf16 as Element>::from_f64(value).to_f64().to_bits(), value.to_bits());
            assert_eq!(<f16 as Element>::from_f64(value).to_f64().to_bits(), value.to_bits());
        }
        assert!(<bf16 as Element>::from_f64(f64::NAN).to_f32().is_nan());
        assert_eq!(<bf16 as Element>::from_f64(1e300).to_f32(), f32::INFINITY);
    }
}
