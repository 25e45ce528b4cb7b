//! The search for the best plans: every strategy is considered, best first.

mod refusals;
mod serving;
mod training;

use self::refusals::Refusals;
use super::{Goal, Job, Limits, Machine, Memory, Parts, Plan, Plans, Strategy, Verdict};
use crate::error::{Error, Result};

const OP: &str = "plan";

/// The number of plans that are returned.
const BEST: usize = 10;

/// The most tokens of a sequence. A dry run makes lists of their ids and positions.
const MOST_TOKENS: usize = 1 << 22;
/// The most sequences of a training step. The timeline has spans for each microbatch.
const MOST_TRAINED: usize = 1 << 20;
/// The most sequences of generation. A dry run makes a cache slot for each.
const MOST_SERVED: usize = 1 << 14;

/// Finds the best plans of a job on a machine.
///
/// ```
/// use shardwise::{models::DecoderConfig, plan::{Job, Machine, plan}, prelude::*};
/// let attention = AttentionConfig::new(2048, 16).with_choices(AttentionChoices::CAUSAL);
/// let norm = NormKind::LayerNorm { eps: 1e-5 };
/// let block = BlockConfig::new(attention, 8192, Activation::GeluTanh, norm);
/// let job = Job::train(DecoderConfig::new(50304, block, 24), DType::BF16, 512, 2048);
/// let plans = plan(&job, &Machine::preset("a100-80g")?.with_ranks(64))?;
/// let best = &plans.best[0];
/// assert!(best.strategy.ranks() <= 64);
/// assert!(best.ranks[0].memory.total() < 80 << 30);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// As [`plan_within`].
pub fn plan(job: &Job, machine: &Machine) -> Result<Plans> {
    plan_within(job, machine, &Limits::default())
}

/// As [`plan`], among the strategies that have the values of `limits`.
///
/// Every strategy is considered: data, pipeline and tensor parallelism over at most
/// `machine.ranks` ranks, the number of stages of a pipeline rank, the size of microbatches,
/// sequence parallelism, and the smallest number of recomputed blocks with which the plan fits.
/// Plans that fit come first, the fastest first.
///
/// # Errors
/// When a number of the machine is not valid ([`Machine::check`]), the job has no sequences or
/// tokens, more than 2²⁰ sequences (2¹⁴ for serving), or sequences of more than 2²² tokens or than
/// the model has positions, a limit cannot be kept (the error says what would work), the machine
/// has no rate for the element type, or rates with which a time is not finite, or the model cannot
/// be loaded. [`Error::Unsupported`] for f64. It is not an error if nothing fits: then
/// [`Plans::best`] is empty.
pub fn plan_within(job: &Job, machine: &Machine, limits: &Limits) -> Result<Plans> {
    machine.check()?;
    check(job, machine, limits)?;
    let calibrated = machine.calibrated(&job.goal);
    let plans = match job.goal {
        Goal::Train { batch, tokens } => training::search(job, &calibrated, limits, batch, tokens),
        Goal::Serve { batch, context } => serving::search(job, &calibrated, limits, batch, context),
    };
    plans.map(|plans| Plans { machine: machine.clone(), ..plans })
}

/// The plan of one strategy, whatever its memory. The machine's rates are calibrated to its runs of
/// the same goal.
///
/// # Errors
/// As [`plan_within`] and [`Strategy::check`]. Also when the model has fewer blocks than the
/// strategy has stages.
pub fn predict(job: &Job, machine: &Machine, strategy: &Strategy) -> Result<Plan> {
    strategy.check_for(&job.model)?;
    machine.check()?;
    let Strategy { data, pipeline, tensor, .. } = *strategy;
    let limits = Limits::default().with_data(data).with_pipeline(pipeline).with_tensor(tensor);
    check(job, machine, &limits)?;
    let machine = machine.calibrated(&job.goal);
    match job.goal {
        Goal::Train { batch, tokens } => training::predict(job, &machine, *strategy, batch, tokens),
        Goal::Serve { batch, context } => serving::evaluate(job, &machine, strategy, batch, context),
    }
}

/// The predicted seconds of a strategy's step by what takes them, without calibration.
///
/// A step is a sum of maxima of sums of seconds, so its parts are its derivatives with respect to
/// factors of each.
///
/// # Errors
/// As [`predict`].
pub fn parts(job: &Job, machine: &Machine, strategy: &Strategy) -> Result<Parts> {
    const MORE: f64 = 1e-3;
    let machine = Machine { runs: Vec::new(), ..machine.clone() };
    let seconds = |factors| Ok(predict(job, &machine.scaled(factors), strategy)?.seconds);
    let whole = seconds([1.0; 3])?;
    let part = |at: usize| {
        let mut factors = [1.0; 3];
        factors[at] += MORE;
        // A rounding error may make a part that is 0 negative.
        Ok::<_, Error>(((seconds(factors)? - whole) / MORE).max(0.0))
    };
    let (memory, transfers) = (part(1)?, part(2)?);
    Ok(Parts { operations: (whole - memory - transfers).max(0.0), memory, transfers })
}

/// Checks the sizes of a job, and that the limits can be kept.
fn check(job: &Job, machine: &Machine, limits: &Limits) -> Result<()> {
    let (batch, tokens, most_sequences) = match job.goal {
        Goal::Train { batch, tokens } => (batch, tokens, MOST_TRAINED),
        Goal::Serve { batch, context } => (batch, context, MOST_SERVED),
    };
    if batch == 0 || tokens == 0 {
        return Err(Error::invalid(OP, format!("a step of {batch} sequences of {tokens} tokens")));
    }
    for (what, size, most) in [("tokens", tokens, MOST_TOKENS), ("sequences", batch, most_sequences)] {
        if size > most {
            return Err(Error::invalid(OP, format!("a step with {size} {what}; at most {most} are planned")));
        }
    }
    if job.model.packing.is_some() {
        let reason = "the checkpoint is quantized, and plans count dense weights: plan the model without \
                      `quantization_config`";
        return Err(Error::Unsupported { op: OP, reason: reason.into() });
    }
    if let Some(positions) = job.model.positions.filter(|&positions| positions < tokens) {
        let reason = format!(
            "sequences of {tokens} tokens, but the model has {positions} positions: use at most {positions} tokens"
        );
        return Err(Error::invalid(OP, reason));
    }
    let (layers, heads) = (job.model.layers.len(), job.model.block.attention.heads);
    let serves = matches!(job.goal, Goal::Serve { .. });
    let most = [
        ("data", "replicas", limits.data, batch, "sequences in a step"),
        ("pipeline", "pipeline ranks", limits.pipeline, layers, "blocks in the model"),
        ("tensor", "tensor-parallel ranks", limits.tensor, heads, "query heads in the model"),
        ("sequences", "sequences in a microbatch", limits.sequences, batch, "sequences in a step"),
    ];
    for (what, of, limit, most, why) in most {
        let Some(value) = limit else { continue };
        if value == 0 || value > most {
            let reason =
                format!("`{what}` is {value}: the number of {of} is between 1 and {most}, the {why}");
            return Err(Error::invalid(OP, reason));
        }
    }
    let training = [
        (limits.pipeline.is_some_and(|pipeline| pipeline > 1), "a pipeline"),
        (limits.sequences.is_some(), "microbatches"),
        (limits.sequence_parallel == Some(true), "sequence parallelism"),
    ];
    if let Some((_, what)) = training.into_iter().find(|(limited, _)| serves && *limited) {
        let reason = format!("generation with {what}: use data and tensor parallelism");
        return Err(Error::Unsupported { op: OP, reason });
    }
    let ranks = [limits.data, limits.pipeline, limits.tensor].map(|limit| limit.unwrap_or(1));
    let ranks = ranks.into_iter().fold(1, usize::saturating_mul);
    if ranks > machine.ranks {
        let reason = format!("the limits need {ranks} ranks, but the machine has {}", machine.ranks);
        return Err(Error::invalid(OP, reason));
    }
    Ok(())
}

/// The refusals of what no strategy can do: to divide the model or the batch over more ranks than
/// they have parts.
fn impossible(job: &Job, machine: &Machine, batch: usize) -> Refusals {
    let mut refusals = Refusals::default();
    let heads = job.model.block.attention.heads;
    refusals.beyond("tensor", machine.ranks, heads, "number of query heads is");
    if matches!(job.goal, Goal::Train { .. }) {
        refusals.beyond("pipeline", machine.ranks, job.model.layers.len(), "number of blocks is");
    }
    refusals.beyond("data", machine.ranks, batch, "number of sequences is");
    refusals
}

/// The numbers of tensor-parallel ranks that are considered: all within a node, and the divisors of
/// the number of ranks beyond it.
fn tensor_sizes(job: &Job, machine: &Machine, limits: &Limits) -> Vec<usize> {
    if let Some(tensor) = limits.tensor {
        return vec![tensor];
    }
    let most = job.model.block.attention.heads.min(machine.ranks);
    let considered =
        |&tensor: &usize| tensor <= machine.ranks_per_node || machine.ranks.is_multiple_of(tensor);
    (1..=most).filter(considered).collect()
}

/// The numbers of replicas that are considered if `ranks` ranks are left for them and `of_node` of
/// these are in one node: one, as many as a node has, and all.
fn replicas(batch: usize, ranks: usize, of_node: usize, limits: &Limits) -> Vec<usize> {
    let most = ranks.min(batch);
    if let Some(data) = limits.data {
        return if data <= ranks { vec![data] } else { Vec::new() };
    }
    let mut sizes = vec![1, of_node.clamp(1, most), most];
    sizes.dedup();
    sizes
}

/// Whether a memory suffices.
fn verdict(machine: &Machine, strategy: &Strategy, memory: &Memory) -> Verdict {
    let share = memory.total() as f64 / machine.rank_memory(strategy.ranks()) as f64;
    if share <= machine.fits {
        Verdict::Fits
    } else if share <= machine.tight {
        Verdict::Tight
    } else {
        Verdict::OutOfMemory
    }
}
