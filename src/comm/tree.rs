//! Sums along a fixed tree. The bits of the sum do not depend on which ranks own which leaves.
//!
//! The ranks exchange the sums of their sub-trees as values of the accumulator type (`Acc`). For
//! its shard of the result, each rank adds these sums in the tree's order and rounds once. Then the
//! ranks gather the shards. With one sub-tree per rank, and for an element type that is its own
//! accumulator type, this moves as many bytes as a reduce-scatter and an all-gather.

use super::{Group, Op, ReduceOp, Shards};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{MatMut, MatRef, Pointwise},
    shard::{Node, Partition, Shape, Tree, TreeSum},
    tensor::Tensor,
};
use std::ops::Range;

/// If the sums of all sub-trees together have at most this many elements, every rank gathers all
/// these sums in one collective.
const SMALL: usize = 4096;

/// The algorithm of a sum along the tree.
enum Algorithm {
    /// The rank owns all leaves and adds locally.
    Local,
    /// Two ranks own one sub-tree each. A plain all-reduce suffices, because a + b = b + a.
    Pair,
    /// Every rank gathers the sums of all sub-trees and adds them up.
    Gather,
    /// Every rank receives its shard of each sub-tree's sum, and adds these shards up.
    Exchange,
}

impl Algorithm {
    fn of(tree: &Tree, elements: usize) -> Self {
        let nodes: usize = (0..tree.ranks()).map(|rank| tree.nodes(rank).len()).sum();
        match tree.ranks() {
            1 => Self::Local,
            2 if nodes == 2 => Self::Pair,
            _ if nodes * elements <= SMALL => Self::Gather,
            _ => Self::Exchange,
        }
    }
}

impl<B: Pointwise> Group<B> {
    /// Returns Σ over the leaves of `tree`, rounded once. `terms` are the sums of this rank's
    /// sub-trees, in the order of [`Tree::nodes`].
    ///
    /// Collectives: none on one rank. Otherwise one of: an all-reduce; an all-gather; exchanges
    /// with every other rank and an all-gather.
    ///
    /// ```
    /// use shardwise::{prelude::*, shard::Tree};
    /// let tree = Tree::new("sum", "terms", 3, 2)?; // rank 0 owns leaves 0 and 1, rank 1 leaf 2
    /// let sums = launch::threads(2, |world| {
    ///     let own: &[f32] = if world.rank() == 0 { &[1e8 + 8.0] } else { &[-1e8] };
    ///     let term = Tensor::from_slice(world.device(), [1], own)?;
    ///     world.tree_all_reduce::<f32>(&tree, vec![term])?.to_vec()
    /// })?;
    /// assert_eq!(sums, [[8.0], [8.0]]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the terms do not match this rank's sub-trees, the ranks disagree, or a rank is lost.
    /// [`Error::NotPermitted`] as for [`Group::all_reduce`].
    #[track_caller]
    pub fn tree_all_reduce<T: Element>(
        &self,
        tree: &Tree,
        terms: Vec<Tensor<T::Acc, B>>,
    ) -> Result<Tensor<T, B>> {
        let (shape, is_weight) = self.check_terms(tree, &terms)?;
        let sum: Tensor<T, B> = match Algorithm::of(tree, shape.len()) {
            Algorithm::Local => rounded(add_up(tree, 0..1, terms)?),
            Algorithm::Pair => {
                let mut sum = one(terms)?;
                self.all_reduce(ReduceOp::Sum, &mut sum)?;
                rounded(sum)
            }
            Algorithm::Gather => {
                let whole = Shards { rows: 1, partition: Partition::from_sizes([shape.len()]) };
                let terms = self.gather_terms(tree, &terms, &whole, 0)?;
                rounded(add_up(tree, 0..self.size(), terms)?)?.reshape(shape)
            }
            Algorithm::Exchange => {
                let partition = Partition::even(shape.len(), self.size());
                let shards = Shards { rows: 1, partition: partition.clone() };
                let terms = self.exchange_terms(tree, &terms, &shards)?;
                let shard = rounded::<T, B>(add_up(tree, 0..self.size(), terms)?)?;
                let len = shard.len();
                self.all_gather(&shard.reshape([len])?, 0, &partition)?.reshape(shape)
            }
        }?;
        Ok(sum.marked(is_weight))
    }

    /// Returns this rank's shard, along dimension `dim`, of [`Group::tree_all_reduce`]'s result.
    ///
    /// Collectives: none on one rank. Otherwise one of: a reduce-scatter; an all-gather; exchanges
    /// with every other rank.
    ///
    /// # Errors
    /// The errors of [`Group::tree_all_reduce`]. Also when the partition does not fit the
    /// dimension.
    #[track_caller]
    pub fn tree_reduce_scatter<T: Element>(
        &self,
        tree: &Tree,
        terms: Vec<Tensor<T::Acc, B>>,
        dim: usize,
        partition: &Partition,
    ) -> Result<Tensor<T, B>> {
        const OP: &str = "tree_reduce_scatter";
        let (shape, is_weight) = self.check_terms(tree, &terms)?;
        if dim >= shape.rank() {
            return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {shape}")));
        }
        same_size(OP, "the number of shards", partition.shards(), "the number of ranks", self.size())?;
        same_size(
            OP,
            "the size of the partition",
            partition.total(),
            "that of the dimension",
            shape.dims()[dim],
        )?;
        let local = shape.with(dim, partition.size(self.rank()));
        let shards = Shards::along(shape, dim, partition);
        let shard: Tensor<T, B> = match Algorithm::of(tree, shape.len()) {
            Algorithm::Local => rounded(add_up(tree, 0..1, terms)?),
            Algorithm::Pair => rounded(self.reduce_scatter(ReduceOp::Sum, &one(terms)?, dim, partition)?),
            Algorithm::Gather => {
                let terms = self.gather_terms(tree, &terms, &shards, self.rank())?;
                rounded(add_up(tree, 0..self.size(), terms)?)?.reshape(local)
            }
            Algorithm::Exchange => {
                let terms = self.exchange_terms(tree, &terms, &shards)?;
                rounded(add_up(tree, 0..self.size(), terms)?)?.reshape(local)
            }
        }?;
        Ok(shard.marked(is_weight))
    }

    /// For each step, the rank to send to and the rank to receive from.
    fn peers(&self) -> impl Iterator<Item = (usize, usize)> + use<B> {
        let (rank, size) = (self.rank(), self.size());
        (1..size).map(move |step| ((rank + step) % size, (rank + size - step) % size))
    }

    /// Checks that there is one term per sub-tree of this rank, all of one shape, and that the
    /// ranks may see them. Returns the shape, and whether a term is a weight.
    fn check_terms<A: Element>(&self, tree: &Tree, terms: &[Tensor<A, B>]) -> Result<(Shape, bool)> {
        const OP: &str = "tree sum";
        same_size(OP, "the ranks of the tree", tree.ranks(), "the ranks of the group", self.size())?;
        let nodes = tree.nodes(self.rank()).len();
        same_size(OP, "the number of terms", terms.len(), "the number of this rank's sub-trees", nodes)?;
        let shape = terms.first().map_or(Shape::new(&[0]), Tensor::shape);
        for term in terms {
            let (dims, first) = (term.shape(), shape);
            crate::error::same_shape(OP, "a term", dims.dims(), "the first", first.dims())?;
        }
        let weight = terms.iter().find(|term| term.is_weight());
        weight.map_or(Ok(()), |weight| self.admit_all(Op::AllReduce, weight))?;
        Ok((shape, weight.is_some()))
    }

    /// Gathers the terms of every rank, in rank order, and returns shard `shard` of each term.
    #[track_caller]
    fn gather_terms<A: Element>(
        &self,
        tree: &Tree,
        terms: &[Tensor<A, B>],
        shards: &Shards,
        shard: usize,
    ) -> Result<Vec<Tensor<A, B>>> {
        let len = terms.first().map_or(0, Tensor::len);
        let all = Shards { rows: 1, partition: Partition::from_sizes([len]) };
        let packed = pack(self.device(), terms, &all, 0..len)?;
        let counts = (0..self.size()).map(|rank| tree.nodes(rank).len());
        let whole = self.all_gather(&packed, 0, &Partition::from_sizes(counts))?;
        let total = shards.partition.total();
        let unpack = |node: usize| {
            let one = MatRef::<A, B>::new(
                B::narrow(whole.slice(), node * len..(node + 1) * len),
                shards.rows,
                total,
            )?;
            copied(self.device(), one.columns(shards.partition.range(shard)))
        };
        (0..whole.shape().dims()[0]).map(unpack).collect()
    }

    /// Exchanges terms with every other rank. Returns this rank's shard of each term, in rank
    /// order.
    #[track_caller]
    fn exchange_terms<A: Element>(
        &self,
        tree: &Tree,
        terms: &[Tensor<A, B>],
        shards: &Shards,
    ) -> Result<Vec<Tensor<A, B>>> {
        let (rank, own) = (self.rank(), shards.partition.size(self.rank()));
        let nodes = |rank: usize| tree.nodes(rank).len();
        let mut terms_of: Vec<Vec<Tensor<A, B>>> = (0..self.size()).map(|_| Vec::new()).collect();
        for (to, from) in self.peers() {
            let send = match shards.partition.size(to) {
                0 => None,
                _ => Some(pack(self.device(), terms, shards, shards.partition.range(to))?),
            };
            let recv = (own > 0).then(|| (from, Shape::new(&[nodes(from), shards.rows * own])));
            let arrived = match (&send, recv) {
                (None, None) => None,
                _ => self.exchange(send.as_ref().map(|packed| (to, packed)), recv)?,
            };
            let Some(arrived) = arrived else {
                terms_of[from] = (0..nodes(from))
                    .map(|_| Tensor::empty(self.device(), [shards.rows, 0]))
                    .collect::<Result<_>>()?;
                continue;
            };
            let len = shards.rows * own;
            for node in 0..nodes(from) {
                let one = MatRef::<A, B>::new(
                    B::narrow(arrived.slice(), node * len..(node + 1) * len),
                    shards.rows,
                    own,
                )?;
                terms_of[from].push(copied(self.device(), one)?);
            }
        }
        for term in terms {
            let whole = MatRef::<A, B>::new(term.slice(), shards.rows, shards.partition.total())?;
            terms_of[rank].push(copied(self.device(), whole.columns(shards.partition.range(rank)))?);
        }
        Ok(terms_of.into_iter().flatten().collect())
    }
}

/// Copies a range of columns of all terms into one tensor, one term per row.
fn pack<A: Element, B: Pointwise>(
    device: &B,
    terms: &[Tensor<A, B>],
    shards: &Shards,
    range: Range<usize>,
) -> Result<Tensor<A, B>> {
    let len = shards.rows * range.len();
    let mut packed = Tensor::<A, B>::empty(device, [terms.len(), len])?;
    for (at, term) in terms.iter().enumerate() {
        let from = MatRef::<A, B>::new(term.slice(), shards.rows, shards.partition.total())?;
        let to = B::narrow_mut(packed.slice_mut()?, at * len..(at + 1) * len);
        device.copy(from.columns(range.clone()), MatMut::<A, B>::new(to, shards.rows, range.len())?)?;
    }
    Ok(packed)
}

fn copied<A: Element, B: Pointwise>(device: &B, from: MatRef<'_, A, B>) -> Result<Tensor<A, B>> {
    let mut to = Tensor::<A, B>::empty(device, [from.rows(), from.cols()])?;
    device.copy(from, to.mat_mut()?)?;
    Ok(to)
}

/// Adds up the sub-trees of `ranks`, which together are the whole tree.
fn add_up<A: Element<Acc = A>, B: Pointwise>(
    tree: &Tree,
    ranks: Range<usize>,
    terms: Vec<Tensor<A, B>>,
) -> Result<Tensor<A, B>> {
    let mut sum = TreeSum::new(tree.leaves());
    let nodes: Vec<Node> = ranks.flat_map(|rank| tree.nodes(rank)).collect();
    for (node, term) in nodes.into_iter().zip(terms) {
        sum.push(node, term, |sum, term| sum.accumulate(&term))?;
    }
    one(sum.values())
}

fn one<A: Element, B: Device>(terms: Vec<Tensor<A, B>>) -> Result<Tensor<A, B>> {
    let mut terms = terms.into_iter();
    match (terms.next(), terms.next()) {
        (Some(term), None) => Ok(term),
        _ => Err(Error::internal("tree sum", "the sub-trees do not form one tree")),
    }
}

/// Rounds a sum to the element type of the result, which may be the accumulator type itself.
fn rounded<T: Element, B: Pointwise>(sum: Tensor<T::Acc, B>) -> Result<Tensor<T, B>> {
    sum.into_element()
}
