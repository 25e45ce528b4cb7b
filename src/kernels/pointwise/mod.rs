//! Element-wise kernels: activations, gates, sums, products, bias, copies and conversions. Also
//! sums over rows and over columns.

mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::kernels) mod cuda;
mod meta;

use super::{
    MatMut, MatRef,
    view::{Dims, same_dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Result, same_size},
};

/// An element-wise activation function f.
///
/// ```
/// use shardwise::prelude::*;
///
/// let x = Tensor::<f64>::from_slice(&Cpu::new(), [1], &[1.0])?;
/// let y = |f| Ok::<_, Error>(ops::activate(f, &x)?.to_vec()?[0]);
/// assert!((y(Activation::GeluErf)? - 0.841345).abs() < 1e-6);
/// assert!((y(Activation::GeluTanh)? - 0.841192).abs() < 1e-6);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// max(x, 0). NaN stays NaN; the derivative at 0 is 0.
    Relu,
    /// x / (1 + e⁻ˣ).
    Silu,
    /// x Φ(x) = x (1 + erf(x / √2)) / 2, the exact GELU (Hendrycks and Gimpel, 2016).
    GeluErf,
    /// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, the tanh approximation of GELU, as in GPT-2.
    GeluTanh,
}

/// Element-wise kernels. All matrices must have unit column stride. The operands of a call must
/// have the same dimensions, unless the method says otherwise.
///
/// # Errors
/// Every method fails when dimensions disagree or a column stride is not 1.
pub trait Pointwise: Device {
    /// y ← f(x).
    fn activate<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// dx ← dy f′(x).
    fn activate_backward<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// y ← f(gate) · up, as in a gated linear unit (Shazeer, 2020).
    fn gate<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// dgate ← dy · up · f′(gate), dup ← dy · f(gate).
    ///
    /// `d` is `[rows, 2 · cols]`, with dgate in the left half and dup in the right, like `[gate |
    /// up]`.
    fn gate_backward<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        d: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// y ← a + b.
    fn add<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// y ← a · b.
    fn mul<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// yᵢⱼ ← sᵢ xᵢⱼ; `s` has one element per row.
    fn scale_rows<T: Element>(
        &self,
        s: Self::Slice<'_, T>,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// sᵢ ← Σⱼ aᵢⱼ bᵢⱼ, summed in the accumulator type; `s` has one element per row.
    fn dot_rows<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        s: Self::SliceMut<'_, T>,
    ) -> Result<()>;

    /// y ← y + x, computed in the accumulator type.
    fn accumulate<T: Element, Y: Element<Acc = T::Acc>>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, Y, Self>,
    ) -> Result<()>;

    /// yᵢⱼ ← yᵢⱼ + biasⱼ; `bias` has one element per column.
    fn add_bias<T: Element>(&self, bias: Self::Slice<'_, T>, y: MatMut<'_, T, Self>) -> Result<()>;

    /// sums ← Σ over the rows of x, in the accumulator type: the gradient of a bias.
    fn sum_rows<T: Element>(&self, x: MatRef<'_, T, Self>, sums: Self::SliceMut<'_, T::Acc>) -> Result<()>;

    /// y ← x, converted to the element type of y.
    fn copy<T: Element, Y: Element>(&self, x: MatRef<'_, T, Self>, y: MatMut<'_, Y, Self>) -> Result<()>;

    /// y ← α y.
    fn scale<T: Element>(&self, alpha: f64, y: MatMut<'_, T, Self>) -> Result<()>;

    /// y ← value.
    fn fill<T: Element>(&self, value: f64, y: MatMut<'_, T, Self>) -> Result<()>;
}

/// Checks that the inputs have the dimensions of the output, and unit column strides.
fn check(op: &'static str, inputs: &[(&str, Dims)], (name, y): (&str, Dims)) -> Result<()> {
    unit_columns(op, y)?;
    inputs.iter().try_for_each(|(input, x)| {
        unit_columns(op, *x)?;
        same_dims(op, input, *x, name, y)
    })
}

/// Checks the operands of `gate_backward`: d must be twice as wide as the others.
fn check_gate_backward(gate: Dims, up: Dims, dy: Dims, d: Dims) -> Result<()> {
    const OP: &str = "gate backward";
    [gate, up, dy, d].iter().try_for_each(|dims| unit_columns(OP, *dims))?;
    same_dims(OP, "up", up, "gate", gate)?;
    same_dims(OP, "dy", dy, "gate", gate)?;
    same_size(OP, "columns of d", d.cols, "twice the columns of gate", gate.cols.saturating_mul(2))?;
    same_size(OP, "rows of d", d.rows, "rows of gate", gate.rows)
}

/// Checks the operands of `scale_rows`.
fn check_scale_rows(s: usize, x: Dims, y: Dims) -> Result<()> {
    check("scale rows", &[("x", x)], ("y", y))?;
    same_size("scale rows", "the number of factors", s, "the number of rows", x.rows)
}

/// Checks the operands of `dot_rows`.
fn check_dot_rows(a: Dims, b: Dims, s: usize) -> Result<()> {
    check("dot rows", &[("a", a)], ("b", b))?;
    same_size("dot rows", "the number of products", s, "the number of rows", a.rows)
}

/// Checks the vector of `add_bias` and `sum_rows`: it must have one element per column.
pub(super) fn check_row(op: &'static str, name: &str, len: usize, cols: usize) -> Result<()> {
    same_size(op, name, len, "the number of columns", cols)
}
