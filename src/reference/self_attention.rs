//! Reference self-attention layer: the q, k and v projections, the attention, and the output
//! projection. Tests compare the tensor-parallel attention layer with this function, and the
//! reference block uses it.

use super::{AttentionGrads, AttentionSpec, attention, attention_backward, linear, linear_backward};
use ndarray::{Array1, Array2};
use std::ops::Range;

/// The weights of [`self_attention`].
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionWeights {
    /// `[heads · head_dim, hidden]`.
    pub q: Array2<f64>,
    /// `[heads · head_dim]`.
    pub q_bias: Option<Array1<f64>>,
    /// `[kv_heads · head_dim, hidden]`.
    pub k: Array2<f64>,
    /// `[kv_heads · head_dim]`. The bias adds the same number to all scores of a query, which does
    /// not change the softmax. So the bias's gradient is 0 up to rounding. Compare that gradient by
    /// absolute error.
    pub k_bias: Option<Array1<f64>>,
    /// `[kv_heads · head_dim, hidden]`.
    pub v: Array2<f64>,
    /// `[kv_heads · head_dim]`.
    pub v_bias: Option<Array1<f64>>,
    /// `[hidden, heads · head_dim]`.
    pub o: Array2<f64>,
    /// `[hidden]`.
    pub o_bias: Option<Array1<f64>>,
}

/// `y = attention(x qᵀ + q_bias, x kᵀ + k_bias, x vᵀ + v_bias) oᵀ + o_bias`, without a position
/// encoding.
///
/// `x, y: [tokens, hidden]`; `sequences` and `valid` as in [`attention`]. Source: Vaswani et al.,
/// arXiv 1706.03762, section 3.2.2.
///
/// # Panics
/// When shapes disagree with `spec` or with each other, and as [`attention`].
pub fn self_attention(
    spec: &AttentionSpec,
    w: &AttentionWeights,
    x: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
) -> Array2<f64> {
    let q = linear(x, &w.q, w.q_bias.as_ref());
    let k = linear(x, &w.k, w.k_bias.as_ref());
    let v = linear(x, &w.v, w.v_bias.as_ref());
    linear(&attention(spec, &q, &k, &v, sequences, valid), &w.o, w.o_bias.as_ref())
}

/// The gradients of [`self_attention`].
#[derive(Clone, Debug, PartialEq)]
pub struct SelfAttentionGrads {
    /// `[tokens, hidden]`.
    pub dx: Array2<f64>,
    /// The gradients, each in the field of its weight. `None` for an absent bias.
    pub weights: AttentionWeights,
}

/// `dx = dq q + dk k + dv v`, where [`attention_backward`] returns `dq`, `dk`, `dv` for
/// `dout = dy o`: the gradients of [`self_attention`].
///
/// `dy: [tokens, hidden]`.
///
/// # Panics
/// As [`self_attention`], and when the shapes of `x` and `dy` differ.
pub fn self_attention_backward(
    spec: &AttentionSpec,
    w: &AttentionWeights,
    x: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
    dy: &Array2<f64>,
) -> SelfAttentionGrads {
    let q = linear(x, &w.q, w.q_bias.as_ref());
    let k = linear(x, &w.k, w.k_bias.as_ref());
    let v = linear(x, &w.v, w.v_bias.as_ref());
    let attended = attention(spec, &q, &k, &v, sequences, valid);

    let o = linear_backward(&attended, &w.o, dy);
    let AttentionGrads { dq, dk, dv } = attention_backward(spec, &q, &k, &v, sequences, valid, &o.dx);
    let (q, k, v) =
        (linear_backward(x, &w.q, &dq), linear_backward(x, &w.k, &dk), linear_backward(x, &w.v, &dv));
    SelfAttentionGrads {
        dx: q.dx + k.dx + v.dx,
        weights: AttentionWeights {
            q: q.dw,
            q_bias: w.q_bias.as_ref().map(|_| q.db),
            k: k.dw,
            k_bias: w.k_bias.as_ref().map(|_| k.db),
            v: v.dw,
            v_bias: w.v_bias.as_ref().map(|_| v.db),
            o: o.dw,
            o_bias: w.o_bias.as_ref().map(|_| o.db),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{check_gradient, loss, one_sequence, random};
    use ndarray::array;

    const SPEC: AttentionSpec =
        AttentionSpec { heads: 4, kv_heads: 2, head_dim: 2, causal: true, window: None, scale: 0.7 };

    fn weights() -> AttentionWeights {
        AttentionWeights {
            q: random((8, 3), 1),
            q_bias: Some(random(8, 2)),
            k: random((4, 3), 3),
            k_bias: Some(random(4, 4)),
            v: random((4, 3), 5),
            v_bias: Some(random(4, 6)),
            o: random((3, 8), 7),
            o_bias: Some(random(3, 8)),
        }
    }

    #[test]
    fn one_token_attends_to_itself() {
        let w = AttentionWeights {
            q: array![[9.0], [9.0]],
            q_bias: None,
            k: array![[9.0]],
            k_bias: None,
            v: array![[2.0]],
            v_bias: Some(array![1.0]),
            o: array![[1.0, 10.0]],
            o_bias: Some(array![100.0]),
        };
        let spec =
            AttentionSpec { heads: 2, kv_heads: 1, head_dim: 1, causal: true, window: None, scale: 1.0 };
        // Both heads give v = 2 · 3 + 1.
        assert_eq!(self_attention(&spec, &w, &array![[3.0]], &one_sequence(1), None), array![[177.0]]);
    }

    /// Checks only `dx`, because the tests of the block check the gradients of the weights.
    #[test]
    fn gradient_of_x() {
        let (w, x, dy) = (weights(), random((4, 3), 9), random((4, 3), 10));
        let valid = Some(&[true, true, false, true][..]);
        let grads = self_attention_backward(&SPEC, &w, &x, &one_sequence(4), valid, &dy);
        check_gradient("dx", &x, &grads.dx, |x| {
            loss(self_attention(&SPEC, &w, x, &one_sequence(4), valid), &dy)
        });
    }

    #[test]
    fn the_bias_of_the_keys_changes_nothing() {
        let (mut w, x, dy) = (weights(), random((4, 3), 9), random((4, 3), 10));
        let grads = self_attention_backward(&SPEC, &w, &x, &one_sequence(4), None, &dy);
        assert!(grads.weights.k_bias.unwrap().iter().all(|gradient| gradient.abs() < 1e-15));
        let with = self_attention(&SPEC, &w, &x, &one_sequence(4), None);
        w.k_bias = None;
        let without = self_attention(&SPEC, &w, &x, &one_sequence(4), None);
        assert!((with - without).iter().all(|difference| difference.abs() < 1e-14));
    }
}
