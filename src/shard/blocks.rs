//! Canonical blocks: a cut of a dimension that does not depend on the number of ranks.

use super::Partition;
use crate::error::Result;
use std::ops::Range;

/// A dimension cut into blocks that stay the same at every number of ranks; a rank owns a contiguous run of them.
///
/// Floating-point sums depend on their order. Where every rank performs, block by block, exactly the operations that a
/// single device would perform, and the blocks' results are added in [`Blocks::tree`]'s order, the number of ranks
/// decides only *who* computes, never *what*: the bits are the same at every tensor-parallel size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    blocks: Partition,
}

impl Blocks {
    /// `units` indivisible runs of `unit_len` indices cut into `count` blocks, each of at least one unit.
    ///
    /// # Errors
    /// [`crate::Error::TooManyRanks`] when there are fewer units than blocks.
    pub fn new(
        op: &'static str,
        unit: &'static str,
        units: usize,
        unit_len: usize,
        count: usize,
    ) -> Result<Self> {
        Ok(Self { blocks: Partition::by_unit(op, unit, units, unit_len, count)? })
    }

    /// The number of blocks.
    pub fn count(&self) -> usize {
        self.blocks.parts()
    }

    /// The indices of one block.
    pub fn range(&self, block: usize) -> Range<usize> {
        self.blocks.range(block)
    }

    /// Which blocks each of `ranks` ranks owns.
    ///
    /// # Errors
    /// [`crate::Error::TooManyRanks`] when there are fewer blocks than ranks.
    pub fn owned(&self, op: &'static str, ranks: usize) -> Result<Partition> {
        Partition::by_unit(op, "canonical blocks", self.count(), 1, ranks)
    }

    /// The cut of the dimension that the ownership of blocks implies.
    ///
    /// # Errors
    /// As [`Blocks::owned`].
    pub fn partition(&self, op: &'static str, ranks: usize) -> Result<Partition> {
        let owned = self.owned(op, ranks)?;
        Ok(Partition::from_sizes(
            (0..ranks).map(|rank| owned.range(rank).map(|block| self.blocks.size(block)).sum()),
        ))
    }

    /// The order in which the blocks' results are added: pairs `(into, from)`, to be carried out in sequence as
    /// `result[into] += result[from]`; the sum ends in `result[0]`.
    ///
    /// This is the binary tree over block indices in which neighbours at distance 1, 2, 4, … meet: it depends on the
    /// number of blocks alone, and a sub-tree whose blocks belong to one rank can be added by that rank.
    pub fn tree(&self) -> Vec<(usize, usize)> {
        let mut pairs = Vec::with_capacity(self.count() - 1);
        let mut distance = 1;
        while distance < self.count() {
            pairs.extend(
                (0..self.count() - distance).step_by(2 * distance).map(|into| (into, into + distance)),
            );
            distance *= 2;
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_adds_every_block_exactly_once() {
        for count in 1..20 {
            let blocks = Blocks::new("sum", "features", 40, 1, count).unwrap();
            let mut sums: Vec<Vec<usize>> = (0..count).map(|block| vec![block]).collect();
            for (into, from) in blocks.tree() {
                let taken = std::mem::take(&mut sums[from]);
                assert!(into < from && !taken.is_empty());
                sums[into].extend(taken);
            }
            assert_eq!(sums[0], (0..count).collect::<Vec<_>>(), "each block once, in order of index");
        }
    }

    #[test]
    fn ranks_own_whole_blocks() {
        let blocks = Blocks::new("sum", "features", 10, 1, 4).unwrap();
        assert_eq!((0..4).map(|block| blocks.range(block)).collect::<Vec<_>>(), [0..3, 3..6, 6..8, 8..10]);
        assert_eq!(blocks.partition("sum", 3).unwrap().sizes().collect::<Vec<_>>(), [6, 2, 2]);
        assert!(blocks.partition("sum", 5).is_err());
    }
}
