//! [`NcclDevice`] for NVIDIA GPUs.

use super::{MakeCurrent, NcclDevice};
use crate::{
    comm::ReduceOp,
    device::{
        Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Event},
    },
    error::Result,
};
use std::{ffi::c_void, rc::Rc};

// SAFETY: each address is the start of its view, in memory of the GPU that runs the streams. The
// pool frees memory in the order of the allocating handle's stream. `wait_event` is the driver's
// wait for an event.
#[allow(unsafe_code)]
unsafe impl NcclDevice for Cuda {
    type Event = Event;

    fn comm_stream(&self) -> Result<Self> {
        Cuda::comm_stream(self)
    }

    fn open_memory(&self) -> Result<()> {
        Cuda::open_memory(self)
    }

    fn make_current(&self) -> Result<()> {
        Cuda::make_current(self)
    }

    fn make_current_fn(&self) -> MakeCurrent {
        Cuda::make_current_fn(self)
    }

    fn stream(&self) -> *mut c_void {
        Cuda::stream(self)
    }

    fn record_event(&self) -> Result<Event> {
        Cuda::record_event(self)
    }

    fn wait_event(&self, event: &Event) -> Result<()> {
        Cuda::wait_event(self, event)
    }

    fn is_complete(&self, event: &Event) -> Result<bool> {
        Cuda::is_complete(self, event)
    }

    fn poll_while_waiting(&self, poll: &Rc<dyn Fn() -> Result<()>>) {
        Cuda::poll_while_waiting(self, poll);
    }

    fn foreign_stream<T: Element>(&self, slice: CudaSlice<'_, T>) -> Result<Option<Self>> {
        Cuda::foreign_stream(self, &slice.owner())
    }

    fn combine<T: Element>(
        &self,
        op: ReduceOp,
        ranks: usize,
        terms: CudaSlice<'_, T>,
        to: CudaSliceMut<'_, T>,
    ) -> Result<()> {
        let how = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
        };
        Cuda::combine(self, how, ranks, terms, to)
    }

    fn address<T: Element>(slice: CudaSlice<'_, T>) -> *const c_void {
        slice.address() as *const c_void
    }

    fn address_mut<T: Element>(slice: &mut CudaSliceMut<'_, T>) -> *mut c_void {
        slice.address() as *mut c_void
    }
}
