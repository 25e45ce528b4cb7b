//! Where tensors live: devices, and the elements that they can hold. Used by kernels and everything above them.
//!
//! A [`Device`] owns memory; what it can compute is said by the kernel families in [`crate::kernels`]. The element of a
//! tensor is a type ([`Element`]); where only run time knows it (a communicator's wire, a checkpoint), [`AnyRef`],
//! [`AnyMut`] and [`AnyBuffer`] carry it as a value, and [`each_dtype!`] goes back to the type.

mod any;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod meta;

pub use crate::each_dtype;
pub use any::{AnyBuffer, AnyMut, AnyRef};
pub use cpu::{Cpu, CpuBuffer, MemoryUse};
pub(crate) use cpu::{Kernel, vectorized, widest, zeroed};
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use element::{Accumulator, DType, Element};
pub use meta::{Meta, MetaBuffer, MetaSlice, MetaSliceMut};

use crate::error::Result;
use std::{fmt, ops::Range};

/// A place that holds tensors: memory, and views of it.
///
/// A handle is cheap to clone and belongs to one rank; it is not `Send`.
pub trait Device: Clone + fmt::Debug + 'static {
    /// Owned memory for a number of elements.
    type Buffer<T: Element>: fmt::Debug;
    /// A shared view of elements.
    type Slice<'a, T: Element>: Copy;
    /// An exclusive view of elements.
    type SliceMut<'a, T: Element>;

    /// Whether memory holds values. Where it does not, as on [`Meta`], parameters are not read from
    /// their source, and every value that is read is 0.
    const HAS_VALUES: bool = true;

    /// Memory for `len` elements, whose values are arbitrary.
    ///
    /// # Errors
    /// When there is no such memory left.
    fn empty<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Memory with the elements of a vector; the vector's own, where the device computes on host
    /// memory.
    ///
    /// # Errors
    /// When there is no such memory left.
    fn adopt<T: Element>(&self, elements: Vec<T>) -> Result<Self::Buffer<T>> {
        let mut buffer = self.empty(elements.len())?;
        self.upload(&elements, Self::slice_mut(&mut buffer))?;
        Ok(buffer)
    }

    /// The whole of a buffer.
    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> Self::Slice<'_, T>;

    /// The whole of a buffer, to be written.
    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> Self::SliceMut<'_, T>;

    /// A shared view of what an exclusive one views.
    fn shared<'a, T: Element>(slice: &'a Self::SliceMut<'_, T>) -> Self::Slice<'a, T>;

    /// The same exclusive view, lent for a time.
    fn reborrow<'a, T: Element>(slice: &'a mut Self::SliceMut<'_, T>) -> Self::SliceMut<'a, T>;

    /// The number of elements of a view.
    fn len<T: Element>(slice: Self::Slice<'_, T>) -> usize;

    /// The number of elements of a view.
    fn len_mut<T: Element>(slice: &Self::SliceMut<'_, T>) -> usize;

    /// A part of a view. The range has been checked against the length.
    fn narrow<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T>;

    /// A part of a view, to be written. The range has been checked against the length.
    fn narrow_mut<'a, T: Element>(slice: Self::SliceMut<'a, T>, range: Range<usize>)
    -> Self::SliceMut<'a, T>;

    /// Copies from the host. The lengths have been checked.
    fn upload<T: Element>(&self, from: &[T], to: Self::SliceMut<'_, T>) -> Result<()>;

    /// Copies to the host, after everything that was asked of the device before. The lengths have been checked.
    fn download<T: Element>(&self, from: Self::Slice<'_, T>, to: &mut [T]) -> Result<()>;

    /// Returns when everything that was asked of the device is done.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// The bytes that this rank's tensors take on the device, now and at most.
    fn memory(&self) -> MemoryUse;
}
