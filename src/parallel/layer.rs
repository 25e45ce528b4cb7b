//! What a layer is, and how two become one.

use super::{Context, DTensor, Fits, Follows};
use crate::{device::Element, error::Result, kernels::Backend, shard::Placement, tensor::Param};

/// A differentiable map from a tensor held as `In` to one held as `Out`.
///
/// The backward maps the gradient, held as `Out`'s dual, to that of the input, held as `In`'s dual, and adds to the
/// gradients of the layer's parameters. What it needs of the forward is handed back by value, so that many microbatches
/// may be under way at once.
///
/// Tensors are given by value: a layer may write its output into the memory of its input. A caller
/// that needs its tensor afterwards clones it, which shares the memory; writing then copies it.
///
/// A layer does not declare its collectives. To see them, run it on
/// [`Group::planned`](crate::comm::Group::planned), which records the calls of any rank without
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
    /// How the input is held.
    type In: Placement;
    /// How the output is held.
    type Out: Placement;
    /// What the backward needs of the forward.
    type Saved;

    /// The output, and what the backward needs.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    fn forward(&self, x: DTensor<Self::In, T, B>) -> Result<(DTensor<Self::Out, T, B>, Self::Saved)>;

    /// The gradient of the input from that of the output. Adds to the parameters' gradients.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    fn backward(
        &self,
        saved: Self::Saved,
        dy: DTensor<<Self::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<Self::In as Placement>::Dual, T, B>>;

    /// The output, where no backward follows. If the context has a cache, tokens also attend to
    /// those that it holds: see [`Context`].
    ///
    /// The default calls `forward`. A layer that contains others overrides it and calls their
    /// `infer`; otherwise attention inside refuses a cached step. It knows such a step by the
    /// sequences of its input, so a layer that makes a tensor anew hands them on
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

    /// The parameters, in the same order on every rank. Layers that share one each list it;
    /// optimizers and norms take a list that has it once.
    fn params(&self) -> Vec<Param<T, B>> {
        Vec::new()
    }

    /// This layer, and then another whose input is held as this one's output.
    fn then<L: Follows<Self::Out, T, B>>(self, next: L) -> Chain<Self, L>
    where
        Self: Sized,
    {
        Chain(self, next)
    }
}

/// One layer after another.
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
