//! Reference rotary position embedding. Tests compare the operator with this function.

use ndarray::Array2;

/// `y[a] = m (x[a] cos θ − x[b] sin θ)`, `y[b] = m (x[b] cos θ + x[a] sin θ)` with
/// `θ = positions[i] · frequencies[j]`, for row `i` and each pair `j` of features `a`, `b` of a
/// head.
///
/// Pair j has features 2 j and 2 j + 1 if `interleaved`, else j and j + `frequencies.len()`.
/// Features that belong to no pair are copied. `m` is `magnitude`.
/// `x, y: [tokens, heads · head_dim]`. Source: Su et al., arXiv 2104.09864, section 3.2.2.
///
/// ```
/// use ndarray::array;
/// use shardwise::reference::rope;
/// let quarter = std::f64::consts::FRAC_PI_2;
/// let y = rope(&array![[1.0, 2.0, 3.0, 4.0]], 4, &[1], &[quarter], true, 1.0);
/// assert!((&y - &array![[-2.0, 1.0, 3.0, 4.0]]).iter().all(|x| x.abs() < 1e-15));
/// ```
///
/// # Panics
/// When shapes disagree.
pub fn rope(
    x: &Array2<f64>,
    head_dim: usize,
    positions: &[usize],
    frequencies: &[f64],
    interleaved: bool,
    magnitude: f64,
) -> Array2<f64> {
    rotate(x, head_dim, positions, frequencies, interleaved, magnitude, 1.0)
}

/// The gradient of [`rope`] with respect to `x`: the rotation of `dy` by −θ, times `magnitude`.
///
/// # Panics
/// When shapes disagree.
pub fn rope_backward(
    dy: &Array2<f64>,
    head_dim: usize,
    positions: &[usize],
    frequencies: &[f64],
    interleaved: bool,
    magnitude: f64,
) -> Array2<f64> {
    rotate(dy, head_dim, positions, frequencies, interleaved, magnitude, -1.0)
}

fn rotate(
    x: &Array2<f64>,
    head_dim: usize,
    positions: &[usize],
    frequencies: &[f64],
    interleaved: bool,
    magnitude: f64,
    sign: f64,
) -> Array2<f64> {
    assert_eq!(x.nrows(), positions.len(), "rope: the tokens of x and the positions");
    assert_eq!(x.ncols() % head_dim, 0, "rope: the features of x modulo head_dim");
    assert!(
        2 * frequencies.len() <= head_dim,
        "rope: {} pairs exceed a head of {head_dim} features",
        frequencies.len()
    );
    let mut y = x.clone();
    for (row, &position) in positions.iter().enumerate() {
        for head in 0..x.ncols() / head_dim {
            for (pair, frequency) in frequencies.iter().enumerate() {
                let (first, second) =
                    if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + frequencies.len()) };
                let (first, second) = (head * head_dim + first, head * head_dim + second);
                let angle = sign * position as f64 * frequency;
                let (a, b) = (x[[row, first]], x[[row, second]]);
                y[[row, first]] = magnitude * (a * angle.cos() - b * angle.sin());
                y[[row, second]] = magnitude * (b * angle.cos() + a * angle.sin());
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, random};
    use ndarray::array;
    use std::f64::consts::FRAC_PI_2;

    #[test]
    fn a_quarter_turn() {
        let x = array![[1.0, 2.0, 3.0, 4.0, 5.0]];
        let halves = rope(&x, 5, &[1], &[FRAC_PI_2, 0.0], false, 1.0);
        assert_close("halves", &halves, &array![[-3.0, 2.0, 1.0, 4.0, 5.0]], 1e-15);
        let interleaved = rope(&x, 5, &[3], &[FRAC_PI_2], true, 2.0);
        assert_close("interleaved", &interleaved, &array![[4.0, -2.0, 3.0, 4.0, 5.0]], 1e-15);
    }

    #[test]
    fn gradient() {
        let (x, dy) = (random((3, 10), 1), random((3, 10), 2));
        for interleaved in [false, true] {
            let dx = rope_backward(&dy, 5, &[0, 7, 2], &[1.0, 0.3], interleaved, 1.5);
            check_gradient("dx", &x, &dx, |x| {
                loss(rope(x, 5, &[0, 7, 2], &[1.0, 0.3], interleaved, 1.5), &dy)
            });
        }
    }
}
