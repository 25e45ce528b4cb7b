//! Streams of work, and marks in them.

use super::{context::Context, status::driver};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

/// A stream of the device's work, done in the order in which it was asked for.
pub(super) struct Stream {
    pub(super) handle: CUstream,
    context: &'static Context,
}

impl Stream {
    /// A stream that does not wait for the default one.
    pub(super) fn new(context: &'static Context) -> Result<Self> {
        const NON_BLOCKING: u32 = 1;
        context.make_current()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a place for a stream; the context is current.
        #[allow(unsafe_code)]
        driver("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut handle, NON_BLOCKING) })?;
        Ok(Self { handle, context })
    }

    /// A mark behind everything that was asked of the stream so far.
    pub(super) fn mark(&self) -> Result<Mark> {
        const DISABLE_TIMING: u32 = 2;
        self.context.make_current()?;
        let mut mark = Mark { event: std::ptr::null_mut(), context: self.context };
        // SAFETY: `event` is a place for an event; stream and event are of the current context.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuEventCreate", sys::cuEventCreate(&mut mark.event, DISABLE_TIMING))?;
            driver("cuEventRecord", sys::cuEventRecord(mark.event, self.handle))?;
        }
        Ok(mark)
    }

    /// Lets everything that is asked of the stream later wait for a mark.
    pub(super) fn after(&self, mark: &Mark) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: both live. An event may be destroyed while a stream waits for it.
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
    fn drop(&mut self) {
        if !self.event.is_null() && self.context.make_current().is_ok() {
            // SAFETY: the event lives, and is not used again.
            #[allow(unsafe_code)]
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
