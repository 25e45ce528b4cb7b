//! y = x wᵀ + b.

use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Activation, Backend, MatMut, MatRef, Product},
    tensor::Tensor,
    trace,
};

/// y = x wᵀ + b.
///
/// `x`: `[…, in]`, `w`: `[out, in]`, `b`: `[out]`; `y`: `[…, out]`.
///
/// # Errors
/// When sizes disagree.
pub fn linear<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    w: &Tensor<T, B>,
    bias: Option<&Tensor<T, B>>,
) -> Result<Tensor<T, B>> {
    same_size("linear", "columns of x", x.shape().cols(), "columns of w", w.shape().cols())?;
    let shape = x.shape().with(x.shape().rank() - 1, w.shape().rows());
    let mut y = Tensor::empty(x.device(), shape)?;
    let dims = [x.mat().rows(), w.mat().cols(), w.mat().rows()];
    let (a, b) = (x.mat(), w.mat().t());
    trace::compute("gemm", T::DTYPE, &dims, || match bias {
        Some(bias) => x.device().gemm_bias::<T>(a, b, bias.slice(), y.mat_mut()?),
        None => x.device().gemm(1.0, a, b, 0.0, y.mat_mut()?),
    })?;
    Ok(y)
}

/// y = f(pre) of pre = x wᵀ + b: y and pre, which the backward needs.
///
/// # Errors
/// When sizes disagree.
pub fn linear_activate<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    w: &Tensor<T, B>,
    bias: &Tensor<T, B>,
    f: Activation,
) -> Result<(Tensor<T, B>, Tensor<T, B>)> {
    same_size("linear", "columns of x", x.shape().cols(), "columns of w", w.shape().cols())?;
    let shape = x.shape().with(x.shape().rank() - 1, w.shape().rows());
    let (mut y, mut pre) = (Tensor::empty(x.device(), shape)?, Tensor::empty(x.device(), shape)?);
    let dims = [x.mat().rows(), w.mat().cols(), w.mat().rows()];
    trace::compute("gemm", T::DTYPE, &dims, || {
        let (product, bias) = ((x.mat(), w.mat().t()), bias.slice());
        x.device().gemm_activate::<T>(product, bias, f, pre.mat_mut()?, y.mat_mut()?)
    })?;
    Ok((y, pre))
}

/// (dy w) f′(pre): the gradient of pre, where y = f(pre) wᵀ.
///
/// # Errors
/// When sizes disagree.
pub fn linear_activate_backward<T: Element, B: Backend>(
    dy: &Tensor<T, B>,
    w: &Tensor<T, B>,
    f: Activation,
    pre: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    const OP: &str = "linear backward";
    same_size(OP, "columns of dy", dy.shape().cols(), "rows of w", w.shape().rows())?;
    let mut dx = Tensor::empty(dy.device(), pre.shape())?;
    let dims = [dy.mat().rows(), w.mat().rows(), w.mat().cols()];
    trace::compute("gemm", T::DTYPE, &dims, || {
        dy.device().gemm_activate_backward((dy.mat(), w.mat()), f, pre.mat(), dx.mat_mut()?)
    })?;
    Ok(dx)
}

/// dw ← dyᵀ x + β dw, db ← Σ over the rows of dy, both in the accumulator.
///
/// # Errors
/// When sizes disagree.
pub fn linear_param_grads<T: Element, B: Backend>(
    dy: MatRef<'_, T, B>,
    x: MatRef<'_, T, B>,
    beta: f64,
    dw: MatMut<'_, T::Acc, B>,
    db: &mut Tensor<T::Acc, B>,
) -> Result<()> {
    let device = db.device().clone();
    trace::compute("gemm", T::DTYPE, &[dy.cols(), x.rows(), x.cols()], || {
        device.gemm_column_sums(dy, x, beta, dw, db.slice_mut()?)
    })
}

/// dx = dy w.
///
/// # Errors
/// When sizes disagree.
pub fn linear_input_grad<T: Element, B: Backend>(
    dy: &Tensor<T, B>,
    w: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    const OP: &str = "linear backward";
    same_size(OP, "columns of dy", dy.shape().cols(), "rows of w", w.shape().rows())?;
    let shape = dy.shape().with(dy.shape().rank() - 1, w.shape().cols());
    let mut dx = Tensor::empty(dy.device(), shape)?;
    let dims = [dy.mat().rows(), w.mat().rows(), w.mat().cols()];
    trace::compute("gemm", T::DTYPE, &dims, || dy.device().gemm(1.0, dy.mat(), w.mat(), 0.0, dx.mat_mut()?))?;
    Ok(dx)
}

/// dw = dyᵀ x, in the accumulator.
///
/// # Errors
/// When sizes disagree.
pub fn linear_weight_grad<T: Element, B: Backend>(
    dy: &Tensor<T, B>,
    x: &Tensor<T, B>,
) -> Result<Tensor<T::Acc, B>> {
    let mut dw = Tensor::empty(x.device(), [dy.shape().cols(), x.shape().cols()])?;
    let dims = [dy.mat().cols(), x.mat().rows(), x.mat().cols()];
    trace::compute("gemm", T::DTYPE, &dims, || {
        x.device().gemm(1.0, dy.mat().t(), x.mat(), 0.0, dw.mat_mut()?)
    })?;
    Ok(dw)
}

/// The products of pairs of matrices, at the same time where the device can.
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
    trace::compute("gemm_all", T::DTYPE, &[all.len()], || device.gemm_all(all))?;
    Ok(results)
}

/// db = Σ over the rows of dy, in the accumulator.
///
/// # Errors
/// When the device fails.
pub fn bias_grad<T: Element, B: Backend>(device: &B, dy: MatRef<'_, T, B>) -> Result<Tensor<T::Acc, B>> {
    let mut db = Tensor::empty(device, [dy.cols()])?;
    device.sum_rows(dy, db.slice_mut()?)?;
    Ok(db)
}
