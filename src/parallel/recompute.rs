//! Activation recomputation.

use super::{DTensor, Layer, Traffic};
use crate::{
    comm::Group,
    device::Element,
    error::Result,
    kernels::Backend,
    shard::{Placement, Shape},
    tensor::Param,
};

/// A layer that keeps its input only, and computes the forward anew in the backward: memory for time.
///
/// The same results, bit for bit, dropout included. Collectives: those of the layer; those of its forward once more in
/// the backward. Source: Chen et al., 2016: Training Deep Nets with Sublinear Memory Cost.
#[derive(Clone, Debug)]
pub struct Recompute<L>(pub L);

impl<T: Element, B: Backend, L: Layer<T, B>> Layer<T, B> for Recompute<L> {
    type In = L::In;
    type Out = L::Out;
    type Saved = DTensor<L::In, T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<L::In, T, B>) -> Result<(DTensor<L::Out, T, B>, Self::Saved)> {
        Ok((self.0.forward(x)?.0, x.clone()))
    }

    #[track_caller]
    fn backward(
        &self,
        x: Self::Saved,
        dy: &DTensor<<L::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<L::In as Placement>::Dual, T, B>> {
        let (_, saved) = self.0.forward(&x)?;
        self.0.backward(saved, dy)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.0.params()
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        let (Traffic { forward, backward }, y) = self.0.traffic(group, x);
        (Traffic { backward: [forward.clone(), backward].concat(), forward }, y)
    }
}
