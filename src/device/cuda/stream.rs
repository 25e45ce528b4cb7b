//! Streams and events.

use super::{context::Context, lock, status::driver};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

/// A stream. The device executes its work in launch order.
pub(super) struct Stream {
    pub(super) handle: CUstream,
    context: &'static Context,
}

impl Stream {
    /// Creates a stream that does not synchronize with the default stream. With `high_priority`,
    /// the GPU schedules the stream's blocks before waiting blocks of other streams. So a
    /// collective does not wait for all blocks of a matrix product.
    pub(super) fn new(context: &'static Context, high_priority: bool) -> Result<Self> {
        const NON_BLOCKING: u32 = 1;
        context.make_current()?;
        let (mut handle, mut least, mut greatest) = (std::ptr::null_mut(), 0, 0);
        // SAFETY: `handle` is valid for writing a stream, and the other pointers for writing an
        // int. The context is current.
        #[allow(unsafe_code)]
        unsafe {
            let code = sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest);
            driver("cuCtxGetStreamPriorityRange", code)?;
            let priority = if high_priority { greatest } else { least };
            let code = sys::cuStreamCreateWithPriority(&mut handle, NON_BLOCKING, priority);
            driver("cuStreamCreateWithPriority", code)?;
        }
        Ok(Self { handle, context })
    }

    /// Records an event after all work launched on the stream so far.
    pub(super) fn record_event(&self) -> Result<Event> {
        const DISABLE_TIMING: u32 = 2;
        self.context.make_current()?;
        let mut handle = lock(&self.context.spare_events).pop().unwrap_or(std::ptr::null_mut());
        if handle.is_null() {
            // SAFETY: `handle` is valid for writing an event; the context is current.
            #[allow(unsafe_code)]
            driver("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, DISABLE_TIMING) })?;
        }
        let event = Event { handle, context: self.context };
        // SAFETY: stream and event belong to the current context. A stream that already waits for
        // the event still waits for the event's earlier record.
        #[allow(unsafe_code)]
        driver("cuEventRecord", unsafe { sys::cuEventRecord(event.handle, self.handle) })?;
        Ok(event)
    }

    /// Makes all later work of the stream wait for an event.
    pub(super) fn wait_event(&self, event: &Event) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: both are live. If the event is recorded again later, the stream still waits for
        // the earlier record.
        #[allow(unsafe_code)]
        driver("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) })
    }

    /// Waits until the stream has finished all its work.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: the stream is live.
        #[allow(unsafe_code)]
        driver("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Waits, because pending work uses memory that is freed after the stream.
        let _ = self.synchronize();
        // SAFETY: the stream is live and is not used again.
        #[allow(unsafe_code)]
        let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
    }
}

/// An event: a point in a stream's work.
pub struct Event {
    handle: CUevent,
    context: &'static Context,
}

impl Event {
    /// Whether all work before the event has finished.
    pub(super) fn is_complete(&self) -> Result<bool> {
        self.context.make_current()?;
        // SAFETY: the event is live.
        #[allow(unsafe_code)]
        match unsafe { sys::cuEventQuery(self.handle) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => driver("cuEventQuery", code).map(|()| true),
        }
    }
}

impl Drop for Event {
    /// Keeps the driver's event for reuse.
    fn drop(&mut self) {
        lock(&self.context.spare_events).push(self.handle);
    }
}
