//! LayerNorm and RMSNorm on the residual stream.

use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, same_size},
    kernels::{Backend, NormKind},
    ops::{self, NormContext},
    parallel::{DTensor, Layer, ResidualStream, sums::Sums},
    tensor::{Param, Region, Role, Tensor, Weights},
};
use std::marker::PhantomData;

/// LayerNorm y = (x − mean) / √(var + ε) · γ + β, or RMSNorm y = x / √(mean(x²) + ε) · γ, over the
/// features of each token: S → S.
///
/// γ and β: `[features]`, equal on every rank.
///
/// Collectives: the forward makes none. With `Shard<0>`, the backward makes one all-reduce of dγ
/// and dβ together, because each rank has only its own tokens. (Megatron-LM sums these gradients in
/// `finalize_model_grads`.)
///
/// Sources: Ba, Kiros and Hinton, 2016; Zhang and Sennrich, 2019.
///
/// ```
/// use ndarray::arr1;
/// use shardwise::prelude::*;
///
/// let group = Group::solo(&Cpu::new());
/// let source = Arrays([("weight".into(), arr1(&[1.0, 10.0]).into_dyn())].into());
/// let kind = NormKind::RmsNorm { eps: 0.0 };
/// let norm = Normalize::<Replicated, f64, _>::load(&group, &Weights::new(&source), kind, 2)?;
/// let x = Tensor::from_slice(group.device(), [1, 2], &[1.0, 7.0])?; // root mean square 5
/// let y = norm.forward(DTensor::replicated(&group, x)?)?.0.into_local().to_vec()?;
/// assert!((y[0] - 0.2).abs() < 1e-12 && (y[1] - 14.0).abs() < 1e-12);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct Normalize<S: ResidualStream, T: Element, B: Device> {
    kind: NormKind,
    gamma: Param<T, B>,
    beta: Option<Param<T, B>>,
    sums: Sums<B>,
    stream: PhantomData<S>,
}

impl<S: ResidualStream, T: Element, B: Backend> Normalize<S, T, B> {
    /// Reads `weight`, and `bias` for a LayerNorm.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or ε is negative or not finite.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, kind: NormKind, features: usize) -> Result<Self> {
        kind.check()?;
        let sums = Sums::of(group)?;
        let load = |name, role| {
            let (region, owned) = (Region::whole([features]), group.rank() == 0);
            Ok(sums.replicated(Param::load_region(group.device(), weights, name, role, region, owned)?))
        };
        let gamma: Param<T, B> = load("weight", Role::Scale)?;
        let beta = if kind.centers() { Some(load("bias", Role::Bias)?) } else { None };
        Ok(Self { kind, gamma, beta, sums, stream: PhantomData })
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for Normalize<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = NormContext<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        x.check("normalize", self.sums.group())?;
        let (gamma, beta) = (self.gamma.value()?, self.beta.as_ref().map(Param::value).transpose()?);
        let (y, context) = ops::normalize(self.kind, x.local(), &gamma, beta.as_ref())?;
        Ok((x.with_local(y)?, context))
    }

    #[track_caller]
    fn backward(&self, context: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let _site = self.gamma.site().enter();
        dy.check("normalize backward", self.sums.group())?;
        let (device, cols) = (dy.local().device(), dy.shape().cols());
        let gamma = self.gamma.value()?;
        same_size("normalize backward", "features of dy", cols, "those of the layer", gamma.len())?;
        let mut dx = Tensor::empty(device, dy.local().shape())?;
        let term = |rows, sums: &mut Tensor<T::Acc, B>| {
            let (dgamma, dbeta) =
                ops::normalize_backward_rows(self.kind, &context, &gamma, dy.local(), rows, &mut dx)?;
            for (at, grad) in [Some(dgamma), dbeta].into_iter().flatten().enumerate() {
                device.copy(grad.mat(), sums.mat_mut()?.block(at..at + 1, 0..cols))?;
            }
            Ok(())
        };
        let params: Vec<_> = [&self.gamma].into_iter().chain(&self.beta).collect();
        // One collective sums dγ and dβ over all tokens.
        self.sums.add_vectors(&params, &dy, term)?;
        dy.with_local(dx)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        [&self.gamma].into_iter().chain(&self.beta).cloned().collect()
    }
}
