//! Operators on elements and rows, for routers and other custom layers: product, scaling, dot
//! product, scatter, top-k. [`Tensor::rows`] gathers rows by index.

use crate::{
    device::Element,
    error::{Error, Result, same_shape},
    kernels::{Backend, MatRef},
    tensor::Tensor,
};
use std::cmp::Ordering;

/// y = a · b, element by element. The backward is da = dy · b, db = dy · a.
///
/// # Errors
/// When shapes disagree.
pub fn mul<T: Element, B: Backend>(a: &Tensor<T, B>, b: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    same_shape("mul", "a", a.shape().dims(), "b", b.shape().dims())?;
    let mut y = Tensor::empty(a.device(), a.shape())?;
    a.device().mul(a.mat(), b.mat(), y.mat_mut()?)?;
    Ok(y)
}

/// yᵢ = sᵢ xᵢ, one factor per row. The backward is dx = [`scale_rows`]`(s, dy)`, ds =
/// [`dot_rows`]`(x, dy)`.
///
/// `s`: `[rows]`; `x`, `y`: `[…, features]` with `rows` rows over the leading dimensions.
///
/// # Errors
/// When s does not have one element per row.
pub fn scale_rows<T: Element, B: Backend>(s: &Tensor<T, B>, x: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let mut y = Tensor::empty(x.device(), x.shape())?;
    x.device().scale_rows(s.slice(), x.mat(), y.mat_mut()?)?;
    Ok(y)
}

/// sᵢ = Σⱼ aᵢⱼ bᵢⱼ, the dot product of row i of a and row i of b: `[rows]`. The sums are computed
/// in the accumulator type. The backward is da = [`scale_rows`]`(ds, b)`, db = [`scale_rows`]`(ds,
/// a)`.
///
/// # Errors
/// When shapes disagree.
pub fn dot_rows<T: Element, B: Backend>(a: &Tensor<T, B>, b: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    same_shape("dot rows", "a", a.shape().dims(), "b", b.shape().dims())?;
    let mut s = Tensor::empty(a.device(), [a.shape().rows()])?;
    a.device().dot_rows(a.mat(), b.mat(), s.slice_mut()?)?;
    Ok(s)
}

/// yᵣ = Σ of xᵢ over all i with idsᵢ = r: `[rows, features]`, in the accumulator type. This
/// function and [`Tensor::rows`] are each other's backward. Rows with id
/// [`NO_ROW`](crate::kernels::NO_ROW) are skipped.
///
/// # Errors
/// When an id other than `NO_ROW` is out of bounds, or x does not have one row per id.
pub fn scatter_rows<T: Element, B: Backend>(
    device: &B,
    ids: &[u32],
    rows: usize,
    x: MatRef<'_, T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let mut y = Tensor::zeros(device, [rows, x.cols()])?;
    device.scatter_add(ids, x, y.mat_mut()?)?;
    Ok(y)
}

/// The `k` largest elements of each row in descending order, and their columns: `[rows, k]` each.
/// Equal elements stay in the order of their columns. The host computes the result.
///
/// # Errors
/// When a row has fewer than `k` elements, or an element is NaN.
pub fn top_k<T: Element, B: Backend>(x: &Tensor<T, B>, k: usize) -> Result<(Tensor<T, B>, Vec<u32>)> {
    const OP: &str = "top k";
    let (rows, cols) = (x.shape().rows(), x.shape().cols());
    if k > cols {
        return Err(Error::sizes(OP, "k", k, "the number of columns", cols));
    }
    let host = x.to_vec()?;
    let (mut values, mut ids) = (Vec::with_capacity(rows * k), Vec::with_capacity(rows * k));
    for row in 0..rows {
        let row_of = &host[row * cols..(row + 1) * cols];
        if let Some(at) = row_of.iter().position(|value| value.to_f64().is_nan()) {
            return Err(Error::invalid(OP, format!("row {row} has NaN in column {at}")));
        }
        let mut order: Vec<u32> = (0..cols as u32).collect();
        let value = |id: u32| row_of[id as usize].to_f64();
        // The sort is stable, so equal elements stay in order.
        order.sort_by(|&a, &b| value(b).partial_cmp(&value(a)).unwrap_or(Ordering::Equal));
        ids.extend(&order[..k]);
        values.extend(order[..k].iter().map(|&id| row_of[id as usize]));
    }
    Ok((Tensor::from_vec(x.device(), [rows, k], values)?, ids))
}
