//! Expected values of matrix products, with tolerances.

/// The relative error of rounding to the element type.
pub(crate) const BF16: f64 = 0.00390625;
pub(crate) const F32: f64 = 1e-7;

/// Returns a dot product, and its tolerance after summation in f32 and rounding of the result.
pub(crate) fn dot(a: &[f64], b: &[f64], rounding: f64) -> (f64, f64) {
    let products = || a.iter().zip(b).map(|(a, b)| a * b);
    let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
    (sum, rounding * sum.abs() + 1e-5 * size)
}

/// Returns a few positions in a matrix to check.
pub(crate) fn positions(rows: usize, cols: usize) -> [(usize, usize); 5] {
    [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3), (rows / 3, cols / 2), (rows - 1, 0)]
}
