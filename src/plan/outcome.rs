//! The results of planning.

use super::{
    Job, Machine, Strategy,
    timeline::{self, Passes, Timeline},
};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// The plans of a job, best first, and the reasons why other plans were refused.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plans {
    /// What was planned.
    pub job: Job,
    /// The machine.
    pub machine: Machine,
    /// The best plans, at most ten. Empty if nothing fits.
    pub best: Vec<Plan>,
    /// The number of strategies that were considered.
    pub considered: usize,
    /// Why the others were refused, the most frequent reason first.
    pub refused: Vec<Refusal>,
}

/// One way to run a job: what each rank holds, and how long a step takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Plan {
    /// How the job is divided.
    pub strategy: Strategy,
    /// Whether the fullest rank's memory suffices.
    pub verdict: Verdict,
    /// The predicted seconds of a step. For serving, of generating one token for every sequence.
    pub seconds: f64,
    /// The relative uncertainty of `seconds`: it is between (1 − error) and (1 + error) times this.
    pub error: f64,
    /// Tokens of all replicas a second.
    pub tokens_per_second: f64,
    /// For serving, the predicted seconds until the first token of a prompt that fills the context.
    pub prefill: Option<f64>,
    /// The share of a step in which the busiest pipeline rank waits for others.
    pub bubble: f64,
    /// The seconds of a step in which the busiest rank waits for transfers, by axis.
    pub exposed: Exposed,
    /// The seconds that an exchange between neighbouring stages takes.
    pub exchange: f64,
    /// Whether the sender of an exchange continues before its receiver has the message
    /// ([`Machine::buffered`]).
    #[serde(default)]
    pub buffered: bool,
    /// The threads with which each rank computes matrix products: see
    /// [`Cpu::with_threads`](crate::device::Cpu::with_threads). 1 on GPUs.
    #[serde(default = "one")]
    pub threads: usize,
    /// The floating-point operations of a step, over all ranks.
    pub flops: u64,
    /// One entry for each pipeline rank: its fullest tensor-parallel rank.
    pub ranks: Vec<RankUse>,
}

fn one() -> usize {
    1
}

/// Seconds of communication that computation does not hide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Exposed {
    /// Collectives of the tensor-parallel group.
    pub tensor: f64,
    /// The reduction of gradients over the replicas.
    pub data: f64,
    /// Exchanges between neighbouring stages, without the wait for the neighbour.
    pub pipeline: f64,
}

/// What a rank holds and does in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RankUse {
    /// Its rank in the pipeline.
    pub pipeline: usize,
    /// Its memory at the moment at which it holds the most.
    pub memory: Memory,
    /// The seconds of a forward and of a backward of one microbatch through each of its chunks,
    /// with the collectives of the tensor-parallel group.
    pub passes: Vec<Passes>,
    /// The bytes that it has to send in a step.
    pub sent: u64,
}

/// Bytes of a rank, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Memory {
    /// The weights.
    pub weights: u64,
    /// The gradients, in the accumulator's type.
    pub gradients: u64,
    /// The state of the optimizer, master weights included.
    pub optimizer: u64,
    /// What forwards have saved for their backwards, and tensors that wait to be used or sent.
    pub activations: u64,
    /// Temporary tensors of the operation during which the rank holds the most.
    pub transients: u64,
    /// The key/value cache.
    pub cache: u64,
}

impl Memory {
    /// The sum of all parts: the peak of the rank's memory.
    pub fn total(&self) -> u64 {
        let Self { weights, gradients, optimizer, activations, transients, cache } = *self;
        weights + gradients + optimizer + activations + transients + cache
    }
}

/// Whether a plan's memory suffices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// The peak is at most `machine.fits` of the memory.
    Fits,
    /// The peak is at most `machine.tight` of the memory. Fragmentation or a library's workspace
    /// may not fit.
    Tight,
    /// The peak is more than that.
    OutOfMemory,
}

/// A reason for which strategies were refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Refusal {
    /// The number of strategies.
    pub count: usize,
    /// The reason, with the two numbers that disagree, and what would work.
    pub reason: String,
}

impl Plan {
    /// The better plan first: one that fits, then the faster one. Plans that take the same time are
    /// ordered by their ranks, tensor-parallel ranks, recomputed blocks and stages.
    pub(super) fn order(&self, other: &Self) -> Ordering {
        let simple = |plan: &Self| {
            let Strategy { tensor, recomputed, chunks, sequence_parallel, .. } = plan.strategy;
            (plan.strategy.ranks(), tensor, recomputed, chunks, sequence_parallel)
        };
        let time = self.verdict.cmp(&other.verdict).then(self.seconds.total_cmp(&other.seconds));
        time.then(simple(self).cmp(&simple(other)))
    }

    /// The pipeline's passes and transfers of a step, by rank.
    ///
    /// # Errors
    /// When the plan was changed and its schedule cannot be run.
    pub fn timeline(&self) -> Result<Timeline> {
        let passes: Vec<_> = self.ranks.iter().map(|rank| rank.passes.clone()).collect();
        timeline::simulate(&self.strategy.schedule()?, &passes, self.exchange, self.buffered)
    }
}
