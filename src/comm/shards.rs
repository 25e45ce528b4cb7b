//! The layout of a tensor's shards, for collectives along any dimension.

use crate::shard::{Partition, Shape};
use std::hash::{DefaultHasher, Hash, Hasher};

/// A tensor sharded along one dimension, seen as a matrix of `rows` rows. Rank `r` has the columns
/// `partition.range(r)`.
///
/// Let `outer` be the product of the dimensions before the sharded dimension, and `inner` the
/// product of the dimensions after it. A row-major tensor is then a matrix of `outer` rows and
/// `size · inner` columns. If dimension 0 is sharded, there is one row, and shards are contiguous.
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

    /// The number of elements of the whole tensor. It saturates at `usize::MAX`, as do `len` and
    /// `longest`.
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
        // The standard hasher has fixed keys, so every process of one program gets the same hash.
        let mut hasher = DefaultHasher::new();
        (self.rows, &self.partition).hash(&mut hasher);
        hasher.finish() | 1
    }
}
