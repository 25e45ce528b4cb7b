//! One kind of sum: layers say *what* is summed over the ranks of a group, the group says *how*.
//!
//! A sum has terms, one for each *leaf*:
//!
//! * [`Reduction::Fast`](crate::shard::Reduction::Fast): a leaf is a rank. The communicator adds
//!   them in its order.
//! * [`Reduction::Invariant`](crate::shard::Reduction::Invariant): a leaf is a canonical block, of
//!   which a rank owns a run. Terms are made block by block and added along the group's [`Tree`],
//!   in the accumulator, and rounded once. So the bits do not depend on the number of ranks.
//!
//! What layers sum:
//!
//! * products whose inner dimension is cut ([`Sums::product`]: a row linear layer, the gradient of
//!   a column linear layer's input);
//! * terms of tokens, which sequence parallelism cuts ([`Sums::over_tokens`]: gradients of
//!   parameters that all ranks hold);
//! * the gradients of key/value heads that several leaves hold ([`Holders`]);
//! * anything else, leaf by leaf ([`Sums::total`]).
//!
//! Products that are cut and not summed ([`Sums::outputs`], [`Sums::inputs`], [`Sums::row_grads`])
//! are computed leaf by leaf as well where the order is fixed, unless the device computes elements
//! that do not depend on their neighbours
//! ([`Gemm::splits_exactly`](crate::kernels::Gemm::splits_exactly)). A kernel then gets the same
//! numbers, in the same shapes, whichever rank owns the leaf
//! ([`Gemm::gemm_block`](crate::kernels::Gemm::gemm_block)).

mod holders;
mod products;

pub(super) use {
    holders::Holders,
    products::{Affine, Factors, Through},
};

use super::{DTensor, ResidualStream};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result},
    kernels::Backend,
    shard::{Heads, Node, Partition, Shape, Tree, TreeSum, blocks},
    tensor::{BlockRegion, Param, Tensor},
};
use std::ops::Range;

/// How a group adds: decided once, when a layer is loaded.
#[derive(Clone, Debug)]
pub(super) struct Sums<B: Device> {
    group: Group<B>,
    /// The fixed order, if there is one.
    tree: Option<Tree>,
}

/// Where a rank's leaves lie in one dimension of its tensors.
#[derive(Clone, Debug, Default)]
pub(super) struct Leaves {
    /// The runs of each leaf: such as its rows of q, of k and of v.
    own: Vec<Vec<Range<usize>>>,
    /// All runs that the rank holds, those that a leaf of another rank owns among them. What
    /// several leaves hold is a run of its own.
    held: Vec<Range<usize>>,
    /// Whether several leaves of the group hold the same indices.
    shared: bool,
}

impl Leaves {
    /// Leaves of which each has these runs, and of which a rank holds others as well.
    pub(super) fn new(own: Vec<Vec<Range<usize>>>, others: Vec<Range<usize>>, shared: bool) -> Self {
        Self { held: own.iter().flatten().chain(&others).cloned().collect(), own, shared }
    }

    /// The same leaves in tensors that lie one behind another: each leaf has the runs of all.
    pub(super) fn beside(parts: impl IntoIterator<Item = Self>) -> Self {
        let join = |mut all: Self, part: Self| {
            all.own.iter_mut().zip(part.own).for_each(|(leaf, runs)| leaf.extend(runs));
            all.held.extend(part.held);
            all.shared |= part.shared;
            all
        };
        parts.into_iter().reduce(join).unwrap_or_default()
    }

    /// The same leaves `by` indices further on.
    pub(super) fn shifted(&self, by: usize) -> Self {
        let shift = |runs: &Vec<Range<usize>>| runs.iter().map(|run| run.start + by..run.end + by).collect();
        Self { own: self.own.iter().map(shift).collect(), held: shift(&self.held), shared: self.shared }
    }

    /// The indices of one of the rank's leaves, from its first run to its last.
    pub(super) fn range(&self, leaf: usize) -> Range<usize> {
        let runs = &self.own[leaf];
        runs.first().map_or(0, |run| run.start)..runs.last().map_or(0, |run| run.end)
    }

    /// The lengths of the rank's own runs: the depths of the products whose inner dimension they
    /// are.
    pub(super) fn depths(&self) -> impl Iterator<Item = usize> {
        self.own.iter().flatten().map(|run| run.len())
    }
}

impl<B: Device> Sums<B> {
    /// How this group adds.
    ///
    /// # Errors
    /// When there are fewer canonical blocks than ranks.
    pub(super) fn of(group: &Group<B>) -> Result<Self> {
        Ok(Self { group: group.clone(), tree: group.tree()? })
    }

    /// The ranks that add.
    pub(super) fn group(&self) -> &Group<B> {
        &self.group
    }

    /// The number of leaves of all ranks.
    fn count(&self) -> usize {
        self.tree.as_ref().map_or(self.group.size(), Tree::leaves)
    }

    /// This rank's leaves.
    fn own(&self) -> Range<usize> {
        let rank = self.group.rank();
        self.tree.as_ref().map_or(rank..rank + 1, |tree| tree.owned(rank))
    }

    /// This rank's leaves of a dimension that is cut over the ranks.
    ///
    /// # Errors
    /// When the order is fixed, and the cut is not one of canonical blocks: on every rank.
    pub(super) fn leaves(&self, op: &'static str, cut: &Partition) -> Result<Leaves> {
        let rank = self.group.rank();
        let Some(tree) = &self.tree else {
            return Ok(Leaves::new(vec![vec![0..cut.size(rank)]], Vec::new(), false));
        };
        let blocks = |rank: usize| cut.blocks(rank).filter(|own| own.len() == tree.owned(rank).len());
        match blocks(rank).filter(|_| (0..tree.ranks()).all(|rank| blocks(rank).is_some())) {
            Some(own) => Ok(Leaves::new(own.into_iter().map(|leaf| vec![leaf]).collect(), Vec::new(), false)),
            None => {
                let reason = "an invariant reduction needs features that are cut by canonical blocks: take them from \
                              `Group::cut`";
                Err(Error::Unsupported { op, reason: reason.into() })
            }
        }
    }

    /// That these heads belong to the leaves of this group.
    ///
    /// # Errors
    /// When the query heads are cut into other blocks, or into blocks where the order is free: on
    /// every rank.
    pub(super) fn check_heads(&self, op: &'static str, heads: &Heads) -> Result<()> {
        let query = heads.query_features();
        self.leaves(op, &query)?;
        if self.tree.is_none() && query.blocks(0).is_some() {
            let reason =
                "heads that are cut by canonical blocks belong to a group with an invariant reduction";
            return Err(Error::Unsupported { op, reason: reason.into() });
        }
        Ok(())
    }

    /// The same leaves. Where the order is free, a sum has one term for neighbouring runs.
    pub(super) fn joined(&self, mut leaves: Leaves) -> Leaves {
        if self.tree.is_none() {
            for leaf in &mut leaves.own {
                let mut joined: Vec<Range<usize>> = Vec::new();
                for run in leaf.drain(..) {
                    match joined.last_mut() {
                        Some(last) if last.end == run.start => last.end = run.end,
                        _ => joined.push(run),
                    }
                }
                *leaf = joined;
            }
        }
        leaves
    }
}

impl<B: Backend> Sums<B> {
    /// A parameter that every rank holds.
    pub(super) fn whole<T: Element>(&self, param: Param<T, B>) -> Param<T, B> {
        if self.tree.is_some() {
            param.sum_in_tree(None);
        }
        param
    }

    /// A parameter whose dimension `dim` is cut into these leaves.
    pub(super) fn cut<T: Element>(&self, param: Param<T, B>, dim: usize, leaves: &Leaves) -> Param<T, B> {
        if self.tree.is_some() {
            let (rows, cols) = (param.shape().rows(), param.shape().cols());
            let region = |run: &Range<usize>| match dim {
                0 => BlockRegion { rows: run.clone(), cols: 0..cols },
                _ => BlockRegion { rows: 0..rows, cols: run.clone() },
            };
            let regions = leaves.own.iter().map(|leaf| leaf.iter().map(region).collect());
            param.sum_in_tree(Some(regions.collect()));
        }
        param
    }

    /// Σ over the leaves of all ranks, on every rank. `term` writes that of the rank's leaf of this
    /// number, in the accumulator; the sum is rounded once. Collective: an all-reduce.
    ///
    /// # Errors
    /// Those of `term`, and when the collective fails.
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

    /// Σ over all tokens of a tensor, such as the gradient of a parameter that every rank holds.
    /// `term` writes that over some of the rows which this rank has. Collective: none where every
    /// rank has all tokens, else an all-reduce.
    ///
    /// # Errors
    /// Those of `term`, and when the collective fails.
    #[track_caller]
    pub(super) fn over_tokens<S: ResidualStream, T: Element>(
        &self,
        of: &DTensor<S, T, B>,
        shape: impl Into<Shape>,
        mut term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>> {
        let (rank, shape) = (self.group.rank(), shape.into());
        let cut = match (&self.tree, S::SHARD_DIM) {
            (None, _) => Partition::from_sizes([of.local().shape().rows()]),
            (Some(tree), _) => blocks(of.shape().rows(), 1, tree.leaves()),
        };
        let first = match (&self.tree, S::SHARD_DIM) {
            (Some(tree), Some(_)) => tree.owned(rank).start,
            _ => 0,
        };
        let offset = cut.range(first).start;
        let rows = |leaf: usize, out: &mut Tensor<T::Acc, B>| {
            let rows = cut.range(first + leaf);
            match rows.is_empty() {
                true => self.group.device().fill(0.0, out.mat_mut()?),
                false => term(rows.start - offset..rows.end - offset, out),
            }
        };
        match S::SHARD_DIM {
            Some(_) => self.total(shape, rows),
            None => {
                let leaves = cut.shards();
                Ok(nodes(self.group.device(), leaves, 0..leaves, shape, rows)?.swap_remove(0))
            }
        }
    }

    /// Adds [`Sums::over_tokens`] to the gradient of a parameter. Where every rank has all tokens
    /// and their order is free, the parameter's sink may ask for some of them.
    ///
    /// # Errors
    /// As there, and when the sink refuses the gradient.
    #[track_caller]
    pub(super) fn add_over_tokens<S: ResidualStream, T: Element>(
        &self,
        param: &Param<T, B>,
        of: &DTensor<S, T, B>,
        mut term: impl FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
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

/// The sums of the largest sub-trees over some of `count` leaves, of which `term` writes each.
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
