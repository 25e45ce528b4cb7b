//! The CPU: pooled host memory, and code that its kernels share (vectorization, f32 functions).

mod free_list;
pub(super) mod math;
mod pool;
mod simd;

pub(super) use free_list::{FreeList, FreeLists};
pub use pool::{CpuBuffer, MemoryUse};
pub(crate) use pool::{HeldBytes, zeroed};
pub(crate) use simd::{Kernel, vectorized, widest};

use super::{Device, Element};
use crate::error::Result;
use pool::Pool;
use std::{fmt, num::NonZeroUsize, ops::Range, rc::Rc};

/// The CPU as one rank sees it.
///
/// Keeps freed buffers in a pool and reuses them, so that the training steps after the first
/// allocate nothing from the system. A rank computes on one thread by default, because the ranks
/// already run in parallel. [`Cpu::with_threads`] gives its GEMMs more threads.
///
/// ```
/// use shardwise::prelude::*;
/// let cpu = Cpu::new();
/// let x = Tensor::<f32, _>::zeros(&cpu, [4, 16])?;
/// assert_eq!(cpu.memory().live, 256);
/// drop(x);
/// let _y = Tensor::<f32, _>::zeros(&cpu, [2, 16])?;
/// assert_eq!((cpu.memory().live, cpu.memory().peak), (128, 256));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Cpu {
    pool: Rc<Pool>,
    threads: NonZeroUsize,
}

impl Cpu {
    /// Returns a CPU with a pool of its own and one thread.
    pub fn new() -> Self {
        Self { pool: Rc::new(Pool::new(false)), threads: NonZeroUsize::MIN }
    }

    /// Returns a CPU that fills every new buffer with NaN, so that tests find kernels that leave an
    /// element unwritten.
    pub fn poisoned() -> Self {
        Self { pool: Rc::new(Pool::new(true)), threads: NonZeroUsize::MIN }
    }

    /// Splits GEMMs over this many threads. The bits of the results do not depend on the number of
    /// threads.
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// The number of threads of a GEMM.
    pub fn threads(&self) -> usize {
        self.threads.get()
    }

    /// The floating-point operations of matrix products and attention since the CPU was created, or
    /// `u64::MAX` if there are more. They are counted as [`Meta::flops`](super::Meta::flops) counts
    /// them, and over all handles of this CPU.
    ///
    /// Model FLOPs utilization is flops / (seconds · peak FLOPs a second).
    ///
    /// ```
    /// use shardwise::{kernels::Gemm, prelude::*};
    /// let cpu = Cpu::new();
    /// let x = Tensor::<f32>::zeros(&cpu, [4, 16])?;
    /// let mut y = Tensor::<f32>::zeros(&cpu, [4, 4])?;
    /// cpu.gemm(1.0, x.mat(), x.mat().t(), 0.0, y.mat_mut()?)?;
    /// assert_eq!(cpu.flops(), 2 * 4 * 16 * 4);
    /// # Ok::<(), Error>(())
    /// ```
    pub fn flops(&self) -> u64 {
        self.pool.flops.get()
    }

    /// Adds the operations of a kernel.
    pub(crate) fn count(&self, flops: u128) {
        let flops = u64::try_from(flops).unwrap_or(u64::MAX);
        self.pool.flops.set(self.flops().saturating_add(flops));
    }

    /// The number of allocations from the system.
    #[cfg(test)]
    pub(crate) fn made(&self) -> usize {
        self.pool.made.get()
    }

    /// Counts bytes of memory that is not the pool's as live until the value is dropped.
    pub(crate) fn hold(&self, bytes: usize) -> HeldBytes {
        HeldBytes::new(&self.pool, bytes)
    }

    /// Returns the pool's idle memory to the system.
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
