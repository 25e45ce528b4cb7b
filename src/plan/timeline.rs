//! The timeline of a pipeline: a [`Schedule`] with the times of its passes.

use super::Passes;
use crate::{
    error::Result,
    train::{Pass, Schedule},
};

/// What each rank of a pipeline does in a step, and when.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Timeline {
    /// The seconds of the step's passes and exchanges.
    pub seconds: f64,
    /// The spans of each rank, by ascending start. Between them the rank waits.
    pub ranks: Vec<Vec<Span>>,
}

/// What a rank does between two times.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Span {
    /// The start, in seconds.
    pub start: f64,
    /// The end, in seconds.
    pub end: f64,
    /// The activity.
    pub work: SpanWork,
}

/// What a rank does in a [`Span`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpanWork {
    /// A pass of a microbatch through a chunk.
    Compute {
        /// The direction.
        pass: Pass,
        /// The rank's chunk.
        chunk: usize,
        /// The microbatch.
        microbatch: usize,
    },
    /// A transfer to or from another stage, without the wait for the other rank.
    Exchange,
}

/// Simulates a step of a pipeline as [`Pipeline::run`](crate::train::Pipeline::run) makes it: each
/// rank executes its [`Schedule::actions`] in order, and an exchange ends on both ranks at the same
/// time. `passes` has the seconds of each rank's chunks, `exchange` those of a message.
///
/// # Errors
/// When the schedule cannot be run.
pub(super) fn simulate(schedule: &Schedule, passes: &[Vec<Passes>], exchange: f64) -> Result<Timeline> {
    let _ = (schedule, passes, exchange);
    Err(crate::error::Error::internal("pipeline", "passes are not simulated"))
}
