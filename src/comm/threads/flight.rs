//! Started collectives. See `README.md`, R6.
//!
//! Starting a collective only posts the rank's input. `wait` computes the result, because a rank
//! has no second thread that could compute it meanwhile. The gain is that no rank waits for another
//! rank before it needs the result.

use super::{
    host::HostVec,
    sync::{AtomicUsize, Ordering},
};
use crate::{
    comm::Call,
    error::{Error, Result},
};
use std::sync::OnceLock;

/// A collective to which some ranks have posted their input.
#[derive(Debug)]
pub(super) struct Flight {
    posted: Box<[OnceLock<(Call, HostVec)>]>,
    count: AtomicUsize,
}

impl Flight {
    pub(super) fn new(size: usize) -> Self {
        Self { posted: (0..size).map(|_| OnceLock::new()).collect(), count: AtomicUsize::new(0) }
    }

    /// Posts a rank's input. Returns whether all ranks have posted now.
    pub(super) fn post(&self, call: &Call, rank: usize, input: HostVec) -> Result<bool> {
        if self.posted[rank].set((*call, input)).is_err() {
            return Err(Error::internal(call.op.name(), "a rank started one collective twice"));
        }
        Ok(self.count.fetch_add(1, Ordering::AcqRel) + 1 == self.posted.len())
    }

    pub(super) fn is_complete(&self) -> bool {
        self.count.load(Ordering::Acquire) == self.posted.len()
    }

    pub(super) fn missing(&self) -> Vec<usize> {
        (0..self.posted.len()).filter(|&rank| self.posted[rank].get().is_none()).collect()
    }

    pub(super) fn posts(&self) -> impl Iterator<Item = &(Call, HostVec)> + Clone {
        self.posted.iter().filter_map(OnceLock::get)
    }
}
