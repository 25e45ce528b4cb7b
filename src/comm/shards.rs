//! The layout of a tensor's shards, for collectives along any dimension.

use crate::shard::{Partition, Shape};
use std::hash::{DefaultHasher, Hash, Hasher};

/// A tensor sharded along one dimension, as a matrix of `rows` rows; rank `r` has the columns
/// `partition.range(r)`.
///
/// Let `outer` be the product of the dimensions before the sharded one, `inner` of those after it.
/// A row-major tensor is then `outer` rows of `size · inner` elements, so that any dimension
/// becomes columns. For dimension 0 there is one row, and shards are contiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    /// The number of rows.
    pub rows: usize,
    /// The columns of each rank.
    pub partition: Partition,
}

impl Shards {
    /// The shards of a tensor of shape `shape` whose dimension `dim` is partitioned by `partition`.
    pub fn along(shape: Shape, dim: usize, partition: &Partition) -> Self {
        let (rows, inner) = shape.split_at(dim);
        Self { rows, partition: partition.scaled(inner) }
    }

    /// The number of elements of the whole tensor. Saturates at `usize::MAX`, as the numbers below
    /// do.
    pub fn total(&self) -> usize {
        self.rows.saturating_mul(self.partition.total())
    }

    /// The number of elements of one rank's shard.
    pub fn len(&self, rank: usize) -> usize {
        self.rows.saturating_mul(self.partition.size(rank))
    }

    /// The number of elements of the largest shard.
    pub fn longest(&self) -> usize {
        self.rows.saturating_mul(self.partition.sizes().max().unwrap_or(0))
    }

    /// A hash of rows and partition; never 0.
    pub(crate) fn fingerprint(&self) -> u64 {
        // The standard hasher with its fixed keys: the same in every process of one program.
        let mut hasher = DefaultHasher::new();
        (self.rows, &self.partition).hash(&mut hasher);
        hasher.finish() | 1
    }
}
