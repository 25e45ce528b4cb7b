//! Element-wise kernels on the CPU. They widen each row to the accumulator, and the compiler
//! vectorizes their loops.

use super::{Activation, Pointwise, check, check_dot_rows, check_gate_backward, check_row, check_scale_rows};
use crate::{
    device::{Accumulator, Cpu, Element, vectorized},
    error::Result,
    kernels::{MatMut, MatRef, lanes::lane_sum, view::unit_columns},
};

impl Pointwise for Cpu {
    #[inline(never)]
    fn activate<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation", &[("x", x.dims())], ("y", y.dims()))?;
        match f {
            Activation::Relu => map(x, y, relu),
            Activation::Silu => map(x, y, |x| x * sigmoid(x)),
            Activation::GeluErf => map(x, y, gelu_erf),
            Activation::GeluTanh => map(x, y, gelu_tanh),
        }
        Ok(())
    }

    #[inline(never)]
    fn activate_backward<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation backward", &[("x", x.dims()), ("dy", dy.dims())], ("dx", dx.dims()))?;
        match f {
            Activation::Relu => map2(x, dy, dx, relu_backward),
            Activation::Silu => map2(x, dy, dx, silu_backward),
            Activation::GeluErf => map2(x, dy, dx, gelu_erf_backward),
            Activation::GeluTanh => map2(x, dy, dx, gelu_tanh_backward),
        }
        Ok(())
    }

    #[inline(never)]
    fn gate<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gate", &[("gate", gate.dims()), ("up", up.dims())], ("y", y.dims()))?;
        match f {
            Activation::Relu => map2(gate, up, y, |gate, up| relu(gate) * up),
            Activation::Silu => map2(gate, up, y, |gate, up| gate * sigmoid(gate) * up),
            Activation::GeluErf => map2(gate, up, y, |gate, up| gelu_erf(gate) * up),
            Activation::GeluTanh => map2(gate, up, y, |gate, up| gelu_tanh(gate) * up),
        }
        Ok(())
    }

    #[inline(never)]
    fn gate_backward<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        d: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_gate_backward(gate.dims(), up.dims(), dy.dims(), d.dims())?;
        match f {
            Activation::Relu => gate_rows(gate, up, dy, d, relu, relu_backward),
            Activation::Silu => gate_rows(gate, up, dy, d, |x| x * sigmoid(x), silu_backward),
            Activation::GeluErf => gate_rows(gate, up, dy, d, gelu_erf, gelu_erf_backward),
            Activation::GeluTanh => gate_rows(gate, up, dy, d, gelu_tanh, gelu_tanh_backward),
        }
        Ok(())
    }

    #[inline(never)]
    fn add<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("add", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        map2(a, b, y, |a, b| a + b);
        Ok(())
    }

    #[inline(never)]
    fn mul<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("mul", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        map2(a, b, y, |a, b| a * b);
        Ok(())
    }

    #[inline(never)]
    fn scale_rows<T: Element>(&self, s: &[T], x: MatRef<'_, T, Self>, y: MatMut<'_, T, Self>) -> Result<()> {
        check_scale_rows(s.len(), x.dims(), y.dims())?;
        rows(y, |row, y| {
            let s = s[row].widen();
            for (y, x) in y.iter_mut().zip(x.row(row)) {
                *y = T::narrow(s * x.widen());
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn dot_rows<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        s: &mut [T],
    ) -> Result<()> {
        check_dot_rows(a.dims(), b.dims(), s.len())?;
        vectorized(|| {
            for (row, s) in s.iter_mut().enumerate() {
                *s = T::narrow(lane_sum([a.row(row), b.row(row)], |[a, b]| a.widen() * b.widen()));
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn accumulate<T: Element, Y: Element<Acc = T::Acc>>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, Y, Self>,
    ) -> Result<()> {
        check("accumulate", &[("x", x.dims())], ("y", y.dims()))?;
        rows(y, |row, y| {
            for (y, x) in y.iter_mut().zip(x.row(row)) {
                *y = Y::narrow(y.widen() + x.widen());
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn add_bias<T: Element>(&self, bias: &[T], y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("bias", y.dims())?;
        check_row("bias", "the bias", bias.len(), y.cols())?;
        rows(y, |_, y| {
            for (y, bias) in y.iter_mut().zip(bias) {
                *y = T::narrow(y.widen() + bias.widen());
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn sum_rows<T: Element>(&self, x: MatRef<'_, T, Self>, sums: &mut [T::Acc]) -> Result<()> {
        unit_columns("bias gradient", x.dims())?;
        check_row("bias gradient", "the gradient", sums.len(), x.cols())?;
        sums.fill(T::Acc::ZERO);
        vectorized(|| {
            for row in 0..x.rows() {
                for (sum, x) in sums.iter_mut().zip(x.row(row)) {
                    *sum += x.widen();
                }
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn copy<T: Element, Y: Element>(&self, x: MatRef<'_, T, Self>, y: MatMut<'_, Y, Self>) -> Result<()> {
        check("copy", &[("x", x.dims())], ("y", y.dims()))?;
        if T::DTYPE == Y::DTYPE {
            rows(y, |row, y| {
                let x = Y::of_ref::<Self>(T::any_ref::<Self>(x.row(row)));
                y.copy_from_slice(x.expect("the elements are the same"));
            });
        } else {
            rows(y, |row, y| {
                for (y, x) in y.iter_mut().zip(x.row(row)) {
                    *y = Y::from_f64(x.to_f64());
                }
            });
        }
        Ok(())
    }

    #[inline(never)]
    fn scale<T: Element>(&self, alpha: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("scale", y.dims())?;
        let alpha = T::Acc::from_f64(alpha);
        rows(y, |_, y| {
            for y in y {
                *y = T::narrow(alpha * y.widen());
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn fill<T: Element>(&self, value: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("fill", y.dims())?;
        rows(y, |_, y| y.fill(T::from_f64(value)));
        Ok(())
    }
}

/// Runs `f` on each row of `y`.
#[inline(always)]
fn rows<T: Element>(mut y: MatMut<'_, T, Cpu>, f: impl Fn(usize, &mut [T])) {
    vectorized(|| {
        for row in 0..y.rows() {
            f(row, y.row(row));
        }
    });
}

/// y ← f(x).
#[inline(always)]
fn map<T: Element>(x: MatRef<'_, T, Cpu>, y: MatMut<'_, T, Cpu>, f: impl Fn(T::Acc) -> T::Acc) {
    rows(y, |row, y| {
        for (y, x) in y.iter_mut().zip(x.row(row)) {
            *y = T::narrow(f(x.widen()));
        }
    });
}

/// y ← f(a, b).
#[inline(always)]
fn map2<T: Element>(
    a: MatRef<'_, T, Cpu>,
    b: MatRef<'_, T, Cpu>,
    y: MatMut<'_, T, Cpu>,
    f: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    rows(y, |row, y| {
        for ((y, a), b) in y.iter_mut().zip(a.row(row)).zip(b.row(row)) {
            *y = T::narrow(f(a.widen(), b.widen()));
        }
    });
}

/// Writes dgate to the left half of each row of d, and dup to the right half.
#[inline(always)]
fn gate_rows<T: Element>(
    gate: MatRef<'_, T, Cpu>,
    up: MatRef<'_, T, Cpu>,
    dy: MatRef<'_, T, Cpu>,
    d: MatMut<'_, T, Cpu>,
    f: impl Fn(T::Acc) -> T::Acc,
    backward: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    let cols = gate.cols();
    rows(d, |row, d| {
        let (dgate, dup) = d.split_at_mut(cols);
        let inputs = gate.row(row).iter().zip(up.row(row)).zip(dy.row(row));
        for ((dgate, dup), ((gate, up), dy)) in dgate.iter_mut().zip(dup).zip(inputs) {
            let (gate, up, dy) = (gate.widen(), up.widen(), dy.widen());
            *dgate = T::narrow(backward(gate, dy * up));
            *dup = T::narrow(dy * f(gate));
        }
    });
}

#[inline(always)]
fn relu<A: Accumulator>(x: A) -> A {
    x.max_nan(A::ZERO)
}

#[inline(always)]
fn relu_backward<A: Accumulator>(x: A, dy: A) -> A {
    // If x is NaN, dx is dy, as in PyTorch. This selects instead of multiplying, so that an
    // infinite dy gives 0 where x ≤ 0.
    if x <= A::ZERO { A::ZERO } else { dy }
}

#[inline(always)]
fn sigmoid<A: Accumulator>(x: A) -> A {
    A::ONE / (A::ONE + (-x).exp())
}

#[inline(always)]
fn silu_backward<A: Accumulator>(x: A, dy: A) -> A {
    let s = sigmoid(x);
    dy * (s * (A::ONE + x * (A::ONE - s)))
}

#[inline(always)]
fn constant<A: Accumulator>(value: f64) -> A {
    A::from_f64(value)
}

/// Φ, the distribution function of the standard normal distribution.
#[inline(always)]
fn normal_cdf<A: Accumulator>(x: A) -> A {
    constant::<A>(0.5) * (A::ONE + (x * constant(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

#[inline(always)]
fn gelu_erf<A: Accumulator>(x: A) -> A {
    x * normal_cdf(x)
}

/// dy (Φ(x) + x φ(x)).
#[inline(always)]
fn gelu_erf_backward<A: Accumulator>(x: A, dy: A) -> A {
    const FRAC_1_SQRT_TAU: f64 = 0.398_942_280_401_432_7;
    dy * (normal_cdf(x) + x * constant(FRAC_1_SQRT_TAU) * (constant::<A>(-0.5) * x * x).exp())
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

#[inline(always)]
fn gelu_tanh<A: Accumulator>(x: A) -> A {
    let inner = constant::<A>(SQRT_2_OVER_PI) * (x + constant::<A>(CUBIC) * x * x * x);
    constant::<A>(0.5) * x * (A::ONE + inner.tanh())
}

#[inline(always)]
fn gelu_tanh_backward<A: Accumulator>(x: A, dy: A) -> A {
    let t = (constant::<A>(SQRT_2_OVER_PI) * (x + constant::<A>(CUBIC) * x * x * x)).tanh();
    // tanh′ = 1 − t² is the first factor. It is 0 where x² overflows, so the product stays 0.
    let bump = (A::ONE - t * t) * x;
    let inner_slope = bump + bump * x * x * constant(3.0 * CUBIC);
    dy * (constant::<A>(0.5) * (A::ONE + t + constant::<A>(SQRT_2_OVER_PI) * inner_slope))
}
