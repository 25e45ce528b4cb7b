//! Dropout.

use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Backend, DropoutMask},
    tensor::Tensor,
};

/// y = x / (1 − p) where the mask keeps an element, else 0. The backward is the same function with
/// dy as x.
///
/// `masks`: for each range of rows of x, in order, its number of rows and its mask.
///
/// # Errors
/// When the masks' numbers of rows do not add up to the rows of x, the columns of x extend beyond
/// the width of a mask's whole matrix, or p is not in 0 ≤ p < 1.
pub fn dropout<T: Element, B: Backend>(
    masks: &[(usize, DropoutMask)],
    x: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    let (rows, cols) = (x.shape().rows(), x.shape().cols());
    let masked = masks.iter().fold(0_usize, |sum, (rows, _)| sum.saturating_add(*rows));
    same_size("dropout", "rows of the masks", masked, "rows of x", rows)?;
    let mut y = Tensor::empty(x.device(), x.shape())?;
    let mut start = 0;
    for (rows, mask) in masks {
        let run = start..start + rows;
        start = run.end;
        let to = y.mat_mut()?.block(run.clone(), 0..cols);
        x.device().dropout(mask, x.mat().block(run, 0..cols), to)?;
    }
    Ok(y)
}
