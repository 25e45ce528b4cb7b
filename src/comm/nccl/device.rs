//! What NCCL has to know of a device.

use crate::{comm::ReduceOp, device::Element, error::Result, kernels::Pointwise};
use std::{ffi::c_void, rc::Rc, sync::Arc};

/// Makes a device the current one of the thread that calls it.
pub type Enter = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// A device whose memory and streams NCCL can use.
///
/// # Safety
/// `address` and `address_mut` give the first of as many elements as the view has, in memory that a library which works on
/// `stream` may read, and write. Memory that a handle gave is not taken back before what was asked of its stream until then
/// is done. `after` makes everything that is asked of the handle later wait for the mark.
#[allow(unsafe_code)]
pub unsafe trait NcclDevice: Pointwise {
    /// A point in a stream's work.
    type Mark: 'static;

    /// Another handle of the same device and memory, with a stream of its own.
    fn beside(&self) -> Result<Self>;

    /// Lets the other devices reach this one's memory. Called where ranks with several devices share a process: NCCL's kernels
    /// then read and write each other's tensors directly.
    fn open_memory(&self) -> Result<()>;

    /// Makes the device the calling thread's current one.
    fn make_current(&self) -> Result<()>;

    /// What makes the device current on another thread, also when no handle of it lives any more.
    fn elsewhere(&self) -> Enter;

    /// The stream, as the driver knows it.
    fn stream(&self) -> *mut c_void;

    /// A mark behind everything that was asked of this handle so far.
    fn mark(&self) -> Result<Self::Mark>;

    /// Lets what is asked of this handle later wait for a mark. Returns at once.
    fn after(&self, mark: &Self::Mark) -> Result<()>;

    /// Whether a mark has been reached.
    fn is_reached(&self, mark: &Self::Mark) -> Result<bool>;

    /// While this handle's thread waits for the device it calls `look` again and again, and once after the wait; an error of it
    /// ends the wait, and is what the waiting call returns. `look` is forgotten when nobody else holds it.
    fn while_waiting(&self, look: &Rc<dyn Fn() -> Result<()>>);

    /// The handle that a view's memory came from, where marks of this one do not order what is done with it.
    ///
    /// # Errors
    /// When the memory is another device's.
    fn foreign<T: Element>(&self, slice: Self::Slice<'_, T>) -> Result<Option<Self>>;

    /// to ← the reduction of `ranks` terms that lie one after another, in rank order, in the accumulator: the bits of thread
    /// ranks.
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

    /// Where a view begins.
    fn address<T: Element>(slice: Self::Slice<'_, T>) -> *const c_void;

    /// Where an exclusive view begins.
    fn address_mut<T: Element>(slice: &mut Self::SliceMut<'_, T>) -> *mut c_void;
}
