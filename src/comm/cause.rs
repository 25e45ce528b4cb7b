//! Why a group of processes is broken.

use super::Call;
use crate::error::{Error, LostReason, Mismatch};
use std::time::Duration;

#[derive(Clone, Debug)]
pub(super) enum Cause {
    /// A rank of the group was lost.
    Lost {
        rank: usize,
        reason: LostReason,
    },
    /// The first process was lost, by way of which all messages go; it is no rank of the group.
    Way {
        reason: LostReason,
    },
    Disagreement(Box<Mismatch>),
    Deadline {
        missing: Vec<usize>,
        after: Duration,
    },
}

impl Cause {
    /// What a call on the group of that name is told.
    pub(super) fn error(&self, call: &Call, group: &str) -> Error {
        let (op, seq, group, site) = (call.op.name(), call.seq, group.to_string(), call.site);
        match self.clone() {
            Self::Disagreement(mismatch) => Error::Mismatch(mismatch),
            Self::Way { reason } => Error::PeerLost { rank: 0, reason, op, seq, group: "world".into(), site },
            Self::Lost { rank, reason } => Error::PeerLost { rank, reason, op, seq, group, site },
            Self::Deadline { missing, after } => Error::Deadline { missing, op, seq, group, site, after },
        }
    }
}
