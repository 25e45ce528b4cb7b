//! The settings that layers read from their group: the reduction and the overlap. Also the
//! partitions that follow from these settings.

use super::{Group, Overlap};
use crate::{
    device::Device,
    error::Result,
    shard::{Partition, Reduction, Tree},
};

/// The maximum number of chunks with [`Overlap::From`]. However many chunks there are, the
/// communication of one of them does not overlap with computation.
const MAX_CHUNKS: usize = 4;

impl<B: Device> Group<B> {
    /// Returns this group with another reduction. Layers that are loaded on the returned group use
    /// the reduction, and its sub-groups inherit it. Pass the same reduction on every rank.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let group = Group::solo(&Cpu::new()).with_reduction(Reduction::Invariant { blocks: 4 });
    /// let partition = group.partition("linear", "features", 10, 1)?;
    /// assert_eq!(partition.blocks(0), Some(vec![0..2, 2..5, 5..7, 7..10]));
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn with_reduction(&self, reduction: Reduction) -> Self {
        let mut group = self.clone();
        group.reduction = reduction;
        group
    }

    /// The order in which operators add the partial sums of several ranks.
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// The tree over the group's canonical blocks; none with [`Reduction::Fast`].
    ///
    /// # Errors
    /// When there are fewer blocks than ranks.
    pub fn tree(&self) -> Result<Option<Tree>> {
        match self.reduction {
            Reduction::Fast => Ok(None),
            Reduction::Invariant { blocks } => {
                Tree::new("invariant reduction", "canonical blocks", blocks, self.size()).map(Some)
            }
        }
    }

    /// Partitions `units` indivisible units of `unit_len` indices each over the ranks. Every rank
    /// gets at least one unit. The partition is even, or follows the canonical blocks if there is a
    /// tree.
    ///
    /// # Errors
    /// [`TooManyRanks`](crate::Error::TooManyRanks), naming `op` and `unit`, when there are fewer
    /// units than ranks. With [`Reduction::Invariant`], also when a rank's blocks contain no unit.
    pub fn partition(
        &self,
        op: &'static str,
        unit: &'static str,
        units: usize,
        unit_len: usize,
    ) -> Result<Partition> {
        match self.tree()? {
            None => Partition::by_unit(op, unit, units, unit_len, self.size()),
            Some(tree) => tree.partition(op, unit, units, unit_len, false),
        }
    }

    /// Partitions `len` indices, such as tokens, over the ranks: evenly, or by canonical blocks if
    /// there is a tree. A rank may get no index.
    ///
    /// # Errors
    /// When there are fewer blocks than ranks.
    pub fn even_partition(&self, len: usize) -> Result<Partition> {
        match self.tree()? {
            None => Ok(Partition::even(len, self.size())),
            Some(tree) => tree.partition("partition", "indices", len, 1, true),
        }
    }

    /// Returns this group with another overlap setting. Layers that are loaded on the returned
    /// group use the setting, and its sub-groups inherit it. Pass the same setting on every rank.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// launch::threads(2, |world| {
    ///     let world = world.with_overlap(Overlap::From(1024));
    ///     assert_eq!(world.chunks(8, 100), None); // 800 bytes: not worth a second chunk
    ///     assert_eq!(world.chunks(8, 512), Some(Partition::even(8, 4)));
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn with_overlap(&self, overlap: Overlap) -> Self {
        let mut group = self.clone();
        group.overlap = overlap;
        group
    }

    /// How layers overlap their collectives with computation.
    pub fn overlap(&self) -> Overlap {
        self.overlap
    }

    /// The chunks in which a layer communicates `tokens` tokens of `bytes` bytes each; none if the
    /// layer uses a single collective.
    pub fn chunks(&self, tokens: usize, bytes: usize) -> Option<Partition> {
        let count = match self.overlap {
            Overlap::Off => 0,
            Overlap::Chunks(count) => count.min(tokens),
            Overlap::From(least) => match (tokens * bytes / least.max(1)).min(MAX_CHUNKS).min(tokens) {
                1 => 0,
                count => count,
            },
        };
        (count > 0 && self.size() > 1).then(|| Partition::even(tokens, count))
    }
}
