//! Sequences of layers: `Vec<L>` for one layer type, and [`BoxLayer`] for mixing types.

use crate::{
    device::{Cpu, Element},
    error::{Error, Result, Site},
    kernels::Backend,
    parallel::{Context, DTensor, Fits, Layer},
    shard::Placement,
    tensor::Param,
};
use std::any::Any;

/// Layers, one after another. An empty list is the identity.
impl<T, B, P, L> Layer<T, B> for Vec<L>
where
    T: Element,
    B: Backend,
    P: Placement<Dual = P>,
    L: Layer<T, B, In = P>,
    L::Out: Fits<P>,
{
    type In = P;
    type Out = P;
    type Saved = Vec<L::Saved>;

    #[track_caller]
    fn forward(&self, x: DTensor<P, T, B>) -> Result<(DTensor<P, T, B>, Self::Saved)> {
        let (mut y, mut all) = (x, Vec::with_capacity(self.len()));
        for layer in self {
            let (next, saved) = layer.forward(y)?;
            y = L::Out::fit(next);
            all.push(saved);
        }
        Ok((y, all))
    }

    #[track_caller]
    fn backward(&self, mut saved: Self::Saved, dy: DTensor<P, T, B>) -> Result<DTensor<P, T, B>> {
        let mut dx = dy;
        for layer in self.iter().rev() {
            let saved = saved.pop().ok_or_else(|| foreign("fewer layers"))?;
            dx = layer.backward(saved, L::Out::fit_grad(dx))?;
        }
        Ok(dx)
    }

    #[track_caller]
    fn infer(&self, x: DTensor<P, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<P, T, B>> {
        let mut y = x;
        // A loop, not a fold, because errors inside a closure would not name the caller's line.
        for layer in self {
            y = L::Out::fit(layer.infer(y, context)?);
        }
        Ok(y)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.iter().flat_map(Layer::params).collect()
    }
}

fn foreign(what: &str) -> Error {
    Error::invalid("backward", format!("the saved values belong to a forward of {what}"))
}

/// A boxed layer with placements `In` and `Out`. A `Vec` of such boxes can contain layers of
/// different types. Errors name the line that called the box instead of lines inside the layer.
pub struct BoxLayer<In: Placement, Out: Placement, T: Element = f32, B: Backend = Cpu>(
    Box<dyn Erased<In, Out, T, B>>,
);

impl<In: Placement, Out: Placement, T: Element, B: Backend> BoxLayer<In, Out, T, B> {
    /// Boxes a layer.
    pub fn new<L>(layer: L) -> Self
    where
        L: Layer<T, B, In = In, Out = Out> + 'static,
        L::Saved: 'static,
    {
        Self(Box::new(layer))
    }
}

/// The object-safe form of [`Layer`]: `Saved` is type-erased to `Box<dyn Any>`.
trait Erased<In: Placement, Out: Placement, T: Element, B: Backend> {
    fn forward(&self, x: DTensor<In, T, B>) -> Result<(DTensor<Out, T, B>, Box<dyn Any>)>;
    fn backward(&self, saved: Box<dyn Any>, dy: DTensor<Out::Dual, T, B>) -> Result<DTensor<In::Dual, T, B>>;
    fn infer(&self, x: DTensor<In, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<Out, T, B>>;
    fn params(&self) -> Vec<Param<T, B>>;
}

impl<T: Element, B: Backend, L: Layer<T, B>> Erased<L::In, L::Out, T, B> for L
where
    L::Saved: 'static,
{
    fn forward(&self, x: DTensor<L::In, T, B>) -> Result<(DTensor<L::Out, T, B>, Box<dyn Any>)> {
        let (y, saved) = Layer::forward(self, x)?;
        Ok((y, Box::new(saved)))
    }

    fn backward(
        &self,
        saved: Box<dyn Any>,
        dy: DTensor<<L::Out as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<L::In as Placement>::Dual, T, B>> {
        let saved = saved.downcast::<L::Saved>().map_err(|_| foreign("another layer"))?;
        Layer::backward(self, *saved, dy)
    }

    fn infer(
        &self,
        x: DTensor<L::In, T, B>,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<L::Out, T, B>> {
        Layer::infer(self, x, context)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        Layer::params(self)
    }
}

impl<In: Placement, Out: Placement, T: Element, B: Backend> Layer<T, B> for BoxLayer<In, Out, T, B> {
    type In = In;
    type Out = Out;
    type Saved = Box<dyn Any>;

    #[track_caller]
    fn forward(&self, x: DTensor<In, T, B>) -> Result<(DTensor<Out, T, B>, Self::Saved)> {
        let _site = Site::here().enter();
        self.0.forward(x)
    }

    #[track_caller]
    fn backward(&self, saved: Self::Saved, dy: DTensor<Out::Dual, T, B>) -> Result<DTensor<In::Dual, T, B>> {
        let _site = Site::here().enter();
        self.0.backward(saved, dy)
    }

    #[track_caller]
    fn infer(&self, x: DTensor<In, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<Out, T, B>> {
        let _site = Site::here().enter();
        self.0.infer(x, context)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.0.params()
    }
}
