//! Dropout, whose mask is a function of global indices.

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

/// Which elements of a whole matrix are dropped, and where in it a rank's part lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutMask {
    /// The probability of dropping an element, at least 0 and less than 1.
    pub probability: f64,
    /// The random numbers: element (r, c) of the whole draws the word at index r · `width` + c.
    pub stream: Philox,
    /// The whole's row that is the part's first.
    pub row: u64,
    /// The whole's column that is the part's first.
    pub column: usize,
    /// The number of the whole's columns.
    pub width: usize,
}

impl DropoutMask {
    /// Elements whose random word is smaller are dropped.
    pub(crate) fn threshold(&self) -> u32 {
        (self.probability * 4_294_967_296.0) as u32
    }

    /// The index of the first element of a row of the part.
    pub(crate) fn first_index(&self, row: usize) -> u64 {
        let row = self.row.wrapping_add(row as u64);
        row.wrapping_mul(self.width as u64).wrapping_add(self.column as u64)
    }
}

/// Dropout (Srivastava et al., 2014), scaled at training time.
pub trait Dropout: Device {
    /// y ← x / (1 − p) where the mask keeps the element, 0 where it drops it. The gradient is the same function of dy.
    ///
    /// # Errors
    /// When sizes disagree, the part lies outside the whole, or p is no probability less than 1.
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
        return Err(Error::invalid(OP, format!("{} is no probability less than 1", mask.probability)));
    }
    let end = mask.column.saturating_add(x.cols);
    same_size(OP, "the column after the part's last", end.max(mask.width), "the whole's columns", mask.width)
}
