//! One rank of a plan: its part of the model as sums over the parts of a dry run.

use super::{
    Machine, Memory, Strategy,
    dry::{Block, BlockPasses, Params, Part, Position, Time, Training},
    traffic::Traffic,
};
use crate::{
    comm::{Op, Transfer},
    device::{DType, Work, WorkKind},
    error::Result,
    shard::Partition,
    train::{Action, BUCKET, Compute, Pass, assign_buckets},
};
use std::ops::Range;

/// The element type of gradients: the accumulator of f32, bf16 and f16.
const ACCUMULATOR: DType = DType::F32;

/// One rank in training.
pub(super) struct Stage<'a> {
    dry: &'a Training,
    strategy: &'a Strategy,
    rank: usize,
    dtype: DType,
    /// The blocks of each of its chunks.
    chunks: Vec<Range<usize>>,
    /// The kind of each block of the model.
    kinds: &'a [usize],
}

impl<'a> Stage<'a> {
    /// `dry` is the dry run of this rank's place in the tensor-parallel group.
    pub(super) fn new(
        dry: &'a Training,
        strategy: &'a Strategy,
        rank: usize,
        dtype: DType,
        kinds: &'a [usize],
    ) -> Self {
        let stages = Partition::even(kinds.len(), strategy.pipeline * strategy.chunks);
        let chunks = (0..strategy.chunks).map(|chunk| stages.range(chunk * strategy.pipeline + rank));
        Self { dry, strategy, rank, dtype, chunks: chunks.collect(), kinds }
    }

    fn position(&self) -> Position {
        Position::of(self.rank, self.strategy.pipeline)
    }

    fn is_last(&self) -> bool {
        self.rank + 1 == self.strategy.pipeline
    }

    fn block(&self, layer: usize) -> &'a Block {
        &self.dry.blocks[self.kinds[layer]]
    }

    fn passes(&self, layer: usize) -> &'a BlockPasses {
        let block = self.block(layer);
        if layer < self.strategy.recomputed { &block.recomputed } else { &block.plain }
    }

    /// The blocks of all chunks, in order.
    fn layers(&self) -> impl Iterator<Item = usize> {
        self.chunks.iter().flat_map(Range::clone)
    }

    /// All parameters, in the order of the model's list.
    fn params(&self) -> Vec<&'a Params> {
        let outside = self.dry.outside(self.position());
        let blocks = self.layers().map(|layer| &self.block(layer).params);
        [&outside.before].into_iter().chain(blocks).chain([&outside.after]).collect()
    }

    /// The bytes that the rank always holds: weights, and the optimizer's state from the end of the
    /// first step on.
    pub(super) fn held(&self) -> Memory {
        let params = self.params();
        let weights = params.iter().map(|params| params.weights).sum();
        let optimizer = params.iter().map(|params| params.first_step.kept as u64).sum();
        Memory { weights, optimizer, ..Memory::default() }
    }

    /// The bytes of all gradients.
    pub(super) fn gradients(&self) -> u64 {
        let elements: usize = self.params().iter().flat_map(|params| &params.lengths).sum();
        (elements * ACCUMULATOR.size()) as u64
    }

    /// What the forwards of one microbatch save on this rank.
    pub(super) fn saved(&self) -> u64 {
        self.layers().map(|layer| self.passes(layer).forward.kept as u64).sum()
    }

    /// The temporary bytes of the first backward of a microbatch: of its last block.
    pub(super) fn last_peak(&self) -> u64 {
        self.layers().last().map_or(0, |layer| self.passes(layer).backward[1].peak as u64)
    }

    /// The steps of a pass of a chunk, in order.
    fn steps(&self, compute: Compute) -> Vec<Step<'a>> {
        let blocks = self.chunks[compute.chunk].clone();
        let before: usize = self.chunks[..compute.chunk].iter().map(Range::len).sum();
        let begins = self.rank == 0 && compute.chunk == 0;
        let ends = self.is_last() && compute.chunk + 1 == self.strategy.chunks;
        let later = compute.microbatch > 0;
        // The first microbatch allocates the gradients.
        let completing = |[first, rest]: &'a [Part; 2], group| {
            let gradients = if later { 0 } else { first.kept - rest.kept };
            Step { part: if later { rest } else { first }, gradients, completes: Some(group) }
        };
        let forward = |part| Step { part, gradients: 0, completes: None };
        let mut steps = Vec::with_capacity(blocks.len() + 2);
        match compute.pass {
            Pass::Forward => {
                steps.extend(begins.then(|| forward(&self.dry.input)));
                steps.extend(blocks.map(|layer| forward(&self.passes(layer).forward)));
                let after = self.layers().count() + 1;
                steps.extend(ends.then(|| completing(&self.dry.loss, after)));
            }
            Pass::Backward => {
                let group = |layer: usize| 1 + before + layer - blocks.start;
                let backward = |layer: usize| completing(&self.passes(layer).backward, group(layer));
                steps.extend(blocks.clone().rev().map(backward));
                steps.extend(begins.then(|| completing(&self.dry.input_grad, 0)));
            }
        }
        steps
    }

    /// The memory at the moment at which the rank holds the most, from the second step on.
    /// `actions` are the rank's actions of a schedule with `microbatches` microbatches. These may
    /// be fewer than the strategy's, because the first ones fill the memory.
    pub(super) fn memory(&self, actions: &[Action], microbatches: usize) -> Memory {
        let mut walk = Walk { held: self.held(), ..Walk::default() };
        let activation = self.dry.activation as i64;
        let buckets = self.buckets();
        let mut filling = vec![false; buckets.bytes.len()];
        for action in actions {
            let compute = match *action {
                Action::Exchange { send, receive } => {
                    walk.keep(receive.map_or(0, |_| activation));
                    walk.keep(send.map_or(0, |_| -activation));
                    continue;
                }
                Action::Compute(compute) => compute,
            };
            let reduces = self.strategy.data > 1 && compute.microbatch + 1 == microbatches;
            for step in self.steps(compute) {
                let completes = step.completes.filter(|_| reduces);
                for &bucket in completes.iter().flat_map(|&group| &buckets.of_group[group]) {
                    if !std::mem::replace(&mut filling[bucket], true) {
                        walk.buckets += buckets.bytes[bucket] as i64;
                    }
                }
                walk.apply(&step);
            }
        }
        walk.transient(buckets.largest_param as i64);
        walk.buckets = 0;
        let params = self.params();
        for peak in params.iter().flat_map(|params| [params.norm.peak, params.step.peak]) {
            walk.transient(peak);
        }
        walk.most
    }

    /// The buckets in which gradients are reduced over the replicas.
    fn buckets(&self) -> Buckets {
        if self.strategy.data == 1 {
            return Buckets::default();
        }
        let (params, size) = (self.params(), ACCUMULATOR.size());
        let lengths: Vec<_> = params.iter().flat_map(|params| params.lengths.clone()).collect();
        let (places, filled) = assign_buckets(&lengths, BUCKET / size);
        let mut members = vec![0; filled.len()];
        places.iter().for_each(|&(bucket, ..)| members[bucket] += 1);
        let mut next = places.iter().map(|&(bucket, ..)| bucket);
        let of_group = params.iter().map(|params| next.by_ref().take(params.lengths.len()).collect());
        let of_group = of_group.collect();
        // A bucket ends with one flag for each of its parameters.
        let elements: Vec<_> = filled.iter().zip(members).map(|(len, members)| len + members).collect();
        Buckets {
            bytes: elements.iter().map(|len| (len * size) as u64).collect(),
            elements,
            of_group,
            largest_param: (lengths.iter().max().copied().unwrap_or(0) * size) as u64,
        }
    }

    /// The transfers between the two ends of a pipeline, if they share a tied table.
    fn tied_transfers(&self) -> Option<[Transfer; 2]> {
        let is_end = self.rank == 0 || self.is_last();
        let reduce = |dtype, elements| Transfer { op: Op::AllReduce, dtype, elements };
        let shares = self.dry.tied > 0 && self.strategy.pipeline > 1 && is_end;
        shares.then(|| [reduce(DType::F64, 1), reduce(ACCUMULATOR, self.dry.tied)])
    }

    /// The transfers of a step.
    pub(super) fn traffic(&self) -> Traffic {
        let Strategy { microbatches, pipeline, tensor, chunks, .. } = *self.strategy;
        let mut traffic = Traffic::default();
        for (part, runs) in self.parts_of_step() {
            for (transfer, count) in &part.transfers {
                *traffic.tensor.entry(*transfer).or_default() += count * runs;
            }
        }
        *traffic.tensor.entry(norm(tensor)).or_default() += 1;
        *traffic.pipeline.entry(norm(pipeline)).or_default() += 1;
        let stage = |chunk: usize| chunk * pipeline + self.rank;
        let sends: usize = (0..chunks)
            .map(|chunk| {
                let forward = stage(chunk) + 1 < pipeline * chunks && pipeline > 1;
                let backward = stage(chunk) > 0 && pipeline > 1;
                usize::from(forward) + usize::from(backward)
            })
            .sum();
        if sends > 0 {
            traffic.pipeline.insert(self.dry.exchange(self.dtype), (sends * microbatches) as u64);
        }
        traffic.ends.extend(self.tied_transfers().into_iter().flatten().map(|transfer| (transfer, 1)));
        for elements in self.buckets().elements {
            let reduce = Transfer { op: Op::AllReduce, dtype: ACCUMULATOR, elements };
            *traffic.data.entry(reduce).or_default() += 1;
        }
        traffic
    }

    /// The floating-point operations of a step.
    pub(super) fn flops(&self) -> u64 {
        let flops: u128 =
            self.parts_of_step().iter().map(|(part, runs)| part.flops() * u128::from(*runs)).sum();
        u64::try_from(flops).unwrap_or(u64::MAX)
    }

    /// The parts of a whole step, each with the number of its runs.
    pub(super) fn parts_of_step(&self) -> Vec<(&'a Part, u64)> {
        let mut parts = Vec::new();
        let microbatches = self.strategy.microbatches as u64;
        for chunk in 0..self.strategy.chunks {
            for pass in [Pass::Forward, Pass::Backward] {
                for (microbatch, runs) in [(0, 1), (1, microbatches - 1)] {
                    let steps = self.steps(Compute { pass, chunk, microbatch });
                    parts.extend(steps.into_iter().map(|step| (step.part, runs)));
                }
            }
        }
        for params in self.params() {
            parts.extend([(&params.norm, 1), (&params.step, 1)]);
        }
        parts
    }

    /// The seconds of a pass of one microbatch through a chunk.
    pub(super) fn time(&self, pass: Pass, chunk: usize) -> Time {
        let mut time = Time::default();
        let steps = self.steps(Compute { pass, chunk, microbatch: 1 });
        steps.iter().for_each(|step| time.add(step.part.time, 1));
        time
    }

    /// The seconds of the gradient norm and of the optimizer.
    pub(super) fn update_time(&self) -> f64 {
        self.params().iter().map(|params| params.norm.time.total() + params.step.time.total()).sum()
    }

    /// The seconds of reducing each bucket of gradients over the replicas, and those of filling and
    /// emptying all buckets.
    pub(super) fn reduce_times(&self, machine: &Machine) -> Result<(Vec<f64>, f64)> {
        let Strategy { data, pipeline, tensor, .. } = *self.strategy;
        let (mut times, mut copies) = (Vec::new(), 0.0);
        for elements in self.buckets().elements {
            let transfer = Transfer { op: Op::AllReduce, dtype: ACCUMULATOR, elements };
            times.push(machine.seconds(&transfer, data, pipeline * tensor));
            // A bucket is set to 0, gradients are copied to it, and sums are copied from it.
            for tensors in [1, 2, 2] {
                let bytes = (tensors * transfer.bytes()) as u64;
                let copy = Work { kind: WorkKind::Other, dtype: ACCUMULATOR, flops: 0, bytes };
                copies += machine.kernel(&copy, self.strategy.ranks())?;
            }
        }
        Ok((times, copies))
    }

    /// The seconds of the collectives after the passes that are not over the replicas: of a tied
    /// table's gradient, and of the gradient norm.
    pub(super) fn end_times(&self, machine: &Machine) -> f64 {
        let Strategy { pipeline, tensor, .. } = *self.strategy;
        let ends = self.tied_transfers().into_iter().flatten();
        let ends = ends.map(|transfer| machine.seconds(&transfer, 2, tensor * (pipeline - 1)));
        let norm = |ranks, stride| machine.seconds(&norm(ranks), ranks, stride);
        ends.sum::<f64>() + norm(tensor, 1) + norm(pipeline, tensor)
    }
}

/// The gradient norm gathers three numbers of each rank of a group.
fn norm(ranks: usize) -> Transfer {
    Transfer { op: Op::AllGather, dtype: DType::F64, elements: 3 * ranks }
}

/// A step of a pass.
struct Step<'a> {
    part: &'a Part,
    /// The bytes of the gradients that it allocates.
    gradients: i64,
    /// The index of the parameters whose gradients it completes, in [`Stage::params`].
    completes: Option<usize>,
}

/// The buckets of a rank's gradients. One replica has none.
#[derive(Default)]
struct Buckets {
    /// The number of elements of each bucket.
    elements: Vec<usize>,
    bytes: Vec<u64>,
    /// The buckets of each of [`Stage::params`].
    of_group: Vec<Vec<usize>>,
    /// The bytes of the largest parameter's gradient.
    largest_param: u64,
}

/// The live bytes of a rank during a step.
#[derive(Default)]
struct Walk {
    held: Memory,
    /// Saved values and tensors that wait.
    activations: i64,
    gradients: i64,
    /// Buckets of gradients that are reduced.
    buckets: i64,
    most: Memory,
}

impl Walk {
    fn apply(&mut self, step: &Step<'_>) {
        self.transient(step.part.peak);
        self.gradients += step.gradients;
        self.activations += step.part.kept - step.gradients;
    }

    fn keep(&mut self, bytes: i64) {
        self.activations += bytes;
        self.transient(0);
    }

    /// Takes note of a moment at which `bytes` more are live.
    fn transient(&mut self, bytes: i64) {
        let unsigned = |bytes: i64| bytes.max(0) as u64;
        let now = Memory {
            gradients: unsigned(self.gradients),
            activations: unsigned(self.activations),
            transients: unsigned(bytes + self.buckets),
            ..self.held
        };
        if now.total() >= self.most.total() {
            self.most = now;
        }
    }
}
