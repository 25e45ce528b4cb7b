//! RMSNorm of each head of a fused projection (QK norm), with one γ for all heads.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, NormKind},
    tensor::Tensor,
};
use std::ops::Range;

/// Normalizes each head in the columns `columns` of x over the features of the head, and writes the
/// result to y. Other columns of y do not change. Returns the statistics that the backward needs:
/// `[heads · rows, 2]`.
///
/// `x`, `y`: `[rows, features]`; `gamma`: `[head_dim]`.
///
/// # Errors
/// When sizes disagree.
pub fn normalize_heads<T: Element, B: Backend>(
    kind: NormKind,
    x: &Tensor<T, B>,
    gamma: &Tensor<T, B>,
    columns: Range<usize>,
    y: &mut Tensor<T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let (device, rows, dim) = (x.device(), x.shape().rows(), gamma.len());
    let mut stats = Tensor::empty(device, [columns.len() / dim * rows, 2])?;
    for (head, first) in columns.step_by(dim).enumerate() {
        let columns = first..first + dim;
        let stats = B::narrow_mut(stats.slice_mut()?, head * rows * 2..(head + 1) * rows * 2);
        let (x, y) = (x.mat().columns(columns.clone()), y.mat_mut()?.columns(columns));
        device.normalize::<T>(kind, x, gamma.slice(), None, y, stats)?;
    }
    Ok(stats)
}

/// Writes the gradients of the heads `heads` of some rows to dx, where head 0 begins at column
/// `first`. Other elements of dx do not change. Returns dγ, summed over these heads and rows.
///
/// # Errors
/// When sizes disagree.
pub fn normalize_heads_backward<T: Element, B: Backend>(
    kind: NormKind,
    (x, stats): (&Tensor<T, B>, &Tensor<T::Acc, B>),
    gamma: &Tensor<T, B>,
    (first, heads): (usize, Range<usize>),
    of: Range<usize>,
    dy: &Tensor<T, B>,
    dx: &mut Tensor<T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let (device, rows, dim) = (x.device(), x.shape().rows(), gamma.len());
    let mut sum = Tensor::<T::Acc, B>::zeros(device, [dim])?;
    let mut dgamma = Tensor::<T::Acc, B>::empty(device, [dim])?;
    for head in heads {
        let columns = first + head * dim..first + (head + 1) * dim;
        let stats = B::narrow(stats.slice(), (head * rows + of.start) * 2..(head * rows + of.end) * 2);
        let (x, dy) =
            (x.mat().block(of.clone(), columns.clone()), dy.mat().block(of.clone(), columns.clone()));
        let to = dx.mat_mut()?.block(of.clone(), columns);
        device.normalize_backward::<T>(kind, x, gamma.slice(), stats, dy, to, dgamma.slice_mut()?, None)?;
        device.accumulate(dgamma.mat(), sum.mat_mut()?)?;
    }
    Ok(sum)
}
