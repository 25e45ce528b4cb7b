//! Streams of work, and marks in them.

use super::{context::Context, lock, status::driver};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

/// A stream of the device's work, done in the order in which it was asked for.
pub(super) struct Stream {
    pub(super) handle: CUstream,
    context: &'static Context,
}

impl Stream {
    /// A stream that does not wait for the default one. Blocks of an `urgent` one go before those
    /// of others that wait for a place on the GPU: a collective does not stand behind all of a
    /// product's blocks.
    pub(super) fn new(context: &'static Context, urgent: bool) -> Result<Self> {
        const NON_BLOCKING: u32 = 1;
        context.make_current()?;
        let (mut handle, mut least, mut greatest) = (std::ptr::null_mut(), 0, 0);
        // SAFETY: `handle` is a place for a stream, the others are places for an int; the context
        // is current.
        #[allow(unsafe_code)]
        unsafe {
            let code = sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest);
            driver("cuCtxGetStreamPriorityRange", code)?;
            let priority = if urgent { greatest } else { least };
            let code = sys::cuStreamCreateWithPriority(&mut handle, NON_BLOCKING, priority);
            driver("cuStreamCreateWithPriority", code)?;
        }
        Ok(Self { handle, context })
    }

    /// A mark behind everything that was asked of the stream so far.
    pub(super) fn mark(&self) -> Result<Mark> {
        const DISABLE_TIMING: u32 = 2;
        self.context.make_current()?;
        let mut event = lock(&self.context.spare_events).pop().unwrap_or(std::ptr::null_mut());
        if event.is_null() {
            // SAFETY: `event` is a place for an event; the context is current.
            #[allow(unsafe_code)]
            driver("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, DISABLE_TIMING) })?;
        }
        let mark = Mark { event, context: self.context };
        // SAFETY: stream and event are of the current context. What waits for the event already
        // waits for what it was recorded behind when it began to wait.
        #[allow(unsafe_code)]
        driver("cuEventRecord", unsafe { sys::cuEventRecord(mark.event, self.handle) })?;
        Ok(mark)
    }

    /// Lets everything that is asked of the stream later wait for a mark.
    pub(super) fn after(&self, mark: &Mark) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: both live. An event may be recorded anew while a stream waits for it.
        #[allow(unsafe_code)]
        driver("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.handle, mark.event, 0) })
    }

    /// Returns when the stream has nothing left to do.
    pub(super) fn finish(&self) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: the stream lives.
        #[allow(unsafe_code)]
        driver("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What the stream still has to do uses memory and kernels that go after it.
        let _ = self.finish();
        // SAFETY: the stream lives, and is not used again.
        #[allow(unsafe_code)]
        let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
    }
}

/// A point in a stream's work.
pub struct Mark {
    event: CUevent,
    context: &'static Context,
}

impl Mark {
    /// Whether the work before it is done.
    pub(super) fn is_reached(&self) -> Result<bool> {
        self.context.make_current()?;
        // SAFETY: the event lives.
        #[allow(unsafe_code)]
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => driver("cuEventQuery", code).map(|()| true),
        }
    }
}

impl Drop for Mark {
    /// The event is for the next mark.
    fn drop(&mut self) {
        lock(&self.context.spare_events).push(self.event);
    }
}
