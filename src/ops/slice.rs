//! Slices and concatenation of tensors.

use crate::{
    device::Element,
    error::{Error, Result},
    kernels::{Backend, MatMut, MatRef},
    tensor::Tensor,
};
use std::ops::Range;

/// The slice with the indices `range` of dimension `dim`. The backward is the [`concat()`] of dy
/// with zeros.
///
/// ```
/// use shardwise::prelude::*;
///
/// let x = Tensor::<f32>::from_slice(&Cpu::new(), [2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])?;
/// assert_eq!(ops::slice(&x, 1, 1..3)?.to_vec()?, [1.0, 2.0, 4.0, 5.0]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When the dimension or an index is out of bounds.
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
    Ok(y.marked(x.is_weight()))
}

/// Concatenates tensors along dimension `dim`. The gradient of each tensor is its [`slice()`] of
/// dy.
///
/// ```
/// use shardwise::prelude::*;
///
/// let cpu = Cpu::new();
/// let a = Tensor::<f32>::from_slice(&cpu, [2, 1], &[0.0, 3.0])?;
/// let b = Tensor::from_slice(&cpu, [2, 2], &[1.0, 2.0, 4.0, 5.0])?;
/// assert_eq!(ops::concat(&[&a, &b], 1)?.to_vec()?, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When there are no tensors, or they differ in a dimension other than `dim`.
pub fn concat<T: Element, B: Backend>(tensors: &[&Tensor<T, B>], dim: usize) -> Result<Tensor<T, B>> {
    const OP: &str = "concat";
    let Some(first) = tensors.first() else { return Err(Error::invalid(OP, "no tensors")) };
    let shape = first.shape();
    if dim >= shape.rank() {
        return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {shape}")));
    }
    let mut size = 0;
    for (number, tensor) in tensors.iter().enumerate() {
        let (own, rank) = (tensor.shape(), shape.rank());
        let here = if own.rank() == rank { own.dims()[dim] } else { 0 };
        if own.dims() != shape.with(dim, here).dims() {
            let reason = format!("tensor {number} has shape {own}, but tensor 0 has {shape}");
            return Err(Error::invalid(OP, reason));
        }
        size += here;
    }
    let (outer, inner) = shape.split_at(dim);
    let mut y = Tensor::empty(first.device(), shape.with(dim, size))?;
    let mut at = 0;
    for tensor in tensors {
        let width = tensor.shape().dims()[dim] * inner;
        let from = MatRef::<T, B>::new(tensor.slice(), outer, width)?;
        let to = MatMut::<T, B>::new(y.slice_mut()?, outer, size * inner)?;
        first.device().copy(from, to.columns(at..at + width))?;
        at += width;
    }
    Ok(y.marked(tensors.iter().any(|tensor| tensor.is_weight())))
}
