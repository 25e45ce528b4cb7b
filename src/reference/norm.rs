//! Reference normalizations over the features of each token. Tests compare the norm operators with
//! these functions, and the reference block uses them.

use ndarray::{Array1, Array2, ArrayView1};

/// A normalization with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum Norm {
    /// [`layer_norm`].
    LayerNorm {
        /// The scale, `[features]`.
        gamma: Array1<f64>,
        /// The shift, `[features]`.
        beta: Array1<f64>,
        /// ε, added to the variance.
        eps: f64,
    },
    /// [`rms_norm`].
    RmsNorm {
        /// The scale, `[features]`.
        gamma: Array1<f64>,
        /// ε, added to the mean square.
        eps: f64,
    },
}

impl Norm {
    /// `y = norm(x)`, both `[tokens, features]`.
    ///
    /// # Panics
    /// When `x` and the parameters differ in `features`.
    pub fn apply(&self, x: &Array2<f64>) -> Array2<f64> {
        match self {
            Self::LayerNorm { gamma, beta, eps } => layer_norm(x, gamma, beta, *eps),
            Self::RmsNorm { gamma, eps } => rms_norm(x, gamma, *eps),
        }
    }

    /// `(dx, dself)`: the gradients of [`Norm::apply`]. `dself` has each gradient in the field of
    /// its parameter, and the same `eps`.
    ///
    /// # Panics
    /// When `x` and `gamma` differ in `features`, or `x` and `dy` in shape.
    pub fn backward(&self, x: &Array2<f64>, dy: &Array2<f64>) -> (Array2<f64>, Self) {
        match self {
            Self::LayerNorm { gamma, eps, .. } => {
                let LayerNormGrads { dx, dgamma, dbeta } = layer_norm_backward(x, gamma, *eps, dy);
                (dx, Self::LayerNorm { gamma: dgamma, beta: dbeta, eps: *eps })
            }
            Self::RmsNorm { gamma, eps } => {
                let RmsNormGrads { dx, dgamma } = rms_norm_backward(x, gamma, *eps, dy);
                (dx, Self::RmsNorm { gamma: dgamma, eps: *eps })
            }
        }
    }
}

/// `y = γ ⊙ x̂ + β` with `x̂ = (x - μ) / √(σ² + ε)`, where `μ = Σᵢ xᵢ / n` and
/// `σ² = Σᵢ (xᵢ - μ)² / n` over the token's `n` features.
///
/// `x, y: [tokens, features]`, `γ, β: [features]`. The variance is biased and ε is inside the root,
/// as in PyTorch. Source: Ba, Kiros and Hinton, arXiv 1607.06450, section 3.
///
/// # Panics
/// When `x` and `gamma` or `beta` differ in `features`.
pub fn layer_norm(x: &Array2<f64>, gamma: &Array1<f64>, beta: &Array1<f64>, eps: f64) -> Array2<f64> {
    assert_eq!(x.ncols(), gamma.len(), "layer_norm: the features of x and of gamma");
    assert_eq!(x.ncols(), beta.len(), "layer_norm: the features of x and of beta");
    let mut y = Array2::zeros(x.dim());
    for (x, mut y) in x.rows().into_iter().zip(y.rows_mut()) {
        let (normalized, _) = standardize(x, eps);
        y.assign(&(normalized * gamma + beta));
    }
    y
}

/// The gradients of [`layer_norm`].
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormGrads {
    /// `[tokens, features]`.
    pub dx: Array2<f64>,
    /// `[features]`.
    pub dgamma: Array1<f64>,
    /// `[features]`.
    pub dbeta: Array1<f64>,
}

/// `dx = (g - mean(g) - x̂ mean(g ⊙ x̂)) / √(σ² + ε)` with `g = γ ⊙ dy`, `dγ = Σₜ dy ⊙ x̂`,
/// `dβ = Σₜ dy`: the gradients of [`layer_norm`].
///
/// The means are over the features of a token, and the sums are over the tokens.
/// `dy: [tokens, features]`.
///
/// # Panics
/// When `x` and `gamma` differ in `features`, or `x` and `dy` in shape.
pub fn layer_norm_backward(
    x: &Array2<f64>,
    gamma: &Array1<f64>,
    eps: f64,
    dy: &Array2<f64>,
) -> LayerNormGrads {
    assert_eq!(x.ncols(), gamma.len(), "layer_norm_backward: the features of x and of gamma");
    assert_eq!(x.dim(), dy.dim(), "layer_norm_backward: the shapes of x and of dy");
    let mut dx = Array2::zeros(x.dim());
    let mut dgamma = Array1::zeros(gamma.len());
    let mut dbeta = Array1::zeros(gamma.len());
    for ((x, dy), mut dx) in x.rows().into_iter().zip(dy.rows()).zip(dx.rows_mut()) {
        let (normalized, deviation) = standardize(x, eps);
        let g = gamma * &dy;
        dx.assign(&((&g - mean(&g) - &normalized * mean(&(&g * &normalized))) / deviation));
        dgamma += &(&dy * &normalized);
        dbeta += &dy;
    }
    LayerNormGrads { dx, dgamma, dbeta }
}

/// `y = γ ⊙ x / r` with `r = √(Σᵢ xᵢ² / n + ε)` over the token's `n` features.
///
/// `x, y: [tokens, features]`, `γ: [features]`. Source: Zhang and Sennrich, arXiv 1910.07467,
/// section 4; implementations add ε under the root.
///
/// # Panics
/// When `x` and `gamma` differ in `features`.
pub fn rms_norm(x: &Array2<f64>, gamma: &Array1<f64>, eps: f64) -> Array2<f64> {
    assert_eq!(x.ncols(), gamma.len(), "rms_norm: the features of x and of gamma");
    let mut y = Array2::zeros(x.dim());
    for (x, mut y) in x.rows().into_iter().zip(y.rows_mut()) {
        y.assign(&(gamma * &x / root_mean_square(x, eps)));
    }
    y
}

/// The gradients of [`rms_norm`].
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNormGrads {
    /// `[tokens, features]`.
    pub dx: Array2<f64>,
    /// `[features]`.
    pub dgamma: Array1<f64>,
}

/// `dx = (g - x̂ mean(g ⊙ x̂)) / r` with `g = γ ⊙ dy` and `x̂ = x / r`, `dγ = Σₜ dy ⊙ x̂`: the
/// gradients of [`rms_norm`].
///
/// The mean is over the features of a token, and the sum is over the tokens.
/// `dy: [tokens, features]`.
///
/// # Panics
/// When `x` and `gamma` differ in `features`, or `x` and `dy` in shape.
pub fn rms_norm_backward(x: &Array2<f64>, gamma: &Array1<f64>, eps: f64, dy: &Array2<f64>) -> RmsNormGrads {
    assert_eq!(x.ncols(), gamma.len(), "rms_norm_backward: the features of x and of gamma");
    assert_eq!(x.dim(), dy.dim(), "rms_norm_backward: the shapes of x and of dy");
    let mut dx = Array2::zeros(x.dim());
    let mut dgamma = Array1::zeros(gamma.len());
    for ((x, dy), mut dx) in x.rows().into_iter().zip(dy.rows()).zip(dx.rows_mut()) {
        let r = root_mean_square(x, eps);
        let normalized = &x / r;
        let g = gamma * &dy;
        dx.assign(&((&g - &normalized * mean(&(&g * &normalized))) / r));
        dgamma += &(&dy * &normalized);
    }
    RmsNormGrads { dx, dgamma }
}

/// Returns `x̂` and `√(σ² + ε)` of one token. Takes two passes, because the mean square minus the
/// squared mean would cancel.
fn standardize(x: ArrayView1<f64>, eps: f64) -> (Array1<f64>, f64) {
    let centered = &x - mean(&x.to_owned());
    let deviation = (mean(&(&centered * &centered)) + eps).sqrt();
    (centered / deviation, deviation)
}

fn root_mean_square(x: ArrayView1<f64>, eps: f64) -> f64 {
    (mean(&(&x * &x)) + eps).sqrt()
}

fn mean(x: &Array1<f64>) -> f64 {
    x.sum() / x.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, random};
    use ndarray::array;

    #[test]
    fn literals() {
        // Mean 4 and biased variance 9; with ε = 16 the deviation is 5.
        let x = array![[1.0, 7.0]];
        let y = layer_norm(&x, &array![10.0, 10.0], &array![1.0, 2.0], 16.0);
        assert_close("layer_norm", &y, &array![[-5.0, 8.0]], 1e-15);
        // Mean square 25; with ε = 75 the root is 10.
        let y = rms_norm(&array![[1.0, -7.0]], &array![10.0, 20.0], 75.0);
        assert_close("rms_norm", &y, &array![[1.0, -14.0]], 1e-15);
    }

    #[test]
    fn gradients() {
        // ε is large, so that an ε at the wrong place of a formula changes the result.
        let eps = 0.1;
        let (x, gamma, beta, dy) = (random((3, 5), 1), random(5, 2), random(5, 3), random((3, 5), 4));

        let grads = layer_norm_backward(&x, &gamma, eps, &dy);
        check_gradient("layer_norm dx", &x, &grads.dx, |x| loss(layer_norm(x, &gamma, &beta, eps), &dy));
        check_gradient("dgamma", &gamma, &grads.dgamma, |gamma| loss(layer_norm(&x, gamma, &beta, eps), &dy));
        check_gradient("dbeta", &beta, &grads.dbeta, |beta| loss(layer_norm(&x, &gamma, beta, eps), &dy));

        let grads = rms_norm_backward(&x, &gamma, eps, &dy);
        check_gradient("rms_norm dx", &x, &grads.dx, |x| loss(rms_norm(x, &gamma, eps), &dy));
        check_gradient("dgamma", &gamma, &grads.dgamma, |gamma| loss(rms_norm(&x, gamma, eps), &dy));
    }

    #[test]
    fn the_variance_of_a_large_mean_does_not_cancel() {
        let y = layer_norm(&array![[1e9 - 1.0, 1e9 + 1.0]], &array![1.0, 1.0], &array![0.0, 0.0], 0.0);
        assert_eq!(y, array![[-1.0, 1.0]]);
    }

    #[test]
    fn equal_features_normalize_to_the_shift() {
        let y = layer_norm(&array![[3.0, 3.0]], &array![1.0, 1.0], &array![5.0, 6.0], 1e-5);
        assert_eq!(y, array![[5.0, 6.0]]);
    }

    #[test]
    fn nan_stays_in_its_token() {
        let x = array![[f64::NAN, 1.0], [-1.0, 1.0]];
        let ones = array![1.0, 1.0];
        for y in [layer_norm(&x, &ones, &array![0.0, 0.0], 0.0), rms_norm(&x, &ones, 0.0)] {
            assert!(y.row(0).iter().all(|y| y.is_nan()));
            assert_eq!(y.row(1), array![-1.0, 1.0]);
        }
    }

    #[test]
    fn norm_chooses_the_function() {
        let (x, gamma, beta, dy) = (random((3, 5), 1), random(5, 2), random(5, 3), random((3, 5), 4));
        let layer = Norm::LayerNorm { gamma: gamma.clone(), beta: beta.clone(), eps: 0.1 };
        assert_eq!(layer.apply(&x), layer_norm(&x, &gamma, &beta, 0.1));
        let LayerNormGrads { dx, dgamma, dbeta } = layer_norm_backward(&x, &gamma, 0.1, &dy);
        assert_eq!(layer.backward(&x, &dy), (dx, Norm::LayerNorm { gamma: dgamma, beta: dbeta, eps: 0.1 }));

        let rms = Norm::RmsNorm { gamma: gamma.clone(), eps: 0.1 };
        assert_eq!(rms.apply(&x), rms_norm(&x, &gamma, 0.1));
        let RmsNormGrads { dx, dgamma } = rms_norm_backward(&x, &gamma, 0.1, &dy);
        assert_eq!(rms.backward(&x, &dy), (dx, Norm::RmsNorm { gamma: dgamma, eps: 0.1 }));
    }

    #[test]
    #[should_panic(expected = "rms_norm: the features of x and of gamma")]
    fn disagreeing_shapes_panic() {
        rms_norm(&Array2::zeros((2, 3)), &array![1.0], 0.0);
    }
}
