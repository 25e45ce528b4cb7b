//! The interface to devices whose memory and streams NCCL uses.

use crate::{comm::ReduceOp, device::Element, error::Result, kernels::Pointwise};
use std::{ffi::c_void, rc::Rc, sync::Arc};

/// A function that makes a device the current one of the thread that calls the function.
pub type MakeCurrent = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// A device whose memory and streams NCCL can use.
///
/// # Safety
/// `address` and `address_mut` return the address of the view's first element. The memory there
/// holds as many elements as the view has. A library that works on `stream` may read this memory.
/// If the address came from `address_mut`, the library may also write it. Memory that a handle
/// allocated is freed only after the work that was launched on the handle's stream before the
/// memory was dropped. `wait_event` makes all later work of the handle wait for the event.
#[allow(unsafe_code)]
pub unsafe trait NcclDevice: Pointwise {
    /// A point in a stream's work.
    type Event: 'static;

    /// Creates a handle of the same device and memory, with its own stream.
    fn comm_stream(&self) -> Result<Self>;

    /// Lets the other devices access this device's memory. The group calls this if its ranks are
    /// threads of one process, because NCCL's kernels then access the tensors of other devices
    /// directly.
    fn open_memory(&self) -> Result<()>;

    /// Makes this device the calling thread's current one.
    fn make_current(&self) -> Result<()>;

    /// Returns a function that makes this device current on another thread. The function may
    /// outlive every handle of the device.
    fn make_current_fn(&self) -> MakeCurrent;

    /// Returns the driver's handle of the stream.
    fn stream(&self) -> *mut c_void;

    /// Records an event after all work launched on this handle so far.
    fn record_event(&self) -> Result<Self::Event>;

    /// Makes later work of this handle wait for an event. Does not block the thread.
    fn wait_event(&self, event: &Self::Event) -> Result<()>;

    /// Whether all work before an event has finished.
    fn is_complete(&self, event: &Self::Event) -> Result<bool>;

    /// Registers a function that this handle's thread calls repeatedly while it waits for the
    /// device, and one more time after the wait. If `poll` returns an error, the waiting call
    /// returns that error. The handle keeps only a weak reference to `poll`.
    fn poll_while_waiting(&self, poll: &Rc<dyn Fn() -> Result<()>>);

    /// Returns the handle that allocated a view's memory, if an operation on the view has to wait
    /// for the stream of that handle. Returns none if this handle allocated the memory, or if the
    /// owner of both handles already orders their work by events.
    ///
    /// # Errors
    /// When the memory belongs to another device.
    fn foreign_stream<T: Element>(&self, slice: Self::Slice<'_, T>) -> Result<Option<Self>>;

    /// to ← the reduction of `ranks` terms in rank order, computed with values of the accumulator
    /// type. The result has the bits of thread ranks. The terms are stored one after another.
    ///
    /// # Errors
    /// When the device returns an error.
    fn combine<T: Element>(
        &self,
        op: ReduceOp,
        ranks: usize,
        terms: Self::Slice<'_, T>,
        to: Self::SliceMut<'_, T>,
    ) -> Result<()>;

    /// Returns the address of a view's first element.
    fn address<T: Element>(slice: Self::Slice<'_, T>) -> *const c_void;

    /// Returns the address of an exclusive view's first element.
    fn address_mut<T: Element>(slice: &mut Self::SliceMut<'_, T>) -> *mut c_void;
}
