//! Gather and scatter-add of rows.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{MatMut, MatRef, view::unit_columns};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// An index that selects no row. It stands for a row of the table that another rank holds.
pub const NO_ROW: u32 = u32::MAX;

/// Gather of rows by index, and its transpose.
pub trait Gather: Device {
    /// yᵢ ← `table[idsᵢ]`, or 0 where idsᵢ is [`NO_ROW`].
    ///
    /// # Errors
    /// When an index is out of bounds, or sizes disagree.
    fn gather<T: Element>(
        &self,
        table: MatRef<'_, T, Self>,
        ids: &[u32],
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// `dtable[idsᵢ]` ← `dtable[idsᵢ]` + dyᵢ, in order of i, so repeated indices accumulate. Rows
    /// with index [`NO_ROW`] are skipped.
    ///
    /// # Errors
    /// When an index is out of bounds, or sizes disagree.
    fn scatter_add<T: Element>(
        &self,
        ids: &[u32],
        dy: MatRef<'_, T, Self>,
        dtable: MatMut<'_, T::Acc, Self>,
    ) -> Result<()>;
}

fn check(op: &'static str, ids: &[u32], rows: super::view::Dims, table: super::view::Dims) -> Result<()> {
    unit_columns(op, rows)?;
    unit_columns(op, table)?;
    same_size(op, "the number of ids", ids.len(), "the number of rows", rows.rows)?;
    same_size(op, "columns of the rows", rows.cols, "columns of the table", table.cols)?;
    match ids.iter().find(|&&id| id as usize >= table.rows && id != NO_ROW) {
        Some(id) => Err(Error::invalid(op, format!("id {id} is beyond a table of {} rows", table.rows))),
        None => Ok(()),
    }
}
