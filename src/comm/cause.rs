//! The failure that broke a group.

use super::Call;
use crate::error::{Error, LostReason, Mismatch};
use std::time::Duration;

/// The failure that every later call on a broken group returns.
#[derive(Clone, Debug)]
pub(super) enum Cause {
    /// A rank of the group was lost.
    Lost { rank: usize, reason: LostReason },
    /// Rank 0 of the world was lost. It relays all messages, but is not a rank of this group.
    Relay { reason: LostReason },
    /// The ranks made different calls.
    Disagreement(Box<Mismatch>),
    /// Ranks did not join a call within the deadline.
    Deadline { missing: Vec<usize>, after: Duration },
}

impl Cause {
    /// The error that `call` on the group named `group` returns.
    pub(super) fn error(&self, call: &Call, group: &str) -> Error {
        let (op, seq, group, site) = (call.op.name(), call.seq, group.to_string(), call.site);
        match self.clone() {
            Self::Disagreement(mismatch) => Error::Mismatch(mismatch),
            Self::Relay { reason } => {
                Error::PeerLost { rank: 0, reason, op, seq, group: "world".into(), site }
            }
            Self::Lost { rank, reason } => Error::PeerLost { rank, reason, op, seq, group, site },
            Self::Deadline { missing, after } => Error::Deadline { missing, op, seq, group, site, after },
        }
    }
}
