//! Activations, gated activations and addition.

use crate::{
    device::Element,
    error::{Error, Result, same_shape},
    kernels::{Activation, Backend},
    tensor::Tensor,
};

/// y = f(x), element by element.
///
/// # Errors
/// When the device fails.
pub fn activate<T: Element, B: Backend>(f: Activation, x: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let mut y = Tensor::empty(x.device(), x.shape())?;
    x.device().activate(f, x.mat(), y.mat_mut()?)?;
    Ok(y)
}

/// dx = dy f′(x).
///
/// # Errors
/// When shapes disagree.
pub fn activate_backward<T: Element, B: Backend>(
    f: Activation,
    x: &Tensor<T, B>,
    dy: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    same_shape("activation backward", "x", x.shape().dims(), "dy", dy.shape().dims())?;
    let mut dx = Tensor::empty(x.device(), x.shape())?;
    x.device().activate_backward(f, x.mat(), dy.mat(), dx.mat_mut()?)?;
    Ok(dx)
}

/// y = f(gate) · up, where x = `[gate | up]` along the last dimension.
///
/// # Errors
/// When the last dimension of x is odd.
pub fn gate<T: Element, B: Backend>(f: Activation, x: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let width = half("gate", x)?;
    let mut y = Tensor::empty(x.device(), x.shape().with(x.shape().rank() - 1, width))?;
    let (gate, up) = (x.mat().columns(0..width), x.mat().columns(width..2 * width));
    x.device().gate(f, gate, up, y.mat_mut()?)?;
    Ok(y)
}

/// dx = `[dy · up · f′(gate) | dy · f(gate)]`, where x = `[gate | up]`.
///
/// # Errors
/// When shapes disagree.
pub fn gate_backward<T: Element, B: Backend>(
    f: Activation,
    x: &Tensor<T, B>,
    dy: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    let width = half("gate backward", x)?;
    let mut dx = Tensor::empty(x.device(), x.shape())?;
    let (gate, up) = (x.mat().columns(0..width), x.mat().columns(width..2 * width));
    x.device().gate_backward(f, gate, up, dy.mat(), dx.mat_mut()?)?;
    Ok(dx)
}

fn half<T: Element, B: Backend>(op: &'static str, x: &Tensor<T, B>) -> Result<usize> {
    let cols = x.shape().cols();
    if cols.is_multiple_of(2) {
        Ok(cols / 2)
    } else {
        Err(Error::invalid(op, format!("[gate | up] has an odd number of columns, {cols}")))
    }
}

/// y = a + b. Reuses the memory of a if no other tensor shares it.
///
/// # Errors
/// When shapes disagree.
pub fn add<T: Element, B: Backend>(mut a: Tensor<T, B>, b: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    same_shape("add", "a", a.shape().dims(), "b", b.shape().dims())?;
    if !a.is_shared() {
        a.accumulate(b)?;
        return Ok(a.marked(false));
    }
    let mut y = Tensor::empty(a.device(), a.shape())?;
    a.device().add(a.mat(), b.mat(), y.mat_mut()?)?;
    Ok(y)
}
