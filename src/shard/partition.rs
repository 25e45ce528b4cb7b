//! Partitions of a dimension into contiguous ranges. Every shard boundary in the crate comes from a
//! partition.

use crate::error::{Error, Result};
use std::{ops::Range, sync::Arc};

/// A dimension `0..len` divided into one contiguous range per rank. The ranges may differ in size.
///
/// `range(r) = bounds[r] .. bounds[r + 1]`, with `bounds[0] = 0` and `bounds[shards] = len`. A
/// boundary that overflows a usize becomes `usize::MAX`, because no tensor has such a long
/// dimension. Clones share the boundaries.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Partition {
    bounds: Arc<[usize]>,
    /// The boundaries of the canonical blocks, if the partition consists of such blocks.
    blocks: Option<Arc<[usize]>>,
}

impl Partition {
    /// Divides `len` indices over `shards` ranks. The first `len mod shards` ranks get one index
    /// more than the others. If `len < shards`, some ranks get no index, which is valid for tokens.
    /// Layers that need at least one unit per rank use [`Partition::by_unit`].
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let partition = Partition::even(7, 3);
    /// assert!(partition.sizes().eq([3, 2, 2]));
    /// assert_eq!(partition.range(1), 3..5);
    /// ```
    ///
    /// # Panics
    /// When `shards` is 0.
    pub fn even(len: usize, shards: usize) -> Self {
        Self::of_units(len, 1, shards)
    }

    /// Divides `units` indivisible units of `unit_len` indices each over `shards` ranks, as evenly
    /// as whole units allow. Each rank gets at least one unit.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let heads = Partition::by_unit("attention", "heads", 9, 64, 2)?; // 9 heads of 64 features
    /// assert_eq!((heads.range(0), heads.range(1)), (0..320, 320..576));
    /// assert!(Partition::by_unit("attention", "heads", 1, 64, 2).is_err());
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::TooManyRanks`], naming `op` and `unit`, when there are fewer units than ranks.
    pub fn by_unit(
        op: &'static str,
        unit: &'static str,
        units: usize,
        unit_len: usize,
        shards: usize,
    ) -> Result<Self> {
        if units < shards {
            return Err(Error::TooManyRanks { op, ranks: shards, units, unit });
        }
        Ok(Self::of_units(units, unit_len, shards))
    }

    /// Divides items of the given costs into contiguous ranges of at least one item each, such that
    /// the largest cost of a range is as small as possible.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`], naming `op` and `unit`, when there are fewer items than ranges, or
    /// `shards` is 0.
    pub fn balanced(op: &'static str, unit: &'static str, costs: &[f64], shards: usize) -> Result<Self> {
        if costs.len() < shards || shards == 0 {
            return Err(Error::TooManyRanks { op, ranks: shards, units: costs.len(), unit });
        }
        // Dynamic programming over the number of ranges. `best[i]` is the cost of the most
        // expensive range in the best division of the first i items into the ranges so far.
        // `starts` has the item at which the last of these ranges begins.
        let sums: Vec<f64> = std::iter::once(0.0)
            .chain(costs.iter().scan(0.0, |sum, cost| {
                *sum += cost;
                Some(*sum)
            }))
            .collect();
        let mut best = sums.clone();
        let mut starts = vec![vec![0; costs.len() + 1]];
        for shard in 1..shards {
            let (mut next, mut start) = (vec![f64::INFINITY; costs.len() + 1], vec![0; costs.len() + 1]);
            for end in shard + 1..=costs.len() {
                for at in shard..end {
                    let worst = best[at].max(sums[end] - sums[at]);
                    if worst < next[end] {
                        (next[end], start[end]) = (worst, at);
                    }
                }
            }
            best = next;
            starts.push(start);
        }
        let mut bounds = vec![costs.len()];
        for start in starts.iter().rev() {
            bounds.push(start[bounds[bounds.len() - 1]]);
        }
        bounds.reverse();
        Ok(Self { bounds: bounds.into(), blocks: None })
    }

    /// The partition with the given sizes, in rank order.
    ///
    /// # Panics
    /// When there is no size.
    pub fn from_sizes(sizes: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(sizes.into_iter().scan(0_usize, |end, size| {
            *end = end.saturating_add(size);
            Some(*end)
        }));
        assert!(bounds.len() > 1, "a partition has at least one shard");
        Self { bounds: bounds.into(), blocks: None }
    }

    fn of_units(units: usize, unit_len: usize, shards: usize) -> Self {
        let (each, extra) = (units / shards, units % shards);
        let size = |shard: usize| (each + usize::from(shard < extra)).saturating_mul(unit_len);
        Self::from_sizes((0..shards).map(size))
    }

    /// The size of the whole dimension.
    pub fn total(&self) -> usize {
        self.bounds[self.shards()]
    }

    /// The number of shards.
    pub fn shards(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The indices of one shard.
    ///
    /// # Panics
    /// When there is no such shard.
    pub fn range(&self, shard: usize) -> Range<usize> {
        self.bounds[shard]..self.bounds[shard + 1]
    }

    /// The number of indices of one shard.
    pub fn size(&self, shard: usize) -> usize {
        self.range(shard).len()
    }

    /// The sizes of all shards, in rank order.
    pub fn sizes(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.bounds.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The same partition with `inner` elements for each index. Multiplies all boundaries by
    /// `inner`.
    pub fn scaled(&self, inner: usize) -> Self {
        let scaled = |bounds: &Arc<[usize]>| bounds.iter().map(|bound| bound.saturating_mul(inner)).collect();
        Self { bounds: scaled(&self.bounds), blocks: self.blocks.as_ref().map(scaled) }
    }

    /// The inverse of [`Partition::scaled`] by `inner`.
    pub(crate) fn shrunk(&self, inner: usize) -> Self {
        let shrunk = |bounds: &Arc<[usize]>| bounds.iter().map(|bound| bound / inner).collect();
        Self { bounds: shrunk(&self.bounds), blocks: self.blocks.as_ref().map(shrunk) }
    }

    /// The same ranges, together with the boundaries of the canonical blocks that they consist of.
    pub(super) fn with_blocks(self, blocks: &Self) -> Self {
        Self { blocks: Some(blocks.bounds.clone()), ..self }
    }

    /// The canonical blocks of one shard, as ranges of indices within the shard. `None` if the
    /// partition is not made of blocks.
    ///
    /// See [`super::Tree::partition`]. Two partitions are equal only if both their ranges and their
    /// blocks are equal.
    pub fn blocks(&self, shard: usize) -> Option<Vec<Range<usize>>> {
        let blocks = self.blocks.as_ref()?;
        let owned = Self::even(blocks.len() - 1, self.shards()).range(shard);
        let start = self.bounds[shard];
        Some(owned.map(|block| blocks[block] - start..blocks[block + 1] - start).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_partitions_cover_the_dimension_and_differ_by_at_most_one() {
        for len in 0..40 {
            for shards in 1..9 {
                let partition = Partition::even(len, shards);
                assert_eq!((partition.total(), partition.shards()), (len, shards));
                let sizes: Vec<_> = partition.sizes().collect();
                assert_eq!(sizes.iter().sum::<usize>(), len);
                assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1] && pair[0] - pair[1] <= 1));
                assert!((1..shards).all(|at| partition.range(at - 1).end == partition.range(at).start));
            }
        }
    }

    #[test]
    fn balanced_partitions_are_the_best_of_all() {
        fn worst(costs: &[f64], shards: usize) -> f64 {
            let all = costs.iter().sum();
            match shards {
                1 => all,
                _ => (1..=costs.len() + 1 - shards)
                    .map(|at| costs[..at].iter().sum::<f64>().max(worst(&costs[at..], shards - 1)))
                    .fold(f64::INFINITY, f64::min),
            }
        }
        for (costs, shards) in [
            (vec![1.0; 7], 3),
            (vec![5.0, 1.0, 1.0, 1.0], 2),
            (vec![1.0, 1.0, 1.0, 9.0], 3),
            (vec![3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], 4),
            (vec![2.0], 1),
        ] {
            let partition = Partition::balanced("stages", "layers", &costs, shards).unwrap();
            assert_eq!((partition.shards(), partition.total()), (shards, costs.len()));
            assert!(partition.sizes().all(|size| size > 0));
            let cost = |shard| costs[partition.range(shard)].iter().sum::<f64>();
            let got = (0..shards).map(cost).fold(0.0, f64::max);
            assert_eq!(got, worst(&costs, shards), "{costs:?} in {shards}");
        }
        assert!(Partition::balanced("stages", "layers", &[1.0], 2).is_err());
    }

    #[test]
    fn units_are_never_divided() {
        let partition = Partition::by_unit("attention", "heads", 9, 64, 4).unwrap();
        assert_eq!(partition.sizes().collect::<Vec<_>>(), [192, 128, 128, 128]);
        let error = Partition::by_unit("attention", "heads", 3, 64, 4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attention: 4 ranks cannot share 3 heads: each rank needs at least one"
        );
    }
}
