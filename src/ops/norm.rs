//! LayerNorm and RMSNorm over the last dimension.

use crate::{
    device::{Device, Element},
    error::{Result, same_shape},
    kernels::{Backend, NormKind},
    tensor::Tensor,
};

/// What the backward of a normalization needs.
#[derive(Debug)]
pub struct NormContext<T: Element, B: Device> {
    x: Tensor<T, B>,
    stats: Tensor<T::Acc, B>,
}

/// The gradients of a normalization.
#[derive(Debug)]
pub struct NormGrads<T: Element, B: Device> {
    /// That of the input.
    pub dx: Tensor<T, B>,
    /// That of γ.
    pub dgamma: Tensor<T::Acc, B>,
    /// That of β, for a LayerNorm.
    pub dbeta: Option<Tensor<T::Acc, B>>,
}

/// y = (x − mean) / √(var + ε) · γ + β, or x / √(mean(x²) + ε) · γ, over the last dimension.
///
/// # Errors
/// When sizes disagree.
pub fn normalize<T: Element, B: Backend>(
    kind: NormKind,
    x: &Tensor<T, B>,
    gamma: &Tensor<T, B>,
    beta: Option<&Tensor<T, B>>,
) -> Result<(Tensor<T, B>, NormContext<T, B>)> {
    let mut y = Tensor::empty(x.device(), x.shape())?;
    let mut stats = Tensor::empty(x.device(), [x.shape().rows(), 2])?;
    let beta = beta.map(Tensor::slice);
    x.device().normalize::<T>(kind, x.mat(), gamma.slice(), beta, y.mat_mut()?, stats.slice_mut()?)?;
    Ok((y, NormContext { x: x.clone(), stats }))
}

/// The gradients of x, γ and β, the last two in the accumulator.
///
/// # Errors
/// When shapes disagree.
pub fn normalize_backward<T: Element, B: Backend>(
    kind: NormKind,
    context: &NormContext<T, B>,
    gamma: &Tensor<T, B>,
    dy: &Tensor<T, B>,
) -> Result<NormGrads<T, B>> {
    let NormContext { x, stats } = context;
    same_shape("norm backward", "x", x.shape().dims(), "dy", dy.shape().dims())?;
    let cols = x.shape().cols();
    let mut dx = Tensor::empty(x.device(), x.shape())?;
    let mut dgamma = Tensor::empty(x.device(), [cols])?;
    let mut dbeta = match kind.centers() {
        true => Some(Tensor::empty(x.device(), [cols])?),
        false => None,
    };
    let dbeta_slice = match &mut dbeta {
        Some(dbeta) => Some(dbeta.slice_mut()?),
        None => None,
    };
    x.device().normalize_backward::<T>(
        kind,
        x.mat(),
        gamma.slice(),
        stats.slice(),
        dy.mat(),
        dx.mat_mut()?,
        dgamma.slice_mut()?,
        dbeta_slice,
    )?;
    Ok(NormGrads { dx, dgamma, dbeta })
}
