//! The seven mappings between placements. The backward of a mapping is the mapping between the dual
//! placements.

use crate::{
    device::Element,
    error::Result,
    kernels::Backend,
    parallel::{DTensor, Layer},
    shard::{Copied, Partial, Partition, Replicated, Shard},
};

/// Replicated → Copied. Forward: no communication. Backward: all-reduce.
///
/// Megatron-LM's *f*, `copy_to_tensor_model_parallel_region`.
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

/// Partial → Replicated. Forward: all-reduce. Backward: no communication.
///
/// Megatron-LM's *g*, `reduce_from_tensor_model_parallel_region`.
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

/// Replicated → Shard\<D\>. Forward: takes this rank's shard. Backward: all-gather.
#[derive(Clone, Debug)]
pub struct ScatterTo<const D: usize> {
    partition: Option<Partition>,
}

impl<const D: usize> ScatterTo<D> {
    /// Scatters by this partition.
    pub fn new(partition: Partition) -> Self {
        Self { partition: Some(partition) }
    }

    /// Scatters inputs of any size by
    /// [`Group::even_partition`](crate::comm::Group::even_partition).
    pub fn even() -> Self {
        Self { partition: None }
    }
}

impl<const D: usize, T: Element, B: Backend> Layer<T, B> for ScatterTo<D> {
    type In = Replicated;
    type Out = Shard<D>;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<Replicated, T, B>) -> Result<(DTensor<Shard<D>, T, B>, ())> {
        let partition = match &self.partition {
            Some(partition) => partition.clone(),
            None => x.group().even_partition(x.shape().dims().get(D).copied().unwrap_or(0))?,
        };
        Ok((x.scatter(&partition)?, ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<Shard<D>, T, B>) -> Result<DTensor<Replicated, T, B>> {
        dy.all_gather()
    }
}

/// Replicated → Shard<0>: scatters tokens at the start of sequence parallelism. Forward: takes this
/// rank's shard. Backward: all-gather.
pub type ScatterSequence = ScatterTo<0>;

/// Shard\<D\> → Replicated. Forward: all-gather. Backward: takes this rank's shard.
///
/// Use this mapping if all ranks use the whole tensor in the same way. The gradient of the whole
/// tensor is then equal on every rank, and each rank takes its shard of this gradient. If each rank
/// uses the tensor differently, each rank has only a term of the gradient. Then use
/// [`GatherSequence`], whose backward sums the terms.
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let y = Tensor::<f32, _>::from_slice(world.device(), [1, 3], &[1.0, 2.0, 3.0])?;
///     let x = DTensor::replicated(&world, y)?.scatter::<1>(&Partition::from_sizes([1, 2]))?;
///     let (whole, saved) = GatherFrom::<1>.forward(x)?;
///     let dx = GatherFrom::<1>.backward(saved, whole)?;
///     assert_eq!(dx.local().to_vec()?, [vec![1.0], vec![2.0, 3.0]][world.rank()]);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct GatherFrom<const D: usize>;

impl<const D: usize, T: Element, B: Backend> Layer<T, B> for GatherFrom<D> {
    type In = Shard<D>;
    type Out = Replicated;
    type Saved = Option<Partition>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<D>, T, B>) -> Result<(DTensor<Replicated, T, B>, Self::Saved)> {
        let partition = x.partition().cloned();
        Ok((x.all_gather()?, partition))
    }

    #[track_caller]
    fn backward(&self, saved: Self::Saved, dy: DTensor<Replicated, T, B>) -> Result<DTensor<Shard<D>, T, B>> {
        let partition = match saved {
            Some(partition) => partition,
            None => dy.group().even_partition(dy.shape().dims()[D])?,
        };
        dy.scatter(&partition)
    }
}

/// Shard<0> → Copied. Forward: all-gather. Backward: reduce-scatter. Enters a tensor-parallel
/// region with sequence parallelism (Korthikanti et al., 2022: *g*).
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

/// Partial → Shard<0>. Forward: reduce-scatter. Backward: all-gather. Leaves a tensor-parallel
/// region with sequence parallelism (Korthikanti et al., 2022: *ḡ*).
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
