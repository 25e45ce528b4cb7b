//! The residual stream: how activations are held between tensor-parallel regions.

use super::{DTensor, dtensor::Layout};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    shard::{Copied, Elementwise, Placement, Replicated, Shard},
    tensor::Tensor,
};
use std::ops::Range;

/// How activations are held between tensor-parallel regions: [`Replicated`], or [`Shard<0>`] with sequence parallelism.
///
/// A region is entered by S → Copied ([`DTensor::enter`]) and left by Partial → S
/// ([`DTensor::leave`]). The two are each other's dual: the backward of entering is leaving, and
/// the other way round. So layers that take S as a parameter serve both, and no layer has a flag.
#[diagnostic::on_unimplemented(
    message = "a residual stream cannot be held as `{Self}`",
    note = "it is `Replicated`, or `Shard<0>` for sequence parallelism",
    note = "`GatherFrom::<1>` or a `RowParallelLinear` leads there from `Shard<1>`; `ReduceFrom` or `ReduceScatterSequence` from `Partial`"
)]
pub trait ResidualStream: Elementwise + Placement<Dual = Self> {
    /// The tensor of `tokens` rows of which this rank holds `local`: all of it, or its part of an even cut.
    ///
    /// # Errors
    /// When `local` has another number of rows.
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>>;

    /// The rows of a tensor of `tokens` rows that this rank holds.
    ///
    /// # Errors
    /// When there are fewer canonical blocks than ranks.
    fn local_rows<B: Device>(group: &Group<B>, tokens: usize) -> Result<Range<usize>> {
        Ok(match Self::SHARD_DIM {
            None => 0..tokens,
            Some(_) => group.even_partition(tokens)?.range(group.rank()),
        })
    }
}

impl ResidualStream for Replicated {
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        same_size("stream", "rows of the tensor", local.shape().rows(), "the number of tokens", tokens)?;
        DTensor::replicated(group, local)
    }
}

impl ResidualStream for Shard<0> {
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        DTensor::shard(group, local, &group.even_partition(tokens)?)
    }
}

impl<S: ResidualStream, T: Element, B: Backend> DTensor<S, T, B> {
    /// The tensor in a tensor-parallel region: S → Copied. Collective: none, or an all-gather of
    /// the tokens.
    ///
    /// # Errors
    /// When the ranks disagree, or one is lost.
    #[track_caller]
    pub fn enter(mut self) -> Result<DTensor<Copied, T, B>> {
        if let Some(dim) = S::SHARD_DIM {
            self.local = self.group.all_gather(&self.local, dim, self.shard_cut()?)?;
        }
        Ok(DTensor::new(self.local, &self.group, Layout { cut: None, ..self.layout }))
    }
}
