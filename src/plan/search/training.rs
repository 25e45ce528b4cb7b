//! The search for training.

use super::{BEST, OP, impossible, replicas, tensor_sizes, verdict};
use crate::{
    error::{Error, Result},
    plan::{
        Exposed, Job, Limits, Machine, Memory, Passes, Plan, Plans, RankUse, SpanWork, Strategy, Verdict,
        bounds,
        dry::{self, Training},
        preview,
        stage::Stage,
        strategy::MAX_PASSES,
        timeline,
    },
    train::Pass,
};
use std::{collections::HashMap, rc::Rc};

/// The dry runs of a tensor-parallel group: one for each size of shards.
type Group = Rc<Vec<Training>>;

struct Search<'a> {
    job: &'a Job,
    machine: &'a Machine,
    batch: usize,
    tokens: usize,
    /// The kind of each block.
    kinds: Vec<usize>,
    /// By the values of a strategy on which they depend.
    groups: HashMap<(usize, bool, usize, bool, usize), Group>,
}

/// A strategy that may fit, and a time that its step is not below.
struct Candidate {
    strategy: Strategy,
    seconds: f64,
}

/// Finds the best strategies for training steps of `batch` sequences of `tokens` tokens.
pub(super) fn search(
    job: &Job,
    machine: &Machine,
    limits: &Limits,
    batch: usize,
    tokens: usize,
) -> Result<Plans> {
    let mut search = Search::new(job, machine, batch, tokens);
    let (mut refusals, mut considered, mut candidates) = (impossible(job, machine, batch), 0, Vec::new());
    for sizes in search.strategies(limits) {
        considered += sizes.len();
        let mut least = 0;
        for strategy in sizes {
            let limit = machine.rank_memory(strategy.ranks()) as f64 * machine.tight;
            // Larger microbatches of a mesh hold more.
            if least as f64 > limit {
                refusals.out_of_memory(least, &strategy);
                continue;
            }
            let group = search.group(&strategy)?;
            let bytes = search.least_memory(&group, &strategy);
            if bytes as f64 > limit {
                least = search.least_memory(&group, &strategy.with_microbatches(1));
                refusals.out_of_memory(bytes, &strategy);
                continue;
            }
            let seconds = search.least_seconds(&group, &strategy);
            candidates.push(Candidate { strategy, seconds });
        }
    }
    if considered == 0 {
        let reason = format!(
            "no strategy keeps the limits: {batch} sequences cannot be divided over these replicas and microbatches"
        );
        return Err(Error::invalid(OP, reason));
    }
    // Interleaved schedules come last, because their bounds are far below their times. The best
    // plans without them exclude many.
    let interleaves = |candidate: &Candidate| candidate.strategy.chunks > 1;
    candidates.sort_by(|a, b| interleaves(a).cmp(&interleaves(b)).then(a.seconds.total_cmp(&b.seconds)));
    let mut best: Vec<Plan> = Vec::new();
    for Candidate { strategy, seconds } in candidates {
        let fits = |plan: &&Plan| plan.verdict == Verdict::Fits;
        let same_mesh = |plan: &Plan| plan.strategy.is_same_mesh(&strategy);
        // Whether a step of at least so many seconds is not listed.
        let too_slow = |best: &[Plan], seconds: f64| {
            let mesh = best.iter().filter(fits).find(|plan| same_mesh(plan));
            let last = best.iter().filter(fits).nth(BEST - 1);
            [mesh, last].into_iter().flatten().any(|plan| plan.seconds <= seconds)
        };
        if too_slow(&best, seconds) {
            continue;
        }
        let (strategy, memory, verdict) = search.fit(strategy)?;
        if verdict == Verdict::OutOfMemory {
            let most = memory.iter().map(Memory::total).max().unwrap_or(0);
            refusals.out_of_memory(most, &strategy);
            continue;
        }
        let group = search.group(&strategy)?;
        if too_slow(&best, search.least_seconds(&group, &strategy)) {
            continue;
        }
        best.push(search.plan(&group, strategy, memory, verdict)?);
        best.sort_by(Plan::order);
        // Of the plans with the same mesh, only the best is listed.
        if let Some(at) = best.iter().rposition(same_mesh)
            && best.iter().filter(|plan| same_mesh(plan)).count() > 1
        {
            best.remove(at);
        }
    }
    best.truncate(BEST);
    let refused = refusals.list(machine);
    Ok(Plans { job: job.clone(), machine: machine.clone(), best, considered, refused })
}

/// The plan of one strategy, whatever its memory.
pub(super) fn predict(
    job: &Job,
    machine: &Machine,
    strategy: Strategy,
    batch: usize,
    tokens: usize,
) -> Result<Plan> {
    let mut search = Search::new(job, machine, batch, tokens);
    let group = search.group(&strategy)?;
    let (memory, verdict) = search.memory(&group, &strategy)?;
    search.plan(&group, strategy, memory, verdict)
}

impl<'a> Search<'a> {
    fn new(job: &'a Job, machine: &'a Machine, batch: usize, tokens: usize) -> Self {
        let (_, kinds) = dry::kinds(&job.model);
        Self { job, machine, batch, tokens, kinds, groups: HashMap::new() }
    }

    /// Lists the strategies, without recomputation. Those of one list differ only in their
    /// microbatches, which ascend in size.
    fn strategies(&self, limits: &Limits) -> Vec<Vec<Strategy>> {
        let (layers, machine, mut all) = (self.kinds.len(), self.machine, Vec::new());
        for tensor in tensor_sizes(self.job, machine, limits) {
            let sps = if tensor > 1 { &[false, true][..] } else { &[false] };
            let sps = sps.iter().filter(|&&sp| limits.sequence_parallel.is_none_or(|limit| limit == sp));
            for pipeline in pipeline_sizes(layers, machine.ranks / tensor, limits) {
                let replica = pipeline * tensor;
                let (left, of_node) = (machine.ranks / replica, machine.ranks_per_node / replica);
                for data in replicas(self.batch, left, of_node, limits) {
                    let sizes = microbatches(self.batch, self.tokens, data, limits);
                    for (chunks, &sp) in (1..=8).flat_map(|chunks| sps.clone().map(move |sp| (chunks, sp))) {
                        let of = |&(sequences, microbatches): &(usize, usize)| {
                            Strategy::new(data, pipeline, tensor, sequences)
                                .with_microbatches(microbatches)
                                .with_chunks(chunks)
                                .with_sequence_parallel(sp)
                        };
                        let can = |strategy: &Strategy| {
                            interleaves(layers, strategy) && strategy.passes() <= MAX_PASSES
                        };
                        all.push(sizes.iter().map(of).filter(can).collect());
                    }
                }
            }
        }
        all
    }

    /// The dry runs of a strategy.
    fn group(&mut self, strategy: &Strategy) -> Result<Group> {
        let Strategy { tensor, sequence_parallel, sequences, pipeline, .. } = *strategy;
        // Kernels have the rates of the ranks that compute.
        let ranks = self.machine.rates(strategy.ranks())?.ranks;
        let key = (tensor, sequence_parallel, sequences, pipeline > 1 && self.job.model.tied, ranks);
        if let Some(group) = self.groups.get(&key) {
            return Ok(Rc::clone(group));
        }
        let mut group = Vec::new();
        for rank in dry::distinct_ranks(&self.job.model, tensor, sequences * self.tokens)? {
            let mut training = preview::training(self.job, strategy, rank, self.tokens)?;
            training.price(self.machine, strategy.ranks(), tensor)?;
            group.push(training);
        }
        let group = Rc::new(group);
        self.groups.insert(key, Rc::clone(&group));
        Ok(group)
    }

    fn stage<'b>(&'b self, dry: &'b Training, strategy: &'b Strategy, rank: usize) -> Stage<'b> {
        Stage::new(dry, strategy, rank, self.job.dtype, &self.kinds)
    }

    /// Bytes that the first or the last pipeline rank holds at least, whatever is recomputed: with
    /// all blocks recomputed, or with none if a rank has so few that this is less.
    fn least_memory(&self, group: &Group, strategy: &Strategy) -> u64 {
        let of = |recomputed| self.memory_bound(group, &strategy.with_recomputed(recomputed));
        of(0).min(of(self.kinds.len()))
    }

    fn memory_bound(&self, group: &Group, strategy: &Strategy) -> u64 {
        let Strategy { pipeline, chunks, microbatches, .. } = *strategy;
        // The number of microbatches whose saved values are live at once, on the first rank.
        let in_flight = match chunks {
            1 => microbatches.min(pipeline),
            _ => (microbatches * chunks).min(2 * (pipeline - 1) + (chunks - 1) * pipeline + 1) / chunks,
        };
        let of = |dry: &Training, rank, in_flight: usize| {
            let stage = self.stage(dry, strategy, rank);
            let gradients = stage.gradients();
            // The backward of the first microbatch allocates the gradients of a chunk.
            let allocated = if chunks == 1 && microbatches > in_flight { gradients } else { 0 };
            let passes = allocated + in_flight as u64 * stage.saved() + stage.last_peak();
            stage.held().total() + gradients.max(passes)
        };
        let least = |dry: &Training| of(dry, 0, in_flight).max(of(dry, pipeline - 1, 1));
        group.iter().map(least).max().unwrap_or(0)
    }

    /// Seconds that a step takes at least. The last rank waits for the first microbatch, works on
    /// all of them, and then the other ranks finish the last one. The first rank works on all.
    fn least_seconds(&self, group: &Group, strategy: &Strategy) -> f64 {
        let Strategy { pipeline, chunks, microbatches, .. } = *strategy;
        let of = |dry: &Training, rank| {
            let stage = self.stage(dry, strategy, rank);
            let passes = |chunk| [Pass::Forward, Pass::Backward].map(|pass| stage.time(pass, chunk).total());
            (0..chunks).flat_map(passes).sum::<f64>()
        };
        let seconds = |dry: &Training| {
            let (first, last) = (of(dry, 0), of(dry, pipeline - 1));
            let blocks = self.kinds.len() / strategy.stages();
            let others = (pipeline - 1) as f64 * blocks as f64 * dry.fastest_block();
            (microbatches as f64 * last + others).max(microbatches as f64 * first)
        };
        group.iter().map(seconds).fold(0.0, f64::max)
    }

    /// Finds the smallest number of recomputed blocks with which a strategy fits, and the memory of
    /// each pipeline rank.
    fn fit(&mut self, strategy: Strategy) -> Result<(Strategy, Vec<Memory>, Verdict)> {
        let group = self.group(&strategy)?;
        let layers = self.kinds.len();
        let planned = |recomputed| {
            let strategy = strategy.with_recomputed(recomputed);
            let (memory, verdict) = self.memory(&group, &strategy)?;
            Ok::<_, Error>((strategy, memory, verdict))
        };
        let mut plan = planned(0)?;
        for goal in [Verdict::Fits, Verdict::Tight] {
            if plan.2 <= goal {
                break;
            }
            let most = planned(layers)?;
            if most.2 > goal {
                continue;
            }
            // More recomputed blocks need less memory.
            let (mut too_few, mut enough) = (0, layers);
            plan = most;
            while enough - too_few > 1 {
                let middle = (too_few + enough) / 2;
                let next = planned(middle)?;
                if next.2 <= goal {
                    (enough, plan) = (middle, next);
                } else {
                    too_few = middle;
                }
            }
            break;
        }
        Ok(plan)
    }

    /// The memory of each pipeline rank, which is that of its fullest tensor-parallel rank, and
    /// whether the machine's memory suffices.
    fn memory(&self, group: &Group, strategy: &Strategy) -> Result<(Vec<Memory>, Verdict)> {
        // The first microbatches fill the memory.
        let Strategy { pipeline, chunks, microbatches, .. } = *strategy;
        let enough = if chunks == 1 { pipeline + 1 } else { 3 * pipeline };
        let short = strategy.with_microbatches(microbatches.min(enough)).schedule()?;
        let actions = short.actions()?;
        let of = |(rank, actions): (usize, &Vec<_>)| {
            let memory = |dry| self.stage(dry, strategy, rank).memory(actions, short.microbatches());
            let fullest = group.iter().map(memory).max_by_key(Memory::total);
            fullest.ok_or_else(|| Error::internal(OP, "a tensor-parallel group without ranks"))
        };
        let memory = actions.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
        let fullest = memory.iter().max_by_key(|memory| memory.total());
        let verdict = fullest.map_or(Verdict::OutOfMemory, |memory| verdict(self.machine, strategy, memory));
        Ok((memory, verdict))
    }

    fn plan(&self, group: &Group, strategy: Strategy, memory: Vec<Memory>, verdict: Verdict) -> Result<Plan> {
        let Strategy { data, pipeline, tensor, chunks, microbatches, .. } = strategy;
        let machine = self.machine;
        let exchange = group.iter().map(|dry| dry.exchange(self.job.dtype)).max_by_key(|own| own.elements);
        let exchange = match exchange {
            Some(transfer) if pipeline > 1 => machine.seconds(&transfer, pipeline, tensor),
            _ => 0.0,
        };
        let (mut ranks, mut flops) = (Vec::new(), 0_u128);
        let (mut update, mut ends, mut reduce) = (0.0_f64, 0.0_f64, 0.0_f64);
        let turns = machine.turns(strategy.ranks());
        let mut tensor_time = Vec::new();
        for (rank, memory) in memory.into_iter().enumerate() {
            let stages: Vec<_> = group.iter().map(|dry| self.stage(dry, &strategy, rank)).collect();
            // Ranks of a tensor-parallel group wait for the slowest in every layer.
            let slowest = |pass, chunk| {
                let times = stages.iter().map(|stage| stage.time(pass, chunk));
                times.max_by(|a, b| a.total().total_cmp(&b.total())).unwrap_or_default()
            };
            let mut transfers = 0.0;
            let passes: Vec<_> = (0..chunks)
                .map(|chunk| {
                    let (forward, backward) = (slowest(Pass::Forward, chunk), slowest(Pass::Backward, chunk));
                    transfers += forward.transfers + backward.transfers;
                    Passes { forward: forward.total(), backward: backward.total() }
                })
                .collect();
            tensor_time.push(transfers * microbatches as f64);
            // The first chunk's backward is the last pass, which the reduction runs along.
            let hidden = passes.first().map_or(0.0, |passes| passes.backward);
            for stage in &stages {
                update = update.max(stage.update_time());
                ends = ends.max(stage.end_times(machine));
                let (times, copies) = stage.reduce_times(machine)?;
                let (all, last) = (times.iter().sum::<f64>(), times.last().copied().unwrap_or(0.0));
                // Otherwise the differences below are NaN, which `max` ignores.
                bounds::seconds(OP, "the reduction of gradients", all)?;
                let exposed = (all - hidden).max(last);
                let slower = (machine.overlap - 1.0) * (all - exposed);
                reduce = reduce.max(exposed + slower + turns * copies);
            }
            // The ranks of a group have different shards, but their operations add up.
            let mean = stages.iter().map(|stage| u128::from(stage.flops())).sum::<u128>()
                / stages.len().max(1) as u128;
            flops += mean * (tensor * data) as u128;
            let sent = stages.iter().map(|stage| stage.traffic().sent(&strategy)).max().unwrap_or(0);
            ranks.push(RankUse { pipeline: rank, memory, passes, sent });
        }
        let passes: Vec<_> = ranks.iter().map(|rank| rank.passes.clone()).collect();
        let timeline = timeline::simulate(&strategy.schedule()?, &passes, exchange, machine.buffered)?;
        let busiest = (0..pipeline).max_by(|&a, &b| timeline.busy(a).total_cmp(&timeline.busy(b)));
        let busiest = busiest.unwrap_or(0);
        // Ranks that take turns leave their core to others while they wait.
        let busy = (0..pipeline).map(|rank| timeline.busy(rank)).sum::<f64>() / pipeline as f64;
        let seconds = timeline.seconds.max(turns * busy) + reduce + ends + turns * update;
        bounds::seconds(OP, "a step", seconds)?;
        let messages = timeline.ranks[busiest].iter().filter(|span| span.work == SpanWork::Exchange).count();
        Ok(Plan {
            strategy,
            verdict,
            seconds,
            error: machine.error,
            tokens_per_second: (self.batch * self.tokens) as f64 / seconds,
            prefill: None,
            bubble: timeline.idle(busiest) / seconds,
            exposed: Exposed {
                tensor: tensor_time[busiest],
                data: reduce,
                pipeline: messages as f64 * exchange + ends,
            },
            exchange,
            buffered: machine.buffered,
            threads: machine.rates(strategy.ranks())?.threads,
            flops: u64::try_from(flops).unwrap_or(u64::MAX),
            ranks,
        })
    }
}

/// The numbers of pipeline ranks that are considered: of those whose largest stage has the same
/// number of blocks, the smallest, and the divisors of the number of ranks.
fn pipeline_sizes(layers: usize, ranks: usize, limits: &Limits) -> Vec<usize> {
    if let Some(pipeline) = limits.pipeline {
        return if pipeline <= ranks { vec![pipeline] } else { Vec::new() };
    }
    let considered = |&pipeline: &usize| {
        let smaller = pipeline > 1 && layers.div_ceil(pipeline - 1) == layers.div_ceil(pipeline);
        !smaller || ranks.is_multiple_of(pipeline)
    };
    (1..=layers.min(ranks)).filter(considered).collect()
}

/// A microbatch of more tokens than this makes no product faster. It only needs more memory, and
/// makes the bubble of a pipeline larger.
const ENOUGH_TOKENS: usize = 1 << 14;

/// The sizes of microbatches, in sequences, and their numbers for each replica. Sizes are powers of
/// two as far as the batch allows, up to the first with [`ENOUGH_TOKENS`].
fn microbatches(batch: usize, tokens: usize, data: usize, limits: &Limits) -> Vec<(usize, usize)> {
    let own = batch.div_ceil(data);
    let double = |&size: &usize| (size < own && size * tokens < ENOUGH_TOKENS).then_some(2 * size);
    let sizes = std::iter::successors(Some(1), double);
    let sizes = limits.sequences.map_or_else(|| sizes.collect(), |sequences| vec![sequences]);
    let mut all: Vec<_> = sizes
        .into_iter()
        .map(|size| {
            let count = own.div_ceil(size);
            (own.div_ceil(count), count)
        })
        .collect();
    all.dedup();
    // Microbatches may have become smaller, so that all have about the same size.
    all.retain(|(size, _)| limits.sequences.is_none_or(|limit| *size == limit));
    all
}

/// Whether the stages of a strategy can be interleaved, if it has several on each pipeline rank:
/// two, or as many as divide the blocks evenly.
fn interleaves(layers: usize, strategy: &Strategy) -> bool {
    let Strategy { pipeline, chunks, microbatches, .. } = *strategy;
    let stages = strategy.stages();
    chunks == 1
        || (pipeline > 1
            && microbatches.is_multiple_of(pipeline)
            && stages <= layers
            && (chunks == 2 || layers.is_multiple_of(stages)))
}
