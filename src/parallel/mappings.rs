//! The seven mappings between placements. Each one's backward is the mapping between the duals.

use super::{DTensor, Layer};
use crate::{
    device::Element,
    error::Result,
    kernels::Backend,
    shard::{Copied, Partial, Partition, Replicated, Shard},
};

/// Replicated → Copied. Forward: none. Backward: all-reduce. Megatron-LM's *f*, `copy_to_tensor_model_parallel_region`.
#[derive(Clone, Copy, Debug)]
pub struct CopyTo;

impl<T: Element, B: Backend> Layer<T, B> for CopyTo {
    type In = Replicated;
    type Out = Copied;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Replicated, T, B>) -> Result<(DTensor<Copied, T, B>, ())> {
        Ok((x.copy_to(), ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Partial, T, B>) -> Result<DTensor<Replicated, T, B>> {
        dy.all_reduce()
    }
}

/// Partial → Replicated. Forward: all-reduce. Backward: none. Megatron-LM's *g*,
/// `reduce_from_tensor_model_parallel_region`.
#[derive(Clone, Copy, Debug)]
pub struct ReduceFrom;

impl<T: Element, B: Backend> Layer<T, B> for ReduceFrom {
    type In = Partial;
    type Out = Replicated;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Partial, T, B>) -> Result<(DTensor<Replicated, T, B>, ())> {
        Ok((x.all_reduce()?, ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Replicated, T, B>) -> Result<DTensor<Copied, T, B>> {
        Ok(dy.copy_to())
    }
}

/// Replicated → Shard\<D\>. Forward: own part. Backward: all-gather.
#[derive(Clone, Debug)]
pub struct ScatterTo<const D: usize> {
    cut: Option<Partition>,
}

impl<const D: usize> ScatterTo<D> {
    /// Scatters as this cut says.
    pub fn new(cut: Partition) -> Self {
        Self { cut: Some(cut) }
    }

    /// Scatters as evenly as whole indices allow, whatever the size.
    pub fn even() -> Self {
        Self { cut: None }
    }
}

impl<const D: usize, T: Element, B: Backend> Layer<T, B> for ScatterTo<D> {
    type In = Replicated;
    type Out = Shard<D>;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Replicated, T, B>) -> Result<(DTensor<Shard<D>, T, B>, ())> {
        let cut = match &self.cut {
            Some(cut) => cut.clone(),
            None => x.group().even_partition(x.shape().dims().get(D).copied().unwrap_or(0))?,
        };
        Ok((x.scatter(&cut)?, ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Shard<D>, T, B>) -> Result<DTensor<Replicated, T, B>> {
        dy.all_gather()
    }
}

/// Replicated → Shard<0>: tokens to ranks, where sequence parallelism begins. Forward: own part. Backward: all-gather.
pub type ScatterSequence = ScatterTo<0>;

/// Shard\<D\> → Replicated. Forward: all-gather. Backward: own part.
///
/// Right where the whole is *used* equally by all ranks: then its gradient is equal everywhere, and a rank's own part of
/// it is all there is. Where each rank goes on differently, the gradient is a sum: [`GatherSequence`].
#[derive(Clone, Copy, Debug)]
pub struct GatherFrom<const D: usize>;

impl<const D: usize, T: Element, B: Backend> Layer<T, B> for GatherFrom<D> {
    type In = Shard<D>;
    type Out = Replicated;
    type Saved = Option<Partition>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<D>, T, B>) -> Result<(DTensor<Replicated, T, B>, Self::Saved)> {
        let cut = x.partition().cloned();
        Ok((x.all_gather()?, cut))
    }

    #[track_caller]
    fn backward(&self, cut: Self::Saved, dy: DTensor<Replicated, T, B>) -> Result<DTensor<Shard<D>, T, B>> {
        let cut = match cut {
            Some(cut) => cut,
            None => dy.group().even_partition(dy.shape().dims()[D])?,
        };
        dy.scatter(&cut)
    }
}

/// Shard<0> → Copied. Forward: all-gather. Backward: reduce-scatter. Where a tensor-parallel region begins under sequence
/// parallelism (Korthikanti et al., 2022: *g*).
#[derive(Clone, Copy, Debug)]
pub struct GatherSequence;

impl<T: Element, B: Backend> Layer<T, B> for GatherSequence {
    type In = Shard<0>;
    type Out = Copied;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<0>, T, B>) -> Result<(DTensor<Copied, T, B>, ())> {
        Ok((x.all_gather()?.copy_to(), ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Partial, T, B>) -> Result<DTensor<Shard<0>, T, B>> {
        dy.leave()
    }
}

/// Partial → Shard<0>. Forward: reduce-scatter. Backward: all-gather. Where a tensor-parallel region ends under sequence
/// parallelism (Korthikanti et al., 2022: *ḡ*).
#[derive(Clone, Copy, Debug)]
pub struct ReduceScatterSequence;

impl<T: Element, B: Backend> Layer<T, B> for ReduceScatterSequence {
    type In = Partial;
    type Out = Shard<0>;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Partial, T, B>) -> Result<(DTensor<Shard<0>, T, B>, ())> {
        Ok((x.leave()?, ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Shard<0>, T, B>) -> Result<DTensor<Copied, T, B>> {
        Ok(dy.all_gather()?.copy_to())
    }
}
