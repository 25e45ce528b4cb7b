//! `Partial` tensors, which are not yet summed over the ranks, and the blocking and asynchronous
//! reductions that sum them.

use super::{DTensor, Layout, addends::Addends, partition::canonical};
use crate::{
    comm::{Group, Pending, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::Backend,
    shard::{Copied, Partial, Partition, Placement, Replicated, Shard, Tree},
    tensor::Tensor,
};

impl<P: Placement, T: Element, B: Backend> DTensor<P, T, B> {
    /// Makes a `Partial` tensor with the rows of `self` and `features` columns. `nodes` are this
    /// rank's terms.
    ///
    /// If `fixed` is true, the terms are the sums of this rank's sub-trees of the reduction tree.
    /// Otherwise `nodes` has one term, and the reduction may add the terms of the ranks in any
    /// order.
    pub(in crate::parallel) fn partial_sum(
        &self,
        mut nodes: Vec<Tensor<T::Acc, B>>,
        features: usize,
        fixed: bool,
    ) -> Result<DTensor<Partial, T, B>> {
        if nodes.len() == 1 && (!fixed || T::DTYPE == T::Acc::DTYPE) {
            let sum = self.with_features(nodes.swap_remove(0).into_element()?, features, None);
            return Ok(sum.with_addends(if fixed { Addends::Node } else { Addends::Ranks }));
        }
        let mut sum: Option<Tensor<T::Acc, B>> = None;
        for node in &nodes {
            match &mut sum {
                Some(sum) => sum.accumulate(node)?,
                none => *none = Some(node.clone()),
            }
        }
        let empty = || Error::internal("partial sum", "a rank has no blocks");
        let local = sum.ok_or_else(empty)?.into_element()?;
        Ok(self.with_features(local, features, None).with_addends(Addends::Nodes(nodes)))
    }
}

impl<T: Element, B: Backend> DTensor<Copied, T, B> {
    /// Makes a `Partial` tensor whose term on this rank is `term`, `[tokens, features]`. Keeps the
    /// sequences, dropout state and token partition of `self`. No communication.
    ///
    /// # Errors
    /// When the term has another number of rows or dimensions than `self`.
    pub fn term(&self, term: Tensor<T, B>) -> Result<DTensor<Partial, T, B>> {
        let features = term.shape().cols();
        let want = self.shape().with(self.shape().rank() - 1, features);
        same_shape(
            "term",
            "the term",
            term.shape().dims(),
            "the tensor with the term's features",
            want.dims(),
        )?;
        Ok(self.with_features(term, features, None))
    }
}

impl<T: Element, B: Backend> DTensor<Partial, T, B> {
    /// Makes a tensor that is the sum of the ranks' local tensors. No communication.
    ///
    /// [`crate::shard::Reduction::Invariant`] cannot reduce such a sum, because its terms depend on
    /// the number of ranks. An invariant reduction can reduce the sums that the crate's layers
    /// make.
    ///
    /// # Errors
    /// When `local` has fewer than two dimensions.
    pub fn partial(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        let layout = Layout::whole(&local, "partial")?;
        Ok(Self::new(local, group, layout))
    }

    /// Declares that for each element at most one rank has a term other than +0.
    pub(in crate::parallel) fn exact(mut self) -> Result<Self> {
        if self.group.tree()?.is_some() {
            // Adding another rank's +0 turns −0 into +0. A group of one rank has no such addition,
            // so +0 is added here.
            let zeros = Tensor::<T, B>::zeros(self.group.device(), [self.local.shape().cols()])?;
            self.group.device().add_bias::<T>(zeros.slice(), self.local.mat_mut()?)?;
        }
        Ok(self.with_addends(Addends::Exact))
    }

    /// Partial → Replicated. Collective: all-reduce.
    ///
    /// # Errors
    /// When the ranks disagree, a rank is lost, or the reduction is invariant and
    /// [`DTensor::partial`] made the sum.
    #[track_caller]
    pub fn all_reduce(self) -> Result<DTensor<Replicated, T, B>> {
        self.sum(None)
    }

    /// Partial → Shard\<D\>. Collective: reduce-scatter.
    ///
    /// # Errors
    /// As [`DTensor::all_reduce`]. Also when the partition does not divide dimension D over the
    /// ranks. For tokens under an invariant reduction, also when the partition is not the one by
    /// canonical blocks.
    #[track_caller]
    pub fn reduce_scatter<const D: usize>(self, partition: &Partition) -> Result<DTensor<Shard<D>, T, B>> {
        let partition = canonical("reduce_scatter", &self.group, D, partition)?;
        self.sum(Some((D, partition)))
    }

    /// Starts [`DTensor::all_reduce`].
    ///
    /// # Errors
    /// As [`DTensor::all_reduce`].
    #[track_caller]
    pub fn start_all_reduce(self) -> Result<PendingDTensor<Replicated, T, B>> {
        self.start(None)
    }

    /// Starts [`DTensor::reduce_scatter`].
    ///
    /// # Errors
    /// As [`DTensor::reduce_scatter`].
    #[track_caller]
    pub fn start_reduce_scatter<const D: usize>(
        self,
        partition: &Partition,
    ) -> Result<PendingDTensor<Shard<D>, T, B>> {
        let partition = canonical("reduce_scatter", &self.group, D, partition)?;
        self.start(Some((D, partition)))
    }

    /// Reduces to placement P: all-reduce if `scatter` is `None`, reduce-scatter otherwise.
    #[track_caller]
    pub(super) fn sum<P: Placement>(
        mut self,
        scatter: Option<(usize, Partition)>,
    ) -> Result<DTensor<P, T, B>> {
        let sum = match (self.take_nodes()?, &scatter) {
            (None, None) => {
                self.group.all_reduce(ReduceOp::Sum, &mut self.local)?;
                self.local
            }
            (None, Some((dim, partition))) => {
                self.group.reduce_scatter(ReduceOp::Sum, &self.local, *dim, partition)?
            }
            (Some((tree, nodes)), None) => self.group.tree_all_reduce(&tree, nodes)?,
            (Some((tree, nodes)), Some((dim, partition))) => {
                self.group.tree_reduce_scatter(&tree, nodes, *dim, partition)?
            }
        };
        let partition = scatter.map(|(_, partition)| partition);
        Ok(DTensor::new(sum, &self.group, Layout { partition, ..self.layout }))
    }

    /// Starts [`DTensor::sum`]. A sum that needs several collectives completes before this function
    /// returns.
    #[track_caller]
    pub(super) fn start<P: Placement>(
        self,
        scatter: Option<(usize, Partition)>,
    ) -> Result<PendingDTensor<P, T, B>> {
        let starts = match &self.addends {
            Addends::Exact => true,
            Addends::Ranks => self.group.tree()?.is_none(),
            Addends::Node => is_one_collective::<T, B>(&self.group)?,
            Addends::Nodes(_) => false,
        };
        if !starts {
            return Ok(PendingDTensor(Progress::Done(self.sum(scatter)?)));
        }
        let pending = match &scatter {
            None => self.group.start_all_reduce(ReduceOp::Sum, self.local)?,
            Some((dim, partition)) => {
                self.group.start_reduce_scatter(ReduceOp::Sum, self.local, *dim, partition)?
            }
        };
        let layout = Layout { partition: scatter.map(|(_, partition)| partition), ..self.layout };
        Ok(PendingDTensor(Progress::Started { pending, group: self.group, layout }))
    }

    /// Returns the tree, and takes this rank's sums of sub-trees out of the tensor; `None` if the
    /// ranks may add in any order.
    fn take_nodes(&mut self) -> Result<Option<(Tree, Vec<Tensor<T::Acc, B>>)>> {
        let Some(tree) = self.group.tree()? else { return Ok(None) };
        match std::mem::replace(&mut self.addends, Addends::Ranks) {
            Addends::Exact => Ok(None),
            Addends::Nodes(nodes) => Ok(Some((tree, nodes))),
            Addends::Node => {
                let none = Tensor::empty(self.group.device(), [0])?;
                let node = std::mem::replace(&mut self.local, none).into_element()?;
                Ok(Some((tree, vec![node])))
            }
            Addends::Ranks => {
                let reason = "an invariant reduction of a sum with one term per rank, not per canonical block: \
                     use the crate's linear layers, or `Reduction::Fast`";
                Err(Error::Unsupported { op: "partial sum", reason: reason.into() })
            }
        }
    }
}

/// Whether a single collective adds in the required order. This holds if the order is free. It also
/// holds if T is its own accumulator type and there are two ranks with one sub-tree each.
pub(super) fn is_one_collective<T: Element, B: Device>(group: &Group<B>) -> Result<bool> {
    Ok(match group.tree()? {
        None => true,
        Some(tree) => {
            let pair = group.size() == 2 && (0..2).all(|rank| tree.nodes(rank).len() == 1);
            pair && T::DTYPE == T::Acc::DTYPE
        }
    })
}

/// The result of a started reduction.
#[must_use = "a collective that is started has to be waited for"]
pub struct PendingDTensor<P: Placement, T: Element, B: Device>(Progress<P, T, B>);

enum Progress<P: Placement, T: Element, B: Device> {
    Started { pending: Pending<T, B>, group: Group<B>, layout: Layout },
    Done(DTensor<P, T, B>),
}

impl<P: Placement, T: Element, B: Backend> PendingDTensor<P, T, B> {
    /// Waits for the tensor.
    ///
    /// # Errors
    /// When the ranks disagreed, or a rank was lost.
    pub fn wait(self) -> Result<DTensor<P, T, B>> {
        match self.0 {
            Progress::Started { pending, group, layout } => Ok(DTensor::new(pending.wait()?, &group, layout)),
            Progress::Done(tensor) => Ok(tensor),
        }
    }
}
