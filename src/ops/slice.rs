//! Parts of a tensor, and tensors put together.

use crate::{
    device::Element,
    error::{Error, Result},
    kernels::{Backend, MatMut, MatRef},
    tensor::Tensor,
};
use std::ops::Range;

/// The indices `range` of dimension `dim`. Backward: [`concat()`] with zeros.
///
/// # Errors
/// When the tensor has no such dimension or indices.
pub fn slice<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    dim: usize,
    range: Range<usize>,
) -> Result<Tensor<T, B>> {
    const OP: &str = "slice";
    let shape = x.shape();
    let size = shape.dims().get(dim).copied().unwrap_or(0);
    if dim >= shape.rank() || range.start > range.end || range.end > size {
        let reason = format!("indices {range:?} of dimension {dim} of a tensor of shape {shape}");
        return Err(Error::invalid(OP, reason));
    }
    let mut y = Tensor::empty(x.device(), shape.with(dim, range.len()))?;
    let (outer, inner) = shape.split_at(dim);
    let from = MatRef::<T, B>::new(x.slice(), outer, size * inner)?;
    let width = range.len() * inner;
    let to = MatMut::<T, B>::new(y.slice_mut()?, outer, width)?;
    x.device().copy(from.columns(range.start * inner..range.end * inner), to)?;
    Ok(y)
}

/// Tensors one after another along dimension `dim`. Backward: the [`slice()`] of each.
///
/// # Errors
/// When there is none, or they differ in another dimension.
pub fn concat<T: Element, B: Backend>(parts: &[&Tensor<T, B>], dim: usize) -> Result<Tensor<T, B>> {
    const OP: &str = "concat";
    let Some(first) = parts.first() else { return Err(Error::invalid(OP, "no tensors")) };
    let shape = first.shape();
    if dim >= shape.rank() {
        return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {shape}")));
    }
    let mut size = 0;
    for (number, part) in parts.iter().enumerate() {
        let (own, rank) = (part.shape(), shape.rank());
        let here = if own.rank() == rank { own.dims()[dim] } else { 0 };
        if own.dims() != shape.with(dim, here).dims() {
            let reason = format!("part {number} has shape {own}, but part 0 has {shape}");
            return Err(Error::invalid(OP, reason));
        }
        size += here;
    }
    let (outer, inner) = shape.split_at(dim);
    let mut y = Tensor::empty(first.device(), shape.with(dim, size))?;
    let mut at = 0;
    for part in parts {
        let width = part.shape().dims()[dim] * inner;
        let from = MatRef::<T, B>::new(part.slice(), outer, width)?;
        let to = MatMut::<T, B>::new(y.slice_mut()?, outer, size * inner)?;
        first.device().copy(from, to.columns(at..at + width))?;
        at += width;
    }
    Ok(y)
}
