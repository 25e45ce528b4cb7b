//! MPI messages. Each message owns its memory as long as MPI may access that memory.

#![allow(unsafe_code)]

use ::mpi::{
    Tag,
    datatype::Equivalence,
    environment, ffi,
    point_to_point::Status,
    raw::AsRaw,
    request,
    topology::SimpleCommunicator,
    traits::{Communicator, Destination, Source},
};
use std::{
    ffi::c_void,
    mem::{ManuallyDrop, forget},
    ops::Range,
    ptr,
    rc::Rc,
};

/// A duplicate of MPI's world communicator, on which no other code sends.
pub(super) struct WorldComm(ManuallyDrop<SimpleCommunicator>);

/// A message that is being sent or received.
pub(super) struct PendingMessage {
    /// None once MPI has completed the request.
    request: Option<ffi::MPI_Request>,
    numbers: Rc<Vec<u64>>,
}

impl WorldComm {
    /// Duplicates MPI's world communicator. Every process calls this.
    pub(super) fn duplicate_world() -> Self {
        Self(ManuallyDrop::new(SimpleCommunicator::world().duplicate()))
    }

    pub(super) fn rank(&self) -> usize {
        self.0.rank() as usize
    }

    pub(super) fn size(&self) -> usize {
        self.0.size() as usize
    }

    /// Returns the largest tag.
    pub(super) fn last_tag(&self) -> Tag {
        let (mut value, mut found) = (ptr::null_mut::<c_void>(), 0);
        // SAFETY: the attribute MPI_TAG_UB of the world is a pointer to an int that lives as long
        // as MPI. The pointer is read only if MPI found the attribute.
        unsafe {
            let world = SimpleCommunicator::world().as_raw();
            ffi::MPI_Comm_get_attr(
                world,
                ffi::MPI_TAG_UB as i32,
                ptr::addr_of_mut!(value).cast(),
                &mut found,
            );
            // The MPI standard guarantees at least 32767.
            if found != 0 && !value.is_null() { *value.cast::<i32>() } else { 32_767 }
        }
    }

    /// Starts to send a range of `numbers`.
    pub(super) fn send(
        &self,
        to: usize,
        tag: Tag,
        numbers: &Rc<Vec<u64>>,
        range: Range<usize>,
    ) -> PendingMessage {
        let process = self.0.process_at_rank(to as i32);
        let request = request::scope(|scope| {
            let request = process.immediate_send_with_tag(scope, &numbers[range], tag);
            // SAFETY: the numbers outlive the request. The message keeps a shared reference until
            // the request is complete, so they stay unchanged. If the message is dropped earlier,
            // the numbers leak.
            unsafe { request.into_raw().0 }
        });
        PendingMessage { request: Some(request), numbers: Rc::clone(numbers) }
    }

    /// Returns a message that has begun to arrive, with its sender and tag.
    pub(super) fn arriving(&self) -> Option<(usize, Tag, PendingMessage)> {
        let (message, status): (_, Status) = self.0.any_process().immediate_matched_probe()?;
        let mut numbers = vec![0_u64; status.count(u64::equivalent_datatype()) as usize];
        let request = request::scope(|scope| {
            let request = message.immediate_matched_receive_into(scope, &mut numbers[..]);
            // SAFETY: the numbers outlive the request. The message owns them, untouched, until the
            // request is complete. If the message is dropped earlier, the numbers leak.
            unsafe { request.into_raw().0 }
        });
        let pending = PendingMessage { request: Some(request), numbers: Rc::new(numbers) };
        Some((status.source_rank() as usize, status.tag(), pending))
    }

    /// Ends all processes of the job.
    pub(super) fn abort(&self, code: i32) -> ! {
        self.0.abort(code)
    }
}

impl Drop for WorldComm {
    fn drop(&mut self) {
        // After MPI is finalized, a group that outlives MPI has nothing to free.
        if !environment::is_finalized() {
            // SAFETY: the communicator is not used again.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

impl PendingMessage {
    /// Whether MPI has completed the request.
    pub(super) fn is_done(&mut self) -> bool {
        if let Some(request) = &mut self.request {
            let mut flag = 0;
            // SAFETY: the request is not complete yet. When it is complete, MPI frees it and this
            // function forgets it.
            unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
            if flag != 0 {
                self.request = None;
            }
        }
        self.request.is_none()
    }

    /// Returns the number of u64 values, which is known before they arrive.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Returns the numbers, if they have arrived.
    pub(super) fn numbers(&mut self) -> Option<&[u64]> {
        self.is_done().then(|| &self.numbers[..])
    }

    /// Returns the numbers of a message that has arrived, without a copy.
    pub(super) fn into_numbers(mut self) -> Vec<u64> {
        assert!(self.is_done(), "the message has not arrived yet");
        Rc::try_unwrap(std::mem::take(&mut self.numbers)).unwrap_or_else(|shared| shared.to_vec())
    }
}

impl Drop for PendingMessage {
    fn drop(&mut self) {
        if !self.is_done() {
            // The numbers leak, because MPI may still read or write them.
            forget(Rc::clone(&self.numbers));
        }
    }
}
