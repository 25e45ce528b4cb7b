//! A residual sum around a layer.

use crate::{
    device::Element,
    error::Result,
    kernels::Backend,
    parallel::{Context, DTensor, Fits, Layer, ResidualStream},
    tensor::Param,
};

/// y = x + f(x): S → S. Collectives: those of f.
///
/// Backward: dx = dy + the gradient that the backward of f returns for dy. Source: He et al., 2015:
/// Deep Residual Learning.
///
/// ```
/// use shardwise::prelude::*;
///
/// let group = Group::solo(&Cpu::new());
/// let layer = Residual(Activate::<Replicated>::new(Activation::Relu));
/// let x = Tensor::<f32, _>::from_slice(group.device(), [1, 2], &[-1.0, 3.0])?;
/// let (y, saved) = layer.forward(DTensor::replicated(&group, x)?)?;
/// assert_eq!(y.local().to_vec()?, [-1.0, 6.0]);
/// assert_eq!(layer.backward(saved, y)?.local().to_vec()?, [-1.0, 12.0]);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Residual<L>(pub L);

impl<S: ResidualStream, T: Element, B: Backend, L: Layer<T, B, In = S>> Layer<T, B> for Residual<L>
where
    L::Out: Fits<S>,
{
    type In = S;
    type Out = S;
    type Saved = L::Saved;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, L::Saved)> {
        let (fx, saved) = self.0.forward(x.clone())?;
        Ok((L::Out::fit(fx).add(&x)?, saved))
    }

    #[track_caller]
    fn backward(&self, saved: L::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        self.0.backward(saved, L::Out::fit_grad(dy.clone()))?.add(&dy)
    }

    #[track_caller]
    fn infer(&self, x: DTensor<S, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<S, T, B>> {
        L::Out::fit(self.0.infer(x.clone(), context)?).add(&x)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.0.params()
    }
}
