//! Sums of two tensors with the same placement.

use super::{DTensor, Fits};
use crate::{
    device::Element,
    error::{Error, Result, same_shape},
    kernels::Backend,
    ops,
    shard::{Partial, Placement},
};

impl<P: Placement, T: Element, B: Backend> DTensor<P, T, B> {
    /// Adds a tensor with the same placement. Writes the sum into the memory of `self`, unless
    /// another tensor shares this memory.
    ///
    /// # Errors
    /// When the shapes, the groups or the partitions differ. Also for two [`Partial`] sums under an
    /// invariant reduction.
    #[expect(clippy::should_implement_trait, reason = "a sum may fail")]
    pub fn add<Q: Fits<P>>(self, other: &DTensor<Q, T, B>) -> Result<Self> {
        same_shape("add", "a", self.shape().dims(), "b", other.shape().dims())?;
        if !self.group.is_same(&other.group) {
            let reason = format!("a is spread over {:?}, but b over {:?}", self.group, other.group);
            return Err(Error::invalid("add", reason));
        }
        if self.layout.partition != other.layout.partition {
            return Err(Error::invalid("add", "the two tensors have different partitions"));
        }
        if P::NAME == Partial::NAME && self.group.tree()?.is_some() {
            // A rank would add the two tensors' sums of each of its sub-trees. The height of these
            // sub-trees, and so the order of the additions, depends on the number of ranks.
            let reason = "two unreduced sums under an invariant reduction: reduce both first";
            return Err(Error::Unsupported { op: "add", reason: reason.into() });
        }
        self.map_local(|local| ops::add(local, &other.local))
    }
}
