//! Settings of a group over NCCL.

use std::time::Duration;

/// The order in which sums are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// NCCL's: the fastest, in its own order and rounding. Runs on one machine usually give the
    /// same bits, but NCCL does not guarantee it.
    #[default]
    Any,
    /// Rank order, in the accumulator, rounded once: the bits of thread ranks. Every rank receives
    /// all ranks' terms of its shard, sums them and gathers the sums: an all-reduce moves the bytes
    /// of a reduce-scatter and an all-gather.
    Ranks,
}

/// How a group uses NCCL.
#[derive(Clone, Debug)]
pub struct Options {
    /// The order in which sums are computed.
    pub order: Order,
    /// After how many calls the ranks compare call signatures. They always compare the first call
    /// of a kind.
    pub check_every: usize,
    /// The longest time that a collective may run, and that a rank waits for the others to create a
    /// communicator.
    pub deadline: Duration,
    /// Whether NCCL's calls block inside NCCL while they wait for other ranks: for connections, at
    /// the first call of a kind or of a size for which NCCL selects another algorithm.
    ///
    /// If so, a call costs microseconds. Otherwise NCCL creates a thread for every call, and the
    /// rank polls until the call is done, which takes tens of microseconds; in return the rank
    /// itself checks for lost ranks throughout. Neither setting waits for a lost rank. Where calls
    /// block, an abort from another thread ends them, as in PyTorch; NCCL's guide advises against
    /// that.
    pub blocking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { order: Order::Any, check_every: 64, deadline: Duration::from_secs(120), blocking: true }
    }
}
