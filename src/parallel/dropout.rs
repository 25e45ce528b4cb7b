//! Dropout that does not depend on the sharding.

use super::{DTensor, Layer};
use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, DropoutMask},
    ops,
    rng::Philox,
    shard::{Elementwise, Placement, Shape},
};
use std::marker::PhantomData;

/// y = x / (1 − p) where the mask keeps an element, 0 where it drops it: P → P. No collectives.
///
/// The mask is a function of the layer's seed and name, of the tensor's [`DropoutState`](super::DropoutState), and of the element's
/// index in the whole tensor: every placement and every number of ranks drops the same elements. A
/// tensor of more than two dimensions has the mask of the matrix whose rows are all its dimensions
/// but the last. (Frameworks that seed a generator a rank need another seed inside and outside of
/// sharded regions, and get another mask at every tensor-parallel size.) A tensor without a draw is
/// not in training, and passes unchanged.
///
/// Backward: dx = dy under the same mask, drawn anew.
///
/// Source: Srivastava et al., 2014.
#[derive(Clone, Copy, Debug)]
pub struct Dropout<P> {
    probability: f64,
    stream: Philox,
    placement: PhantomData<P>,
}

/// How many rows, and their mask.
type Masks = Vec<(usize, DropoutMask)>;

impl<P: Elementwise> Dropout<P> {
    /// Drops elements with this probability. Layers of one model have different names.
    pub fn new(probability: f64, seed: u64, name: &str) -> Self {
        Self { probability, stream: Philox::named(seed, name), placement: PhantomData }
    }

    /// The masks of the runs of this rank's rows that lie together in the whole; none where nothing
    /// is dropped.
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
        // A run for each index of the dimensions before the cut one.
        let (runs, inner) = Shape::new(&shape.dims()[..last]).split_at(dim);
        let (own, all) = (x.local_range(dim), shape.dims()[dim]);
        Some((0..runs).map(|run| (own.len() * inner, mask((run * all + own.start) * inner))).collect())
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
