//! The products of a linear operator y = x wᵀ + b: forward, gradient of x, and gradients of w and
//! b.

use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Activation, Backend, Epilogue, MatMut, MatRef, Product},
    tensor::Tensor,
    trace,
};

/// y = x wᵀ + b. With an activation f: pre = x wᵀ + b and y = f(pre), and the function also returns
/// pre, which the backward needs.
///
/// `x`: `[…, in]`, `w`: `[out, in]`, `b`: `[out]`; `y`, `pre`: `[…, out]`.
///
/// ```
/// use shardwise::prelude::*;
///
/// let cpu = Cpu::new();
/// let x = Tensor::<f32>::from_slice(&cpu, [1, 2], &[1.0, -3.0])?;
/// let w = Tensor::from_slice(&cpu, [2, 2], &[2.0, 1.0, 0.0, 1.0])?;
/// let b = Tensor::from_slice(&cpu, [2], &[0.5, 7.0])?;
/// let (y, pre) = ops::linear(&x, &w, Some(&b), Some(Activation::Relu))?;
/// assert_eq!(pre.map(|pre| pre.to_vec()), Some(Ok(vec![-0.5, 4.0])));
/// assert_eq!(y.to_vec()?, [0.0, 4.0]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When sizes disagree.
pub fn linear<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    w: &Tensor<T, B>,
    bias: Option<&Tensor<T, B>>,
    f: Option<Activation>,
) -> Result<(Tensor<T, B>, Option<Tensor<T, B>>)> {
    same_size("linear", "columns of x", x.shape().cols(), "columns of w", w.shape().cols())?;
    let shape = x.shape().with(x.shape().rank() - 1, w.shape().rows());
    let (mut y, mut pre) = (Tensor::empty(x.device(), shape)?, None);
    let activation = match f {
        Some(f) => Some((f, pre.insert(Tensor::empty(x.device(), shape)?).mat_mut()?)),
        None => None,
    };
    let epilogue = Epilogue { bias: bias.map(Tensor::slice), activation };
    let dims = [x.mat().rows(), w.mat().cols(), w.mat().rows()];
    trace::compute::<B, _>("gemm", T::DTYPE, &dims, || {
        x.device().linear(x.mat(), w.mat(), epilogue, y.mat_mut()?)
    })?;
    Ok((y, pre))
}

/// dx = dy w. `through` = (f, pre) says that x = f(pre). The function then returns the gradient of
/// pre, (dy w) f′(pre).
///
/// # Errors
/// When sizes disagree.
pub fn linear_dx<T: Element, B: Backend>(
    dy: &Tensor<T, B>,
    w: &Tensor<T, B>,
    through: Option<(Activation, &Tensor<T, B>)>,
) -> Result<Tensor<T, B>> {
    const OP: &str = "linear backward";
    same_size(OP, "columns of dy", dy.shape().cols(), "rows of w", w.shape().rows())?;
    let shape = dy.shape().with(dy.shape().rank() - 1, w.shape().cols());
    let mut dx = Tensor::empty(dy.device(), shape)?;
    let dims = [dy.mat().rows(), w.mat().rows(), w.mat().cols()];
    trace::compute::<B, _>("gemm", T::DTYPE, &dims, || {
        let through = through.map(|(f, pre)| (f, pre.mat()));
        dy.device().linear_dx(dy.mat(), w.mat(), through, dx.mat_mut()?)
    })?;
    Ok(dx)
}

/// dw ← dyᵀ x + β dw. If db is given, db ← Σ over the rows of dy. Both have the accumulator type.
///
/// # Errors
/// When sizes disagree.
pub fn linear_dw<T: Element, B: Backend>(
    device: &B,
    (dy, x): (MatRef<'_, T, B>, MatRef<'_, T, B>),
    beta: f64,
    dw: MatMut<'_, T::Acc, B>,
    db: Option<&mut Tensor<T::Acc, B>>,
) -> Result<()> {
    trace::compute::<B, _>("gemm", T::DTYPE, &[dy.cols(), x.rows(), x.cols()], || {
        device.linear_dw(dy, x, beta, dw, db.map(Tensor::slice_mut).transpose()?)
    })
}

/// Computes the product of each pair of matrices. A device that can computes several at a time.
///
/// # Errors
/// When sizes disagree.
pub fn products<'a, T: Element, C: Element<Acc = T::Acc>, B: Backend>(
    device: &B,
    pairs: Vec<(MatRef<'a, T, B>, MatRef<'a, T, B>)>,
) -> Result<Vec<Tensor<C, B>>> {
    let empty = |(a, b): &(MatRef<'a, T, B>, MatRef<'a, T, B>)| Tensor::empty(device, [a.rows(), b.cols()]);
    let mut results = pairs.iter().map(empty).collect::<Result<Vec<Tensor<C, B>>>>()?;
    let mut all = Vec::with_capacity(pairs.len());
    for ((a, b), c) in pairs.into_iter().zip(&mut results) {
        all.push(Product { a, b, beta: 0.0, c: c.mat_mut()? });
    }
    trace::compute::<B, _>("gemm_all", T::DTYPE, &[all.len()], || device.gemm_all(all))?;
    Ok(results)
}

/// db = Σ over the rows of dy, in the accumulator type.
///
/// # Errors
/// When the device fails.
pub fn bias_grad<T: Element, B: Backend>(device: &B, dy: MatRef<'_, T, B>) -> Result<Tensor<T::Acc, B>> {
    let mut db = Tensor::empty(device, [dy.cols()])?;
    device.sum_rows(dy, db.slice_mut()?)?;
    Ok(db)
}
