//! Softmax over the last dimension.

use crate::{
    device::Element,
    error::{Result, same_shape},
    kernels::{Backend, Mask},
    tensor::Tensor,
};

/// yᵢⱼ = e^xᵢⱼ / Σₖ e^xᵢₖ over the columns that the mask lets row i see, 0 elsewhere; a row that sees none is 0.
///
/// # Errors
/// When the mask does not fit.
pub fn softmax<T: Element, B: Backend>(mask: Mask<'_>, x: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let mut y = Tensor::empty(x.device(), x.shape())?;
    x.device().softmax(mask, x.mat(), y.mat_mut()?)?;
    Ok(y)
}

/// dx = y (dy − Σ over the row of y dy).
///
/// # Errors
/// When shapes disagree.
pub fn softmax_backward<T: Element, B: Backend>(y: &Tensor<T, B>, dy: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    same_shape("softmax backward", "y", y.shape().dims(), "dy", dy.shape().dims())?;
    let mut dx = Tensor::empty(y.device(), y.shape())?;
    y.device().softmax_backward(y.mat(), dy.mat(), dx.mat_mut()?)?;
    Ok(dx)
}
