//! Rows of a table by index.

use crate::{device::Element, error::Result, kernels::Backend, tensor::Tensor};

/// yᵢ = `table[idsᵢ]`, of shape `[ids.len(), cols]`.
///
/// # Errors
/// When an id is beyond the table.
pub fn embedding<T: Element, B: Backend>(table: &Tensor<T, B>, ids: &[u32]) -> Result<Tensor<T, B>> {
    let mut y = Tensor::empty(table.device(), [ids.len(), table.shape().cols()])?;
    table.device().gather(table.mat(), ids, y.mat_mut()?)?;
    Ok(y)
}

/// The gradient of a table of `rows` rows, in the accumulator: row r is Σ over the i with idsᵢ = r of dyᵢ.
///
/// # Errors
/// When an id is beyond the table, or there is not one row of dy an id.
pub fn embedding_backward<T: Element, B: Backend>(
    ids: &[u32],
    rows: usize,
    dy: &Tensor<T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let mut dtable = Tensor::zeros(dy.device(), [rows, dy.shape().cols()])?;
    dy.device().scatter_add(ids, dy.mat(), dtable.mat_mut()?)?;
    Ok(dtable)
}
