//! Products with quantized weights: y = x wᵀ, where w is stored in a [`Format`].
//!
//! Every chunk of 32 columns is multiplied in integers, which is exact, and the chunks are added in
//! one order. Chunks start at multiples of 32 columns of the whole matrix, wherever a shard begins.
//! So the bits of a product do not depend on how its rows are divided, and those of a sum over
//! blocks of columns only on the blocks. A cut may fall inside a chunk or a block: both
//! neighbours then hold it, and each multiplies its own columns.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod encode;
mod format;
mod lanes;
mod meta;
mod panel;
mod product;
mod rows;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use format::{CHUNK, e4m3};
pub use format::{Format, GroupSize};

use super::{Gemm, MatMut, MatRef, Pointwise, view::unit_columns};
use crate::{
    device::{DType, Element},
    error::{Error, Result, same_size},
};
use std::{fmt, ops::Range, sync::Arc};

/// How a product with quantized weights treats its other factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Quantize each row in chunks of 32 numbers to 8 bits. Sums within a chunk are exact.
    #[default]
    Int8,
    /// Leave the activations as they are, and dequantize the weights before each product.
    ///
    /// This holds in any case for groups that are not consecutive columns ([`ColumnGroups`]).
    /// Products with [`Format::Fp8`] leave the activations as they are in any case.
    Exact,
}

/// A rank's part of a quantized matrix: some rows, and a range of columns of the whole matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizedShape {
    /// The format.
    pub format: Format,
    /// The number of rows.
    pub rows: usize,
    /// The columns of the whole matrix.
    pub columns: Range<usize>,
    /// The groups of these columns, if groups are not consecutive columns. Only for
    /// [`Format::Int4`] and [`Format::Int8`].
    pub order: Option<ColumnGroups>,
}

/// The groups of columns that share a scale, for a matrix whose columns were quantized in another
/// order than that of the file (GPTQ's `desc_act`, `actorder` of compressed-tensors).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnGroups {
    /// The number of groups of the whole matrix. A shard has the scales of all of them.
    pub groups: usize,
    /// The group of each column.
    pub of: Arc<[u32]>,
}

impl QuantizedShape {
    /// Returns the number of bytes of a row: its blocks or, if groups are not consecutive columns,
    /// the scale and zero point of each group and then the codes of each 32 columns.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.columns.clone(), self.order.as_ref().map(|order| order.groups))
    }

    /// Whether a product rounds activations to 8 bits, if [`Activations`] asks for it.
    pub fn rounds_activations(&self) -> bool {
        self.order.is_none() && self.format.is_integer()
    }

    fn check(&self) -> Result<()> {
        let Some(order) = &self.order else { return Ok(()) };
        if !matches!(self.format, Format::Int4(_) | Format::Int8(_)) {
            let reason = format!("{} has no groups of columns in another order", self.format);
            return Err(Error::Unsupported { op: OP, reason });
        }
        same_size(OP, "columns with a group", order.of.len(), "columns", self.columns.len())?;
        match order.of.iter().find(|group| **group as usize >= order.groups) {
            Some(group) => Err(Error::invalid(
                OP,
                format!("a column is of group {group}, but there are {} groups", order.groups),
            )),
            None => Ok(()),
        }
    }

    /// The chunks of 32 columns of the whole matrix that hold the columns.
    fn chunks(&self) -> Range<usize> {
        self.columns.start / CHUNK..self.columns.end.div_ceil(CHUNK)
    }

    /// The blocks of a row of the whole matrix that hold the scales of the columns.
    fn blocks(&self) -> Range<usize> {
        match &self.order {
            None => self.format.blocks(self.columns.clone()),
            Some(order) => 0..order.groups,
        }
    }
}

/// Reads a range of rows: for each row, the [`QuantizedShape::row_bytes`] that hold the shape's
/// columns.
pub type ReadBlocks<'a> = dyn FnMut(Range<usize>, &mut [u8]) -> Result<()> + 'a;

/// Products with quantized weights.
pub trait Quantized: Gemm + Pointwise {
    /// A quantized matrix in the layout of the device's kernels.
    type QuantizedMatrix: fmt::Debug;

    /// The number of weights that a product with exact activations dequantizes at a time: on a CPU,
    /// as many as stay in the cache as f32.
    const STRIP: usize = 1 << 18;

    /// Reads a quantized matrix. Calls `read` for a few rows at a time, in order.
    ///
    /// # Errors
    /// When `read` fails, memory runs out, or the device has no kernels for the format.
    fn quantized_matrix(
        &self,
        shape: QuantizedShape,
        read: &mut ReadBlocks<'_>,
    ) -> Result<Self::QuantizedMatrix>;

    /// The shape of a quantized matrix.
    fn quantized_shape(w: &Self::QuantizedMatrix) -> &QuantizedShape;

    /// y ← x wᵀ, with x quantized to 8 bits or, for FP8 weights, in f32. `columns` are the columns
    /// of w that x has, counted from the first that w has.
    ///
    /// `x`: `[tokens, columns]`, `y`: `[tokens, rows of w]`. The sum of an element of y has the
    /// same order for any number of tokens, and is rounded once to `C`.
    ///
    /// # Errors
    /// When sizes disagree, the elements of x are f64, whose precision would be lost, or the groups
    /// of w are not consecutive columns.
    fn quantized_product<T: Element, C: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: &Self::QuantizedMatrix,
        columns: Range<usize>,
        y: MatMut<'_, C, Self>,
    ) -> Result<()>;

    /// yᵢ ← these columns of the row `rowsᵢ` of w, or 0 where `rowsᵢ` is [`NO_ROW`](super::NO_ROW).
    /// `columns` counts from the first column that w has.
    ///
    /// `y`: `[rows.len(), columns.len()]`.
    ///
    /// # Errors
    /// When a row or a column is not in w, or sizes disagree.
    fn dequantize<T: Element>(
        &self,
        w: &Self::QuantizedMatrix,
        rows: &[u32],
        columns: Range<usize>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

const OP: &str = "quantized product";
const OP_ROWS: &str = "dequantize";

/// Checks the operands of [`Quantized::quantized_product`].
fn check<T: Element, C: Element, B: Quantized>(
    x: &MatRef<'_, T, B>,
    w: &QuantizedShape,
    columns: &Range<usize>,
    y: &MatMut<'_, C, B>,
) -> Result<()> {
    if T::DTYPE == DType::F64 {
        let reason =
            "the activations are f64, which 8 bits would make far less precise: use `Activations::Exact`";
        return Err(Error::Unsupported { op: OP, reason: reason.into() });
    }
    if w.order.is_some() {
        let reason = "the groups of w are not consecutive columns: dequantize w";
        return Err(Error::Unsupported { op: OP, reason: reason.into() });
    }
    check_columns(OP, w, columns)?;
    unit_columns(OP, x.dims())?;
    unit_columns(OP, y.dims())?;
    same_size(OP, "columns of x", x.cols(), "columns of w", columns.len())?;
    same_size(OP, "rows of x", x.rows(), "rows of y", y.rows())?;
    same_size(OP, "rows of w", w.rows, "columns of y", y.cols())
}

fn check_columns(op: &'static str, w: &QuantizedShape, columns: &Range<usize>) -> Result<()> {
    if columns.start <= columns.end && columns.end <= w.columns.len() {
        return Ok(());
    }
    Err(Error::sizes(op, "the end of the columns", columns.end, "columns of w", w.columns.len()))
}

/// Checks the operands of [`Quantized::dequantize`].
fn check_rows<T: Element, B: Quantized>(
    w: &QuantizedShape,
    rows: &[u32],
    columns: &Range<usize>,
    y: &MatMut<'_, T, B>,
) -> Result<()> {
    check_columns(OP_ROWS, w, columns)?;
    unit_columns(OP_ROWS, y.dims())?;
    same_size(OP_ROWS, "the number of rows", rows.len(), "rows of y", y.rows())?;
    same_size(OP_ROWS, "the number of columns", columns.len(), "columns of y", y.cols())?;
    match rows.iter().find(|&&row| row as usize >= w.rows && row != super::NO_ROW) {
        Some(row) => Err(Error::invalid(OP_ROWS, format!("row {row} is beyond a matrix of {} rows", w.rows))),
        None => Ok(()),
    }
}
