//! NVIDIA GPUs: memory, streams, and the loading of kernels. Feature `cuda`. Used by the kernels' `cuda.rs` and by `comm/nccl`.
//!
//! A [`Cuda`] is one rank's handle of a GPU: a stream of its own, on which everything is done in the order in which it was asked
//! for, while the rank's thread goes on; it waits where values come back to the host. The driver, NVRTC and cuBLASLt are loaded
//! when they are first needed; no toolkit is needed to build, and none to run.
//!
//! The first handle of a GPU in a process loads all kernels, and they stay loaded: a load may wait
//! until the GPU is idle, which it is not while a collective waits there for another rank. Kernels
//! that are not on disk yet (`SHARDWISE_CACHE`, or `shardwise` in the user's cache folder) are
//! compiled for the GPU at hand, in parallel; [`precompile`] does that beforehand.
//!
//! # What is needed
//!
//! A GPU of compute capability 8.0 (Ampere) or later, and
//!
//! | library | versions | comes with |
//! |---|---|---|
//! | the driver, `libcuda.so.1` | for CUDA 12.0 and later | the GPU's kernel module; it is looked for on the loader's path alone |
//! | `libnvrtc` | 12 and 13, not newer than the driver's CUDA | a toolkit; pip's `nvidia-cuda-nvrtc` (13), `nvidia-cuda-nvrtc-cu12` |
//! | `libcublasLt` | 12 and 13, likewise | a toolkit; pip's `nvidia-cublas` (13), `nvidia-cublas-cu12` |
//! | `libnccl.so.2`, for [`crate::comm::nccl`] | 2.18 and later | pip's `nvidia-nccl-cu13`, `nvidia-nccl-cu12` |
//!
//! # Where libraries are looked for
//!
//! 1. In the folder that `SHARDWISE_CUDA_LIBRARIES` names. `SHARDWISE_NCCL` names NCCL's file, and nothing else is tried then.
//! 2. On the loader's path (`LD_LIBRARY_PATH`, `ld.so.conf`).
//! 3. Where conda (`lib`) and pip (`site-packages/nvidia/…/lib`) put them: in `VIRTUAL_ENV`, `CONDA_PREFIX`, `~/.local`, `/usr/local`
//!    and `/usr`.
//! 4. In the `lib64` of a toolkit: `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`.
//!
//! What is missing or too old is an [`Error`] that names the library, the function or version that is wanted, and what was tried.
//!
//! # Numbers
//!
//! * Products are cuBLASLt's: sums in f64 or f32, never in TF32 unless [`Cuda::allow_tf32`] says so, partial sums added in a fixed
//!   order: the same bits at every run on one kind of GPU.
//! * Bias, and gelu (by tanh) of bf16 and f16 with its slope, come with the product where cuBLASLt can, without rounding between; and
//!   so does a bias gradient that is f32.
//! * Kernels add in a fixed order, which does not depend on how memory is aligned; there are no atomic sums.
//! * Attention of bf16 and f16 with heads of at most 128 features is made by tensor cores where every row begins at 16 bytes (heads of
//!   a multiple of 8 features, tensors that are no odd views): weights are then rounded to the element before they meet the values.
//!   Attention of at most 8 rows of a sequence to a cache is made without them.
//! * The collectives' order is [`crate::comm::nccl::Order`].
//!
//! # Without a GPU
//!
//! `scripts/cuda_standin.sh COMMAND` runs a command with a stand-in for the four libraries, with eight devices, in which kernels are
//! compiled for the CPU and every access is checked. It is for tests.

mod context;
mod families;
mod launch;
pub(crate) mod libraries;
mod matmul;
mod memory;
mod program;
mod status;
mod stream;
mod table;

pub(crate) use families::Kernel;
pub(crate) use launch::Grid;
pub use libraries::{Version, versions};
pub(crate) use matmul::{Epilogue, Layout, Lt, Matmul, Operands};
pub use memory::{CudaBuffer, CudaSlice, CudaSliceMut};
pub use program::precompile;
pub use stream::Mark;
pub(crate) use table::Table;

use super::{Device, Element, MemoryUse};
use crate::error::{Error, Result};
use context::Context;
use memory::{Staging, bytes, bytes_mut};
use std::{
    cell::{Cell, OnceCell, RefCell},
    fmt,
    ops::Range,
    rc::{Rc, Weak},
    sync::{Mutex, MutexGuard, PoisonError},
};
use stream::Stream;
use table::Tables;

/// A GPU as one rank sees it: a stream on it.
///
/// Handles of one GPU share its memory: a tensor that one of them made can be used on another, and is ordered behind what made it.
#[derive(Clone)]
pub struct Cuda(Rc<Handle>);

pub(crate) struct Handle {
    // These two have memory that goes back in the stream's order: they are dropped before it.
    lt: OnceCell<Lt>,
    tables: RefCell<Tables>,
    stream: Stream,
    staging: RefCell<Staging>,
    context: &'static Context,
    /// Shared by the handles whose owner orders their work by marks.
    order: Rc<()>,
    looks: RefCell<Vec<Weak<dyn Fn() -> Result<()>>>>,
    memory: Rc<Counters>,
    poison: bool,
    exact: Cell<bool>,
}

/// Bytes in use by the tensors of handles that share an `order`.
#[derive(Default)]
struct Counters {
    live: Cell<usize>,
    peak: Cell<usize>,
}

impl Counters {
    fn taken(&self, bytes: usize) {
        self.live.set(self.live.get() + bytes);
        self.peak.set(self.peak.get().max(self.live.get()));
    }

    fn given_back(&self, bytes: usize) {
        self.live.set(self.live.get().saturating_sub(bytes));
    }
}

/// Locks, also what a thread that panicked had locked: what is behind these locks is whole at any
/// time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// The GPU of this number.
    ///
    /// # Errors
    /// When there is no such GPU, no driver, or a library is missing or too old: it is named, and where it was looked for.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with(ordinal, false)
    }

    /// A GPU whose new tensors are filled with NaN, so that a kernel which leaves an element unwritten is seen.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn poisoned(ordinal: usize) -> Result<Self> {
        Self::with(ordinal, true)
    }

    fn with(ordinal: usize, poison: bool) -> Result<Self> {
        let cuda = Self::on(Context::of(ordinal)?, Rc::default(), Rc::default(), poison, false)?;
        // What allocates in the driver, before there are collectives.
        cuda.0.staging.borrow_mut().memory(cuda.0.context)?;
        cuda.lt()?;
        Ok(cuda)
    }

    fn on(
        context: &'static Context,
        order: Rc<()>,
        memory: Rc<Counters>,
        poison: bool,
        urgent: bool,
    ) -> Result<Self> {
        Ok(Self(Rc::new(Handle {
            stream: Stream::new(context, urgent)?,
            staging: RefCell::default(),
            tables: RefCell::default(),
            lt: OnceCell::new(),
            context,
            order,
            looks: RefCell::default(),
            memory,
            poison,
            exact: Cell::new(true),
        })))
    }

    /// The number of GPUs.
    ///
    /// # Errors
    /// When there is no driver.
    pub fn count() -> Result<usize> {
        Context::count()
    }

    /// The number of this GPU.
    pub fn ordinal(&self) -> usize {
        self.0.context.ordinal
    }

    /// The name of this GPU.
    pub fn name(&self) -> &str {
        &self.0.context.name
    }

    /// The bytes of memory that this GPU has, free or not.
    pub fn total_memory(&self) -> usize {
        self.0.context.total_memory
    }

    /// Lets products of f32 be computed in TF32, with 10 bits of mantissa, from here on. By default they are not.
    pub fn allow_tf32(&self, allow: bool) {
        self.0.exact.set(!allow);
    }

    /// Another handle of the same GPU and memory, with a stream of its own, whose work goes first
    /// where both could run. The caller orders what the two do by marks.
    #[cfg(feature = "nccl")]
    pub(crate) fn beside(&self) -> Result<Self> {
        let handle = &self.0;
        let (order, memory) = (Rc::clone(&handle.order), Rc::clone(&handle.memory));
        let beside = Self::on(handle.context, order, memory, handle.poison, true)?;
        beside.0.exact.set(handle.exact.get());
        Ok(beside)
    }

    /// Makes the GPU the calling thread's current one.
    #[cfg(feature = "nccl")]
    pub(crate) fn make_current(&self) -> Result<()> {
        self.0.context.make_current()
    }

    /// What makes the GPU the current one of another thread.
    #[cfg(feature = "nccl")]
    pub(crate) fn elsewhere(&self) -> std::sync::Arc<dyn Fn() -> Result<()> + Send + Sync> {
        let context = self.0.context;
        std::sync::Arc::new(move || context.make_current())
    }

    /// Lets the other GPUs reach this one's memory, as far as they are connected.
    #[cfg(feature = "nccl")]
    pub(crate) fn open_memory(&self) -> Result<()> {
        self.0.context.open_memory()
    }

    /// The stream, as the driver knows it.
    #[cfg(feature = "nccl")]
    pub(crate) fn stream(&self) -> *mut std::ffi::c_void {
        self.0.stream.handle.cast()
    }

    /// A mark behind everything that was asked of this handle so far.
    pub(crate) fn mark(&self) -> Result<Mark> {
        self.0.stream.mark()
    }

    /// Lets what is asked of this handle later wait for a mark.
    pub(crate) fn after(&self, mark: &Mark) -> Result<()> {
        self.0.stream.after(mark)
    }

    /// Whether a mark has been reached.
    #[cfg(feature = "nccl")]
    pub(crate) fn is_reached(&self, mark: &Mark) -> Result<bool> {
        mark.is_reached()
    }

    /// While this handle's thread waits for the device it calls `look` again and again; an error of it ends the wait.
    #[cfg(feature = "nccl")]
    pub(crate) fn while_waiting(&self, look: &Rc<dyn Fn() -> Result<()>>) {
        let mut looks = self.0.looks.borrow_mut();
        looks.retain(|look| look.strong_count() > 0);
        let look = Rc::downgrade(look);
        if !looks.iter().any(|known| known.ptr_eq(&look)) {
            looks.push(look);
        }
    }

    /// Whether products of f32 keep all their bits.
    pub(crate) fn is_exact(&self) -> bool {
        self.0.exact.get()
    }

    pub(crate) fn lt(&self) -> Result<&Lt> {
        if self.0.lt.get().is_none() {
            let _ = self.0.lt.set(Lt::new(self)?);
        }
        self.0.lt.get().ok_or_else(|| Error::internal("cuBLASLt", "it was not made"))
    }

    /// Runs `work`, which is asked of this handle and uses memory of `others`: behind what they were asked for before, and before
    /// what they are asked for later.
    pub(crate) fn joins(&self, others: &[Rc<Handle>], work: impl FnOnce() -> Result<()>) -> Result<()> {
        let foreign = others.iter().map(|other| self.foreign(other));
        let foreign = foreign.filter_map(Result::transpose).collect::<Result<Vec<_>>>()?;
        foreign.iter().try_for_each(|other| self.after(&other.mark()?))?;
        work()?;
        if foreign.is_empty() {
            return Ok(());
        }
        let done = self.mark()?;
        foreign.iter().try_for_each(|other| other.after(&done))
    }

    /// The other handle, if marks of this one do not order the work on its memory.
    pub(crate) fn foreign(&self, other: &Rc<Handle>) -> Result<Option<Self>> {
        if Rc::ptr_eq(other, &self.0) {
            return Ok(None);
        }
        let (here, there) = (self.ordinal(), other.context.ordinal);
        if here != there {
            return Err(Error::invalid("CUDA", format!("a tensor of GPU {there} is used on GPU {here}")));
        }
        Ok((!Rc::ptr_eq(&other.order, &self.0.order)).then(|| Self(Rc::clone(other))))
    }
}

impl Handle {
    /// Returns when everything that was asked of the stream is done.
    fn wait(&self) -> Result<()> {
        if self.looks.borrow().is_empty() {
            return self.stream.finish();
        }
        let mark = self.stream.mark()?;
        self.wait_for(&mark)
    }

    /// Returns when a mark is reached. Those who asked for it look around meanwhile, and once after.
    fn wait_for(&self, mark: &Mark) -> Result<()> {
        loop {
            let reached = mark.is_reached()?;
            let looks: Vec<_> = self.looks.borrow().iter().filter_map(Weak::upgrade).collect();
            looks.iter().try_for_each(|look| look())?;
            if reached {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Handle {
    /// The stream's work is waited for before what it uses is given back.
    fn drop(&mut self) {
        let _ = self.stream.finish();
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({}, {})", self.ordinal(), self.name())
    }
}

impl Device for Cuda {
    type Buffer<T: Element> = CudaBuffer<T>;
    type Slice<'a, T: Element> = CudaSlice<'a, T>;
    type SliceMut<'a, T: Element> = CudaSliceMut<'a, T>;

    fn empty<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        CudaBuffer::new(self, len)
    }

    fn slice<T: Element>(buffer: &CudaBuffer<T>) -> CudaSlice<'_, T> {
        buffer.slice()
    }

    fn slice_mut<T: Element>(buffer: &mut CudaBuffer<T>) -> CudaSliceMut<'_, T> {
        buffer.slice_mut()
    }

    fn shared<'a, T: Element>(slice: &'a CudaSliceMut<'_, T>) -> CudaSlice<'a, T> {
        slice.shared()
    }

    fn reborrow<'a, T: Element>(slice: &'a mut CudaSliceMut<'_, T>) -> CudaSliceMut<'a, T> {
        slice.reborrow()
    }

    fn len<T: Element>(slice: CudaSlice<'_, T>) -> usize {
        slice.len
    }

    fn len_mut<T: Element>(slice: &CudaSliceMut<'_, T>) -> usize {
        slice.len
    }

    fn narrow<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T> {
        slice.narrow(range)
    }

    fn narrow_mut<'a, T: Element>(
        slice: Self::SliceMut<'a, T>,
        range: Range<usize>,
    ) -> Self::SliceMut<'a, T> {
        slice.narrow(range)
    }

    fn upload<T: Element>(&self, from: &[T], to: CudaSliceMut<'_, T>) -> Result<()> {
        let handle = &self.0;
        handle.context.make_current()?;
        self.joins(&[Rc::clone(to.owner)], || {
            handle.staging.borrow_mut().upload(handle, bytes(from), to.address)
        })
    }

    fn download<T: Element>(&self, from: CudaSlice<'_, T>, to: &mut [T]) -> Result<()> {
        let handle = &self.0;
        handle.context.make_current()?;
        self.joins(&[Rc::clone(from.owner)], || {
            handle.staging.borrow_mut().download(handle, from.address, bytes_mut(to))
        })
    }

    fn synchronize(&self) -> Result<()> {
        self.0.wait()
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { live: self.0.memory.live.get(), peak: self.0.memory.peak.get() }
    }
}
