//! The assignment of samples to data-parallel ranks.

use crate::{rng::Philox, shard::Partition};
use std::ops::Range;

/// Batches of samples, sharded over the ranks of a data-parallel group.
///
/// The order of an epoch is a function of the seed and the epoch. Batch b has samples b · batch ..
/// (b + 1) · batch of that order. The last batch may be shorter. Each batch is partitioned over the
/// ranks as evenly as possible. So no sample is dropped, repeated or padded, and a batch does not
/// depend on the number of ranks. Ranks may have different numbers of samples, even none. Use this
/// rank's number of samples as the weight of [`GradReduce::Mean`](super::GradReduce::Mean), or
/// divide the loss by the size of the batch.
///
/// ```
/// let sampler = shardwise::train::ShardedSampler { samples: 10, batch: 4, shuffle: Some(7) };
/// assert_eq!(sampler.batches(), 3);
/// let order = sampler.order(0);
/// let last: Vec<_> = (0..3).map(|rank| &order[sampler.range(2, rank, 3)]).collect();
/// assert_eq!(last, [&order[8..9], &order[9..10], &[]]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardedSampler {
    /// The number of samples.
    pub samples: usize,
    /// The number of samples in a batch, over all ranks.
    pub batch: usize,
    /// The seed of the shuffle, or `None` to keep the order of the samples.
    pub shuffle: Option<u64>,
}

impl ShardedSampler {
    /// Returns the number of batches in an epoch.
    pub fn batches(&self) -> usize {
        self.samples.div_ceil(self.batch.max(1))
    }

    /// Returns the order of the samples in an epoch.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.samples).collect();
        if let Some(seed) = self.shuffle {
            // Sorting by random keys gives a uniformly random order.
            let stream = Philox::stream(seed, epoch);
            order.sort_by_cached_key(|&sample| (stream.uniform(sample as u64).to_bits(), sample));
        }
        order
    }

    /// Returns the samples of rank `rank` in batch number `batch`, as a range of indices of
    /// [`ShardedSampler::order`].
    pub fn range(&self, batch: usize, rank: usize, ranks: usize) -> Range<usize> {
        let start = (batch * self.batch).min(self.samples);
        let len = self.batch.min(self.samples - start);
        let own = Partition::even(len, ranks).range(rank);
        start + own.start..start + own.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_once_on_any_number_of_ranks() {
        for (samples, batch, ranks) in [(10, 4, 3), (7, 7, 8), (0, 3, 2), (9, 1, 2), (5, 100, 2)] {
            let sampler = ShardedSampler { samples, batch, shuffle: Some(7) };
            let all: Vec<_> = (0..sampler.batches())
                .flat_map(|at| (0..ranks).flat_map(move |rank| sampler.range(at, rank, ranks)))
                .collect();
            assert_eq!(all, (0..samples).collect::<Vec<_>>());
            let mut order = sampler.order(3);
            assert_eq!(order, sampler.order(3));
            assert!(samples < 7 || order != sampler.order(4));
            order.sort_unstable();
            assert_eq!(order, (0..samples).collect::<Vec<_>>());
        }
    }
}
