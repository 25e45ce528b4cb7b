//! Dry runs: the library's own layers on [`Meta`], with a planned group.
//!
//! A dry run measures the parts of a model, such as the forward of one block. A part's numbers do
//! not depend on the other parts, so those of a whole model are sums.

mod serving;
mod training;

pub(super) use serving::Serving;
pub(super) use training::{Block, BlockPasses, Params, Position, Training};

use super::Machine;
use crate::{
    comm::{Group, Transfer, TransferLog},
    device::{DType, Device, Meta, Work},
    error::{Error, Result},
    models::DecoderConfig,
    shard::{Heads, Partition},
};
use std::collections::{BTreeMap, HashSet};

/// What a part of a model does on one rank.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    /// The bytes that are live after the part, minus those before it.
    pub(super) kept: i64,
    /// The most bytes that are live during the part, minus those before it.
    pub(super) peak: i64,
    /// The kernels, with the number of their runs.
    pub(super) work: Vec<(Work, u64)>,
    /// The transfers in the tensor-parallel group, with their number.
    pub(super) transfers: BTreeMap<Transfer, u64>,
    /// Its seconds on a machine, once it is priced.
    pub(super) time: Time,
}

/// Seconds of a part.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Time {
    /// Of its kernels.
    pub(super) compute: f64,
    /// Of its transfers in the tensor-parallel group.
    pub(super) transfers: f64,
}

impl Time {
    pub(super) fn total(self) -> f64 {
        self.compute + self.transfers
    }

    /// Adds `count` times `other`.
    pub(super) fn add(&mut self, other: Self, count: u64) {
        self.compute += other.compute * count as f64;
        self.transfers += other.transfers * count as f64;
    }
}

impl Part {
    /// Sets the part's seconds on a machine, with `ranks` ranks of which a tensor-parallel group
    /// has `tensor`.
    pub(super) fn price(&mut self, machine: &Machine, ranks: usize, tensor: usize) -> Result<()> {
        self.time = Time::default();
        for (kernel, runs) in &self.work {
            self.time.compute += machine.kernel(kernel, ranks)? * *runs as f64;
        }
        for (transfer, count) in &self.transfers {
            self.time.transfers += machine.seconds(transfer, tensor, 1) * *count as f64;
        }
        Ok(())
    }

    /// Adds `count` times what `more` does beyond `less`. The peaks of parts do not add up: the
    /// largest stays.
    fn extend(&mut self, more: &Self, less: &Self, count: u64) {
        self.kept += (more.kept - less.kept) * count as i64;
        self.peak = self.peak.max(more.peak);
        let mut work: BTreeMap<Work, u64> = self.work.iter().copied().collect();
        for (kernel, runs) in &more.work {
            let before = less.work.iter().find(|(other, _)| other == kernel).map_or(0, |(_, runs)| *runs);
            *work.entry(*kernel).or_default() += (runs - before) * count;
        }
        self.work = work.into_iter().collect();
        for (transfer, runs) in &more.transfers {
            let before = less.transfers.get(transfer).copied().unwrap_or(0);
            *self.transfers.entry(*transfer).or_default() += (runs - before) * count;
        }
    }

    /// The floating-point operations.
    pub(super) fn flops(&self) -> u128 {
        self.work.iter().map(|(work, runs)| u128::from(work.flops) * u128::from(*runs)).sum()
    }
}

/// One tensor-parallel rank without data.
pub(super) struct Probe {
    device: Meta,
    group: Group<Meta>,
    log: TransferLog,
    dtype: DType,
}

impl Probe {
    /// `dtype` is the element type that the parts name. f16 is run as bf16, which has its size.
    fn new(rank: usize, ranks: usize, dtype: DType) -> Result<Self> {
        let device = Meta::new();
        let (group, log) = Group::planned(&device, rank, ranks)?;
        Ok(Self { device, group, log, dtype })
    }

    fn name(&self, dtype: DType) -> DType {
        if dtype == DType::BF16 { self.dtype } else { dtype }
    }

    /// Runs a part of a model, and returns what it did.
    fn run<R>(&self, part: impl FnOnce() -> Result<R>) -> Result<(R, Part)> {
        self.log.take();
        self.device.take_work();
        self.device.reset_peak();
        let before = self.device.memory().live as i64;
        let result = part()?;
        let memory = self.device.memory();
        let mut transfers = BTreeMap::new();
        for transfer in self.log.take() {
            *transfers.entry(Transfer { dtype: self.name(transfer.dtype), ..transfer }).or_default() += 1;
        }
        let mut work = self.device.take_work();
        work.iter_mut().for_each(|(work, _)| work.dtype = self.name(work.dtype));
        let (kept, peak) = (memory.live as i64 - before, memory.peak as i64 - before);
        Ok((result, Part { kept, peak, work, transfers, time: Time::default() }))
    }
}

/// The refusal of f64, in which models are tested but not trained.
pub(super) fn no_f64() -> Error {
    let reason = "plans are for f32, bf16 and f16, not for f64".into();
    Error::Unsupported { op: "plan", reason }
}

/// The ranks of a tensor-parallel group whose shards have different sizes: the first of each kind.
pub(super) fn distinct_ranks(model: &DecoderConfig, ranks: usize, tokens: usize) -> Result<Vec<usize>> {
    let attention = &model.block.attention;
    let heads = Heads::new(attention.heads, attention.kv_heads, attention.head_dim, ranks)?;
    let [ffn, vocabulary, rows] =
        [model.block.ffn, model.vocabulary, tokens].map(|len| Partition::even(len, ranks));
    let mut seen = HashSet::new();
    let shape = |rank: usize| {
        let kv = heads.kv_range(rank);
        let owned = kv.clone().filter(|&head| heads.owner(head) == rank).count();
        let shared = kv.clone().filter(|&head| heads.holders(head).len() > 1).count();
        let sizes = [&ffn, &vocabulary, &rows].map(|partition| partition.size(rank));
        (heads.query_range(rank).len(), kv.len(), owned, shared, sizes)
    };
    Ok((0..ranks).filter(|&rank| seen.insert(shape(rank))).collect())
}

/// The distinct kinds of blocks of a model, as the indices of the first block of each, and the kind
/// of each block.
pub(super) fn kinds(model: &DecoderConfig) -> (Vec<usize>, Vec<usize>) {
    let mut first: Vec<usize> = Vec::new();
    let of_layer = (0..model.layers.len())
        .map(|layer| {
            let same = |&other: &usize| model.layers[other] == model.layers[layer];
            first.iter().position(same).unwrap_or_else(|| {
                first.push(layer);
                first.len() - 1
            })
        })
        .collect();
    (first, of_layer)
}

/// The model with `count` blocks that are all like block `layer`.
fn with_blocks(model: &DecoderConfig, layer: usize, count: usize, recomputed: bool) -> DecoderConfig {
    let mut config = model.clone();
    config.block = model.block(layer);
    config.layers = vec![model.layers[layer].clone(); count];
    config.recomputed = if recomputed { count } else { 0 };
    config.json.clear();
    config
}
