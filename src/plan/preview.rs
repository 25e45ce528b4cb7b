//! What one rank of a strategy holds, computes and moves.

use super::{
    Goal, Job, Memory, Strategy,
    dry::{self, Training},
    stage::Stage,
    traffic::Traffic,
};
use crate::{
    device::DType,
    error::{Error, Result},
    shard::{Axis, Replicated, Shard},
};
use half::bf16;

/// What one rank holds, computes and moves in a training step, without data.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Preview {
    /// Its memory at the moment at which it holds the most, from the second step on.
    pub memory: Memory,
    /// The bytes of its gradients.
    pub gradients: u64,
    /// Its transfers.
    pub traffic: Traffic,
    /// The floating-point operations of its products and of its attention.
    pub flops: u64,
}

impl Preview {
    /// Runs the layers of rank `rank` of a strategy's mesh without data. The strategy need not fit
    /// any machine.
    ///
    /// # Errors
    /// As [`Strategy::check`]. Also when the mesh has no such rank, the model cannot be divided so,
    /// or the job is not training.
    pub fn new(job: &Job, strategy: &Strategy, rank: usize) -> Result<Self> {
        strategy.check_for(&job.model)?;
        let mesh = strategy.mesh()?;
        if rank >= mesh.len() {
            return Err(Error::sizes("plan", "the rank", rank, "the ranks of the mesh", mesh.len()));
        }
        let Goal::Train { tokens, .. } = job.goal else {
            return Err(Error::Unsupported { op: "plan", reason: "a preview of serving".into() });
        };
        let [pipeline, tensor] = [Axis::Pipeline, Axis::Tensor].map(|axis| mesh.coordinate(rank, axis));
        let dry = training(job, strategy, tensor, tokens)?;
        let (_, kinds) = dry::kinds(&job.model);
        let stage = Stage::new(&dry, strategy, pipeline, job.dtype, &kinds);
        let schedule = strategy.schedule()?;
        let memory = stage.memory(&schedule.actions()?[pipeline], schedule.microbatches());
        Ok(Self { memory, gradients: stage.gradients(), traffic: stage.traffic(), flops: stage.flops() })
    }
}

/// Runs the parts of a training step on rank `rank` of the tensor-parallel group.
pub(super) fn training(job: &Job, strategy: &Strategy, rank: usize, tokens: usize) -> Result<Training> {
    let Strategy { pipeline, tensor, sequences, sequence_parallel, .. } = *strategy;
    let together = pipeline == 1 || !job.model.tied;
    let run = match (job.dtype, sequence_parallel) {
        (DType::F32, false) => Training::run::<Replicated, f32>,
        (DType::F32, true) => Training::run::<Shard<0>, f32>,
        (DType::BF16 | DType::F16, false) => Training::run::<Replicated, bf16>,
        (DType::BF16 | DType::F16, true) => Training::run::<Shard<0>, bf16>,
        (DType::F64, _) => return Err(dry::no_f64()),
    };
    run(&job.model, (rank, tensor), (sequences, tokens), job.dtype, together)
}
