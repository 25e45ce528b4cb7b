//! LayerNorm and RMSNorm over the last dimension.

use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::{Backend, NormKind},
    tensor::Tensor,
};
use std::ops::Range;

/// The tensors that the backward of a normalization needs.
#[derive(Debug)]
pub struct NormContext<T: Element, B: Device> {
    x: Tensor<T, B>,
    stats: Tensor<T::Acc, B>,
}

/// The gradients of a normalization.
#[derive(Debug)]
pub struct NormGrads<T: Element, B: Device> {
    /// The gradient of the input.
    pub dx: Tensor<T, B>,
    /// The gradient of γ.
    pub dgamma: Tensor<T::Acc, B>,
    /// The gradient of β, for LayerNorm.
    pub dbeta: Option<Tensor<T::Acc, B>>,
}

/// LayerNorm, y = (x − mean) / √(var + ε) · γ + β, or RMSNorm, y = x / √(mean(x²) + ε) · γ, over
/// the last dimension.
///
/// `x`, `y`: `[…, features]`; `gamma`, `beta`: `[features]`.
///
/// ```
/// use shardwise::prelude::*;
///
/// let cpu = Cpu::new();
/// let x = Tensor::<f32>::from_slice(&cpu, [1, 2], &[1.0, 3.0])?;
/// let gamma = Tensor::from_slice(&cpu, [2], &[2.0, 3.0])?;
/// let beta = Tensor::from_slice(&cpu, [2], &[0.5, 0.0])?;
/// let (y, _) = ops::normalize(NormKind::LayerNorm { eps: 0.0 }, &x, &gamma, Some(&beta))?;
/// assert_eq!(y.to_vec()?, [-1.5, 3.0]);
/// # Ok::<(), Error>(())
/// ```
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

/// The gradients of x, γ and β. dγ and dβ have the accumulator type.
///
/// # Errors
/// When shapes disagree.
pub fn normalize_backward<T: Element, B: Backend>(
    kind: NormKind,
    context: &NormContext<T, B>,
    gamma: &Tensor<T, B>,
    dy: &Tensor<T, B>,
) -> Result<NormGrads<T, B>> {
    let mut dx = Tensor::empty(dy.device(), context.x.shape())?;
    let rows = 0..context.x.shape().rows();
    let (dgamma, dbeta) = normalize_backward_rows(kind, context, gamma, dy, rows, &mut dx)?;
    Ok(NormGrads { dx, dgamma, dbeta })
}

/// The gradients of γ and β.
type ParamGrads<A, B> = (Tensor<A, B>, Option<Tensor<A, B>>);

/// The backward for a range of rows. Writes these rows of dx. Returns the contributions of these
/// rows to dγ and dβ, in the accumulator type.
///
/// # Errors
/// When shapes disagree.
pub fn normalize_backward_rows<T: Element, B: Backend>(
    kind: NormKind,
    context: &NormContext<T, B>,
    gamma: &Tensor<T, B>,
    dy: &Tensor<T, B>,
    rows: Range<usize>,
    dx: &mut Tensor<T, B>,
) -> Result<ParamGrads<T::Acc, B>> {
    const OP: &str = "norm backward";
    let NormContext { x, stats } = context;
    same_shape(OP, "x", x.shape().dims(), "dy", dy.shape().dims())?;
    same_shape(OP, "x", x.shape().dims(), "dx", dx.shape().dims())?;
    if rows.end > x.shape().rows() {
        return Err(Error::sizes(
            OP,
            "the end of the rows",
            rows.end,
            "the number of rows",
            x.shape().rows(),
        ));
    }
    let cols = x.shape().cols();
    let mut dgamma = Tensor::empty(x.device(), [cols])?;
    let mut dbeta = if kind.centers() { Some(Tensor::empty(x.device(), [cols])?) } else { None };
    let dbeta_slice = match &mut dbeta {
        Some(dbeta) => Some(dbeta.slice_mut()?),
        None => None,
    };
    x.device().normalize_backward::<T>(
        kind,
        x.mat().block(rows.clone(), 0..cols),
        gamma.slice(),
        B::narrow(stats.slice(), 2 * rows.start..2 * rows.end),
        dy.mat().block(rows.clone(), 0..cols),
        dx.mat_mut()?.block(rows, 0..cols),
        dgamma.slice_mut()?,
        dbeta_slice,
    )?;
    Ok((dgamma, dbeta))
}
