//! A rank's endpoint in a group, and the groups that its thread has joined.

use super::shared::{Shared, Unread};
use crate::error::LostReason;
use std::{
    cell::RefCell,
    sync::{Arc, Weak},
};

/// One rank's endpoint in a group. Dropping it informs the other ranks that this rank has left.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(super) shared: Arc<Shared>,
    pub(super) rank: usize,
}

impl Endpoint {
    /// The list of messages that were never received in any group of the world. It is complete once
    /// all ranks have left.
    pub(crate) fn unread(&self) -> Unread {
        Arc::clone(&self.shared.unread)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.shared.leave(self.rank, std::thread::panicking().then_some(LostReason::Panicked));
    }
}

/// The groups that one thread has joined. When the thread ends, it leaves all these groups and
/// states the reason. It leaves even a group whose communicator was leaked.
#[derive(Debug, Default)]
pub(crate) struct JoinedGroups(RefCell<Vec<(Weak<Shared>, usize)>>);

impl JoinedGroups {
    pub(super) fn add(&self, endpoint: &Endpoint) {
        let mut groups = self.0.borrow_mut();
        groups.retain(|(group, _)| group.strong_count() > 0);
        groups.push((Arc::downgrade(&endpoint.shared), endpoint.rank));
    }

    /// Leaves every group, and informs its ranks of the reason.
    pub(crate) fn leave_all(&self, reason: LostReason) {
        for (group, rank) in self.0.take() {
            if let Some(group) = group.upgrade() {
                group.leave(rank, Some(reason));
            }
        }
    }
}

impl Drop for JoinedGroups {
    fn drop(&mut self) {
        self.leave_all(LostReason::Left);
    }
}
