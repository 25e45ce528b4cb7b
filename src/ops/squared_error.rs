//! Squared error.

use crate::{
    device::Element,
    error::{Result, same_shape},
    kernels::Backend,
    tensor::Tensor,
};

/// Σ (x − y)² over all elements. Divided by the number of elements, this sum is the mean squared
/// error.
///
/// # Errors
/// When shapes disagree.
pub fn squared_error<T: Element, B: Backend>(x: &Tensor<T, B>, y: &Tensor<T, B>) -> Result<f64> {
    same_shape("squared error", "x", x.shape().dims(), "y", y.shape().dims())?;
    let mut sums = Tensor::<T::Acc, B>::empty(x.device(), [x.shape().rows()])?;
    x.device().squared_error(x.mat(), y.mat(), sums.slice_mut()?)?;
    Ok(sums.to_vec()?.into_iter().map(Element::to_f64).sum())
}

/// dx = scale · 2 (x − y), the gradient of `scale` · Σ (x − y)².
///
/// # Errors
/// When shapes disagree.
pub fn squared_error_backward<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    y: &Tensor<T, B>,
    scale: f64,
) -> Result<Tensor<T, B>> {
    same_shape("squared error backward", "x", x.shape().dims(), "y", y.shape().dims())?;
    let mut dx = Tensor::empty(x.device(), x.shape())?;
    x.device().squared_error_backward(scale, x.mat(), y.mat(), dx.mat_mut()?)?;
    Ok(dx)
}
