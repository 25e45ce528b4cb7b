//! Row softmax with masks.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

pub(super) use cpu::softmax_row;

use super::{
    MatMut, MatRef,
    view::{Dims, same_dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Result, same_size},
};

/// Which columns of each row take part in a softmax.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mask<'a> {
    /// With `Some(offset)`, row `i` sees columns `0 ..= i + offset` only. Queries that follow `offset` earlier keys see
    /// those and themselves.
    pub causal: Option<usize>,
    /// One flag a column: `false` columns are seen by no row.
    pub valid: Option<&'a [bool]>,
}

impl Mask<'_> {
    /// The number of leading columns that a row may see, by the causal mask alone.
    pub(crate) fn visible(&self, row: usize, cols: usize) -> usize {
        self.causal.map_or(cols, |offset| offset.saturating_add(row + 1).min(cols))
    }
}

/// Softmax over rows.
pub trait Softmax: Device {
    /// yᵢⱼ ← e^(xᵢⱼ − maxᵢ) / Σ over seen k of e^(xᵢₖ − maxᵢ) for the seen columns j; 0 for the others.
    ///
    /// A row that sees no column is all 0. Among seen values, NaN and +∞ make the seen part of the row NaN, as does a
    /// row of nothing but −∞; masked values have no influence, whatever they are.
    ///
    /// # Errors
    /// When sizes disagree.
    fn softmax<T: Element>(
        &self,
        mask: Mask<'_>,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// dx ← y (dy − Σ over the row of y dy).
    ///
    /// # Errors
    /// When sizes disagree.
    fn softmax_backward<T: Element>(
        &self,
        y: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

fn check(op: &'static str, mask: Mask<'_>, inputs: &[(&str, Dims)], y: Dims) -> Result<()> {
    unit_columns(op, y)?;
    for (name, x) in inputs {
        unit_columns(op, *x)?;
        same_dims(op, name, *x, "the result", y)?;
    }
    let flags = mask.valid.map_or(y.cols, <[bool]>::len);
    same_size(op, "the mask", flags, "the number of columns", y.cols)
}
