//! Reference losses.

use super::log_sum_exp;
use ndarray::{Array1, Array2};

/// The cross entropy with label smoothing and z-loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// The probability that label smoothing spreads over all classes, the target included.
    pub over_all: f64,
    /// The probability that label smoothing spreads over all classes except the target.
    pub over_others: f64,
    /// The target that marks a row as ignored, with loss 0 (`ignore_index` in PyTorch).
    pub ignored: Option<u32>,
    /// The weight of the z-loss, the squared log-sum-exp.
    pub z: f64,
}

impl CrossEntropy {
    /// Returns the smoothed target probability `q` of a class.
    fn wanted(&self, class: usize, target: usize, classes: usize) -> f64 {
        let mut q = self.over_all / classes as f64;
        if class == target {
            q += 1.0 - self.over_all;
        }
        if classes > 1 {
            q += if class == target { -self.over_others } else { self.over_others / (classes - 1) as f64 };
        }
        q
    }

    /// `−Σₖ qₖ log pₖ + z (log Σₖ e^xₖ)²` for each row of `x`. `p` is the softmax of the row, and
    /// `q` has the smoothed targets. The loss of an ignored row is 0.
    ///
    /// `x: [rows, classes]`, `targets: [rows]`.
    ///
    /// # Panics
    /// When `targets` has fewer than `rows` elements.
    pub fn losses(&self, x: &Array2<f64>, targets: &[u32]) -> Array1<f64> {
        let (classes, lse) = (x.ncols(), log_sum_exp(x, None));
        Array1::from_shape_fn(x.nrows(), |row| {
            if self.ignored == Some(targets[row]) {
                return 0.0;
            }
            let lse = lse[row];
            let mut loss = self.z * lse * lse;
            for class in 0..classes {
                let q = self.wanted(class, targets[row] as usize, classes);
                // A class with q = 0 may have x = -∞, and 0 · ∞ would be NaN.
                if q != 0.0 {
                    loss += q * (lse - x[[row, class]]);
                }
            }
            loss
        })
    }

    /// `dx = scale · (p (1 + 2 z log Σₖ e^xₖ) − q)`, and 0 for ignored rows: the gradient of
    /// `scale` times the sum of [`CrossEntropy::losses`].
    ///
    /// # Panics
    /// As [`CrossEntropy::losses`].
    pub fn backward(&self, x: &Array2<f64>, targets: &[u32], scale: f64) -> Array2<f64> {
        let (classes, lse) = (x.ncols(), log_sum_exp(x, None));
        Array2::from_shape_fn(x.dim(), |(row, class)| {
            if self.ignored == Some(targets[row]) {
                return 0.0;
            }
            let lse = lse[row];
            let p = (x[[row, class]] - lse).exp();
            scale * (p * (1.0 + 2.0 * self.z * lse) - self.wanted(class, targets[row] as usize, classes))
        })
    }
}

/// `Σ (x − y)² / n` over all `n` elements, and its gradient `2 (x − y) / n` with respect to `x`.
pub fn mean_squared_error(x: &Array2<f64>, y: &Array2<f64>) -> (f64, Array2<f64>) {
    let count = x.len() as f64;
    let difference = x - y;
    ((&difference * &difference).sum() / count, difference * (2.0 / count))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random};
    use super::*;

    #[test]
    fn gradients_are_those_of_the_losses() {
        let (x, targets) = (random((3, 4), 1) * 3.0, [2, 0, 9]);
        let ignored = Some(9);
        for loss in [
            CrossEntropy { ignored, ..CrossEntropy::default() },
            CrossEntropy { over_all: 0.1, ignored, z: 0.01, ..CrossEntropy::default() },
            CrossEntropy { over_others: 0.1, ignored, z: 0.3, ..CrossEntropy::default() },
        ] {
            let grad = loss.backward(&x, &targets, 0.7);
            check_gradient("cross entropy", &x, &grad, |x| 0.7 * loss.losses(x, &targets).sum());
        }
        let y = random((3, 4), 2);
        check_gradient("mse", &x, &mean_squared_error(&x, &y).1, |x| mean_squared_error(x, &y).0);
    }

    /// Checks the target probabilities of both conventions of label smoothing.
    #[test]
    fn smoothed_probabilities_sum_to_one() {
        for (over_all, over_others) in [(0.1, 0.0), (0.0, 0.1), (0.0, 0.0)] {
            let loss = CrossEntropy { over_all, over_others, ..CrossEntropy::default() };
            let q: Vec<_> = (0..5).map(|class| loss.wanted(class, 3, 5)).collect();
            assert!((q.iter().sum::<f64>() - 1.0).abs() < 1e-15);
            assert!((q[3] - (1.0 - over_all - over_others + over_all / 5.0)).abs() < 1e-15);
        }
    }
}
