//! Devices, which hold tensors, and the element types of tensors. Kernels and all higher modules
//! use this module.
//!
//! A [`Device`] owns memory. It computes by the kernel families of [`crate::kernels`] that it
//! implements. The element type of a tensor is a static type ([`Element`]). The element type of a
//! communicator's message or of a tensor in a checkpoint is known only at run time. [`AnyRef`],
//! [`AnyMut`] and [`AnyBuffer`] then carry it as a value, and [`each_dtype!`] turns the value back
//! into a type.

mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod meta;
mod work;

pub use crate::each_dtype;
pub use cpu::{Cpu, CpuBuffer, MemoryUse};
pub(crate) use cpu::{HeldBytes, Kernel, vectorized, widest, zeroed};
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use element::{Accumulator, AnyBuffer, AnyMut, AnyRef, DType, Element};
pub use meta::{Meta, MetaBuffer, MetaSlice, MetaSliceMut};
pub use work::{Work, WorkKind};

use crate::error::Result;
use std::{fmt, ops::Range};

/// A device: memory for tensors, and views of it.
///
/// A handle is cheap to clone. Each handle belongs to one rank and is not `Send`.
///
/// ```
/// use shardwise::prelude::*;
/// let cpu = Cpu::new();
/// let mut buffer = cpu.adopt(vec![1.0_f32, 2.0, 3.0])?;
/// let tail = Cpu::narrow_mut::<f32>(Cpu::slice_mut(&mut buffer), 1..3);
/// cpu.upload(&[4.0, 5.0], tail)?;
/// let mut host = [0.0; 3];
/// cpu.download(Cpu::slice(&buffer), &mut host)?;
/// assert_eq!(host, [1.0, 4.0, 5.0]);
/// # Ok::<(), Error>(())
/// ```
pub trait Device: Clone + fmt::Debug + 'static {
    /// Owned memory for a number of elements.
    type Buffer<T: Element>: fmt::Debug;
    /// A shared view of elements.
    type Slice<'a, T: Element>: Copy;
    /// An exclusive view of elements.
    type SliceMut<'a, T: Element>;

    /// Whether the memory holds values. If not, as on [`Meta`], parameters are not read from their
    /// source, and every download gives 0.
    const HAS_VALUES: bool = true;

    /// Allocates memory for `len` elements. Their values are arbitrary.
    ///
    /// # Errors
    /// When there is not enough memory.
    fn empty<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Returns a buffer with the elements of a vector. A device that computes on host memory takes
    /// over the vector's memory, and other devices copy the elements.
    ///
    /// # Errors
    /// When there is not enough memory.
    fn adopt<T: Element>(&self, elements: Vec<T>) -> Result<Self::Buffer<T>> {
        let mut buffer = self.empty(elements.len())?;
        self.upload(&elements, Self::slice_mut(&mut buffer))?;
        Ok(buffer)
    }

    /// A shared view of a whole buffer.
    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> Self::Slice<'_, T>;

    /// An exclusive view of a whole buffer.
    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> Self::SliceMut<'_, T>;

    /// A shared view of the elements of an exclusive view.
    fn shared<'a, T: Element>(slice: &'a Self::SliceMut<'_, T>) -> Self::Slice<'a, T>;

    /// Reborrows an exclusive view.
    fn reborrow<'a, T: Element>(slice: &'a mut Self::SliceMut<'_, T>) -> Self::SliceMut<'a, T>;

    /// The number of elements of a view.
    fn len<T: Element>(slice: Self::Slice<'_, T>) -> usize;

    /// The number of elements of a view.
    fn len_mut<T: Element>(slice: &Self::SliceMut<'_, T>) -> usize;

    /// A range of a view. The caller has checked the range against the length.
    fn narrow<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T>;

    /// A range of an exclusive view. The caller has checked the range against the length.
    fn narrow_mut<'a, T: Element>(slice: Self::SliceMut<'a, T>, range: Range<usize>)
    -> Self::SliceMut<'a, T>;

    /// Copies from the host. The caller has checked the lengths.
    fn upload<T: Element>(&self, from: &[T], to: Self::SliceMut<'_, T>) -> Result<()>;

    /// Waits until the device has finished all earlier work, then copies to the host. The caller
    /// has checked the lengths.
    fn download<T: Element>(&self, from: Self::Slice<'_, T>, to: &mut [T]) -> Result<()>;

    /// Waits until the device has finished all earlier work.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// The bytes of this rank's tensors on the device, now and at their peak.
    fn memory(&self) -> MemoryUse;
}
