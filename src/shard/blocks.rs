//! Canonical blocks: cuts that do not depend on the number of ranks, and the tree in which their results are added.

use super::Partition;
use crate::error::{Error, Result};
use std::ops::Range;

/// In which order a group's operators add what several ranks have computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// Any order: each rank adds up what it has, and ranks are added in rank order. The bits depend on the number of
    /// ranks, but not on the run.
    #[default]
    Fast,
    /// Every dimension that is split is cut into this many blocks, which are the same at every number of ranks; a rank owns
    /// a run of them ([`Tree::owned`]), computes block by block what a single device computes for the same blocks, and
    /// results are added in the order of a [`Tree`] over the blocks. So the bits are the same at every number of ranks up
    /// to the number of blocks.
    Invariant {
        /// The number of blocks.
        blocks: usize,
    },
}

/// The canonical blocks of `units` indivisible runs of `unit_len` indices each: block b has the units
/// ⌊b · units / count⌋ .. ⌊(b + 1) · units / count⌋. Blocks are empty where there are fewer units than blocks.
///
/// Cuts of this kind nest: where one count is a multiple of another, so are the boundaries.
///
/// # Panics
/// When `count` is 0.
pub fn blocks(units: usize, unit_len: usize, count: usize) -> Partition {
    // At most `units`; the product is not.
    let bound = |block: usize| (block as u128 * units as u128 / count as u128) as usize;
    Partition::from_sizes((0..count).map(|block| (bound(block + 1) - bound(block)).saturating_mul(unit_len)))
}

/// A fixed binary tree over leaves 0, 1, 2, …, of which each rank owns a contiguous run.
///
/// Neighbours at distance 1, 2, 4, … meet: the sum over the leaves `start .. start + 2ᵏ`, with `start` a multiple of 2ᵏ, is
/// that of its first half plus that of its second, which may lie beyond the last leaf and is left out then. The tree
/// depends on the number of leaves alone. Floating-point sums depend on their order; sums along this tree do not depend on
/// which rank owns which leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    leaves: usize,
    owned: Partition,
}

impl Tree {
    /// The tree over so many leaves, each rank owning as even a run of them as whole leaves allow.
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

    /// The largest sub-trees all of whose leaves one rank owns, in order: what it has to say about a sum. At most twice the
    /// tree's height; one where every rank owns the same power of two.
    pub fn nodes(&self, rank: usize) -> Vec<Node> {
        let mut sum = TreeSum::new(self.leaves);
        for leaf in self.owned(rank) {
            let merged = sum.push(Node::leaf(leaf), (), |(), ()| Ok(()));
            merged.expect("nothing fails");
        }
        sum.nodes.into_iter().map(|(node, ())| node).collect()
    }

    /// A cut of a dimension into canonical blocks, one a leaf, and of those to ranks.
    ///
    /// # Errors
    /// When a rank's blocks have no unit, where `empty` does not allow it.
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
                "rank {rank} of {ranks} owns none of the {units} {unit}, which are cut into {leaves} canonical blocks"
            );
            return Err(Error::invalid(op, reason));
        }
        Ok(Partition::from_sizes((0..self.ranks()).map(size)).with_blocks(&blocks))
    }
}

/// The leaves `start .. start + 2^level` of a tree, as far as there are that many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    start: usize,
    level: u32,
}

impl Node {
    /// One leaf.
    pub fn leaf(index: usize) -> Self {
        Self { start: index, level: 0 }
    }

    fn len(self) -> usize {
        1 << self.level
    }
}

/// A sum along the tree over a number of leaves, to which sub-trees are added from left to right.
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

    /// Adds the next sub-tree. Whatever is complete is added up: `add(left, right)` makes `left` the sum of both.
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
            let (_, right) = self.nodes.pop().expect("there are two");
            let (node, left) = self.nodes.last_mut().expect("there are two");
            add(left, right)?;
            node.level += 1;
        }
        Ok(())
    }

    /// The sums of the largest sub-trees so far, from left to right.
    pub fn values(self) -> Vec<X> {
        self.nodes.into_iter().map(|(_, value)| value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is added to what, in brackets.
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
        let cut = tree.partition("sum", "features", 10, 2, false).unwrap();
        assert_eq!(cut.sizes().collect::<Vec<_>>(), [10, 4, 6]);
        assert_eq!(cut.blocks(0), Some(vec![0..4, 4..10]));
        let one = |block| Some(vec![block]);
        assert_eq!((cut.blocks(1), cut.blocks(2)), (one(0..4), one(0..6)));
        assert_eq!(cut.scaled(3).blocks(0), Some(vec![0..12, 12..30]));
        assert!(Tree::new("sum", "blocks", 4, 5).is_err());
        let error = tree.partition("attention", "heads", 1, 64, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attention: rank 0 of 3 owns none of the 1 heads, which are cut into 4 canonical blocks"
        );
        assert!(tree.partition("sum", "tokens", 1, 1, true).is_ok());
    }
}
