//! Sums over the ranks that are not made yet.

use super::{
    DTensor, ResidualStream,
    dtensor::{Layout, canonical, uncut},
};
use crate::{
    comm::{Group, Pending, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::Backend,
    shard::{Copied, Partial, Partition, Placement, Replicated, Shard, Tree},
    tensor::Tensor,
};

/// What a [`Partial`] tensor is the sum of.
#[derive(Clone)]
pub(super) enum Addends<A: Element, B: Device> {
    /// Every rank's local tensor, in any order.
    Ranks,
    /// As `Ranks`. In each element all ranks but one have +0, so that every order gives the same
    /// bits.
    Exact,
    /// Every rank's sums of its sub-trees of the group's tree. The local tensor is the only one, in
    /// the accumulator.
    Node,
    /// The same, of any number.
    Nodes(Vec<Tensor<A, B>>),
}

impl<A: Element, B: Device> Addends<A, B> {
    /// The same map of every sub-tree's sum as of the local tensor.
    pub(super) fn map(&self, f: impl FnMut(&Tensor<A, B>) -> Result<Tensor<A, B>>) -> Result<Self> {
        Ok(match self {
            Self::Nodes(nodes) => Self::Nodes(nodes.iter().map(f).collect::<Result<_>>()?),
            others => others.clone(),
        })
    }
}

impl<P: Placement, T: Element, B: Backend> DTensor<P, T, B> {
    /// The sum over all ranks of these nodes: one a rank in any order, or where it is fixed, those
    /// of its sub-trees. It has the rows of `self`, and other features.
    pub(super) fn derive_sum(
        &self,
        mut nodes: Vec<Tensor<T::Acc, B>>,
        features: usize,
        fixed: bool,
    ) -> Result<DTensor<Partial, T, B>> {
        if nodes.len() == 1 && (!fixed || T::DTYPE == T::Acc::DTYPE) {
            let sum = self.derive(nodes.swap_remove(0).into_element()?, features, None);
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
        Ok(self.derive(local, features, None).with_addends(Addends::Nodes(nodes)))
    }
}

impl<T: Element, B: Backend> DTensor<Copied, T, B> {
    /// Makes a sum over the ranks, of which `term`, `[tokens, features]`, is this rank's term. Keeps
    /// the sequences, draw and cut of these tokens. No communication.
    ///
    /// # Errors
    /// When the term has another number of rows, or of dimensions.
    pub fn term(&self, term: Tensor<T, B>) -> Result<DTensor<Partial, T, B>> {
        let features = term.shape().cols();
        let want = self.shape().with(self.shape().rank() - 1, features);
        same_shape("term", "the term", term.shape().dims(), "the tensor, so wide,", want.dims())?;
        Ok(self.derive(term, features, None))
    }
}

impl<T: Element, B: Backend> DTensor<Partial, T, B> {
    /// A tensor that is the sum of what the ranks hold.
    ///
    /// With [`crate::shard::Reduction::Invariant`] such a sum cannot be reduced: what its terms are
    /// depends on the number of ranks. Layers give it terms that do not.
    ///
    /// # Errors
    /// When it has fewer than two dimensions.
    pub fn partial(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        let layout = uncut(&local, "partial")?;
        Ok(Self::new(local, group, layout))
    }

    /// A sum of which every rank but one at most has +0 in each element.
    pub(super) fn exact(mut self) -> Result<Self> {
        if self.group.tree()?.is_some() {
            // −0 becomes +0 where another rank's zero is added: so it does where there is no other
            // rank, too.
            let zeros = Tensor::<T, B>::zeros(self.group.device(), [self.local.shape().cols()])?;
            self.group.device().add_bias::<T>(zeros.slice(), self.local.mat_mut()?)?;
        }
        Ok(self.with_addends(Addends::Exact))
    }

    /// The sum on every rank. Collective: all-reduce.
    ///
    /// # Errors
    /// When the ranks disagree, or one is lost.
    #[track_caller]
    pub fn all_reduce(self) -> Result<DTensor<Replicated, T, B>> {
        self.sum(None)
    }

    /// Each rank's part of the sum along dimension `D`. Collective: reduce-scatter.
    ///
    /// # Errors
    /// When the cut is not one of that dimension, the ranks disagree, or one is lost.
    #[track_caller]
    pub fn reduce_scatter<const D: usize>(self, cut: &Partition) -> Result<DTensor<Shard<D>, T, B>> {
        let cut = canonical("reduce_scatter", &self.group, D, cut)?;
        self.sum(Some((D, cut)))
    }

    /// The sum as the residual stream holds it: Partial → S. Collective: all-reduce, or
    /// reduce-scatter over tokens.
    ///
    /// # Errors
    /// When the ranks disagree, or one is lost.
    #[track_caller]
    pub fn leave<S: ResidualStream>(self) -> Result<DTensor<S, T, B>> {
        let scatter = self.token_scatter::<S>()?;
        self.sum(scatter)
    }

    /// Starts [`DTensor::all_reduce`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn start_all_reduce(self) -> Result<PendingDTensor<Replicated, T, B>> {
        self.start(None)
    }

    /// Starts [`DTensor::reduce_scatter`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn start_reduce_scatter<const D: usize>(
        self,
        cut: &Partition,
    ) -> Result<PendingDTensor<Shard<D>, T, B>> {
        let cut = canonical("reduce_scatter", &self.group, D, cut)?;
        self.start(Some((D, cut)))
    }

    /// Starts [`DTensor::leave`].
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn start_leave<S: ResidualStream>(self) -> Result<PendingDTensor<S, T, B>> {
        let scatter = self.token_scatter::<S>()?;
        self.start(scatter)
    }

    /// The dimension and cut of which the residual stream S has parts.
    fn token_scatter<S: ResidualStream>(&self) -> Result<Option<(usize, Partition)>> {
        let cut = |dim| Ok((dim, canonical("reduce_scatter", &self.group, dim, &self.token_cut()?)?));
        S::SHARD_DIM.map(cut).transpose()
    }

    /// The sum, held as P: whole, or the rank's part.
    #[track_caller]
    fn sum<P: Placement>(mut self, scatter: Option<(usize, Partition)>) -> Result<DTensor<P, T, B>> {
        let sum = match (self.take_nodes()?, &scatter) {
            (None, None) => {
                self.group.all_reduce(ReduceOp::Sum, &mut self.local)?;
                self.local
            }
            (None, Some((dim, cut))) => self.group.reduce_scatter(ReduceOp::Sum, &self.local, *dim, cut)?,
            (Some((tree, nodes)), None) => self.group.tree_all_reduce(&tree, nodes)?,
            (Some((tree, nodes)), Some((dim, cut))) => {
                self.group.tree_reduce_scatter(&tree, nodes, *dim, cut)?
            }
        };
        Ok(DTensor::new(sum, &self.group, Layout { cut: scatter.map(|(_, cut)| cut), ..self.layout }))
    }

    /// Starts [`DTensor::sum`]. A sum along a tree is made of several collectives, at once.
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
            Some((dim, cut)) => self.group.start_reduce_scatter(ReduceOp::Sum, self.local, *dim, cut)?,
        };
        let layout = Layout { cut: scatter.map(|(_, cut)| cut), ..self.layout };
        Ok(PendingDTensor(Progress::Started { pending, group: self.group, layout }))
    }

    /// The nodes along the group's tree; none where the order is free.
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
                let reason = "an invariant reduction of a sum whose terms are those of ranks, not of canonical blocks: \
                     use the crate's linear layers, or `Reduction::Fast`";
                Err(Error::Unsupported { op: "partial sum", reason: reason.into() })
            }
        }
    }
}

/// Whether one collective makes the sum over a group of what its ranks have computed.
pub(super) fn is_one_collective<T: Element, B: Device>(group: &Group<B>) -> Result<bool> {
    Ok(match group.tree()? {
        None => true,
        Some(tree) => {
            let pair = group.size() == 2 && (0..2).all(|rank| tree.nodes(rank).len() == 1);
            pair && T::DTYPE == T::Acc::DTYPE
        }
    })
}

/// A tensor whose collective was started.
#[must_use = "a collective that is started has to be waited for"]
pub struct PendingDTensor<P: Placement, T: Element, B: Device>(Progress<P, T, B>);

enum Progress<P: Placement, T: Element, B: Device> {
    Started { pending: Pending<T, B>, group: Group<B>, layout: Layout },
    Done(DTensor<P, T, B>),
}

impl<P: Placement, T: Element, B: Backend> PendingDTensor<P, T, B> {
    /// The tensor.
    ///
    /// # Errors
    /// When the ranks disagreed, or one was lost.
    pub fn wait(self) -> Result<DTensor<P, T, B>> {
        match self.0 {
            Progress::Started { pending, group, layout } => Ok(DTensor::new(pending.wait()?, &group, layout)),
            Progress::Done(tensor) => Ok(tensor),
        }
    }
}
