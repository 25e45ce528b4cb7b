//! How a model is divided over ranks, as values that the constructors of the library take.

use crate::{error::Result, shard::Mesh, train::Schedule};
use serde::{Deserialize, Serialize};

/// How a job is divided over ranks: what a program passes to the constructors of meshes, schedules
/// and models.
///
/// A replica of the model has `pipeline · tensor` ranks and processes `microbatches` microbatches
/// per step, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Strategy {
    /// The number of replicas: the ranks along [`Axis::Data`](crate::shard::Axis::Data).
    pub data: usize,
    /// The number of pipeline ranks.
    pub pipeline: usize,
    /// The number of tensor-parallel ranks.
    pub tensor: usize,
    /// The number of stages that each pipeline rank holds.
    pub chunks: usize,
    /// The number of microbatches of each replica in a step.
    pub microbatches: usize,
    /// The number of sequences in the largest microbatch. For serving, the number of sequences of
    /// a replica.
    pub sequences: usize,
    /// The number of leading blocks that recompute their forward in the backward.
    pub recomputed: usize,
    /// Whether the residual stream is sharded over tokens (`Shard<0>`) instead of `Replicated`.
    pub sequence_parallel: bool,
}

impl Strategy {
    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.data.saturating_mul(self.pipeline).saturating_mul(self.tensor)
    }

    /// The mesh of the ranks.
    ///
    /// # Errors
    /// When an axis has no ranks.
    pub fn mesh(&self) -> Result<Mesh> {
        Mesh::new(self.data, self.pipeline, self.tensor)
    }

    /// The order of the passes: 1F1B, or interleaved 1F1B with several chunks.
    ///
    /// # Errors
    /// When the schedule is interleaved and `microbatches` is not a multiple of `pipeline`.
    pub fn schedule(&self) -> Result<Schedule> {
        match self.chunks {
            1 => Ok(Schedule::one_forward_one_backward(self.pipeline, self.microbatches)),
            chunks => Schedule::interleaved(self.pipeline, chunks, self.microbatches),
        }
    }
}
