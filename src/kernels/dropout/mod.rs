//! Dropout with a mask that is a function of global indices.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{
    MatMut, MatRef,
    view::{same_dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    rng::Philox,
};

/// The random mask of a whole matrix, and the position of a rank's shard in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutMask {
    /// The probability p of dropping an element, 0 ≤ p < 1.
    pub probability: f64,
    /// The stream of random numbers. Element (r, c) of the whole matrix uses the u32 at index r ·
    /// `width` + c.
    pub stream: Philox,
    /// The row of the whole matrix at which the shard begins.
    pub row: u64,
    /// The column of the whole matrix at which the shard begins.
    pub column: usize,
    /// The number of columns of the whole matrix.
    pub width: usize,
}

impl DropoutMask {
    /// The kernels drop the elements whose random u32 is below this threshold.
    pub(crate) fn threshold(&self) -> u32 {
        (self.probability * 4_294_967_296.0) as u32
    }

    /// The index of the random number for the first element of a row of the shard.
    pub(crate) fn first_index(&self, row: usize) -> u64 {
        let row = self.row.wrapping_add(row as u64);
        row.wrapping_mul(self.width as u64).wrapping_add(self.column as u64)
    }
}

/// Dropout (Srivastava et al., 2014), scaled by 1 / (1 − p) in training.
pub trait Dropout: Device {
    /// y ← x / (1 − p) where the mask keeps the element, else 0. The backward is the same function
    /// with dy as x.
    ///
    /// # Errors
    /// When sizes disagree, the shard exceeds the whole matrix, or p is not in 0 ≤ p < 1.
    fn dropout<T: Element>(
        &self,
        mask: &DropoutMask,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

fn check(mask: &DropoutMask, x: super::view::Dims, y: super::view::Dims) -> Result<()> {
    const OP: &str = "dropout";
    unit_columns(OP, x)?;
    unit_columns(OP, y)?;
    same_dims(OP, "x", x, "y", y)?;
    if !(0.0..1.0).contains(&mask.probability) {
        return Err(Error::invalid(
            OP,
            format!("the probability is {}, but must be in 0 ≤ p < 1", mask.probability),
        ));
    }
    let end = mask.column.saturating_add(x.cols);
    same_size(
        OP,
        "the column after the shard's last",
        end.max(mask.width),
        "the width of the whole matrix",
        mask.width,
    )
}
