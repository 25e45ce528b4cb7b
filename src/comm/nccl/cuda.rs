//! What NCCL has to know of NVIDIA GPUs.

use super::{NcclDevice, device::Enter};
use crate::{
    comm::ReduceOp,
    device::{
        Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Mark},
    },
    error::Result,
};
use std::{ffi::c_void, rc::Rc};

// SAFETY: addresses are those of the views, in memory of the GPU on which the streams are; memory goes back in the order of the
// stream of the handle that it came from; `after` is the driver's wait for an event.
#[allow(unsafe_code)]
unsafe impl NcclDevice for Cuda {
    type Mark = Mark;

    fn beside(&self) -> Result<Self> {
        Cuda::beside(self)
    }

    fn open_memory(&self) -> Result<()> {
        Cuda::open_memory(self)
    }

    fn make_current(&self) -> Result<()> {
        Cuda::make_current(self)
    }

    fn elsewhere(&self) -> Enter {
        Cuda::elsewhere(self)
    }

    fn stream(&self) -> *mut c_void {
        Cuda::stream(self)
    }

    fn mark(&self) -> Result<Mark> {
        Cuda::mark(self)
    }

    fn after(&self, mark: &Mark) -> Result<()> {
        Cuda::after(self, mark)
    }

    fn is_reached(&self, mark: &Mark) -> Result<bool> {
        Cuda::is_reached(self, mark)
    }

    fn while_waiting(&self, look: &Rc<dyn Fn() -> Result<()>>) {
        Cuda::while_waiting(self, look);
    }

    fn foreign<T: Element>(&self, slice: CudaSlice<'_, T>) -> Result<Option<Self>> {
        Cuda::foreign(self, &slice.owner())
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
