//! Copies of ranges of a tensor's rows.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, MatMut, MatRef},
    tensor::Tensor,
};
use std::ops::Range;

/// Returns the number of rows in all ranges.
pub(super) fn count(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(|range| range.len()).sum()
}

/// Copies ranges of a tensor's dimension 0 to a new tensor, one after another.
pub(super) fn take<T: Element, B: Backend>(
    from: &Tensor<T, B>,
    ranges: &[Range<usize>],
) -> Result<Tensor<T, B>> {
    let mut taken = Tensor::empty(from.device(), from.shape().with(0, count(ranges)))?;
    let (rows, width) = (taken.shape().dims()[0], taken.shape().split_at(0).1);
    let from = MatRef::<T, B>::new(from.slice(), from.shape().dims()[0], width)?;
    let device = taken.device().clone();
    let mut at = 0;
    for range in ranges {
        let to = MatMut::<T, B>::new(taken.slice_mut()?, rows, width)?;
        device.copy(from.block(range.clone(), 0..width), to.block(at..at + range.len(), 0..width))?;
        at += range.len();
    }
    Ok(taken)
}

/// Copies the consecutive rows of `from` to ranges of dimension 0 of `to`. The inverse of [`take`].
pub(super) fn place<T: Element, B: Backend>(
    from: &Tensor<T, B>,
    to: &mut Tensor<T, B>,
    ranges: &[Range<usize>],
) -> Result<()> {
    let (rows, width) = (to.shape().dims()[0], to.shape().split_at(0).1);
    let from = MatRef::<T, B>::new(from.slice(), from.shape().dims()[0], width)?;
    let device = to.device().clone();
    let mut at = 0;
    for range in ranges {
        let to = MatMut::<T, B>::new(to.slice_mut()?, rows, width)?;
        device.copy(from.block(at..at + range.len(), 0..width), to.block(range.clone(), 0..width))?;
        at += range.len();
    }
    Ok(())
}
