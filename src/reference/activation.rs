//! Reference activation functions. Tests compare the activation kernels with these functions, and
//! the reference MLPs use them.

use ndarray::{Array2, Zip};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

/// The cubic coefficient of the tanh approximation of GELU.
const GELU_TANH_CUBIC: f64 = 0.044715;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// [`relu`].
    Relu,
    /// [`silu`].
    Silu,
    /// [`gelu_erf`].
    GeluErf,
    /// [`gelu_tanh`].
    GeluTanh,
}

impl Activation {
    /// `y = act(x)`, of any shape.
    pub fn apply(self, x: &Array2<f64>) -> Array2<f64> {
        match self {
            Self::Relu => relu(x),
            Self::Silu => silu(x),
            Self::GeluErf => gelu_erf(x),
            Self::GeluTanh => gelu_tanh(x),
        }
    }

    /// `dx = act'(x) ⊙ dy`: the gradient of [`Activation::apply`].
    ///
    /// # Panics
    /// When the shapes of `x` and `dy` differ.
    pub fn backward(self, x: &Array2<f64>, dy: &Array2<f64>) -> Array2<f64> {
        match self {
            Self::Relu => relu_backward(x, dy),
            Self::Silu => silu_backward(x, dy),
            Self::GeluErf => gelu_erf_backward(x, dy),
            Self::GeluTanh => gelu_tanh_backward(x, dy),
        }
    }
}

/// `y = max(x, 0)`, of any shape; NaN stays NaN.
pub fn relu(x: &Array2<f64>) -> Array2<f64> {
    // `f64::max` would return 0 for NaN.
    x.mapv(|x| if x <= 0.0 { 0.0 } else { x })
}

/// `dx = dy` where `x > 0`, 0 where `x ≤ 0`: the gradient of [`relu`], with derivative 0 at 0.
///
/// Where `x` is NaN, `dx = dy`, as in PyTorch.
///
/// # Panics
/// When the shapes of `x` and `dy` differ.
pub fn relu_backward(x: &Array2<f64>, dy: &Array2<f64>) -> Array2<f64> {
    // A product with 0 would give NaN for an infinite dy where x ≤ 0.
    zip("relu_backward", x, dy, |x, dy| if x <= 0.0 { 0.0 } else { dy })
}

/// `y = x σ(x)` with `σ(x) = 1 / (1 + e⁻ˣ)`, of any shape. `y` is NaN at `x = -∞`, as in PyTorch.
///
/// Also called swish. Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
pub fn silu(x: &Array2<f64>) -> Array2<f64> {
    x.mapv(|x| x * sigmoid(x))
}

/// `dx = σ(x) (1 + x (1 - σ(x))) dy`: the gradient of [`silu`].
///
/// # Panics
/// When the shapes of `x` and `dy` differ.
pub fn silu_backward(x: &Array2<f64>, dy: &Array2<f64>) -> Array2<f64> {
    zip("silu_backward", x, dy, |x, dy| {
        let s = sigmoid(x);
        s * (1.0 + x * (1.0 - s)) * dy
    })
}

/// `y = x Φ(x)` with `Φ(x) = ½ (1 + erf(x / √2))`, of any shape. `y` is NaN at `x = -∞`, as in
/// PyTorch.
///
/// For large negative `x`, the error is small relative to 1, not to `y`, because `1 + erf` cancels.
/// Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
pub fn gelu_erf(x: &Array2<f64>) -> Array2<f64> {
    x.mapv(|x| x * normal_cdf(x))
}

/// `dx = (Φ(x) + x φ(x)) dy` with `φ(x) = e^(-x²/2) / √(2π)`: the gradient of [`gelu_erf`].
///
/// # Panics
/// When the shapes of `x` and `dy` differ.
pub fn gelu_erf_backward(x: &Array2<f64>, dy: &Array2<f64>) -> Array2<f64> {
    zip("gelu_erf_backward", x, dy, |x, dy| {
        let density = (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
        (normal_cdf(x) + x * density) * dy
    })
}

/// `y = ½ x (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`, of any shape. `y` is NaN at
/// `x = -∞`, as in PyTorch.
///
/// Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2; the GELU of GPT-2.
pub fn gelu_tanh(x: &Array2<f64>) -> Array2<f64> {
    x.mapv(|x| 0.5 * x * (1.0 + gelu_tanh_argument(x).tanh()))
}

/// `dx = ½ (1 + tanh u + x (1 - tanh² u) u') dy` with `u' = √(2/π) (1 + 3 · 0.044715 x²)`: the
/// gradient of [`gelu_tanh`].
///
/// # Panics
/// When the shapes of `x` and `dy` differ.
pub fn gelu_tanh_backward(x: &Array2<f64>, dy: &Array2<f64>) -> Array2<f64> {
    zip("gelu_tanh_backward", x, dy, |x, dy| {
        let t = gelu_tanh_argument(x).tanh();
        let slope = FRAC_2_PI.sqrt() * (1.0 + 3.0 * GELU_TANH_CUBIC * x * x);
        0.5 * (1.0 + t + x * (1.0 - t * t) * slope) * dy
    })
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn normal_cdf(x: f64) -> f64 {
    0.5 * (1.0 + libm::erf(x * FRAC_1_SQRT_2))
}

fn gelu_tanh_argument(x: f64) -> f64 {
    FRAC_2_PI.sqrt() * (x + GELU_TANH_CUBIC * x * x * x)
}

fn zip(name: &str, x: &Array2<f64>, dy: &Array2<f64>, f: impl Fn(f64, f64) -> f64) -> Array2<f64> {
    assert_eq!(x.dim(), dy.dim(), "{name}: the shapes of x and of dy");
    Zip::from(x).and(dy).map_collect(|&x, &dy| f(x, dy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, random};
    use ndarray::array;

    const ALL: [Activation; 4] =
        [Activation::Relu, Activation::Silu, Activation::GeluErf, Activation::GeluTanh];

    #[test]
    fn literals() {
        let x = array![[-2.0, 0.0, 0.5, 1.0]];
        let expected = [
            array![[0.0, 0.0, 0.5, 1.0]],
            array![[-0.2384058440442351, 0.0, 0.3112296656009273, 0.7310585786300049]],
            array![[-0.04550026389635842, 0.0, 0.34573123063700656, 0.8413447460685429]],
            array![[-0.04540230591222494, 0.0, 0.34571400982514394, 0.8411919906082768]],
        ];
        for (act, expected) in ALL.into_iter().zip(expected) {
            assert_close(&format!("{act:?}"), &act.apply(&x), &expected, 1e-15);
        }
    }

    #[test]
    fn derivatives_at_zero() {
        for (act, expected) in ALL.into_iter().zip([0.0, 0.5, 0.5, 0.5]) {
            assert_eq!(act.backward(&array![[0.0]], &array![[1.0]]), array![[expected]], "{act:?}");
        }
    }

    #[test]
    fn gradients() {
        let x = random((5, 7), 3) * 4.0;
        assert!(x.iter().all(|x| x.abs() > 0.01), "no input near the kink of relu");
        let dy = random((5, 7), 2);
        for act in ALL {
            let dx = act.backward(&x, &dy);
            check_gradient(&format!("{act:?}"), &x, &dx, |x| loss(act.apply(x), &dy));
        }
    }

    #[test]
    fn nan_stays_nan() {
        for act in ALL {
            assert!(act.apply(&array![[f64::NAN]])[[0, 0]].is_nan(), "{act:?}");
        }
    }

    #[test]
    fn large_inputs_do_not_overflow() {
        for act in ALL {
            let x = array![[-800.0, 800.0]];
            assert_eq!(act.apply(&x), array![[0.0, 800.0]], "{act:?}");
            assert_eq!(act.backward(&x, &array![[1.0, 1.0]]), array![[0.0, 1.0]], "{act:?} backward");
        }
        assert_eq!(relu(&array![[f64::NEG_INFINITY, f64::INFINITY]]), array![[0.0, f64::INFINITY]]);
        assert_eq!(relu_backward(&array![[-1.0]], &array![[f64::INFINITY]]), array![[0.0]]);
    }

    #[test]
    #[should_panic(expected = "silu_backward: the shapes of x and of dy")]
    fn disagreeing_shapes_panic() {
        silu_backward(&Array2::zeros((2, 3)), &Array2::zeros((1, 3)));
    }
}
