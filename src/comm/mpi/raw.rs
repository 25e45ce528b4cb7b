//! Messages that own their memory for as long as MPI may touch it.

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

/// A communicator that no other code sends over.
pub(super) struct WorldComm(ManuallyDrop<SimpleCommunicator>);

/// A message in transit, in either direction.
pub(super) struct PendingMessage {
    /// None once the message has arrived or MPI has taken it.
    request: Option<ffi::MPI_Request>,
    numbers: Rc<Vec<u64>>,
}

impl WorldComm {
    /// Duplicates MPI's world. Every process calls it.
    pub(super) fn duplicate_world() -> Self {
        Self(ManuallyDrop::new(SimpleCommunicator::world().duplicate()))
    }

    pub(super) fn rank(&self) -> usize {
        self.0.rank() as usize
    }

    pub(super) fn size(&self) -> usize {
        self.0.size() as usize
    }

    /// The largest tag.
    pub(super) fn last_tag(&self) -> Tag {
        let (mut value, mut found) = (ptr::null_mut::<c_void>(), 0);
        // SAFETY: MPI_TAG_UB is an attribute of the world whose value is a pointer to an int that
        // lives as long as MPI; it is read only if it was found.
        unsafe {
            let world = SimpleCommunicator::world().as_raw();
            ffi::MPI_Comm_get_attr(
                world,
                ffi::MPI_TAG_UB as i32,
                ptr::addr_of_mut!(value).cast(),
                &mut found,
            );
            // The least that the standard guarantees.
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
            // SAFETY: the numbers outlive the request: the message holds them, unchanged because
            // they are shared, until it is complete, and forever if it is dropped before.
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
            // SAFETY: the numbers outlive the request: the message holds them, untouched, until it
            // is complete, and forever if it is dropped before.
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
        // A group kept for longer than MPI lives has nothing to free.
        if !environment::is_finalized() {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

impl PendingMessage {
    /// Whether the message is complete.
    pub(super) fn is_done(&mut self) -> bool {
        if let Some(request) = &mut self.request {
            let mut flag = 0;
            // SAFETY: the request is not complete yet; once it is, MPI has freed it, and it is
            // forgotten.
            unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
            if flag != 0 {
                self.request = None;
            }
        }
        self.request.is_none()
    }

    /// The number of u64, known before they have arrived.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Returns the numbers, if they have arrived.
    pub(super) fn numbers(&mut self) -> Option<&[u64]> {
        self.is_done().then(|| &self.numbers[..])
    }

    /// Returns the numbers of a message that has arrived, without a copy.
    pub(super) fn into_numbers(mut self) -> Vec<u64> {
        assert!(self.is_done(), "a message is taken when it has arrived");
        Rc::try_unwrap(std::mem::take(&mut self.numbers)).unwrap_or_else(|shared| shared.to_vec())
    }
}

impl Drop for PendingMessage {
    fn drop(&mut self) {
        if !self.is_done() {
            // MPI may still read or write them.
            forget(Rc::clone(&self.numbers));
        }
    }
}
