//! Reference softmax and log-sum-exp of rows. Tests compare the vocabulary-parallel cross entropy
//! with these functions, and the reference attention uses the softmax.

use ndarray::{Array1, Array2, Zip};

/// `y[r, c] = exp(x[r, c]) / Σⱼ exp(x[r, j])` for the unmasked columns `c` and `j` of row `r`, and
/// exactly 0 for masked columns.
///
/// `x, y: [rows, columns]`; `mask: [rows, columns]` is false for masked entries.
/// * A row without unmasked entries gives 0, not NaN.
/// * If an unmasked entry is NaN or +∞, or all are -∞, the unmasked entries give NaN, as in
///   PyTorch.
/// * An unmasked -∞ gives 0 if the largest unmasked entry is finite.
/// * Masked entries have no influence, even if they are NaN or +∞.
///
/// ```
/// use ndarray::array;
/// use shardwise::reference::softmax;
/// let (x, mask) = (array![[0.0, f64::NAN, 3f64.ln()]], array![[true, false, true]]);
/// let y = softmax(&x, Some(&mask));
/// assert!((&y - &array![[0.25, 0.0, 0.75]]).iter().all(|x| x.abs() < 1e-15));
/// ```
///
/// # Panics
/// When the shapes of `x` and `mask` differ.
pub fn softmax(x: &Array2<f64>, mask: Option<&Array2<bool>>) -> Array2<f64> {
    let mut y = Array2::zeros(x.dim());
    for row in 0..x.nrows() {
        let columns = unmasked("softmax", x, mask, row);
        let probabilities = softmax_of_all(&columns.iter().map(|&c| x[[row, c]]).collect());
        for (column, probability) in columns.into_iter().zip(probabilities) {
            y[[row, column]] = probability;
        }
    }
    y
}

/// `dx[r, c] = p[r, c] (dp[r, c] - Σⱼ p[r, j] dp[r, j])`: the gradient of [`softmax`] from its
/// output `p`.
///
/// `p, dp, dx: [rows, columns]`. For masked entries `p` is 0, and so is `dx` if `dp` is finite.
///
/// # Panics
/// When the shapes of `p` and `dp` differ.
pub fn softmax_backward(p: &Array2<f64>, dp: &Array2<f64>) -> Array2<f64> {
    assert_eq!(p.dim(), dp.dim(), "softmax_backward: the shapes of p and of dp");
    let mut dx = Array2::zeros(p.dim());
    Zip::from(dx.rows_mut()).and(p.rows()).and(dp.rows()).for_each(|mut dx, p, dp| {
        dx.assign(&softmax_of_all_backward(&p.to_owned(), &dp.to_owned()));
    });
    dx
}

/// `y[r] = ln Σⱼ exp(x[r, j])` over the unmasked columns `j` of row `r`.
///
/// `x: [rows, columns]`, `mask` as in [`softmax`], `y: [rows]`. As in PyTorch, a row with a NaN
/// gives NaN, else a row with +∞ gives +∞. A row of only -∞ gives -∞. A row without unmasked
/// entries gives -∞, the logarithm of an empty sum.
///
/// # Panics
/// When the shapes of `x` and `mask` differ.
pub fn log_sum_exp(x: &Array2<f64>, mask: Option<&Array2<bool>>) -> Array1<f64> {
    Array1::from_shape_fn(x.nrows(), |row| {
        let x: Array1<f64> = unmasked("log_sum_exp", x, mask, row).into_iter().map(|c| x[[row, c]]).collect();
        // ln Σ exp(x) = s + ln Σ exp(x - s) for any finite s. With the largest x as s, exp cannot
        // overflow. An infinite s would give ∞ - ∞.
        let largest = largest(&x);
        let shift = if largest.is_finite() { largest } else { 0.0 };
        shift + x.mapv(|x| (x - shift).exp()).sum().ln()
    })
}

/// `dx[r, c] = softmax(x)[r, c] dy[r]`: the gradient of [`log_sum_exp`].
///
/// `x, dx: [rows, columns]`, `mask` as in [`softmax`], `dy: [rows]`.
///
/// # Panics
/// When the shapes of `x` and `mask` differ, or `x` and `dy` have different numbers of rows.
pub fn log_sum_exp_backward(x: &Array2<f64>, mask: Option<&Array2<bool>>, dy: &Array1<f64>) -> Array2<f64> {
    assert_eq!(x.nrows(), dy.len(), "log_sum_exp_backward: the rows of x and of dy");
    let mut dx = softmax(x, mask);
    Zip::from(dx.rows_mut()).and(dy).for_each(|mut dx, &dy| dx *= dy);
    dx
}

/// The softmax of a vector without a mask. The vector may be empty.
pub(super) fn softmax_of_all(x: &Array1<f64>) -> Array1<f64> {
    // exp(x - s) / Σ exp(x - s) does not depend on s. With the largest x as s, exp cannot overflow.
    let largest = largest(x);
    let exponentials = x.mapv(|x| (x - largest).exp());
    let sum = exponentials.sum();
    exponentials / sum
}

/// The gradient of [`softmax_of_all`] from its output `p`.
pub(super) fn softmax_of_all_backward(p: &Array1<f64>, dp: &Array1<f64>) -> Array1<f64> {
    p * &(dp - p.dot(dp))
}

/// Returns the largest element that is not NaN, or -∞ if there is no such element. A NaN still
/// makes the sum NaN, because the NaN has its own term in the sum.
fn largest(x: &Array1<f64>) -> f64 {
    x.fold(f64::NEG_INFINITY, |largest, &x| largest.max(x))
}

/// Returns the unmasked columns of a row.
fn unmasked(name: &str, x: &Array2<f64>, mask: Option<&Array2<bool>>, row: usize) -> Vec<usize> {
    if let Some(mask) = mask {
        assert_eq!(x.dim(), mask.dim(), "{name}: the shapes of x and of the mask");
    }
    (0..x.ncols()).filter(|&column| mask.is_none_or(|mask| mask[[row, column]])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, random};
    use ndarray::{ArrayView1, array};
    use std::f64::consts::LN_2;

    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;

    fn is_nan(row: ArrayView1<f64>) -> Vec<bool> {
        row.iter().map(|x| x.is_nan()).collect()
    }

    #[test]
    fn literals() {
        let x = array![[0.0, LN_2, 3f64.ln()], [1e6, 1e6 + LN_2, -1e6]];
        let y = softmax(&x, None);
        assert_close("softmax", &y, &array![[1.0 / 6.0, 2.0 / 6.0, 0.5], [1.0 / 3.0, 2.0 / 3.0, 0.0]], 1e-10);
        assert_close("log_sum_exp", &log_sum_exp(&x, None), &array![6f64.ln(), 1e6 + 3f64.ln()], 1e-15);

        let mask = array![[true, false, true], [false, false, true]];
        let y = softmax(&x, Some(&mask));
        assert_close("masked", &y, &array![[0.25, 0.0, 0.75], [0.0, 0.0, 1.0]], 1e-15);
        assert_close("masked", &log_sum_exp(&x, Some(&mask)), &array![4f64.ln(), -1e6], 1e-15);
    }

    #[test]
    fn gradients() {
        let (x, dp, dy) = (random((4, 5), 1) * 3.0, random((4, 5), 2), random(4, 3));
        let masked = Array2::from_shape_fn((4, 5), |(row, column)| (row + 2 * column) % 3 != 0);
        for mask in [None, Some(&masked)] {
            let dx = softmax_backward(&softmax(&x, mask), &dp);
            check_gradient("softmax", &x, &dx, |x| loss(softmax(x, mask), &dp));
            let dx = log_sum_exp_backward(&x, mask, &dy);
            check_gradient("log_sum_exp", &x, &dx, |x| log_sum_exp(x, mask).dot(&dy));
        }
    }

    #[test]
    fn a_fully_masked_row_is_zero() {
        let (x, mask) = (array![[1.0, NAN, INF]], Array2::from_elem((1, 3), false));
        assert_eq!(softmax(&x, Some(&mask)), array![[0.0, 0.0, 0.0]]);
        assert_eq!(log_sum_exp(&x, Some(&mask)), array![-INF]);
        assert_eq!(log_sum_exp_backward(&x, Some(&mask), &array![1.0]), array![[0.0, 0.0, 0.0]]);
    }

    #[test]
    fn masked_entries_have_no_influence() {
        let x = array![[0.0, NAN, LN_2], [0.0, INF, LN_2]];
        let mask = array![[true, false, true], [true, false, true]];
        let thirds = array![1.0 / 3.0, 0.0, 2.0 / 3.0];
        for row in softmax(&x, Some(&mask)).rows() {
            assert_close("softmax", &row.to_owned(), &thirds, 1e-15);
        }
        assert_close("log_sum_exp", &log_sum_exp(&x, Some(&mask)), &array![3f64.ln(), 3f64.ln()], 1e-15);
    }

    #[test]
    fn nan_and_infinity_among_the_allowed() {
        let x = array![
            [0.0, NAN, 5.0],
            [0.0, INF, 5.0],
            [-INF, -INF, 5.0],
            [-INF, 0.0, 0.0],
            [NAN, -INF, 5.0],
            [NAN, INF, 5.0]
        ];
        let mut mask = Array2::from_elem((6, 3), true);
        mask.column_mut(2).fill(false);
        let y = softmax(&x, Some(&mask));
        for row in [0, 1, 2, 4, 5] {
            assert_eq!(is_nan(y.row(row)), [true, true, false], "row {row}");
        }
        assert!(y.column(2).iter().all(|&y| y == 0.0));
        assert_eq!(y.row(3), array![0.0, 1.0, 0.0]);

        let y = log_sum_exp(&x, Some(&mask));
        assert_eq!(is_nan(y.view()), [true, false, false, false, true, true]);
        assert_eq!((y[1], y[2], y[3]), (INF, -INF, 0.0));
    }

    #[test]
    fn no_columns() {
        let x = Array2::zeros((2, 0));
        assert_eq!(softmax(&x, None).dim(), (2, 0));
        assert_eq!(log_sum_exp(&x, None), array![-INF, -INF]);
    }

    #[test]
    #[should_panic(expected = "softmax: the shapes of x and of the mask")]
    fn disagreeing_shapes_panic() {
        softmax(&Array2::zeros((2, 3)), Some(&Array2::from_elem((1, 3), true)));
    }
}
