//! Inputs and checks for the unit tests of the reference: random arrays, comparison, finite
//! differences.

use super::worst_relative;
use ndarray::{Array, Array2, Dimension, ShapeBuilder};
use std::ops::Range;

/// Returns uniform numbers in [-1, 1), determined by the seed.
pub(super) fn random<S: ShapeBuilder>(shape: S, seed: u64) -> Array<f64, S::Dim> {
    // Knuth's MMIX generator. Use its high 53 bits, because its low bits are not random and an f64
    // holds 53 bits.
    let mut state = seed;
    Array::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

/// Returns all `tokens` rows as one sequence.
pub(super) fn one_sequence(tokens: usize) -> Vec<Range<usize>> {
    vec![Range { start: 0, end: tokens }]
}

/// `Σ y ⊙ dy`: a loss whose gradient with respect to `y` is `dy`.
pub(super) fn loss(y: Array2<f64>, dy: &Array2<f64>) -> f64 {
    (y * dy).sum()
}

/// Asserts that the largest difference of the arrays is at most `tolerance` times the largest
/// `expected` value, or at most `tolerance` if that value is below 1. NaN never agrees.
pub(super) fn assert_close<D: Dimension>(
    what: &str,
    actual: &Array<f64, D>,
    expected: &Array<f64, D>,
    tolerance: f64,
) {
    assert_eq!(actual.shape(), expected.shape(), "{what}: shapes");
    let worst = worst_relative(actual, expected);
    assert!(worst <= tolerance, "{what}: got {actual}, expected {expected}, difference {worst:e}");
}

/// Asserts that `gradient` is the gradient of `f` at `at`.
pub(super) fn check_gradient<D: Dimension>(
    what: &str,
    at: &Array<f64, D>,
    gradient: &Array<f64, D>,
    f: impl Fn(&Array<f64, D>) -> f64,
) {
    // The error of the five-point central difference is STEP⁴ f⁽⁵⁾/30, and the rounding error is
    // about 1e-16 f/STEP. Both are below 1e-10.
    const STEP: f64 = 3e-4;
    let moved = |i: usize, by: f64| {
        let mut x = at.clone();
        *x.iter_mut().nth(i).expect("the index is below the length") += by;
        f(&x)
    };
    let numeric = (0..at.len()).map(|i| {
        let near = moved(i, STEP) - moved(i, -STEP);
        let far = moved(i, 2.0 * STEP) - moved(i, -2.0 * STEP);
        (8.0 * near - far) / (12.0 * STEP)
    });
    let numeric = Array::from_shape_vec(at.raw_dim(), numeric.collect()).expect("one number per element");
    assert_close(what, gradient, &numeric, 1e-9);
}

#[test]
fn check_gradient_accepts_the_gradient_of_a_cube() {
    let x = random((2, 3), 1);
    check_gradient("cube", &x, &x.mapv(|x| 3.0 * x * x), |x| x.mapv(|x| x.powi(3)).sum());
}

#[test]
#[should_panic(expected = "cube")]
fn check_gradient_rejects_an_error_of_one_in_ten_million() {
    let x = random((2, 3), 1);
    check_gradient("cube", &x, &x.mapv(|x| 3.0 * x * x + 1e-7), |x| x.mapv(|x| x.powi(3)).sum());
}

#[test]
#[should_panic(expected = "NaN")]
fn assert_close_rejects_nan() {
    assert_close("nan", &ndarray::array![f64::NAN], &ndarray::array![f64::NAN], 1.0);
}
