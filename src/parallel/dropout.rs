//! Dropout that does not depend on the sharding.

use super::{DTensor, Layer, Traffic};
use crate::{
    comm::Group,
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
/// The mask is a function of the layer's seed and name, of the tensor's [`Draw`](super::Draw), and of the element's
/// index in the whole tensor: every placement and every number of ranks drops the same elements. (Frameworks that seed a
/// generator a rank need another seed inside and outside of sharded regions, and get another mask at every
/// tensor-parallel size.) A tensor without a draw is not in training, and passes unchanged.
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

impl<P: Elementwise> Dropout<P> {
    /// Drops elements with this probability. Layers of one model have different names.
    pub fn new(probability: f64, seed: u64, name: &str) -> Self {
        Self { probability, stream: Philox::named(seed, name), placement: PhantomData }
    }

    fn mask<Q: Placement, T: Element, B: Backend>(&self, x: &DTensor<Q, T, B>) -> Option<DropoutMask> {
        let draw = x.draw().filter(|_| self.probability != 0.0)?;
        let last = x.shape().rank() - 1;
        Some(DropoutMask {
            probability: self.probability,
            stream: self.stream.substream(draw.step),
            row: draw.row + x.local_range(0).start as u64,
            column: x.local_range(last).start,
            width: x.shape().cols(),
        })
    }
}

impl<P: Elementwise, T: Element, B: Backend> Layer<T, B> for Dropout<P> {
    type In = P;
    type Out = P;
    type Saved = Option<DropoutMask>;

    fn forward(&self, x: &DTensor<P, T, B>) -> Result<(DTensor<P, T, B>, Self::Saved)> {
        let Some(mask) = self.mask(x) else { return Ok((x.clone(), None)) };
        Ok((x.with_local(ops::dropout(&mask, x.local())?), Some(mask)))
    }

    fn backward(
        &mut self,
        mask: Self::Saved,
        dy: &DTensor<<P as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<P as Placement>::Dual, T, B>> {
        let Some(mask) = mask else { return Ok(dy.clone()) };
        Ok(dy.with_local(ops::dropout(&mask, dy.local())?))
    }

    fn traffic(&self, _: &Group<B>, x: Shape) -> (Traffic, Shape) {
        (Traffic::default(), x)
    }
}
