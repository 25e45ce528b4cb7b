//! The terms of a sum over the ranks.

use crate::{
    device::{Device, Element},
    error::Result,
    tensor::Tensor,
};

/// The terms of a [`Partial`](crate::shard::Partial) tensor.
#[derive(Clone)]
pub(super) enum Addends<A: Element, B: Device> {
    /// Each rank has one term, its local tensor. The ranks add the terms in any order.
    Ranks,
    /// As `Ranks`, but for each element at most one rank has a term other than +0, so that every
    /// order gives the same bits.
    Exact,
    /// This rank has one term: the sum of its only sub-tree of the group's tree. The term is the
    /// local tensor, whose element type is the accumulator's.
    Node,
    /// This rank has one term for each of its sub-trees of the group's tree: the sum of the
    /// sub-tree.
    Nodes(Vec<Tensor<A, B>>),
}

impl<A: Element, B: Device> Addends<A, B> {
    /// Applies `f` to the sum of every sub-tree. The caller must also apply `f` to the local
    /// tensor.
    pub(super) fn map(&self, f: impl FnMut(&Tensor<A, B>) -> Result<Tensor<A, B>>) -> Result<Self> {
        Ok(match self {
            Self::Nodes(nodes) => Self::Nodes(nodes.iter().map(f).collect::<Result<_>>()?),
            others => others.clone(),
        })
    }
}
