//! Sums along a fixed tree: the same bits whichever ranks own the leaves.
//!
//! The ranks exchange the sums of their sub-trees in the accumulator, each rank adds up its part of the tensor in the
//! tree's order, and the parts, rounded once, are gathered. Where every rank has one sub-tree, that is as many bytes as a
//! reduce-scatter and an all-gather, for elements that are their own accumulators.

use super::{Group, ReduceOp};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{MatMut, MatRef, Pointwise},
    shard::{Node, Partition, Reduction, Shape, Tree, TreeSum},
    tensor::Tensor,
};
use std::ops::Range;

/// The most elements of all sub-trees together that every rank gathers, to add them up by itself: one meeting then, and few
/// bytes.
const SMALL: usize = 4096;

/// How a sum is made.
enum Way {
    /// The rank has all leaves.
    Alone,
    /// Two ranks have one sub-tree each. There is one sum of two numbers, whoever adds.
    Pair,
    /// Every rank gathers all sub-trees.
    Gather,
    /// Every rank is sent its part of all sub-trees.
    Exchange,
}

impl Way {
    fn of(tree: &Tree, elements: usize) -> Self {
        let nodes: usize = (0..tree.ranks()).map(|rank| tree.nodes(rank).len()).sum();
        match tree.ranks() {
            1 => Self::Alone,
            2 if nodes == 2 => Self::Pair,
            _ if nodes * elements <= SMALL => Self::Gather,
            _ => Self::Exchange,
        }
    }
}

/// A tensor as a matrix of which ranks get columns.
struct Columns {
    rows: usize,
    cut: Partition,
}

impl<B: Device> Group<B> {
    /// This group with another way to add what its ranks have computed: layers that are loaded on it keep to it. The same
    /// on every rank. Groups that are split from it inherit it.
    ///
    /// ```
    /// # use shardwise::{comm::Group, device::Cpu, shard::Reduction};
    /// let world = Group::solo(&Cpu::new()).with_reduction(Reduction::Invariant { blocks: 8 });
    /// ```
    pub fn with_reduction(&self, reduction: Reduction) -> Self {
        let mut group = self.clone();
        group.reduction = reduction;
        group
    }

    /// How operators add what ranks have computed.
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

    /// `units` indivisible runs of `unit_len` indices each over the ranks, at least one unit a rank: as evenly as can be, or
    /// by canonical blocks.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`], naming `op` and `unit`, when there are fewer units than ranks; with
    /// [`Reduction::Invariant`] when a rank's blocks have no unit.
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

    /// Indices, such as tokens, over the ranks, of which some may have none: as evenly as can be, or by canonical blocks.
    ///
    /// # Errors
    /// When there are fewer blocks than ranks.
    pub fn even_partition(&self, len: usize) -> Result<Partition> {
        match self.tree()? {
            None => Ok(Partition::even(len, self.size())),
            Some(tree) => tree.partition("cut", "indices", len, 1, true),
        }
    }
}

impl<B: Pointwise> Group<B> {
    /// The sum over the leaves of a tree, of which this rank gives those of its sub-trees ([`Tree::nodes`]), rounded once.
    ///
    /// Collectives: none on one rank; else an all-reduce, an all-gather, or exchanges with every
    /// rank and an all-gather.
    ///
    /// # Errors
    /// When the terms are not those of this rank's sub-trees, a rank calls something else, or is lost.
    #[track_caller]
    pub fn tree_all_reduce<T: Element>(
        &self,
        tree: &Tree,
        terms: Vec<Tensor<T::Acc, B>>,
    ) -> Result<Tensor<T, B>> {
        let shape = self.check_terms(tree, &terms)?;
        match Way::of(tree, shape.len()) {
            Way::Alone => rounded(add_up(tree, 0..1, terms)?),
            Way::Pair => {
                let mut sum = one(terms)?;
                self.all_reduce(ReduceOp::Sum, &mut sum)?;
                rounded(sum)
            }
            Way::Gather => {
                let columns = Columns { rows: 1, cut: Partition::from_sizes([shape.len()]) };
                let parts = self.gather_terms(tree, &terms, &columns, 0)?;
                rounded(add_up(tree, 0..self.size(), parts)?)?.reshape(shape)
            }
            Way::Exchange => {
                let cut = Partition::even(shape.len(), self.size());
                let parts = self.exchange_terms(tree, &terms, &Columns { rows: 1, cut: cut.clone() })?;
                let part = rounded::<T, B>(add_up(tree, 0..self.size(), parts)?)?;
                let len = part.len();
                self.all_gather(&part.reshape([len])?, 0, &cut)?.reshape(shape)
            }
        }
    }

    /// This rank's part along dimension `dim` of [`Group::tree_all_reduce`]'s result.
    ///
    /// # Errors
    /// As there, and when the cut is not one of the dimension over this group.
    #[track_caller]
    pub fn tree_reduce_scatter<T: Element>(
        &self,
        tree: &Tree,
        terms: Vec<Tensor<T::Acc, B>>,
        dim: usize,
        cut: &Partition,
    ) -> Result<Tensor<T, B>> {
        const OP: &str = "tree_reduce_scatter";
        let shape = self.check_terms(tree, &terms)?;
        if dim >= shape.rank() {
            return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {shape}")));
        }
        same_size(OP, "the number of shards", cut.shards(), "the number of ranks", self.size())?;
        same_size(OP, "the size that is cut", cut.total(), "that of the dimension", shape.dims()[dim])?;
        let part = shape.with(dim, cut.size(self.rank()));
        let (rows, inner) = shape.split_at(dim);
        let columns = Columns { rows, cut: cut.scaled(inner) };
        match Way::of(tree, shape.len()) {
            Way::Alone => rounded(add_up(tree, 0..1, terms)?),
            Way::Pair => rounded(self.reduce_scatter(ReduceOp::Sum, &one(terms)?, dim, cut)?),
            Way::Gather => {
                let parts = self.gather_terms(tree, &terms, &columns, self.rank())?;
                rounded(add_up(tree, 0..self.size(), parts)?)?.reshape(part)
            }
            Way::Exchange => {
                let parts = self.exchange_terms(tree, &terms, &columns)?;
                rounded(add_up(tree, 0..self.size(), parts)?)?.reshape(part)
            }
        }
    }

    /// Whom to send to and whom to receive from, step by step.
    fn others(&self) -> impl Iterator<Item = (usize, usize)> + use<B> {
        let (rank, size) = (self.rank(), self.size());
        (1..size).map(move |step| ((rank + step) % size, (rank + size - step) % size))
    }

    /// The terms are of one shape, one for each sub-tree of this rank.
    fn check_terms<A: Element>(&self, tree: &Tree, terms: &[Tensor<A, B>]) -> Result<Shape> {
        const OP: &str = "tree sum";
        same_size(OP, "the ranks of the tree", tree.ranks(), "the ranks of the group", self.size())?;
        let nodes = tree.nodes(self.rank()).len();
        same_size(OP, "the number of terms", terms.len(), "that of this rank's sub-trees", nodes)?;
        let shape = terms.first().map_or(Shape::new(&[0]), Tensor::shape);
        for term in terms {
            let (dims, first) = (term.shape(), shape);
            crate::error::same_shape(OP, "a term", dims.dims(), "the first", first.dims())?;
        }
        Ok(shape)
    }

    /// Part `part` of every rank's terms, in order.
    #[track_caller]
    fn gather_terms<A: Element>(
        &self,
        tree: &Tree,
        terms: &[Tensor<A, B>],
        columns: &Columns,
        part: usize,
    ) -> Result<Vec<Tensor<A, B>>> {
        let len = terms.first().map_or(0, Tensor::len);
        let all = Columns { rows: 1, cut: Partition::from_sizes([len]) };
        let packed = pack(self.device(), terms, &all, 0..len)?;
        let counts = (0..self.size()).map(|rank| tree.nodes(rank).len());
        let whole = self.all_gather(&packed, 0, &Partition::from_sizes(counts))?;
        let total = columns.cut.total();
        let unpack = |node: usize| {
            let one = MatRef::<A, B>::new(
                B::narrow(whole.slice(), node * len..(node + 1) * len),
                columns.rows,
                total,
            )?;
            copied(self.device(), one.columns(columns.cut.range(part)))
        };
        (0..whole.shape().dims()[0]).map(unpack).collect()
    }

    /// This rank's part of every rank's terms, in order.
    #[track_caller]
    fn exchange_terms<A: Element>(
        &self,
        tree: &Tree,
        terms: &[Tensor<A, B>],
        columns: &Columns,
    ) -> Result<Vec<Tensor<A, B>>> {
        let (rank, own) = (self.rank(), columns.cut.size(self.rank()));
        let nodes = |rank: usize| tree.nodes(rank).len();
        let mut parts: Vec<Vec<Tensor<A, B>>> = (0..self.size()).map(|_| Vec::new()).collect();
        for (to, from) in self.others() {
            let send = match columns.cut.size(to) {
                0 => None,
                _ => Some(pack(self.device(), terms, columns, columns.cut.range(to))?),
            };
            let recv = (own > 0).then(|| (from, Shape::new(&[nodes(from), columns.rows * own])));
            let arrived = match (&send, recv) {
                (None, None) => None,
                _ => self.exchange(send.as_ref().map(|packed| (to, packed)), recv)?,
            };
            let Some(arrived) = arrived else {
                parts[from] = (0..nodes(from))
                    .map(|_| Tensor::empty(self.device(), [columns.rows, 0]))
                    .collect::<Result<_>>()?;
                continue;
            };
            let len = columns.rows * own;
            for node in 0..nodes(from) {
                let one = MatRef::<A, B>::new(
                    B::narrow(arrived.slice(), node * len..(node + 1) * len),
                    columns.rows,
                    own,
                )?;
                parts[from].push(copied(self.device(), one)?);
            }
        }
        for term in terms {
            let whole = MatRef::<A, B>::new(term.slice(), columns.rows, columns.cut.total())?;
            parts[rank].push(copied(self.device(), whole.columns(columns.cut.range(rank)))?);
        }
        Ok(parts.into_iter().flatten().collect())
    }
}

/// Some columns of all terms, one term a row.
fn pack<A: Element, B: Pointwise>(
    device: &B,
    terms: &[Tensor<A, B>],
    columns: &Columns,
    range: Range<usize>,
) -> Result<Tensor<A, B>> {
    let len = columns.rows * range.len();
    let mut packed = Tensor::<A, B>::empty(device, [terms.len(), len])?;
    for (at, term) in terms.iter().enumerate() {
        let from = MatRef::<A, B>::new(term.slice(), columns.rows, columns.cut.total())?;
        let to = B::narrow_mut(packed.slice_mut()?, at * len..(at + 1) * len);
        device.copy(from.columns(range.clone()), MatMut::<A, B>::new(to, columns.rows, range.len())?)?;
    }
    Ok(packed)
}

fn copied<A: Element, B: Pointwise>(device: &B, from: MatRef<'_, A, B>) -> Result<Tensor<A, B>> {
    let mut to = Tensor::<A, B>::empty(device, [from.rows(), from.cols()])?;
    device.copy(from, to.mat_mut()?)?;
    Ok(to)
}

/// The sum of the sub-trees of some ranks, which are the whole tree.
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
        _ => Err(Error::internal("tree sum", "the sub-trees are not one tree")),
    }
}

/// The sum in the element of the result, which may be the accumulator itself.
fn rounded<T: Element, B: Pointwise>(sum: Tensor<T::Acc, B>) -> Result<Tensor<T, B>> {
    sum.into_element()
}
