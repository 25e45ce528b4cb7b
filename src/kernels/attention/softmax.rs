//! Softmax of a row of scores on the CPU.

use crate::{
    device::Accumulator,
    kernels::lanes::{lane_max, lane_sum},
};

/// Softmax of one row in place. A column is visible if it is among the first `visible` and, where
/// `valid` is given, its flag in `valid` is true. Other columns become 0. Returns lse = log Σ e^x
/// over the visible columns. Without visible columns lse is +∞, so that e^(x − lse) is 0.
#[inline(always)]
pub(super) fn softmax_row<A: Accumulator>(row: &mut [A], visible: usize, valid: Option<&[bool]>) -> A {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(A::ZERO);
    let valid = valid.map(|valid| &valid[..visible]);
    if let Some(valid) = valid {
        for (x, &valid) in seen.iter_mut().zip(valid) {
            *x = if valid { *x } else { A::NEG_INFINITY };
        }
    }
    let none = valid.map_or(visible == 0, |valid| !valid.contains(&true));
    if none {
        seen.fill(A::ZERO);
        return -A::NEG_INFINITY;
    }
    let max = lane_max(seen);
    for x in seen.iter_mut() {
        *x = (*x - max).exp();
    }
    let sum = lane_sum([&*seen], |[x]| x);
    let scale = A::ONE / sum;
    for x in seen.iter_mut() {
        *x = *x * scale;
    }
    // A visible NaN has made the whole row NaN. Masked elements must be 0, so this sets them to 0
    // again.
    #[allow(clippy::eq_op)]
    if let (Some(valid), true) = (valid, sum != sum) {
        for (x, &valid) in seen.iter_mut().zip(valid) {
            *x = if valid { *x } else { A::ZERO };
        }
    }
    max + sum.ln()
}

/// Replaces the scores of a row by their softmax weights e^(score − lse). Masked columns become 0.
#[inline(always)]
pub(super) fn weights_row<A: Accumulator>(row: &mut [A], visible: usize, valid: Option<&[bool]>, lse: A) {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(A::ZERO);
    for x in seen.iter_mut() {
        *x = (*x - lse).exp();
    }
    if let Some(valid) = valid {
        for (x, &valid) in seen.iter_mut().zip(valid) {
            *x = if valid { *x } else { A::ZERO };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Element;

    fn softmax<A: Accumulator>(row: &[f64], visible: usize, valid: Option<&[bool]>) -> Vec<f64> {
        let mut row: Vec<A> = row.iter().map(|&x| A::from_f64(x)).collect();
        softmax_row(&mut row, visible, valid);
        row.into_iter().map(Element::to_f64).collect()
    }

    /// Asserts that numbers are equal, where NaN equals NaN.
    fn same(got: &[f64], want: &[f64]) {
        let same = |(got, want): (&f64, &f64)| got == want || got.is_nan() && want.is_nan();
        assert!(got.len() == want.len() && got.iter().zip(want).all(same), "{got:?}, not {want:?}");
    }

    #[test]
    fn softmax_of_special_rows_sees_nothing_of_what_is_masked() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        // Rows and their softmax. The last two columns are masked.
        let rows = [
            ([nan, 1.0, 2.0, 0.0], [nan, nan, 0.0, 0.0]),
            ([inf, 1.0, 2.0, 0.0], [nan, nan, 0.0, 0.0]),
            ([-inf, 1.0, inf, nan], [0.0, 1.0, 0.0, 0.0]),
            ([-inf, -inf, 2.0, 0.0], [nan, nan, 0.0, 0.0]),
            ([1.0, 1.0, nan, -inf], [0.5, 0.5, 0.0, 0.0]),
            ([3e38, -3e38, 3e38, inf], [1.0, 0.0, 0.0, 0.0]),
        ];
        for (x, want) in rows {
            let valid = [true, true, false, false];
            same(&softmax::<f64>(&x, 4, Some(&valid)), &want);
            same(&softmax::<f32>(&x, 4, Some(&valid)), &want);
            same(&softmax::<f32>(&x, 2, None), &want);
            same(&softmax::<f32>(&x, 4, Some(&[false; 4])), &[0.0; 4]);
            same(&softmax::<f64>(&x, 0, None), &[0.0; 4]);
        }
    }

    #[test]
    fn softmax_does_not_change_when_its_row_is_shifted() {
        let row = |shift: f64| (0..21).map(|i| f64::from(i * 7 % 13) + shift).collect::<Vec<_>>();
        for shift in [1e3, -1e3, 1e6, -1e6] {
            same(&softmax::<f32>(&row(shift), 21, None), &softmax::<f32>(&row(0.0), 21, None));
        }
    }
}
