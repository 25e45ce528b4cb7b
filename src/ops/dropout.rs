//! Dropout.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, DropoutMask},
    tensor::Tensor,
};

/// y = x / (1 − p) where the mask keeps an element, 0 elsewhere; of dy, the gradient.
///
/// # Errors
/// When the part lies outside the whole of the mask, or p is no probability less than 1.
pub fn dropout<T: Element, B: Backend>(mask: &DropoutMask, x: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let mut y = Tensor::empty(x.device(), x.shape())?;
    x.device().dropout(mask, x.mat(), y.mat_mut()?)?;
    Ok(y)
}
