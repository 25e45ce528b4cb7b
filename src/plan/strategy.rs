//! How a model is divided over ranks, as values that the constructors of the library take.

use crate::{
    error::{Error, Result},
    models::DecoderConfig,
    shard::Mesh,
    train::Schedule,
};
use serde::{Deserialize, Serialize};
use std::fmt;

const OP: &str = "plan";

/// The largest number of passes of a step in one direction. Making a schedule allocates all of
/// them.
pub(super) const MAX_PASSES: usize = 1 << 22;

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
    /// A strategy on `data · pipeline · tensor` ranks: one microbatch of `sequences` sequences, one
    /// stage a pipeline rank, without recomputation and sequence parallelism.
    pub fn new(data: usize, pipeline: usize, tensor: usize, sequences: usize) -> Self {
        Self {
            data,
            pipeline,
            tensor,
            chunks: 1,
            microbatches: 1,
            sequences,
            recomputed: 0,
            sequence_parallel: false,
        }
    }

    /// Sets the number of stages of each pipeline rank.
    pub fn with_chunks(self, chunks: usize) -> Self {
        Self { chunks, ..self }
    }

    /// Sets the number of microbatches of each replica in a step.
    pub fn with_microbatches(self, microbatches: usize) -> Self {
        Self { microbatches, ..self }
    }

    /// Sets the number of leading blocks that recompute their forward.
    pub fn with_recomputed(self, recomputed: usize) -> Self {
        Self { recomputed, ..self }
    }

    /// Sets whether the residual stream is sharded over tokens.
    pub fn with_sequence_parallel(self, sequence_parallel: bool) -> Self {
        Self { sequence_parallel, ..self }
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.data.saturating_mul(self.pipeline).saturating_mul(self.tensor)
    }

    /// Checks that the strategy can be run.
    ///
    /// # Errors
    /// When a size is 0, the mesh or the schedule is not valid, or a step has more than 2²² passes
    /// in a direction.
    pub fn check(&self) -> Result<()> {
        self.mesh()?;
        let Self { pipeline, chunks, microbatches, sequences, .. } = *self;
        for (what, size) in [("chunks", chunks), ("microbatches", microbatches), ("sequences", sequences)] {
            if size == 0 {
                return Err(Error::invalid(OP, format!("`{what}` is 0, but has to be at least 1")));
            }
        }
        if self.passes() > MAX_PASSES {
            let reason = format!(
                "{pipeline} pipeline ranks, {chunks} chunks and {microbatches} microbatches are more than {MAX_PASSES} passes"
            );
            return Err(Error::invalid(OP, reason));
        }
        self.schedule().map(drop)
    }

    /// Checks that the strategy can be run, and that each stage of `model` has a block.
    pub(super) fn check_for(&self, model: &DecoderConfig) -> Result<()> {
        self.check()?;
        let (layers, stages) = (model.layers.len(), self.stages());
        if layers < stages {
            return Err(Error::sizes(OP, "the number of blocks", layers, "that of stages", stages));
        }
        Ok(())
    }

    /// The number of passes of a step in one direction, over all pipeline ranks.
    pub(super) fn passes(&self) -> usize {
        self.stages().saturating_mul(self.microbatches)
    }

    /// The number of stages of the pipeline.
    pub(super) fn stages(&self) -> usize {
        self.pipeline.saturating_mul(self.chunks)
    }

    /// Whether two strategies have equal meshes.
    pub(super) fn is_same_mesh(&self, other: &Self) -> bool {
        let mesh = |strategy: &Self| (strategy.data, strategy.pipeline, strategy.tensor);
        mesh(self) == mesh(other)
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

/// Such as `dp 2, tp 4, pp 1, 8 microbatches of 2, sp, 3 blocks recomputed`. Microbatches are
/// counted in sequences.
impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, pipeline, tensor, chunks, microbatches, sequences, recomputed, sequence_parallel } =
            *self;
        write!(f, "dp {data}, tp {tensor}, pp {pipeline}")?;
        if chunks > 1 {
            write!(f, " x {chunks} stages")?;
        }
        write!(f, ", {microbatches} microbatches of {sequences}")?;
        f.write_str(if sequence_parallel { ", sp" } else { "" })?;
        if recomputed > 0 {
            write!(f, ", {recomputed} blocks recomputed")?;
        }
        Ok(())
    }
}
