//! Timed steps: what ranks need for a step that a plan predicts.

mod serving;
mod training;

use super::{Goal, Job, Strategy, dry::no_f64};
use crate::{
    comm::{Group, ReduceOp},
    device::DType,
    error::{Error, Result, Site, same_size},
    kernels::Backend,
    models::DecoderConfig,
    rng::Philox,
    shard::{Replicated, Shard},
};
use half::{bf16, f16};
use std::time::Instant;

const OP: &str = "time steps";

/// Times steps of a job that is divided as a strategy says, with random weights and tokens.
///
/// Returns the seconds of `steps` steps, each of the slowest rank, so that all ranks return the
/// same list. One more step runs first, which allocates memory and does not count. The clock starts
/// after a barrier, and stops when the device has finished.
///
/// * Training: a step of [`Goal::Train`]. Each replica trains `strategy.microbatches` microbatches
///   of `strategy.sequences` sequences. The job's batch is not read: of a real batch, the last
///   microbatches may be smaller.
/// * Serving: each replica generates the last token of a full context, for `strategy.sequences`
///   sequences at once, and samples it greedily. Reading the prompt does not count.
///
/// Every rank calls it with the same arguments.
///
/// # Errors
/// As [`Strategy::check`]. Also when `world` has another number of ranks than the strategy, `steps`
/// is 0, the model has fewer blocks than stages or fewer positions than tokens, a sequence has no
/// tokens (for serving, fewer than 2), a replica more than 2³² − 1, the model cannot be divided so,
/// memory does not suffice, or a collective fails. [`Error::Unsupported`] for f64, and for serving
/// by anything but data and tensor parallelism.
///
/// ```
/// use shardwise::{models::DecoderConfig, plan::{Job, Strategy, time_steps}, prelude::*};
/// let attention = AttentionConfig::new(8, 2).with_choices(AttentionChoices::CAUSAL);
/// let norm = NormKind::RmsNorm { eps: 1e-5 };
/// let block = BlockConfig::new(attention, 16, Activation::Silu, norm);
/// let job = Job::train(DecoderConfig::new(20, block, 1), DType::F32, 1, 4);
/// let strategy = Strategy::new(1, 1, 2, 1);
/// let ranks = launch::threads(2, |world| time_steps(&world, &job, &strategy, 2))?;
/// assert!(ranks[0].len() == 2 && ranks[0].iter().all(|&seconds| seconds > 0.0));
/// assert_eq!(ranks[0], ranks[1]);
/// # Ok::<(), Error>(())
/// ```
#[track_caller]
pub fn time_steps<B: Backend>(
    world: &Group<B>,
    job: &Job,
    strategy: &Strategy,
    steps: usize,
) -> Result<Vec<f64>> {
    let _site = Site::here().enter();
    same_size(OP, "the ranks of the strategy", strategy.ranks(), "the ranks of the group", world.size())?;
    check(job, strategy, steps)?;
    let mut seconds = match job.goal {
        Goal::Train { tokens, .. } => {
            let run = match (job.dtype, strategy.sequence_parallel) {
                (DType::F32, false) => training::run::<Replicated, f32, B>,
                (DType::F32, true) => training::run::<Shard<0>, f32, B>,
                (DType::BF16, false) => training::run::<Replicated, bf16, B>,
                (DType::BF16, true) => training::run::<Shard<0>, bf16, B>,
                (DType::F16, false) => training::run::<Replicated, f16, B>,
                (DType::F16, true) => training::run::<Shard<0>, f16, B>,
                (DType::F64, _) => return Err(no_f64()),
            };
            run(world, &job.model, strategy, tokens, steps)?
        }
        Goal::Serve { context, .. } => {
            let run = match job.dtype {
                DType::F32 => serving::run::<f32, B>,
                DType::BF16 => serving::run::<bf16, B>,
                DType::F16 => serving::run::<f16, B>,
                DType::F64 => return Err(no_f64()),
            };
            run(world, &job.model, strategy, context, steps)?
        }
    };
    Ok(seconds.split_off(1))
}

fn check(job: &Job, strategy: &Strategy, steps: usize) -> Result<()> {
    strategy.check_for(&job.model)?;
    if steps == 0 {
        return Err(Error::invalid(OP, "`steps` is 0, but has to be at least 1"));
    }
    let &Strategy { data, tensor, sequences, microbatches, .. } = strategy;
    let (tokens, least) = match job.goal {
        Goal::Train { tokens, .. } => (tokens, 1),
        Goal::Serve { context, .. } => (context, 2),
    };
    if let Some(positions) = job.model.positions.filter(|&positions| positions < tokens) {
        let (what, of) = ("the tokens of a sequence", "the number of learned positions");
        return Err(Error::sizes(OP, what, tokens, of, positions));
    }
    let all = sequences.checked_mul(microbatches).and_then(|count| count.checked_mul(tokens));
    if tokens < least || all.is_none_or(|all| u32::try_from(all).is_err()) {
        let reason = format!(
            "{microbatches} microbatches of {sequences} sequences of {tokens} tokens: a sequence has at least {least} \
             tokens, and a replica at most {} in all",
            u32::MAX
        );
        return Err(Error::invalid(OP, reason));
    }
    let serves = matches!(job.goal, Goal::Serve { .. });
    if serves && *strategy != Strategy::new(data, 1, tensor, sequences) {
        let reason = format!("generation with {strategy}: use data and tensor parallelism only");
        return Err(Error::Unsupported { op: OP, reason });
    }
    Ok(())
}

/// Draws `count` tokens of a replica.
fn random_tokens(model: &DecoderConfig, replica: usize, count: usize) -> Vec<u32> {
    let stream = Philox::stream(0, replica as u64);
    (0..count as u64).map(|at| (stream.uniform(at) * model.vocabulary as f64) as u32).collect()
}

/// The seconds of a step on the slowest rank.
fn seconds<B: Backend>(world: &Group<B>, step: impl FnOnce() -> Result<()>) -> Result<f64> {
    world.barrier()?;
    let start = Instant::now();
    step()?;
    world.device().synchronize()?;
    let own = start.elapsed().as_secs_f64();
    Ok(world.all_reduce_host(ReduceOp::Max, &[own])?[0])
}
