//! The CPU: pooled host memory, and what its kernels share (vectorization, f32 functions).

pub(super) mod math;
mod pool;
mod simd;

pub(crate) use pool::zeroed;
pub use pool::{CpuBuffer, MemoryUse};
pub(super) use pool::{Pool, Shelf};
pub(crate) use simd::{Kernel, vectorized, widest};

use super::{Device, Element};
use crate::error::Result;
use std::{fmt, num::NonZeroUsize, ops::Range, rc::Rc};

/// The CPU as one rank sees it.
///
/// Freed buffers are kept and used again, so that a warm training step takes its memory from its own pool. A rank
/// computes on one thread by default: ranks are the parallelism. [`Cpu::with_threads`] gives a rank more for its GEMMs.
#[derive(Clone)]
pub struct Cpu {
    pool: Rc<Pool>,
    threads: NonZeroUsize,
}

impl Cpu {
    /// A CPU with a pool of its own.
    pub fn new() -> Self {
        Self { pool: Rc::new(Pool::new(false)), threads: NonZeroUsize::MIN }
    }

    /// A CPU that fills every new tensor with NaN, so that a kernel which leaves an element unwritten is seen.
    pub fn poisoned() -> Self {
        Self { pool: Rc::new(Pool::new(true)), threads: NonZeroUsize::MIN }
    }

    /// The same CPU, with GEMMs split over this many threads. The result's bits do not depend on it.
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// The number of threads a GEMM may use.
    pub fn threads(&self) -> usize {
        self.threads.get()
    }

    /// How often the system was asked for memory.
    #[cfg(test)]
    pub(crate) fn made(&self) -> usize {
        self.pool.made.get()
    }

    /// Gives the pool's idle memory back to the system.
    pub fn trim(&self) {
        self.pool.trim();
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({} threads)", self.threads)
    }
}

impl Device for Cpu {
    type Buffer<T: Element> = CpuBuffer<T>;
    type Slice<'a, T: Element> = &'a [T];
    type SliceMut<'a, T: Element> = &'a mut [T];

    fn empty<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>> {
        self.pool.take(len)
    }

    fn adopt<T: Element>(&self, elements: Vec<T>) -> Result<CpuBuffer<T>> {
        Ok(self.pool.adopt(elements))
    }

    fn slice<T: Element>(buffer: &CpuBuffer<T>) -> &[T] {
        buffer
    }

    fn slice_mut<T: Element>(buffer: &mut CpuBuffer<T>) -> &mut [T] {
        buffer
    }

    fn shared<'a, T: Element>(slice: &'a &mut [T]) -> &'a [T] {
        slice
    }

    fn reborrow<'a, T: Element>(slice: &'a mut &mut [T]) -> &'a mut [T] {
        slice
    }

    fn len<T: Element>(slice: &[T]) -> usize {
        slice.len()
    }

    fn len_mut<T: Element>(slice: &&mut [T]) -> usize {
        slice.len()
    }

    fn narrow<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T> {
        &slice[range]
    }

    fn narrow_mut<'a, T: Element>(
        slice: Self::SliceMut<'a, T>,
        range: Range<usize>,
    ) -> Self::SliceMut<'a, T> {
        &mut slice[range]
    }

    fn upload<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn download<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        self.pool.memory()
    }
}
