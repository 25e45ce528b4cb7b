//! Reference mean over sequences. Tests compare `ops::mean_sequences` and `MeanPool` with this
//! function.

use ndarray::Array2;
use std::ops::Range;

/// `y[s, :] = Σ x[t, :] / n` over the `n` valid tokens `t` of sequence `s`, and 0 if `n` is 0.
///
/// `x: [tokens, features]`, `y: [sequences, features]`. `sequences` are ranges of tokens;
/// `valid: [tokens]` is false for padding. Without `valid`, all tokens are valid.
///
/// # Panics
/// When a sequence goes beyond the tokens, or `valid` and `x` differ in `tokens`.
pub fn mean_sequences(x: &Array2<f64>, sequences: &[Range<usize>], valid: Option<&[bool]>) -> Array2<f64> {
    let mut y = Array2::zeros((sequences.len(), x.ncols()));
    for (sequence, token, share) in shares("mean_sequences", sequences, valid, x.nrows()) {
        y.row_mut(sequence).scaled_add(share, &x.row(token));
    }
    y
}

/// `dx[t, :] = dy[s, :] / n` for the valid tokens `t` of sequence `s`, 0 for padding: the gradient
/// of [`mean_sequences`].
///
/// `dy: [sequences, features]`; `dx: [tokens, features]`.
///
/// # Panics
/// As [`mean_sequences`], or when `dy` has another number of rows than there are sequences.
pub fn mean_sequences_backward(
    tokens: usize,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
    dy: &Array2<f64>,
) -> Array2<f64> {
    assert_eq!(sequences.len(), dy.nrows(), "mean_sequences_backward: the sequences and the rows of dy");
    let mut dx = Array2::zeros((tokens, dy.ncols()));
    for (sequence, token, share) in shares("mean_sequences_backward", sequences, valid, tokens) {
        dx.row_mut(token).scaled_add(share, &dy.row(sequence));
    }
    dx
}

/// Returns every valid token as `(sequence, token, weight in the mean)`.
fn shares(
    name: &str,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
    tokens: usize,
) -> Vec<(usize, usize, f64)> {
    if let Some(valid) = valid {
        assert_eq!(valid.len(), tokens, "{name}: the tokens of valid and of x");
    }
    let mut shares = Vec::new();
    for (sequence, range) in sequences.iter().enumerate() {
        assert!(range.end <= tokens, "{name}: sequence {range:?} exceeds the {tokens} tokens");
        let own: Vec<usize> = range.clone().filter(|&token| valid.is_none_or(|valid| valid[token])).collect();
        let share = 1.0 / own.len() as f64;
        shares.extend(own.into_iter().map(|token| (sequence, token, share)));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{check_gradient, loss, random};
    use ndarray::array;

    #[test]
    fn literals() {
        let x = array![[1.0, 2.0], [3.0, 6.0], [5.0, 7.0], [9.0, 9.0]];
        let sequences = [0..2, 2..2, 2..4];
        assert_eq!(mean_sequences(&x, &sequences, None), array![[2.0, 4.0], [0.0, 0.0], [7.0, 8.0]]);
        let valid = [true, false, false, false];
        assert_eq!(mean_sequences(&x, &sequences, Some(&valid)), array![[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]);
        let dy = array![[2.0], [3.0], [4.0]];
        assert_eq!(mean_sequences_backward(4, &sequences, None, &dy), array![[1.0], [1.0], [2.0], [2.0]]);
    }

    #[test]
    fn gradients() {
        let (x, dy, sequences) = (random((5, 2), 1), random((2, 2), 2), [0..3, 3..5]);
        let valid = [true, false, true, true, true];
        let dx = mean_sequences_backward(5, &sequences, Some(&valid), &dy);
        check_gradient("dx", &x, &dx, |x| loss(mean_sequences(x, &sequences, Some(&valid)), &dy));
    }

    #[test]
    #[should_panic(expected = "mean_sequences: sequence 1..3 exceeds the 2 tokens")]
    fn a_sequence_beyond_the_tokens_panics() {
        mean_sequences(&Array2::zeros((2, 1)), &[0..1, 1..3], None);
    }
}
