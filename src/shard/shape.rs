//! The dimensions of a tensor, stored inline.

use crate::error::{Error, Result};
use std::fmt;

/// The dimensions of a row-major tensor, at most [`Shape::MAX_RANK`]. A shape is `Copy` and uses no
/// heap memory.
///
/// ```
/// use shardwise::shard::Shape;
/// let shape = Shape::new(&[2, 3, 5]);
/// assert_eq!((shape.len(), shape.rows(), shape.cols()), (30, 6, 5));
/// assert_eq!(shape.split_at(1), (2, 5));
/// assert_eq!(shape.with(1, 4).dims(), [2, 4, 5]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; Self::MAX_RANK],
    rank: usize,
}

impl Shape {
    /// The maximum number of dimensions.
    pub const MAX_RANK: usize = 4;

    /// The shape with the given dimensions.
    ///
    /// # Panics
    /// When there are more than [`Shape::MAX_RANK`] dimensions.
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= Self::MAX_RANK, "a tensor has at most 4 dimensions, not {}", dims.len());
        let mut all = [1; Self::MAX_RANK];
        all[..dims.len()].copy_from_slice(dims);
        Self { dims: all, rank: dims.len() }
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of elements. Saturates at `usize::MAX`, because no tensor has so many elements.
    pub fn len(&self) -> usize {
        product(self.dims())
    }

    /// The number of elements, checked before a tensor is allocated.
    ///
    /// # Errors
    /// When the product of the nonzero dimensions overflows a usize. If there is no error, the
    /// product of any selection of the dimensions does not overflow either.
    pub(crate) fn checked_len(&self, op: &'static str) -> Result<usize> {
        let mut sizes = self.dims().iter().filter(|&&size| size > 0);
        match sizes.try_fold(1_usize, |product, &size| product.checked_mul(size)) {
            Some(_) => Ok(self.len()),
            None => {
                let reason = format!("a tensor of shape {self} has more elements than can be counted");
                Err(Error::invalid(op, reason))
            }
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of rows: the product of all dimensions except the last.
    pub fn rows(&self) -> usize {
        self.dims().split_last().map_or(1, |(_, outer)| product(outer))
    }

    /// The last dimension, or 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// The same shape with dimension `dim` of size `size`.
    pub fn with(mut self, dim: usize, size: usize) -> Self {
        assert!(
            dim < self.rank,
            "dimension {dim} of a tensor with {} dimensions is out of bounds",
            self.rank
        );
        self.dims[dim] = size;
        self
    }

    /// Returns `(outer, inner)`, the products of the dimensions before and after `dim`. A row-major
    /// tensor has `outer` rows of `dims[dim] · inner` elements.
    pub fn split_at(&self, dim: usize) -> (usize, usize) {
        (product(&self.dims()[..dim]), product(&self.dims()[dim + 1..]))
    }
}

/// The product of sizes. Saturates at `usize::MAX`.
fn product(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |product, &size| product.saturating_mul(size))
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Self::new(&dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Self::new(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
