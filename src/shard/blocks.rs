//! Canonical blocks, which do not depend on the number of ranks, and the tree along which their
//! results are added.

use super::Partition;
use crate::error::{Error, Result};
use std::ops::Range;

/// The order in which the operators of a group add the results of several ranks. Later versions may
/// add orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// Each rank adds its own terms. Then the sums of the ranks are added in rank order. The bits
    /// depend on the number of ranks, but are the same in every run.
    #[default]
    Fast,
    /// Gives the same bits at every number of ranks up to the number of blocks. Every sharded
    /// dimension is divided into this many blocks, whatever the number of ranks. A rank owns a
    /// contiguous range of blocks ([`Tree::owned`]) and computes block by block, as a single device
    /// does. The results are added along a [`Tree`] over the blocks.
    Invariant {
        /// The number of blocks.
        blocks: usize,
    },
}

/// The canonical blocks of `units` indivisible units of `unit_len` indices each. Block b has the
/// units ⌊b · units / count⌋ .. ⌊(b + 1) · units / count⌋. If there are fewer units than blocks,
/// some blocks are empty.
///
/// The blocks nest: the boundaries for a multiple of `count` include the boundaries for `count`.
///
/// ```
/// use shardwise::shard::blocks;
/// assert!(blocks(10, 1, 4).sizes().eq([2, 3, 2, 3]));
/// assert!(blocks(10, 1, 2).sizes().eq([5, 5])); // the boundary 5 is one of 2, 5, 7
/// ```
///
/// # Panics
/// When `count` is 0.
pub fn blocks(units: usize, unit_len: usize, count: usize) -> Partition {
    // The quotient is at most `units`, but the product may overflow a usize, so this multiplies in
    // u128.
    let bound = |block: usize| (block as u128 * units as u128 / count as u128) as usize;
    Partition::from_sizes((0..count).map(|block| (bound(block + 1) - bound(block)).saturating_mul(unit_len)))
}

/// A fixed binary tree over the leaves 0, 1, 2, …. Each rank owns a contiguous range of leaves.
///
/// If `start` is a multiple of 2ᵏ⁺¹, sum(start .. start + 2ᵏ⁺¹) = sum(start .. start + 2ᵏ) +
/// sum(start + 2ᵏ .. start + 2ᵏ⁺¹). A right half beyond the last leaf is omitted. The tree depends
/// only on the number of leaves. So the bits of a sum do not depend on which rank owns which
/// leaves.
///
/// ```
/// use shardwise::shard::Tree;
/// let tree = Tree::new("sum", "blocks", 8, 3)?;
/// assert_eq!((tree.owned(0), tree.owned(1), tree.owned(2)), (0..3, 3..6, 6..8));
/// // Rank 0 has the sub-trees 0..2 and 2; rank 1 has 3 and 4..6; rank 2 has 6..8.
/// assert_eq!([0, 1, 2].map(|rank| tree.nodes(rank).len()), [2, 2, 1]);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    leaves: usize,
    owned: Partition,
}

impl Tree {
    /// The tree over `leaves` leaves, divided over the ranks as evenly as whole leaves allow.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`] when there are fewer leaves than ranks.
    pub fn new(op: &'static str, unit: &'static str, leaves: usize, ranks: usize) -> Result<Self> {
        Ok(Self { leaves, owned: Partition::by_unit(op, unit, leaves, 1, ranks)? })
    }

    /// The number of leaves.
    pub fn leaves(&self) -> usize {
        self.leaves
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.owned.shards()
    }

    /// The leaves of one rank.
    pub fn owned(&self, rank: usize) -> Range<usize> {
        self.owned.range(rank)
    }

    /// The largest sub-trees all of whose leaves the rank owns, in order. The rank contributes one
    /// term per sub-tree to a sum. A rank has at most two sub-trees per level of the tree. If all
    /// ranks own the same number of leaves, and this number is a power of two, each rank has a
    /// single sub-tree.
    pub fn nodes(&self, rank: usize) -> Vec<Node> {
        let mut sum = TreeSum::new(self.leaves);
        for leaf in self.owned(rank) {
            let merged = sum.push(Node::leaf(leaf), (), |(), ()| Ok(()));
            merged.expect("the addition cannot fail");
        }
        sum.nodes.into_iter().map(|(node, ())| node).collect()
    }

    /// Divides a dimension into canonical blocks, one per leaf, and assigns them to the ranks that
    /// own the leaves.
    ///
    /// # Errors
    /// When a rank's blocks contain no unit, unless `empty` is set.
    pub fn partition(
        &self,
        op: &'static str,
        unit: &'static str,
        units: usize,
        unit_len: usize,
        empty: bool,
    ) -> Result<Partition> {
        let blocks = blocks(units, unit_len, self.leaves);
        let size = |rank: usize| self.owned(rank).map(|block| blocks.size(block)).sum::<usize>();
        if let Some(rank) = (0..self.ranks()).find(|&rank| size(rank) == 0 && !empty) {
            let (ranks, leaves) = (self.ranks(), self.leaves);
            let reason = format!(
                "rank {rank} of {ranks} owns none of the {units} {unit}, which are divided into {leaves} canonical blocks"
            );
            return Err(Error::invalid(op, reason));
        }
        Ok(Partition::from_sizes((0..self.ranks()).map(size)).with_blocks(&blocks))
    }
}

/// The sub-tree over the leaves `start .. start + 2^level` of a tree. The leaves beyond the tree's
/// last leaf are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    start: usize,
    level: u32,
}

impl Node {
    /// The sub-tree of one leaf.
    pub fn leaf(index: usize) -> Self {
        Self { start: index, level: 0 }
    }

    fn len(self) -> usize {
        1 << self.level
    }
}

/// A sum along the tree over a given number of leaves. The caller pushes sub-trees from left to
/// right.
#[derive(Clone, Debug)]
pub struct TreeSum<X> {
    leaves: usize,
    nodes: Vec<(Node, X)>,
}

impl<X> TreeSum<X> {
    /// An empty sum.
    pub fn new(leaves: usize) -> Self {
        Self { leaves, nodes: Vec::new() }
    }

    /// Pushes the sum `value` of the next sub-tree. As long as the last two sub-trees are complete
    /// siblings, replaces them by their parent. `add(left, right)` must add `right` to `left`.
    ///
    /// # Errors
    /// Those of `add`.
    pub fn push(&mut self, node: Node, value: X, mut add: impl FnMut(&mut X, X) -> Result<()>) -> Result<()> {
        self.nodes.push((node, value));
        while let [.., (left, _), (right, _)] = self.nodes[..] {
            let siblings = left.start % (2 * left.len()) == 0 && right.start == left.start + left.len();
            let whole = right.level == left.level || right.start + right.len() >= self.leaves;
            if !(siblings && whole && right.level <= left.level) {
                break;
            }
            let (_, right) = self.nodes.pop().expect("the stack has two sub-trees");
            let (node, left) = self.nodes.last_mut().expect("the stack has two sub-trees");
            add(left, right)?;
            node.level += 1;
        }
        Ok(())
    }

    /// Returns the sums of the largest sub-trees that the pushed sub-trees form, from left to
    /// right.
    pub fn values(self) -> Vec<X> {
        self.nodes.into_iter().map(|(_, value)| value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of additions, as brackets around leaf numbers.
    fn brackets(leaves: usize, ranks: usize) -> String {
        let tree = Tree::new("sum", "blocks", leaves, ranks).unwrap();
        let add = |left: &mut String, right: String| {
            *left = format!("({left}{right})");
            Ok(())
        };
        let mut total = TreeSum::new(leaves);
        for rank in 0..ranks {
            let mut own = TreeSum::new(leaves);
            for leaf in tree.owned(rank) {
                own.push(Node::leaf(leaf), leaf.to_string(), add).unwrap();
            }
            let nodes = tree.nodes(rank);
            assert!(nodes.len() <= 2 * (leaves.ilog2() as usize + 1));
            for (node, value) in nodes.into_iter().zip(own.values()) {
                total.push(node, value, add).unwrap();
            }
        }
        let [total] = &total.values()[..] else { panic!("{leaves} leaves on {ranks} ranks") };
        total.clone()
    }

    #[test]
    fn sums_do_not_depend_on_who_owns_what() {
        assert_eq!(brackets(1, 1), "0");
        assert_eq!(brackets(7, 1), "(((01)(23))((45)6))");
        assert_eq!(brackets(9, 1).len(), 9 + 2 * 8);
        for leaves in 1..20 {
            for ranks in 1..=leaves {
                assert_eq!(brackets(leaves, ranks), brackets(leaves, 1), "{leaves} leaves on {ranks} ranks");
            }
        }
    }

    #[test]
    fn ranks_own_whole_blocks() {
        let tree = Tree::new("sum", "blocks", 4, 3).unwrap();
        let partition = tree.partition("sum", "features", 10, 2, false).unwrap();
        assert_eq!(partition.sizes().collect::<Vec<_>>(), [10, 4, 6]);
        assert_eq!(partition.blocks(0), Some(vec![0..4, 4..10]));
        let one = |block| Some(vec![block]);
        assert_eq!((partition.blocks(1), partition.blocks(2)), (one(0..4), one(0..6)));
        assert_eq!(partition.scaled(3).blocks(0), Some(vec![0..12, 12..30]));
        assert!(Tree::new("sum", "blocks", 4, 5).is_err());
        let error = tree.partition("attention", "heads", 1, 64, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attention: rank 0 of 3 owns none of the 1 heads, which are divided into 4 canonical blocks"
        );
        assert!(tree.partition("sum", "tokens", 1, 1, true).is_ok());
    }
}
