//! How a tensor lies in its ranks' parts, for collectives along any dimension.

use crate::shard::{Partition, Shape};
use std::hash::{DefaultHasher, Hash, Hasher};

/// A tensor cut along one dimension, as a matrix of `rows` rows of which rank `r` holds the columns `partition.range(r)`.
///
/// With `outer` the product of the dimensions before the cut one and `inner` of those after, a row-major tensor is
/// `outer` rows of `size · inner` elements: any dimension becomes columns. For dimension 0 there is one row, and parts
/// are contiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    /// The number of rows.
    pub rows: usize,
    /// Which columns each rank holds.
    pub partition: Partition,
}

impl Shards {
    /// The parts of a tensor of shape `shape` whose dimension `dim` is cut by `partition`.
    pub fn along(shape: Shape, dim: usize, partition: &Partition) -> Self {
        let (rows, inner) = shape.split_at(dim);
        Self { rows, partition: partition.scaled(inner) }
    }

    /// The number of elements of the whole tensor; `usize::MAX` where there would be more, as for
    /// the numbers below.
    pub fn total(&self) -> usize {
        self.rows.saturating_mul(self.partition.total())
    }

    /// The number of elements of one rank's part.
    pub fn len(&self, rank: usize) -> usize {
        self.rows.saturating_mul(self.partition.size(rank))
    }

    /// The number of elements of the largest part.
    pub fn longest(&self) -> usize {
        self.rows.saturating_mul(self.partition.sizes().max().unwrap_or(0))
    }

    /// A number that differs where the parts do. Never 0.
    pub(crate) fn fingerprint(&self) -> u64 {
        // The standard hasher with its fixed keys: the same in every process of one program.
        let mut hasher = DefaultHasher::new();
        (self.rows, &self.partition).hash(&mut hasher);
        hasher.finish() | 1
    }
}
