//! LayerNorm and RMSNorm on the residual stream.

use super::{DTensor, Layer, Stream, Traffic};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::{Backend, NormKind},
    ops::{self, NormContext, NormGrads},
    shard::Shape,
    tensor::{Param, Region, Role, Tensor, Weights},
};
use std::marker::PhantomData;

/// LayerNorm or RMSNorm over the features of each token: S → S.
///
/// y = (x − mean) / √(var + ε) · γ + β, or y = x / √(mean(x²) + ε) · γ. γ and β: `[features]`, equal on every rank.
///
/// Collectives: none forward. In the backward, with `Shard<0>`, one all-reduce of dγ and dβ together: each rank sees its own
/// tokens only (the gradient that Megatron-LM sums in `finalize_model_grads`).
///
/// Sources: Ba, Kiros and Hinton, 2016; Zhang and Sennrich, 2019.
#[derive(Debug)]
pub struct Normalize<S: Stream, T: Element, B: Device> {
    kind: NormKind,
    gamma: Param<T, B>,
    beta: Option<Param<T, B>>,
    group: Group<B>,
    stream: PhantomData<S>,
}

impl<S: Stream, T: Element, B: Backend> Normalize<S, T, B> {
    /// Reads `weight`, and `bias` for a LayerNorm.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, kind: NormKind, features: usize) -> Result<Self> {
        let load = |name, role| {
            let (region, owned) = (Region::whole([features]), group.rank() == 0);
            Param::load_region(group.device(), weights, name, role, region, owned)
        };
        let gamma = load("weight", Role::Scale)?;
        let beta = if kind.centers() { Some(load("bias", Role::Bias)?) } else { None };
        Ok(Self { kind, gamma, beta, group: group.clone(), stream: PhantomData })
    }

    /// dγ and dβ of all tokens, in one collective.
    fn sum_grads(
        &self,
        dgamma: Tensor<T::Acc, B>,
        dbeta: Option<Tensor<T::Acc, B>>,
    ) -> Result<(Tensor<T::Acc, B>, Option<Tensor<T::Acc, B>>)> {
        let Some(dbeta) = dbeta else {
            let mut dgamma = dgamma;
            S::sum_grad(&self.group, &mut dgamma)?;
            return Ok((dgamma, None));
        };
        let (device, cols) = (dgamma.device().clone(), dgamma.len());
        let mut both = Tensor::<T::Acc, B>::empty(&device, [2, cols])?;
        device.copy(dgamma.mat(), both.mat_mut()?.block(0..1, 0..cols))?;
        device.copy(dbeta.mat(), both.mat_mut()?.block(1..2, 0..cols))?;
        S::sum_grad(&self.group, &mut both)?;
        let row = |at: usize| {
            let mut row = Tensor::<T::Acc, B>::empty(&device, [cols])?;
            device.copy(both.mat().block(at..at + 1, 0..cols), row.mat_mut()?)?;
            Ok(row)
        };
        Ok((row(0)?, Some(row(1)?)))
    }
}

impl<S: Stream, T: Element, B: Backend> Layer<T, B> for Normalize<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = NormContext<T, B>;

    fn forward(&self, x: &DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let beta = self.beta.as_ref().map(Param::value);
        let (y, context) = ops::normalize(self.kind, x.local(), self.gamma.value(), beta)?;
        Ok((x.with_local(y), context))
    }

    fn backward(&mut self, context: Self::Saved, dy: &DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let NormGrads { dx, dgamma, dbeta } =
            ops::normalize_backward(self.kind, &context, self.gamma.value(), dy.local())?;
        let (dgamma, dbeta) = self.sum_grads(dgamma, dbeta)?;
        self.gamma.add_grad(dgamma)?;
        if let (Some(beta), Some(dbeta)) = (&mut self.beta, dbeta) {
            beta.add_grad(dbeta)?;
        }
        Ok(dy.with_local(dx))
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        f(&mut self.gamma)?;
        self.beta.as_mut().map_or(Ok(()), f)
    }

    fn traffic(&self, x: Shape) -> (Traffic, Shape) {
        let vectors = if self.beta.is_some() { 2 } else { 1 };
        (S::sum_grad_traffic::<T::Acc>(vectors * x.cols()), x)
    }
}
