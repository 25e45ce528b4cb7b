//! Activation recomputation.

use crate::{
    device::Element,
    error::Result,
    kernels::Backend,
    parallel::{Context, DTensor, Layer},
    shard::Placement,
    tensor::Param,
};

/// A layer that saves only its input and recomputes the forward in the backward (PyTorch's
/// `checkpoint`).
///
/// The results have the same bits as without recomputation, also with dropout. Collectives: those
/// of the layer. The backward begins with those of the layer's forward. Source: Chen et al., 2016:
/// Training Deep Nets with Sublinear Memory Cost.
///
/// ```
/// use shardwise::prelude::*;
///
/// let (group, silu) = (Group::solo(&Cpu::new()), Activate::<Replicated>::new(Activation::Silu));
/// let x = DTensor::replicated(&group, Tensor::<f32, _>::full(group.device(), [2, 3], 0.5)?)?;
/// let layer = Recompute::new(silu);
/// let (y, saved) = layer.forward(x.clone())?;
/// assert!(matches!(&saved, RecomputeSaved::Input(_)));
/// let (dx, plain) = (layer.backward(saved, y.clone())?, silu.backward(x.into_local(), y)?);
/// assert_eq!(dx.local().to_vec()?, plain.local().to_vec()?);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Recompute<L> {
    layer: L,
    on: bool,
}

impl<L> Recompute<L> {
    /// Recomputes the forward of this layer.
    pub fn new(layer: L) -> Self {
        Self::when(true, layer)
    }

    /// Recomputes the forward of this layer if `on` is true. Otherwise calls the layer unchanged.
    pub fn when(on: bool, layer: L) -> Self {
        Self { layer, on }
    }

    /// Returns the layer.
    pub fn layer(&self) -> &L {
        &self.layer
    }
}

/// The values that the forward of a [`Recompute`] saves for its backward.
#[derive(Debug)]
pub enum RecomputeSaved<X, Saved> {
    /// The input of the layer, if its forward is recomputed.
    Input(X),
    /// The layer's own saved values, if its forward is not recomputed.
    Saved(Saved),
}

impl<T: Element, B: Backend, L: Layer<T, B>> Layer<T, B> for Recompute<L> {
    type In = L::In;
    type Out = L::Out;
    type Saved = RecomputeSaved<DTensor<L::In, T, B>, L::Saved>;

    #[track_caller]
    fn forward(&self, x: DTensor<L::In, T, B>) -> Result<(DTensor<L::Out, T, B>, Self::Saved)> {
        if self.on {
            return Ok((self.layer.forward(x.clone())?.0, RecomputeSaved::Input(x)));
        }
        let (y, saved) = self.layer.forward(x)?;
        Ok((y, RecomputeSaved::Saved(saved)))
    }

    #[track_caller]
    fn backward(
        &self,
        saved: Self::Saved,
        dy: DTensor<<L::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<L::In as Placement>::Dual, T, B>> {
        let saved = match saved {
            RecomputeSaved::Input(x) => self.layer.forward(x)?.1,
            RecomputeSaved::Saved(saved) => saved,
        };
        self.layer.backward(saved, dy)
    }

    #[track_caller]
    fn infer(
        &self,
        x: DTensor<L::In, T, B>,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<L::Out, T, B>> {
        self.layer.infer(x, context)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.layer.params()
    }
}
