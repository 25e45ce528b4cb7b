//! The residual stream: the placement of activations between tensor-parallel regions.

use super::{DTensor, Layout, PendingDTensor, partition::canonical};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    shard::{Copied, Elementwise, Partial, Partition, Placement, Replicated, Shard},
    tensor::Tensor,
};
use std::ops::Range;

/// The placement of activations between tensor-parallel regions: [`Replicated`], or [`Shard<0>`]
/// with sequence parallelism.
///
/// [`DTensor::enter`] (S → Copied) enters a tensor-parallel region, and [`DTensor::leave`] (Partial
/// → S) leaves it. Each of the two mappings is the backward of the other. A layer with S as a type
/// parameter therefore works with both placements, without a flag.
#[diagnostic::on_unimplemented(
    message = "a residual stream cannot be held as `{Self}`",
    note = "it is `Replicated`, or `Shard<0>` for sequence parallelism",
    note = "`GatherFrom::<1>` or a `RowParallelLinear` leads there from `Shard<1>`; `ReduceFrom` or `ReduceScatterSequence` from `Partial`"
)]
pub trait ResidualStream: Elementwise + Placement<Dual = Self> {
    /// Makes a tensor of `tokens` rows from this rank's rows: all rows for `Replicated`, or the
    /// rank's shard of [`Group::even_partition`] for `Shard<0>`.
    ///
    /// # Errors
    /// When `local` does not have as many rows as this rank holds.
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>>;

    /// Returns this rank's rows of a tensor of `tokens` rows.
    ///
    /// # Errors
    /// When an invariant reduction has fewer canonical blocks than ranks.
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
    /// S → Copied: enters a tensor-parallel region. Collective: none for `Replicated`, an
    /// all-gather of the tokens for `Shard<0>`.
    ///
    /// # Errors
    /// When the ranks disagree, or a rank is lost.
    #[track_caller]
    pub fn enter(mut self) -> Result<DTensor<Copied, T, B>> {
        if let Some(dim) = S::SHARD_DIM {
            self.local = self.group.all_gather(&self.local, dim, self.shard_partition()?)?;
        }
        Ok(DTensor::new(self.local, &self.group, Layout { partition: None, ..self.layout }))
    }
}

impl<T: Element, B: Backend> DTensor<Partial, T, B> {
    /// Partial → S: leaves a tensor-parallel region. Collective: an all-reduce for `Replicated`, a
    /// reduce-scatter over tokens for `Shard<0>`.
    ///
    /// # Errors
    /// As [`DTensor::all_reduce`].
    #[track_caller]
    pub fn leave<S: ResidualStream>(self) -> Result<DTensor<S, T, B>> {
        let scatter = self.token_scatter::<S>()?;
        self.sum(scatter)
    }

    /// Starts [`DTensor::leave`].
    ///
    /// # Errors
    /// As [`DTensor::leave`].
    #[track_caller]
    pub fn start_leave<S: ResidualStream>(self) -> Result<PendingDTensor<S, T, B>> {
        let scatter = self.token_scatter::<S>()?;
        self.start(scatter)
    }

    /// Returns the dimension that the residual stream S shards, with its partition; `None` if S is
    /// `Replicated`.
    fn token_scatter<S: ResidualStream>(&self) -> Result<Option<(usize, Partition)>> {
        let scatter =
            |dim| Ok((dim, canonical("reduce_scatter", &self.group, dim, &self.token_partition()?)?));
        S::SHARD_DIM.map(scatter).transpose()
    }
}
