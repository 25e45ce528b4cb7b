//! What NCCL needs of a device.

use crate::{comm::ReduceOp, device::Element, error::Result, kernels::Pointwise};
use std::{ffi::c_void, rc::Rc, sync::Arc};

/// Makes a device the current one of the thread that calls it.
pub type MakeCurrent = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// A device whose memory and streams NCCL can use.
///
/// # Safety
/// `address` and `address_mut` return the address of the first of as many elements as the view has,
/// in memory that a library working on `stream` may read, and in the second case write. Memory that
/// a handle allocated is not freed before the work launched on its stream until then has finished.
/// `wait_event` makes all later work of the handle wait for the event.
#[allow(unsafe_code)]
pub unsafe trait NcclDevice: Pointwise {
    /// A point in a stream's work.
    type Event: 'static;

    /// Creates a handle of the same device and memory with a stream of its own.
    fn comm_stream(&self) -> Result<Self>;

    /// Lets the other devices access this one's memory. Called if ranks with several devices share
    /// a process: NCCL's kernels then access each other's tensors directly.
    fn open_memory(&self) -> Result<()>;

    /// Makes the device the calling thread's current one.
    fn make_current(&self) -> Result<()>;

    /// Returns a function that makes the device current on another thread. It may outlive every
    /// handle of the device.
    fn make_current_fn(&self) -> MakeCurrent;

    /// The stream, as the driver knows it.
    fn stream(&self) -> *mut c_void;

    /// Records an event after all work launched on this handle so far.
    fn record_event(&self) -> Result<Self::Event>;

    /// Makes later work of this handle wait for an event. Returns immediately.
    fn wait_event(&self, event: &Self::Event) -> Result<()>;

    /// Whether all work before an event has finished.
    fn is_complete(&self, event: &Self::Event) -> Result<bool>;

    /// Registers a function that this handle's thread calls repeatedly while it waits for the
    /// device, and once after the wait. An error of `poll` ends the wait, and the waiting call
    /// returns it. The handle keeps only a weak reference to `poll`.
    fn poll_while_waiting(&self, poll: &Rc<dyn Fn() -> Result<()>>);

    /// The handle that allocated a view's memory, if its stream is a foreign one: events of this
    /// handle do not order its work.
    ///
    /// # Errors
    /// When the memory is another device's.
    fn foreign_stream<T: Element>(&self, slice: Self::Slice<'_, T>) -> Result<Option<Self>>;

    /// to ← the reduction of `ranks` terms, stored one after another, in rank order, in the
    /// accumulator: the bits of thread ranks.
    ///
    /// # Errors
    /// When the device refuses.
    fn combine<T: Element>(
        &self,
        op: ReduceOp,
        ranks: usize,
        terms: Self::Slice<'_, T>,
        to: Self::SliceMut<'_, T>,
    ) -> Result<()>;

    /// The address of a view's first element.
    fn address<T: Element>(slice: Self::Slice<'_, T>) -> *const c_void;

    /// The address of an exclusive view's first element.
    fn address_mut<T: Element>(slice: &mut Self::SliceMut<'_, T>) -> *mut c_void;
}
