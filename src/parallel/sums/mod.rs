//! Sums over the ranks of a group. A layer computes the terms, and the group's
//! [`Reduction`](crate::shard::Reduction) determines the order of the additions.
//!
//! A sum has one term for each *leaf*:
//!
//! * [`Reduction::Fast`](crate::shard::Reduction::Fast): a leaf is a rank. The communicator adds
//!   the terms in its own order. Comments call this order *free*.
//! * [`Reduction::Invariant`](crate::shard::Reduction::Invariant): a leaf is a canonical block, and
//!   a rank owns consecutive blocks. The ranks compute the terms block by block, add them along the
//!   group's [`Tree`] as values of the accumulator type, and round only the final sum. The bits do
//!   not depend on the number of ranks. Comments call this order *fixed*.
//!
//! Layers compute these sums:
//!
//! * products whose inner dimension is sharded ([`Sums::product`]: a row linear layer, the gradient
//!   of a column linear layer's input);
//! * sums over tokens, which sequence parallelism shards ([`Sums::over_tokens`]: gradients of
//!   parameters that all ranks hold);
//! * the gradients of key/value heads that several leaves hold ([`Holders`]);
//! * all other sums, leaf by leaf ([`Sums::total`]).
//!
//! If the order is fixed, a rank also computes those products leaf by leaf whose results the ranks
//! do not sum ([`Sums::outputs`], [`Sums::inputs`], [`Sums::row_grads`]). A kernel then gets the
//! same numbers in the same shapes, whichever rank owns the leaf
//! ([`Gemm::gemm_block`](crate::kernels::Gemm::gemm_block)). This is not needed, and not done, on a
//! device where the bits of an element do not depend on the rest of the product
//! ([`Gemm::splits_exactly`](crate::kernels::Gemm::splits_exactly)).

mod holders;
mod products;

pub(super) use {
    holders::Holders,
    products::{Affine, Factors, PrecedingActivation},
};

use super::{DTensor, ResidualStream};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result},
    kernels::{Backend, MatRef},
    shard::{Heads, Node, Partition, Shape, Tree, TreeSum, blocks},
    tensor::{BlockRegion, Param, SampleTerm, Tensor},
};
use std::ops::Range;

/// A group and the order of its additions. A layer makes this value once, when it is loaded.
#[derive(Clone, Debug)]
pub(super) struct Sums<B: Device> {
    group: Group<B>,
    /// The tree of a fixed order; `None` if the order is free.
    tree: Option<Tree>,
}

/// The ranges of a rank's leaves in one dimension of its tensors.
#[derive(Clone, Debug, Default)]
pub(super) struct Leaves {
    /// For each of the rank's leaves, its ranges, such as its rows of q, of k and of v.
    own: Vec<Vec<Range<usize>>>,
    /// All ranges that the rank holds, including ranges that a leaf of another rank owns. Indices
    /// that several leaves hold are in a range of their own, apart from neighbouring indices.
    all: Vec<Range<usize>>,
    /// Whether several leaves of the group hold the same indices.
    shared: bool,
}

impl Leaves {
    /// Makes leaves with these ranges. `others` are ranges that the rank holds but does not own.
    pub(super) fn new(own: Vec<Vec<Range<usize>>>, others: Vec<Range<usize>>, shared: bool) -> Self {
        Self { all: own.iter().flatten().chain(&others).cloned().collect(), own, shared }
    }

    /// Joins the leaves of concatenated tensors. A leaf gets its ranges of all these tensors.
    pub(super) fn concat(tensors: impl IntoIterator<Item = Self>) -> Self {
        let join = |mut joined: Self, next: Self| {
            joined.own.iter_mut().zip(next.own).for_each(|(leaf, ranges)| leaf.extend(ranges));
            joined.all.extend(next.all);
            joined.shared |= next.shared;
            joined
        };
        tensors.into_iter().reduce(join).unwrap_or_default()
    }

    /// Shifts all ranges by `by` indices.
    pub(super) fn shifted(&self, by: usize) -> Self {
        let shift = |ranges: &Vec<Range<usize>>| {
            ranges.iter().map(|range| range.start + by..range.end + by).collect()
        };
        Self { own: self.own.iter().map(shift).collect(), all: shift(&self.all), shared: self.shared }
    }

    /// Returns the indices of one of the rank's leaves, from the start of its first range to the
    /// end of its last range.
    pub(super) fn range(&self, leaf: usize) -> Range<usize> {
        let ranges = &self.own[leaf];
        ranges.first().map_or(0, |range| range.start)..ranges.last().map_or(0, |range| range.end)
    }

    /// Returns the lengths of the ranges that the rank owns. They are the depths of products over
    /// this dimension.
    pub(super) fn depths(&self) -> impl Iterator<Item = usize> {
        self.own.iter().flatten().map(|range| range.len())
    }
}

impl<B: Device> Sums<B> {
    /// Makes the sums of a group.
    ///
    /// # Errors
    /// When there are fewer canonical blocks than ranks.
    pub(super) fn of(group: &Group<B>) -> Result<Self> {
        Ok(Self { group: group.clone(), tree: group.tree()? })
    }

    /// The group whose ranks add.
    pub(super) fn group(&self) -> &Group<B> {
        &self.group
    }

    /// Returns the number of leaves of all ranks.
    fn count(&self) -> usize {
        self.tree.as_ref().map_or(self.group.size(), Tree::leaves)
    }

    /// Returns the numbers of this rank's leaves.
    fn own(&self) -> Range<usize> {
        let rank = self.group.rank();
        self.tree.as_ref().map_or(rank..rank + 1, |tree| tree.owned(rank))
    }

    /// Returns this rank's leaves of a dimension that `partition` shards.
    ///
    /// # Errors
    /// On every rank, when the order is fixed and the partition does not consist of canonical
    /// blocks.
    pub(super) fn leaves(&self, op: &'static str, partition: &Partition) -> Result<Leaves> {
        let rank = self.group.rank();
        let Some(tree) = &self.tree else {
            return Ok(Leaves::new(vec![vec![0..partition.size(rank)]], Vec::new(), false));
        };
        let blocks = |rank: usize| partition.blocks(rank).filter(|own| own.len() == tree.owned(rank).len());
        match blocks(rank).filter(|_| (0..tree.ranks()).all(|rank| blocks(rank).is_some())) {
            Some(own) => Ok(Leaves::new(own.into_iter().map(|leaf| vec![leaf]).collect(), Vec::new(), false)),
            None => {
                let reason = "an invariant reduction needs features that are partitioned by canonical blocks: use \
                              `Group::partition`";
                Err(Error::Unsupported { op, reason: reason.into() })
            }
        }
    }

    /// Checks that the blocks of the query heads are the leaves of this group.
    ///
    /// # Errors
    /// On every rank. If the order is fixed: when the query heads are not partitioned by the
    /// group's canonical blocks. If the order is free: when the query heads are partitioned by
    /// canonical blocks.
    pub(super) fn check_heads(&self, op: &'static str, heads: &Heads) -> Result<()> {
        let query = heads.query_features();
        self.leaves(op, &query)?;
        if self.tree.is_none() && query.blocks(0).is_some() {
            let reason =
                "heads that are partitioned by canonical blocks need a group with an invariant reduction";
            return Err(Error::Unsupported { op, reason: reason.into() });
        }
        Ok(())
    }

    /// If the order is free, joins neighbouring ranges of a leaf, so that a sum has one term for
    /// both.
    pub(super) fn joined(&self, mut leaves: Leaves) -> Leaves {
        if self.tree.is_none() {
            for leaf in &mut leaves.own {
                let mut joined: Vec<Range<usize>> = Vec::new();
                for range in leaf.drain(..) {
                    match joined.last_mut() {
                        Some(last) if last.end == range.start => last.end = range.end,
                        _ => joined.push(range),
                    }
                }
                *leaf = joined;
            }
        }
        leaves
    }
}

impl<B: Backend> Sums<B> {
    /// If the order is fixed, sets how the parameter's gradient is summed: every rank holds the
    /// whole parameter.
    pub(super) fn replicated<T: Element>(&self, param: Param<T, B>) -> Param<T, B> {
        if self.tree.is_some() {
            param.sum_in_tree(None);
        }
        param
    }

    /// If the order is fixed, sets how the parameter's gradient is summed: dimension `dim` of the
    /// parameter is partitioned into these leaves.
    pub(super) fn sharded<T: Element>(&self, param: Param<T, B>, dim: usize, leaves: &Leaves) -> Param<T, B> {
        if self.tree.is_some() {
            let (rows, cols) = (param.shape().rows(), param.shape().cols());
            let region = |range: &Range<usize>| match dim {
                0 => BlockRegion { rows: range.clone(), cols: 0..cols },
                _ => BlockRegion { rows: 0..rows, cols: range.clone() },
            };
            let regions = leaves.own.iter().map(|leaf| leaf.iter().map(region).collect());
            param.sum_in_tree(Some(regions.collect()));
        }
        param
    }

    /// Computes the sum over the leaves of all ranks, on every rank. `term` gets the number of one
    /// of the rank's leaves, counted from 0, and writes the leaf's term as values of the
    /// accumulator type. If the order is fixed, only the final sum is rounded. If it is free, each
    /// rank rounds its term before the all-reduce. Collective: an all-reduce.
    ///
    /// # Errors
    /// When `term` or the collective fails.
    #[track_caller]
    pub(super) fn total<T: Element>(
        &self,
        shape: impl Into<Shape>,
        mut term: impl FnMut(usize, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T, B>> {
        let own = self.own();
        let device = self.group.device();
        let mut nodes =
            nodes(device, self.count(), own.clone(), shape.into(), |leaf, out| term(leaf - own.start, out))?;
        match &self.tree {
            Some(tree) => self.group.tree_all_reduce(tree, nodes),
            None => {
                let mut sum = nodes.swap_remove(0).into_element()?;
                self.group.all_reduce(ReduceOp::Sum, &mut sum)?;
                Ok(sum)
            }
        }
    }

    /// Computes a sum over all tokens of a tensor, such as the gradient of a parameter that every
    /// rank holds. `term` writes the sum over a range of this rank's rows. Collective: an
    /// all-reduce if the tokens are sharded, otherwise none.
    ///
    /// # Errors
    /// When `term` or the collective fails.
    #[track_caller]
    pub(super) fn over_tokens<S: ResidualStream, T: Element>(
        &self,
        of: &DTensor<S, T, B>,
        shape: impl Into<Shape>,
        mut term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>> {
        let (rank, shape) = (self.group.rank(), shape.into());
        let partition = match (&self.tree, S::SHARD_DIM) {
            (None, _) => Partition::from_sizes([of.local().shape().rows()]),
            (Some(tree), _) => blocks(of.shape().rows(), 1, tree.leaves()),
        };
        let first = match (&self.tree, S::SHARD_DIM) {
            (Some(tree), Some(_)) => tree.owned(rank).start,
            _ => 0,
        };
        let offset = partition.range(first).start;
        let rows = |leaf: usize, out: &mut Tensor<T::Acc, B>| {
            let rows = partition.range(first + leaf);
            if rows.is_empty() {
                self.group.device().fill(0.0, out.mat_mut()?)
            } else {
                term(rows.start - offset..rows.end - offset, out)
            }
        };
        match S::SHARD_DIM {
            Some(_) => self.total(shape, rows),
            None => {
                let leaves = partition.shards();
                Ok(nodes(self.group.device(), leaves, 0..leaves, shape, rows)?.swap_remove(0))
            }
        }
    }

    /// Computes [`Sums::over_tokens`] over the tokens of each sequence. Row i of the result is the
    /// sum over sequence i, whose elements have the given shape.
    ///
    /// # Errors
    /// As [`Sums::over_tokens`].
    #[track_caller]
    pub(super) fn over_sequences<S: ResidualStream, T: Element>(
        &self,
        of: &DTensor<S, T, B>,
        shape: impl Into<Shape>,
        mut term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>> {
        let (device, shape, first) = (self.group.device(), shape.into(), of.local_range(0).start);
        let (count, len) = (of.sequences().len(), shape.len());
        self.over_tokens(of, [count, len], |rows, sums| {
            device.fill(0.0, sums.mat_mut()?)?;
            for (at, sequence) in of.sequences().iter().enumerate() {
                let start = sequence.start.saturating_sub(first).max(rows.start);
                let end = sequence.end.saturating_sub(first).min(rows.end);
                if start < end {
                    let mut sum = Tensor::empty(device, shape)?;
                    term(start..end, &mut sum)?;
                    let sum = MatRef::<T::Acc, B>::new(sum.slice(), 1, len)?;
                    device.copy(sum, sums.mat_mut()?.block(at..at + 1, 0..len))?;
                }
            }
            Ok(())
        })
    }

    /// Adds [`Sums::over_tokens`] to the gradients of several vectors of the same length. `term`
    /// writes one row for each vector.
    ///
    /// # Errors
    /// As [`Sums::over_tokens`], and when a sink rejects its gradient.
    #[track_caller]
    pub(super) fn add_vectors<S: ResidualStream, T: Element>(
        &self,
        params: &[&Param<T, B>],
        of: &DTensor<S, T, B>,
        term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        let shape = [params.len(), params.first().map_or(0, |param| param.shape().len())];
        // If one of them needs the gradient of each sample, the sums of all sequences are computed.
        let sums = if params.iter().any(|param| param.keeps_terms()) {
            self.over_sequences(of, shape, term)?
        } else {
            self.over_tokens(of, shape, term)?.reshape([1, shape[0] * shape[1]])?
        };
        add_rows(params, &sums)
    }

    /// Adds [`Sums::over_tokens`] to the gradient of a parameter. If every rank has all tokens and
    /// the order is free, the parameter's sink may request sums over ranges of the tokens.
    ///
    /// # Errors
    /// As [`Sums::over_tokens`], and when the sink rejects the gradient.
    #[track_caller]
    pub(super) fn add_over_tokens<S: ResidualStream, T: Element>(
        &self,
        param: &Param<T, B>,
        of: &DTensor<S, T, B>,
        mut term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        if param.keeps_terms() {
            param.keep_term(SampleTerm::Each(self.over_sequences(of, param.shape(), term)?));
            return Ok(());
        }
        if self.tree.is_some() || S::SHARD_DIM.is_some() {
            return param.add_grad(self.over_tokens(of, param.shape(), term)?);
        }
        param.add_grad_over(of.local().shape().rows(), |tokens| {
            let mut grad = Tensor::empty(self.group.device(), param.shape())?;
            term(tokens, &mut grad)?;
            Ok(grad)
        })
    }
}

/// Adds to the gradients of vectors of the same length. A row of `sums` has one vector after
/// another. There is one row for each sample, or one row if no parameter keeps terms.
pub(super) fn add_rows<T: Element, B: Backend>(to: &[&Param<T, B>], sums: &Tensor<T::Acc, B>) -> Result<()> {
    let (device, rows) = (sums.device(), sums.shape().rows());
    for (at, param) in to.iter().enumerate() {
        let len = param.shape().len();
        let of = sums.mat().columns(at * len..(at + 1) * len);
        let mut grads = Tensor::<T::Acc, B>::empty(device, [rows, len])?;
        device.copy(of, grads.mat_mut()?)?;
        if param.keeps_terms() {
            param.keep_term(SampleTerm::Each(grads));
        } else if rows == 1 {
            param.add_grad(grads.reshape(param.shape())?)?;
        } else {
            let mut grad = Tensor::<T::Acc, B>::empty(device, param.shape())?;
            device.sum_rows::<T::Acc>(of, grad.slice_mut()?)?;
            param.add_grad(grad)?;
        }
    }
    Ok(())
}

/// Computes the sums of the largest sub-trees that have only leaves in `leaves`. The tree has
/// `count` leaves. `term` writes the term of one leaf.
fn nodes<A: Element<Acc = A>, B: Backend>(
    device: &B,
    count: usize,
    leaves: Range<usize>,
    shape: Shape,
    mut term: impl FnMut(usize, &mut Tensor<A, B>) -> Result<()>,
) -> Result<Vec<Tensor<A, B>>> {
    let mut sum = TreeSum::new(count);
    for leaf in leaves {
        let mut next = Tensor::empty(device, shape)?;
        term(leaf, &mut next)?;
        sum.push(Node::leaf(leaf), next, |left, right| left.accumulate(&right))?;
    }
    Ok(sum.values())
}
