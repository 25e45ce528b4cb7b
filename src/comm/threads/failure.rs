//! Why a group is broken, and the first lost rank that this rank got an error for.

use crate::error::{LostReason, Mismatch};
use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// The first lost rank that this rank got an error for: its world rank and the reason. This loss
/// may make this rank leave as well. So ranks that wait for this rank report that first loss
/// instead.
type FirstLoss = Cell<Option<(usize, LostReason)>>;

#[cfg(not(shuttle))]
thread_local! {
    static FIRST_LOSS: FirstLoss = const { Cell::new(None) };
}
// Shuttle runs all model threads on one system thread, so thread locals have to come from Shuttle.
#[cfg(shuttle)]
shuttle::thread_local! {
    static FIRST_LOSS: FirstLoss = Cell::new(None);
}

/// Returns the first loss that this rank got an error for.
pub(super) fn first_loss() -> Option<(usize, LostReason)> {
    FIRST_LOSS.with(Cell::get)
}

/// Sets or clears the first loss that this rank got an error for.
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
    /// None while the rank has only dropped the group: it may have ended or may continue.
    pub(super) reason: Option<LostReason>,
    /// The first loss that the rank itself had got an error for: a world rank and the reason.
    pub(super) root: Option<(usize, LostReason)>,
}

impl Departure {
    pub(super) fn in_order(&self) -> bool {
        matches!(self.reason, None | Some(LostReason::Left))
    }
}

impl Failure {
    /// Whether this failure stops a call that still waits for the `missing` ranks: R7.
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
