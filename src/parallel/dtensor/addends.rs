//! The terms of a sum over the ranks.

use crate::{
    device::{Device, Element},
    error::Result,
    tensor::Tensor,
};

/// The terms of a [`Partial`](crate::shard::Partial) tensor.
#[derive(Clone)]
pub(super) enum Addends<A: Element, B: Device> {
    /// Every rank's local tensor, in any order.
    Ranks,
    /// As `Ranks`. In each element all ranks but one have +0, so that every order gives the same
    /// bits.
    Exact,
    /// Every rank's sum of its one sub-tree of the group's tree: the local tensor, which has the
    /// accumulator's element type.
    Node,
    /// Every rank's sums of its sub-trees of the group's tree.
    Nodes(Vec<Tensor<A, B>>),
}

impl<A: Element, B: Device> Addends<A, B> {
    /// Applies to every sub-tree's sum what the caller applies to the local tensor.
    pub(super) fn map(&self, f: impl FnMut(&Tensor<A, B>) -> Result<Tensor<A, B>>) -> Result<Self> {
        Ok(match self {
            Self::Nodes(nodes) => Self::Nodes(nodes.iter().map(f).collect::<Result<_>>()?),
            others => others.clone(),
        })
    }
}
