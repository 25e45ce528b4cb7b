//! Why a group is broken, and the first loss that a rank has received.

use crate::error::{LostReason, Mismatch};
use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// The first loss that this rank has received: a rank of the world and the reason. It may be why
/// this rank leaves, so ranks that wait for this one receive that loss.
type FirstLoss = Cell<Option<(usize, LostReason)>>;

#[cfg(not(shuttle))]
thread_local! {
    static FIRST_LOSS: FirstLoss = const { Cell::new(None) };
}
// Shuttle runs its threads on one thread of the system.
#[cfg(shuttle)]
shuttle::thread_local! {
    static FIRST_LOSS: FirstLoss = Cell::new(None);
}

/// Returns the first loss that this rank has received.
pub(super) fn first_loss() -> Option<(usize, LostReason)> {
    FIRST_LOSS.with(Cell::get)
}

/// Records the first loss that this rank has received.
pub(super) fn set_first_loss(loss: Option<(usize, LostReason)>) {
    FIRST_LOSS.with(|first| first.set(loss));
}

/// Why a group is broken.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Lost(Departure),
    Disagreement(Box<Mismatch>),
    Deadline { missing: Vec<usize>, after: Duration },
}

/// A rank that has left.
#[derive(Clone, Debug)]
pub(super) struct Departure {
    pub(super) rank: usize,
    pub(super) since: Instant,
    /// None if it has only dropped the group, and either ends or goes on.
    pub(super) reason: Option<LostReason>,
    /// The loss of a world rank that it had received before.
    pub(super) root: Option<(usize, LostReason)>,
}

impl Departure {
    pub(super) fn in_order(&self) -> bool {
        matches!(self.reason, None | Some(LostReason::Left))
    }
}

impl Failure {
    /// Whether it keeps a call from completing that still needs the `missing` ranks: R7.
    pub(super) fn stops(&self, missing: &[usize]) -> bool {
        match self {
            Self::Lost(departure) if departure.in_order() => missing.contains(&departure.rank),
            _ => true,
        }
    }
}

/// Returns the departure of a rank, if it has left.
pub(super) fn departure(failures: &mut [Failure], rank: usize) -> Option<&mut Departure> {
    failures.iter_mut().find_map(|failure| match failure {
        Failure::Lost(departure) if departure.rank == rank => Some(departure),
        _ => None,
    })
}
