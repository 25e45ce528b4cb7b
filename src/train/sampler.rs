//! Which samples a data-parallel rank sees.

use crate::{rng::Philox, shard::Partition};
use std::ops::Range;

/// Samples in batches over the ranks of a data-parallel group.
///
/// The order of an epoch is a function of the seed and the epoch. Batch b is samples b · batch .. (b + 1) · batch of that
/// order, the last one shorter, and each batch is cut over the ranks as evenly as whole samples allow. So no sample is
/// dropped, repeated or padded, the union over the ranks does not depend on their number, and ranks may have different
/// numbers of samples (down to none): gradients are then averaged with those as weights, or scaled by the batch's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardedSampler {
    /// The number of samples.
    pub samples: usize,
    /// The samples of a batch, over all ranks.
    pub batch: usize,
    /// The seed of the order; none for the samples' own order.
    pub shuffle: Option<u64>,
}

impl ShardedSampler {
    /// The number of batches of an epoch.
    pub fn batches(&self) -> usize {
        self.samples.div_ceil(self.batch.max(1))
    }

    /// The order of an epoch's samples.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.samples).collect();
        if let Some(seed) = self.shuffle {
            // Sorted by random keys: a uniformly random order.
            let stream = Philox::stream(seed, epoch);
            order.sort_by_cached_key(|&sample| (stream.uniform(sample as u64).to_bits(), sample));
        }
        order
    }

    /// The places, in the epoch's order, of a rank's samples of a batch.
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
