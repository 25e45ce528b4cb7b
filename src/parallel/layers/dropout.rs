//! Dropout whose masks do not depend on the sharding.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, DropoutMask},
    ops,
    parallel::{DTensor, Layer},
    rng::Philox,
    shard::{Elementwise, Placement, Shape},
};
use std::marker::PhantomData;

/// y = x / (1 − p) for elements that the mask keeps, y = 0 for elements that it drops: P → P. No
/// collectives.
///
/// The mask is a function of the layer's seed and name, of the tensor's
/// [`DropoutState`](crate::parallel::DropoutState), and of the element's index in the whole tensor.
/// The layer therefore drops the same elements at every placement and every number of ranks. (A
/// framework that seeds one generator per rank needs different seeds inside and outside of
/// tensor-parallel regions. Its masks depend on the tensor-parallel size.) All dimensions of a
/// tensor but the last count as rows. A tensor without a dropout state is not in training. The
/// layer returns it unchanged.
///
/// Backward: dx = dy / (1 − p) or 0, by the same mask. The backward draws the mask again.
///
/// Source: Srivastava et al., 2014.
///
/// ```
/// use shardwise::prelude::*;
///
/// let kept = |ranks| launch::threads(ranks, |world| {
///     let state = DropoutState { step: 7, row: 0, sequence: 0 };
///     let x = DTensor::replicated(&world, Tensor::<f32, _>::full(world.device(), [8, 8], 1.0)?)?;
///     let x = x.scatter::<0>(&world.even_partition(8)?)?.with_dropout_state(state);
///     Dropout::new(0.5, 1, "embedding").forward(x)?.0.all_gather()?.local().to_vec()
/// });
/// let (one, three) = (kept(1)?.swap_remove(0), kept(3)?.swap_remove(0));
/// assert!(one.contains(&0.0) && one.contains(&2.0) && one == three);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Dropout<P> {
    probability: f64,
    stream: Philox,
    placement: PhantomData<P>,
}

/// For each range of consecutive rows, the number of rows and their mask.
type Masks = Vec<(usize, DropoutMask)>;

impl<P: Elementwise> Dropout<P> {
    /// Drops elements with this probability. Each dropout layer of a model needs a different name,
    /// because layers with the same seed and name draw the same masks.
    pub fn new(probability: f64, seed: u64, name: &str) -> Self {
        Self { probability, stream: Philox::named(seed, name), placement: PhantomData }
    }

    /// Returns the masks of this rank's rows: one mask for each range of rows that is contiguous in
    /// the whole tensor. Returns `None` if the layer drops nothing.
    fn masks<Q: Placement, T: Element, B: Backend>(&self, x: &DTensor<Q, T, B>) -> Option<Masks> {
        let dropout = x.dropout_state().filter(|_| self.probability != 0.0)?;
        let (shape, last) = (x.shape(), x.shape().rank() - 1);
        let mask = |first: usize| DropoutMask {
            probability: self.probability,
            stream: self.stream.substream(dropout.step),
            row: dropout.row.wrapping_add(first as u64),
            column: x.local_range(last).start,
            width: shape.cols(),
        };
        let Some(dim) = Q::SHARD_DIM.filter(|&dim| dim < last) else {
            return Some(vec![(shape.rows(), mask(0))]);
        };
        // One range for each index of the dimensions before the sharded dimension.
        let (outer, inner) = Shape::new(&shape.dims()[..last]).split_at(dim);
        let (own, all) = (x.local_range(dim), shape.dims()[dim]);
        Some((0..outer).map(|at| (own.len() * inner, mask((at * all + own.start) * inner))).collect())
    }
}

impl<P: Elementwise, T: Element, B: Backend> Layer<T, B> for Dropout<P> {
    type In = P;
    type Out = P;
    type Saved = Option<Masks>;

    fn forward(&self, x: DTensor<P, T, B>) -> Result<(DTensor<P, T, B>, Self::Saved)> {
        let Some(masks) = self.masks(&x) else { return Ok((x, None)) };
        Ok((x.with_local(ops::dropout(&masks, x.local())?)?, Some(masks)))
    }

    fn backward(
        &self,
        masks: Self::Saved,
        dy: DTensor<<P as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<P as Placement>::Dual, T, B>> {
        let Some(masks) = masks else { return Ok(dy) };
        dy.with_local(ops::dropout(&masks, dy.local())?)
    }
}
