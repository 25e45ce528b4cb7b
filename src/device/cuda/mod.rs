//! NVIDIA GPUs: memory, streams, and the loading of kernels. Feature `cuda`.
//!
//! A [`Cuda`] is one rank's handle of a GPU, with its own stream. Operations are asynchronous: the
//! GPU executes them in stream order while the rank's thread continues. The thread waits only when
//! it reads values back to the host. The driver, NVRTC and cuBLASLt are loaded at first use, so
//! neither building nor running needs a toolkit.
//!
//! The first handle of a GPU in a process loads all kernels, and they stay loaded. A later load
//! could wait until the GPU is idle, and the GPU is not idle while a collective on it waits for
//! another rank. A cache on disk keeps compiled kernels (`SHARDWISE_CACHE`, or `shardwise` in the
//! user's cache folder). If the cache does not have all kernels for the GPU, the process compiles
//! the missing ones on several threads. [`precompile`] compiles them in advance.
//!
//! # Requirements
//!
//! A GPU of compute capability 8.0 (Ampere) or later, and
//!
//! | library | versions | comes with |
//! |---|---|---|
//! | the driver, `libcuda.so.1` | for CUDA 12.0 and later | the GPU's kernel module |
//! | `libnvrtc` | 12 and 13, at most the driver's CUDA | a toolkit; pip's [^nvrtc] |
//! | `libcublasLt` | 12 and 13, at most the driver's CUDA | a toolkit; pip's [^cublas] |
//! | `libnccl.so.2`, for [`crate::comm::nccl`] | 2.18 and later | pip's [^nccl] |
//!
//! [^nvrtc]: `nvidia-cuda-nvrtc` (13), `nvidia-cuda-nvrtc-cu12`
//! [^cublas]: `nvidia-cublas` (13), `nvidia-cublas-cu12`
//! [^nccl]: `nvidia-nccl-cu13`, `nvidia-nccl-cu12`
//!
//! # Search for libraries
//!
//! 1. In the folder that `SHARDWISE_CUDA_LIBRARIES` names. `SHARDWISE_NCCL` names NCCL's file. If
//!    `SHARDWISE_NCCL` is set, NCCL is searched nowhere else.
//! 2. On the loader's path (`LD_LIBRARY_PATH`, `ld.so.conf`). The loader has to find the same
//!    driver as this search.
//! 3. Where conda (`lib`) and pip (`site-packages/nvidia/…/lib`) install them: in `VIRTUAL_ENV`,
//!    `CONDA_PREFIX`, `~/.local`, `/usr/local` and `/usr`.
//! 4. In the `lib64` of a toolkit: `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`. NCCL is not
//!    searched there.
//!
//! If a library is missing or too old, the [`Error`] names the library, the missing function or the
//! required version, and the searched places.
//!
//! # Numerics
//!
//! * cuBLASLt computes products. It accumulates in f64 or f32. It rounds f32 operands to TF32 only
//!   after [`Cuda::allow_tf32`]. It adds partial sums in a fixed order, so every run on one kind of
//!   GPU gives the same bits.
//! * Where cuBLASLt supports it, one of these operations is fused with a product: a bias, GELU
//!   (tanh) in bf16 or f16, the derivative of this GELU, or a bias gradient in f32. The product is
//!   not rounded before the fused operation.
//! * Kernels add in a fixed order, which does not depend on the alignment of memory. No kernel uses
//!   atomic sums.
//! * Products with quantized weights and activations of 8 bits have the same bits as on the CPU.
//! * Attention of bf16 and f16 runs on tensor cores if heads have at most 128 features and every
//!   row begins at a multiple of 16 bytes. Heads have such rows if their number of features is a
//!   multiple of 8 and their views begin at aligned offsets. On tensor cores, attention rounds the
//!   weights to the element type before it multiplies them by the values. Attention to a cache uses
//!   no tensor cores for sequences of at most 8 rows.
//! * [`crate::comm::nccl::Order`] selects the order of sums in collectives.
//!
//! # Without a GPU
//!
//! `scripts/cuda_standin.sh COMMAND` runs a command with a stand-in for the four libraries. The
//! stand-in is for tests. It has eight devices, compiles kernels for the CPU and checks every
//! memory access.

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
pub(crate) mod version;

pub(crate) use families::Kernel;
pub(crate) use launch::{Grid, Launch};
pub(crate) use matmul::{Epilogue, Layout, Lt, Matmul, Operands};
pub use memory::{CudaBuffer, CudaSlice, CudaSliceMut};
pub use program::precompile;
pub use stream::Event;
pub(crate) use table::Table;
pub use version::{Version, versions};

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

/// One rank's handle of a GPU, with its own stream.
///
/// Handles of one GPU share its memory. An operation of one handle may use a tensor of another
/// handle. The operation then waits for earlier work of the other handle's stream, and later work
/// of that stream waits for the operation.
#[derive(Clone)]
pub struct Cuda(Rc<Handle>);

pub(crate) struct Handle {
    // These two fields free memory in stream order, so they are dropped before the stream.
    lt: OnceCell<Lt>,
    tables: RefCell<Tables>,
    stream: Stream,
    staging: RefCell<Staging>,
    context: &'static Context,
    /// Handles share this value if their owner orders their work by events.
    order: Rc<()>,
    /// The functions that the handle's thread calls while it waits for the device.
    polls: RefCell<Vec<Weak<dyn Fn() -> Result<()>>>>,
    memory: Rc<Counters>,
    poison: bool,
    exact: Cell<bool>,
}

/// The bytes in use by tensors, over the handles that share these counters.
#[derive(Default)]
struct Counters {
    live: Cell<usize>,
    peak: Cell<usize>,
}

impl Counters {
    fn add(&self, bytes: usize) {
        self.live.set(self.live.get() + bytes);
        self.peak.set(self.peak.get().max(self.live.get()));
    }

    fn subtract(&self, bytes: usize) {
        self.live.set(self.live.get().saturating_sub(bytes));
    }
}

/// Locks a mutex, even if a thread panicked while it held the lock, because the data behind these
/// locks is always valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// Returns a handle of the GPU with this number.
    ///
    /// # Errors
    /// When there is no such GPU or no driver, or a library is missing or too old. The error names
    /// the library and the places that were searched.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with(ordinal, false)
    }

    /// Returns a handle that fills new tensors with NaN, so that tests find a kernel that leaves an
    /// element unwritten.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn poisoned(ordinal: usize) -> Result<Self> {
        Self::with(ordinal, true)
    }

    fn with(ordinal: usize, poison: bool) -> Result<Self> {
        let cuda = Self::on(Context::of(ordinal)?, Rc::default(), Rc::default(), poison, false)?;
        // Makes the driver allocate before there are collectives.
        cuda.0.staging.borrow_mut().memory(cuda.0.context)?;
        cuda.lt()?;
        Ok(cuda)
    }

    fn on(
        context: &'static Context,
        order: Rc<()>,
        memory: Rc<Counters>,
        poison: bool,
        high_priority: bool,
    ) -> Result<Self> {
        Ok(Self(Rc::new(Handle {
            stream: Stream::new(context, high_priority)?,
            staging: RefCell::default(),
            tables: RefCell::default(),
            lt: OnceCell::new(),
            context,
            order,
            polls: RefCell::default(),
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

    /// The bytes of memory of this GPU, free and in use.
    pub fn total_memory(&self) -> usize {
        self.0.context.total_memory
    }

    /// Sets whether later products of f32 may use TF32, with 10 bits of mantissa. By default they
    /// may not.
    pub fn allow_tf32(&self, allow: bool) {
        self.0.exact.set(!allow);
    }

    /// Returns a handle of the same GPU and memory, with its own high-priority stream. The caller
    /// orders the work of the two handles by events.
    #[cfg(feature = "nccl")]
    pub(crate) fn comm_stream(&self) -> Result<Self> {
        let handle = &self.0;
        let (order, memory) = (Rc::clone(&handle.order), Rc::clone(&handle.memory));
        let cuda = Self::on(handle.context, order, memory, handle.poison, true)?;
        cuda.0.exact.set(handle.exact.get());
        Ok(cuda)
    }

    /// Makes the GPU the calling thread's current one.
    #[cfg(feature = "nccl")]
    pub(crate) fn make_current(&self) -> Result<()> {
        self.0.context.make_current()
    }

    /// Returns a function that makes the GPU current on another thread.
    #[cfg(feature = "nccl")]
    pub(crate) fn make_current_fn(&self) -> std::sync::Arc<dyn Fn() -> Result<()> + Send + Sync> {
        let context = self.0.context;
        std::sync::Arc::new(move || context.make_current())
    }

    /// Lets the other GPUs access this GPU's memory, if they are connected.
    #[cfg(feature = "nccl")]
    pub(crate) fn open_memory(&self) -> Result<()> {
        self.0.context.open_memory()
    }

    /// Returns the driver's handle of the stream.
    #[cfg(feature = "nccl")]
    pub(crate) fn stream(&self) -> *mut std::ffi::c_void {
        self.0.stream.handle.cast()
    }

    /// Records an event after all work launched on this handle so far.
    pub(crate) fn record_event(&self) -> Result<Event> {
        self.0.stream.record_event()
    }

    /// Makes later work of this handle wait for an event.
    pub(crate) fn wait_event(&self, event: &Event) -> Result<()> {
        self.0.stream.wait_event(event)
    }

    /// Whether all work before an event has finished.
    #[cfg(feature = "nccl")]
    pub(crate) fn is_complete(&self, event: &Event) -> Result<bool> {
        event.is_complete()
    }

    /// Makes this handle's thread call `poll` repeatedly while it waits for the device. If `poll`
    /// returns an error, the wait ends with that error.
    #[cfg(feature = "nccl")]
    pub(crate) fn poll_while_waiting(&self, poll: &Rc<dyn Fn() -> Result<()>>) {
        let mut polls = self.0.polls.borrow_mut();
        polls.retain(|poll| poll.strong_count() > 0);
        let poll = Rc::downgrade(poll);
        if !polls.iter().any(|known| known.ptr_eq(&poll)) {
            polls.push(poll);
        }
    }

    /// Whether products of f32 keep all bits of their operands (no TF32).
    pub(crate) fn is_exact(&self) -> bool {
        self.0.exact.get()
    }

    pub(crate) fn lt(&self) -> Result<&Lt> {
        if self.0.lt.get().is_none() {
            let _ = self.0.lt.set(Lt::new(self)?);
        }
        self.0.lt.get().ok_or_else(|| Error::internal("cuBLASLt", "the handle was not created"))
    }

    /// Runs `work`, which launches on this handle and uses memory of the `others`. The launch runs
    /// after their earlier work, and their later work runs after the launch.
    pub(crate) fn joins(&self, others: &[Rc<Handle>], work: impl FnOnce() -> Result<()>) -> Result<()> {
        let foreign = others.iter().map(|other| self.foreign_stream(other));
        let foreign = foreign.filter_map(Result::transpose).collect::<Result<Vec<_>>>()?;
        foreign.iter().try_for_each(|other| self.wait_event(&other.record_event()?))?;
        work()?;
        if foreign.is_empty() {
            return Ok(());
        }
        let done = self.record_event()?;
        foreign.iter().try_for_each(|other| other.wait_event(&done))
    }

    /// Returns `other`, if an operation of this handle on memory of `other` has to wait for the
    /// stream of `other`. Returns none if both are the same handle, or if their owner already
    /// orders their work by events. If `other` is a handle of another GPU, returns an error.
    pub(crate) fn foreign_stream(&self, other: &Rc<Handle>) -> Result<Option<Self>> {
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
    /// Waits until the stream has finished all its work.
    fn wait(&self) -> Result<()> {
        if self.polls.borrow().is_empty() {
            return self.stream.synchronize();
        }
        let event = self.stream.record_event()?;
        self.wait_for(&event)
    }

    /// Waits for an event. Calls the registered functions during the wait, and one more time after
    /// it.
    fn wait_for(&self, event: &Event) -> Result<()> {
        loop {
            let reached = event.is_complete()?;
            let polls: Vec<_> = self.polls.borrow().iter().filter_map(Weak::upgrade).collect();
            polls.iter().try_for_each(|poll| poll())?;
            if reached {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Handle {
    /// Waits for the stream's work, because the memory that the work uses is freed next.
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
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
