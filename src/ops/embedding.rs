//! The gradient of a table.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, MatRef},
    tensor::Tensor,
};

/// The gradient of a table of `rows` rows, in the accumulator: row r is Σ over the i with idsᵢ = r of dyᵢ.
///
/// # Errors
/// When an id is beyond the table, or there is not one row of dy an id.
pub fn embedding_backward<T: Element, B: Backend>(
    device: &B,
    ids: &[u32],
    rows: usize,
    dy: MatRef<'_, T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let mut dtable = Tensor::zeros(device, [rows, dy.cols()])?;
    device.scatter_add(ids, dy, dtable.mat_mut()?)?;
    Ok(dtable)
}
