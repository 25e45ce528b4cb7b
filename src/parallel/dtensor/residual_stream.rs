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
/// S → Copied ([`DTensor::enter`]) enters a region, Partial → S ([`DTensor::leave`]) leaves it.
/// Each is the other's backward. Layers that take S as a type parameter therefore serve both
/// placements without a flag.
#[diagnostic::on_unimplemented(
    message = "a residual stream cannot be held as `{Self}`",
    note = "it is `Replicated`, or `Shard<0>` for sequence parallelism",
    note = "`GatherFrom::<1>` or a `RowParallelLinear` leads there from `Shard<1>`; `ReduceFrom` or `ReduceScatterSequence` from `Partial`"
)]
pub trait ResidualStream: Elementwise + Placement<Dual = Self> {
    /// Makes the tensor of `tokens` rows from this rank's rows: all of them, or its shard of an
    /// even partition.
    ///
    /// # Errors
    /// When `local` has another number of rows.
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>>;

    /// Returns this rank's rows of a tensor of `tokens` rows.
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
    /// S → Copied: enters a tensor-parallel region. Collective: none for `Replicated`, an
    /// all-gather of the tokens for `Shard<0>`.
    ///
    /// # Errors
    /// When the ranks disagree, or one is lost.
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
    /// When the ranks disagree, or one is lost.
    #[track_caller]
    pub fn leave<S: ResidualStream>(self) -> Result<DTensor<S, T, B>> {
        let scatter = self.token_scatter::<S>()?;
        self.sum(scatter)
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

    /// The dimension that the residual stream S shards, and its partition.
    fn token_scatter<S: ResidualStream>(&self) -> Result<Option<(usize, Partition)>> {
        let scatter =
            |dim| Ok((dim, canonical("reduce_scatter", &self.group, dim, &self.token_partition()?)?));
        S::SHARD_DIM.map(scatter).transpose()
    }
}
