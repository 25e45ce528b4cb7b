//! Settings of a group over NCCL.

use std::time::Duration;

/// The order in which a group computes sums. Max and min do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// NCCL chooses the order and the rounding. This is fastest. Runs on one machine usually give
    /// the same bits, but NCCL does not guarantee this.
    #[default]
    Any,
    /// The ranks' terms are added in rank order, as values of the accumulator type. Only the sum is
    /// rounded to the element type. The sum has the same bits as the sum of a group of thread
    /// ranks. Every rank receives all ranks' terms of its shard and sums them. In an all-reduce the
    /// ranks then gather the sums, so an all-reduce moves as many bytes as a reduce-scatter and an
    /// all-gather together.
    Ranks,
}

/// How a group uses NCCL.
#[derive(Clone, Debug)]
pub struct Options {
    /// The order in which sums are computed.
    pub order: Order,
    /// The number of calls after which the ranks compare call signatures. They always compare the
    /// first call of a kind. Ranks of one process compare every call.
    pub check_every: usize,
    /// The longest time that a collective may run. Also the longest time that a rank waits for the
    /// other ranks to create a communicator.
    pub deadline: Duration,
    /// Whether a call blocks inside NCCL while NCCL connects the ranks. NCCL connects them at the
    /// first call of each kind, and again at the first call whose size makes it select another
    /// algorithm.
    ///
    /// If true, a call costs microseconds. If false, NCCL creates a thread for every call, and the
    /// rank polls until the call is done. This costs tens of microseconds, but the rank itself
    /// checks for lost ranks throughout.
    ///
    /// With either setting, no rank waits forever for a lost rank. Another thread ends a blocked
    /// call by an abort, as in PyTorch. NCCL's guide advises against such an abort.
    pub blocking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { order: Order::Any, check_every: 64, deadline: Duration::from_secs(120), blocking: true }
    }
}
