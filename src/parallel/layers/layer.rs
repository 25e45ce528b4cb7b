//! The trait of layers, and chains of two layers.

use crate::{
    device::Element,
    error::Result,
    kernels::Backend,
    parallel::{Context, DTensor, Fits},
    shard::Placement,
    tensor::Param,
};

/// A differentiable map from a tensor of placement `In` to one of placement `Out`.
///
/// The backward maps the gradient of the output, of placement `Out::Dual`, to the gradient of the
/// input, of placement `In::Dual`. The backward also adds to the gradients of the layer's
/// parameters. The forward returns the saved values for the backward instead of storing them in the
/// layer, so that several microbatches can be in flight.
///
/// The caller passes tensors by value, so that a layer can write its output into the memory of its
/// input. A caller that needs the input afterwards clones it first. The clone shares the memory,
/// and a layer copies shared memory before it writes.
///
/// A layer does not declare its collectives. To list them, run the layer on
/// [`Group::planned`](crate::comm::Group::planned), which records the calls of one rank without
/// data.
///
/// Errors of collectives name the layer ([`Site`](crate::Site)).
///
#[doc = include_str!("own_layers.md")]
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a layer for these elements on this device",
    note = "layers are generic in the element and the device: `impl<T: Element, B: Backend> Layer<T, B> for …`"
)]
pub trait Layer<T: Element, B: Backend> {
    /// The placement of the input.
    type In: Placement;
    /// The placement of the output.
    type Out: Placement;
    /// The values that the forward saves for the backward.
    type Saved;

    /// Computes the output, and the saved values for the backward.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    fn forward(&self, x: DTensor<Self::In, T, B>) -> Result<(DTensor<Self::Out, T, B>, Self::Saved)>;

    /// Computes the gradient of the input from `dy`, the gradient of the output. Adds to the
    /// parameters' gradients.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    fn backward(
        &self,
        saved: Self::Saved,
        dy: DTensor<<Self::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<Self::In as Placement>::Dual, T, B>>;

    /// Computes the output without saving anything for a backward. If the context has a cache,
    /// tokens also attend to the tokens in the cache: see [`Context`].
    ///
    /// The default calls `forward`. A layer that contains other layers must override `infer` and
    /// call their `infer` with the same context. Otherwise an attention layer inside rejects a
    /// cached step. Attention recognizes a cached step by the sequences of its input. A layer that
    /// makes a new tensor must therefore copy the sequences of its own input
    /// ([`DTensor::with_sequences`]).
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    #[track_caller]
    fn infer(
        &self,
        x: DTensor<Self::In, T, B>,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<Self::Out, T, B>> {
        let _ = context;
        Ok(self.forward(x)?.0)
    }

    /// Returns the parameters, in the same order on every rank. If two layers share a parameter,
    /// both list it. Optimizers and gradient norms reject a list that contains a parameter twice.
    fn params(&self) -> Vec<Param<T, B>> {
        Vec::new()
    }

    /// Chains this layer and `next`. The input of `next` must have the placement of this layer's
    /// output.
    fn then<L: Follows<Self::Out, T, B>>(self, next: L) -> Chain<Self, L>
    where
        Self: Sized,
    {
        Chain(self, next)
    }
}

/// A layer whose input has placement `P`: the bound of [`Layer::then`].
pub trait Follows<P: Placement, T: Element, B: Backend>: Layer<T, B> {}

impl<P: Fits<L::In>, T: Element, B: Backend, L: Layer<T, B>> Follows<P, T, B> for L {}

/// Two layers, the second of which takes the output of the first.
#[derive(Clone, Debug)]
pub struct Chain<A, L>(pub A, pub L);

impl<T: Element, B: Backend, A: Layer<T, B>, L: Layer<T, B>> Layer<T, B> for Chain<A, L>
where
    A::Out: Fits<L::In>,
{
    type In = A::In;
    type Out = L::Out;
    type Saved = (A::Saved, L::Saved);

    #[track_caller]
    fn forward(&self, x: DTensor<A::In, T, B>) -> Result<(DTensor<L::Out, T, B>, Self::Saved)> {
        let (middle, first) = self.0.forward(x)?;
        let (y, second) = self.1.forward(A::Out::fit(middle))?;
        Ok((y, (first, second)))
    }

    #[track_caller]
    fn backward(
        &self,
        (first, second): Self::Saved,
        dy: DTensor<<L::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<A::In as Placement>::Dual, T, B>> {
        let middle = self.1.backward(second, dy)?;
        self.0.backward(first, A::Out::fit_grad(middle))
    }

    #[track_caller]
    fn infer(
        &self,
        x: DTensor<A::In, T, B>,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<L::Out, T, B>> {
        self.1.infer(A::Out::fit(self.0.infer(x, context)?), context)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        [self.0.params(), self.1.params()].concat()
    }
}
