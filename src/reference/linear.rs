//! Reference linear layer. Tests compare the column- and row-parallel linear layers with this
//! function.

use ndarray::{Array1, Array2, Axis};

/// `y = x wᵀ + b`, that is `y[t, o] = Σᵢ x[t, i] w[o, i] + b[o]`, or without `b[o]` if `b` is
/// `None`.
///
/// `x: [tokens, in]`, `w: [out, in]`, `b: [out]`, `y: [tokens, out]`. With `in = 0` every row of
/// `y` is `b`, or 0 without `b`.
///
/// # Panics
/// When `x` and `w` differ in `in`, or `w` and `b` in `out`.
pub fn linear(x: &Array2<f64>, w: &Array2<f64>, b: Option<&Array1<f64>>) -> Array2<f64> {
    assert_eq!(x.ncols(), w.ncols(), "linear: the in features of x and of w");
    if let Some(b) = b {
        assert_eq!(b.len(), w.nrows(), "linear: the out features of b and of w");
    }
    Array2::from_shape_fn((x.nrows(), w.nrows()), |(t, o)| {
        let product = x.row(t).dot(&w.row(o));
        b.map_or(product, |b| product + b[o])
    })
}

/// The gradients of [`linear`].
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGrads {
    /// `[tokens, in]`.
    pub dx: Array2<f64>,
    /// `[out, in]`.
    pub dw: Array2<f64>,
    /// `[out]`. Ignore it if [`linear`] had no bias.
    pub db: Array1<f64>,
}

/// `dx = dy w`, `dw = dyᵀ x`, `db[o] = Σₜ dy[t, o]`: the gradients of [`linear`].
///
/// `dy: [tokens, out]`; the other arguments as in [`linear`].
///
/// # Panics
/// When `x` and `w` differ in `in`, `dy` and `w` in `out`, or `dy` and `x` in `tokens`.
pub fn linear_backward(x: &Array2<f64>, w: &Array2<f64>, dy: &Array2<f64>) -> LinearGrads {
    assert_eq!(x.ncols(), w.ncols(), "linear_backward: the in features of x and of w");
    assert_eq!(dy.ncols(), w.nrows(), "linear_backward: the out features of dy and of w");
    assert_eq!(dy.nrows(), x.nrows(), "linear_backward: the tokens of dy and of x");
    LinearGrads {
        dx: Array2::from_shape_fn(x.dim(), |(t, i)| dy.row(t).dot(&w.column(i))),
        dw: Array2::from_shape_fn(w.dim(), |(o, i)| dy.column(o).dot(&x.column(i))),
        db: dy.sum_axis(Axis(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{check_gradient, loss, random};
    use ndarray::array;

    #[test]
    fn literals() {
        let x = array![[1.0, 2.0], [3.0, 4.0]];
        let w = array![[1.0, -1.0], [0.0, 2.0], [3.0, 0.0]];
        assert_eq!(linear(&x, &w, None), array![[-1.0, 4.0, 3.0], [-1.0, 8.0, 9.0]]);
        let b = array![10.0, 20.0, 30.0];
        assert_eq!(linear(&x, &w, Some(&b)), array![[9.0, 24.0, 33.0], [9.0, 28.0, 39.0]]);

        let grads = linear_backward(&x, &w, &array![[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]);
        assert_eq!(grads.dx, array![[1.0, -1.0], [6.0, 2.0]]);
        assert_eq!(grads.dw, array![[1.0, 2.0], [3.0, 4.0], [6.0, 8.0]]);
        assert_eq!(grads.db, array![1.0, 1.0, 2.0]);
    }

    #[test]
    fn gradients() {
        let (x, w, b, dy) = (random((4, 3), 1), random((5, 3), 2), random(5, 3), random((4, 5), 4));
        let grads = linear_backward(&x, &w, &dy);
        check_gradient("dx", &x, &grads.dx, |x| loss(linear(x, &w, Some(&b)), &dy));
        check_gradient("dw", &w, &grads.dw, |w| loss(linear(&x, w, Some(&b)), &dy));
        check_gradient("db", &b, &grads.db, |b| loss(linear(&x, &w, Some(b)), &dy));
    }

    #[test]
    fn nan_and_infinity_stay_in_their_rows_and_columns() {
        let x = array![[f64::NAN, 1.0], [1.0, 1.0]];
        let y = linear(&x, &array![[0.0, 1.0], [f64::INFINITY, 1.0]], None);
        assert!(y[[0, 0]].is_nan(), "0 · NaN is NaN");
        assert_eq!(y[[1, 0]], 1.0);
        assert_eq!(y[[1, 1]], f64::INFINITY);
    }

    #[test]
    fn empty_dimensions() {
        let b = array![1.0, 2.0];
        assert_eq!(
            linear(&Array2::zeros((2, 0)), &Array2::zeros((2, 0)), Some(&b)),
            array![[1.0, 2.0], [1.0, 2.0]]
        );
        let grads = linear_backward(&Array2::zeros((0, 3)), &Array2::ones((2, 3)), &Array2::zeros((0, 2)));
        assert_eq!(grads.dx.dim(), (0, 3));
        assert_eq!(grads.dw, Array2::<f64>::zeros((2, 3)));
        assert_eq!(grads.db, array![0.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "linear: the in features of x and of w")]
    fn disagreeing_shapes_panic() {
        linear(&Array2::zeros((1, 2)), &Array2::zeros((1, 3)), None);
    }
}
