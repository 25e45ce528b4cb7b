//! Reference attention over heads, without projections. Tests compare the attention operator with
//! this function, and the reference self-attention layer uses it.

use super::softmax::{softmax_of_all, softmax_of_all_backward};
use ndarray::{Array2, ArrayView1, Axis, Slice};
use std::ops::Range;

/// The configuration of [`attention`].
///
/// `kv_heads = heads` gives multi-head attention, fewer key/value heads give grouped-query
/// attention, and one key/value head gives multi-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// The number of query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// The number of key/value heads.
    pub kv_heads: usize,
    /// The number of features of one head.
    pub head_dim: usize,
    /// Whether a row attends only to itself and earlier rows.
    pub causal: bool,
    /// The size of the sliding window: a row attends only to itself and the `window - 1` rows
    /// before it. Use it with `causal`, because the window does not exclude later rows.
    pub window: Option<usize>,
    /// The factor that multiplies the scores before the softmax, usually `1 / √head_dim`.
    pub scale: f64,
}

/// `out[i, h] = Σⱼ p[j] v[j, g]` with `p = softmaxⱼ(scale · q[i, h] · k[j, g])` and
/// `g = ⌊h / (heads / kv_heads)⌋`, where `j` runs over the rows that row `i` may attend to.
///
/// Row `i` may attend to the rows of its own sequence. `valid`, if given, excludes the rows whose
/// entry is false. Causal attention excludes the rows after `i`, and a window excludes the rows
/// before the window. Excluded rows have no influence, even if they are NaN or ∞. The output is 0
/// for a row that may attend to no row, and for a row outside every sequence. A row that is not
/// valid still attends to valid rows.
///
/// `q, out: [tokens, heads · head_dim]`, `k, v: [tokens, kv_heads · head_dim]`, head after head;
/// `sequences`: disjoint ranges of rows; `valid: [tokens]`. Source: Vaswani et al., arXiv
/// 1706.03762, section 3.2; grouped heads: Ainslie et al., arXiv 2305.13245, section 2.2.
///
/// ```
/// use ndarray::array;
/// use shardwise::reference::{AttentionSpec, attention};
/// let (heads, kv_heads, head_dim, window, scale) = (1, 1, 1, None, 1.0);
/// let spec = AttentionSpec { heads, kv_heads, head_dim, causal: true, window, scale };
/// let (q, k, v) = (array![[1.0], [1.0]], array![[0.0], [3f64.ln()]], array![[4.0], [8.0]]);
/// let out = attention(&spec, &q, &k, &v, &[0..2], None);
/// assert_eq!(out[[0, 0]], 4.0);
/// assert!((out[[1, 0]] - (0.25 * 4.0 + 0.75 * 8.0)).abs() < 1e-14);
/// ```
///
/// # Panics
/// When `heads` is not a multiple of `kv_heads`, shapes disagree with `spec` or with each other, or
/// sequences overlap or exceed the rows.
pub fn attention(
    spec: &AttentionSpec,
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
) -> Array2<f64> {
    check("attention", spec, q, k, v, sequences, valid);
    let mut out = Array2::zeros(q.dim());
    for query in queries(spec, sequences, valid) {
        let (q, k, v) = (query.of(q), query.keys_of(k), query.keys_of(v));
        let p = softmax_of_all(&(k.dot(&q) * spec.scale));
        add(&mut out, query.row, &query.columns, p.dot(&v).view());
    }
    out
}

/// The gradients of [`attention`].
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionGrads {
    /// `[tokens, heads · head_dim]`.
    pub dq: Array2<f64>,
    /// `[tokens, kv_heads · head_dim]`; for a key head the sum over its query heads.
    pub dk: Array2<f64>,
    /// `[tokens, kv_heads · head_dim]`; for a value head the sum over its query heads.
    pub dv: Array2<f64>,
}

/// With `s = scale · q[i, h] · k[j, g]` and `p = softmaxⱼ(s)` for each row `i` and head `h`:
/// `dp[j] = dout[i, h] · v[j, g]`, `ds = p ⊙ (dp - p · dp)`, `dq[i, h] = scale Σⱼ ds[j] k[j, g]`,
/// `dk[j, g] += scale ds[j] q[i, h]`, `dv[j, g] += p[j] dout[i, h]`: the gradients of
/// [`attention`].
///
/// `dout: [tokens, heads · head_dim]`; the other arguments as in [`attention`]. `dk` and `dv` are 0
/// for a row that no row attends to.
///
/// # Panics
/// As [`attention`], and when the shapes of `q` and `dout` differ.
pub fn attention_backward(
    spec: &AttentionSpec,
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
    dout: &Array2<f64>,
) -> AttentionGrads {
    check("attention_backward", spec, q, k, v, sequences, valid);
    assert_eq!(q.dim(), dout.dim(), "attention_backward: the shapes of q and of dout");
    let mut grads =
        AttentionGrads { dq: Array2::zeros(q.dim()), dk: Array2::zeros(k.dim()), dv: Array2::zeros(v.dim()) };
    for query in queries(spec, sequences, valid) {
        let (q, k, v, dout) = (query.of(q), query.keys_of(k), query.keys_of(v), query.of(dout));
        let p = softmax_of_all(&(k.dot(&q) * spec.scale));
        let ds = softmax_of_all_backward(&p, &v.dot(&dout));
        add(&mut grads.dq, query.row, &query.columns, (ds.dot(&k) * spec.scale).view());
        for (j, &key) in query.keys.iter().enumerate() {
            add(&mut grads.dk, key, &query.kv_columns, (&q * (ds[j] * spec.scale)).view());
            add(&mut grads.dv, key, &query.kv_columns, (&dout * p[j]).view());
        }
    }
    grads
}

/// One head of one row of the queries.
struct Query {
    row: usize,
    /// The columns of the head in q and out.
    columns: Range<usize>,
    /// The columns of the head's key/value head in k and v.
    kv_columns: Range<usize>,
    /// The rows that the query may attend to.
    keys: Vec<usize>,
}

impl Query {
    /// Returns the query's vector in `x`, which is q or has the shape of q.
    fn of<'a>(&self, x: &'a Array2<f64>) -> ArrayView1<'a, f64> {
        x.index_axis(Axis(0), self.row).slice_axis_move(Axis(0), Slice::from(self.columns.clone()))
    }

    /// Returns the vectors in `x` (k or v) that the query attends to: `[keys, head_dim]`.
    fn keys_of(&self, x: &Array2<f64>) -> Array2<f64> {
        x.slice_axis(Axis(1), Slice::from(self.kv_columns.clone())).select(Axis(0), &self.keys)
    }
}

/// Returns every head of every row of every sequence.
fn queries(spec: &AttentionSpec, sequences: &[Range<usize>], valid: Option<&[bool]>) -> Vec<Query> {
    let columns = |head: usize| head * spec.head_dim..(head + 1) * spec.head_dim;
    let mut queries = Vec::new();
    for sequence in sequences {
        for row in sequence.clone() {
            let may_attend_to = |&key: &usize| {
                let near = spec.window.is_none_or(|window| row < key + window);
                near && (key <= row || !spec.causal) && valid.is_none_or(|valid| valid[key])
            };
            for head in 0..spec.heads {
                queries.push(Query {
                    row,
                    columns: columns(head),
                    kv_columns: columns(head / (spec.heads / spec.kv_heads)),
                    keys: sequence.clone().filter(may_attend_to).collect(),
                });
            }
        }
    }
    queries
}

fn add(x: &mut Array2<f64>, row: usize, columns: &Range<usize>, term: ArrayView1<f64>) {
    for (column, term) in columns.clone().zip(term) {
        x[[row, column]] += term;
    }
}

fn check(
    name: &str,
    spec: &AttentionSpec,
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
) {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{name}: {heads} query heads are not a multiple of {kv_heads} key/value heads"
    );
    assert_eq!(q.ncols(), heads * head_dim, "{name}: the features of q and of the query heads");
    assert_eq!(k.ncols(), kv_heads * head_dim, "{name}: the features of k and of the key/value heads");
    assert_eq!(k.nrows(), q.nrows(), "{name}: the tokens of k and of q");
    assert_eq!(v.dim(), k.dim(), "{name}: the shapes of v and of k");
    if let Some(valid) = valid {
        assert_eq!(valid.len(), q.nrows(), "{name}: the tokens of valid and of q");
    }
    let mut taken = vec![false; q.nrows()];
    for sequence in sequences {
        assert!(
            sequence.start <= sequence.end && sequence.end <= q.nrows(),
            "{name}: sequence {sequence:?} is not a range of the {} rows",
            q.nrows()
        );
        for row in sequence.clone() {
            assert!(!taken[row], "{name}: row {row} is in two sequences");
            taken[row] = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, one_sequence, random};
    use ndarray::{array, concatenate, s};
    use std::f64::consts::LN_2;

    fn spec(heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> AttentionSpec {
        AttentionSpec { heads, kv_heads, head_dim, causal, window: None, scale: 0.7 }
    }

    /// q, k, v for `spec`.
    fn inputs(spec: &AttentionSpec, tokens: usize) -> (Array2<f64>, Array2<f64>, Array2<f64>) {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        (random((tokens, q), 1), random((tokens, kv), 2), random((tokens, kv), 3))
    }

    #[test]
    fn literals() {
        // One head of one feature. The scores of row 0 are [0, 0], those of row 1 [0, ln 2].
        let (q, k, v) = (array![[0.0], [2.0]], array![[0.0], [LN_2]], array![[3.0], [6.0]]);
        let spec =
            AttentionSpec { heads: 1, kv_heads: 1, head_dim: 1, causal: false, window: None, scale: 0.5 };
        let attend = |causal, valid| {
            attention(&AttentionSpec { causal, ..spec.clone() }, &q, &k, &v, &one_sequence(2), valid)
        };
        assert_close("full", &attend(false, None), &array![[4.5], [5.0]], 1e-15);
        assert_close("causal", &attend(true, None), &array![[3.0], [5.0]], 1e-15);
        assert_close("padded", &attend(false, Some(&[false, true])), &array![[6.0], [6.0]], 1e-15);
        assert_close("both", &attend(true, Some(&[false, true])), &array![[0.0], [6.0]], 1e-15);
    }

    #[test]
    fn query_head_uses_the_key_value_head_of_its_group() {
        // A sequence of one row attends to itself with weight 1, so out is v by head.
        let spec = spec(6, 2, 1, false);
        let out = attention(
            &spec,
            &random((1, 6), 1),
            &random((1, 2), 2),
            &array![[7.0, 8.0]],
            &[0..1, 1..1],
            None,
        );
        assert_eq!(out, array![[7.0, 7.0, 7.0, 8.0, 8.0, 8.0]]);
    }

    #[test]
    fn grouped_query_attention_is_multi_head_attention_with_repeated_heads() {
        let grouped = spec(4, 2, 3, true);
        let (q, k, v) = inputs(&grouped, 5);
        let repeat = |x: &Array2<f64>| {
            let (first, second) = (x.slice(s![.., 0..3]), x.slice(s![.., 3..6]));
            concatenate![Axis(1), first, first, second, second]
        };
        let expected = attention(&spec(4, 4, 3, true), &q, &repeat(&k), &repeat(&v), &one_sequence(5), None);
        assert_eq!(attention(&grouped, &q, &k, &v, &one_sequence(5), None), expected);
    }

    #[test]
    fn gradients() {
        let valid = [true, true, false, true, true, false, true];
        for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1)] {
            for causal in [false, true] {
                for valid in [None, Some(&valid[..])] {
                    let spec = spec(heads, kv_heads, 2, causal);
                    let sequences = [0..3, 4..7];
                    let (q, k, v) = inputs(&spec, 7);
                    let dout = random(q.dim(), 4);
                    let grads = attention_backward(&spec, &q, &k, &v, &sequences, valid, &dout);
                    let what = |x| format!("{x} of {spec:?}, valid {valid:?}");
                    check_gradient(&what("dq"), &q, &grads.dq, |q| {
                        loss(attention(&spec, q, &k, &v, &sequences, valid), &dout)
                    });
                    check_gradient(&what("dk"), &k, &grads.dk, |k| {
                        loss(attention(&spec, &q, k, &v, &sequences, valid), &dout)
                    });
                    check_gradient(&what("dv"), &v, &grads.dv, |v| {
                        loss(attention(&spec, &q, &k, v, &sequences, valid), &dout)
                    });
                }
            }
        }
    }

    #[test]
    fn packed_sequences_attend_as_if_apart() {
        let spec = spec(2, 1, 3, true);
        let (q, k, v) = inputs(&spec, 7);
        let packed = attention(&spec, &q, &k, &v, &[4..7, 0..3], None);
        for rows in [0..3, 4..7] {
            let of = |x: &Array2<f64>| x.slice(s![rows.clone(), ..]).to_owned();
            let apart = attention(&spec, &of(&q), &of(&k), &of(&v), &one_sequence(3), None);
            assert_eq!(of(&packed), apart);
        }
        assert!(packed.row(3).iter().all(|&out| out == 0.0), "a row outside every sequence");
    }

    #[test]
    fn what_is_not_attended_to_has_no_influence() {
        let spec = spec(2, 1, 3, true);
        let (q, mut k, mut v) = inputs(&spec, 4);
        let dout = random(q.dim(), 4);
        let valid = [true, false, true, true];
        let sequences = [0..3, 3..4];
        let expected = attention(&spec, &q, &k, &v, &sequences, Some(&valid));
        let grads = attention_backward(&spec, &q, &k, &v, &sequences, Some(&valid), &dout);
        // Row 1 is padding, and row 3 is another sequence.
        k.row_mut(1).fill(f64::NAN);
        v.row_mut(1).fill(f64::NAN);
        v.row_mut(3).fill(f64::INFINITY);
        let out = attention(&spec, &q, &k, &v, &sequences, Some(&valid));
        assert_eq!(out.slice(s![0..3, ..]), expected.slice(s![0..3, ..]));
        let after = attention_backward(&spec, &q, &k, &v, &sequences, Some(&valid), &dout);
        assert_eq!(after.dq.slice(s![0..3, ..]), grads.dq.slice(s![0..3, ..]));
        assert!(after.dk.row(1).iter().chain(after.dv.row(1)).all(|&gradient| gradient == 0.0));
    }

    #[test]
    fn a_later_row_does_not_reach_an_earlier_one_even_as_nan() {
        let spec = spec(1, 1, 2, true);
        let (q, k, mut v) = inputs(&spec, 3);
        v.row_mut(2).fill(f64::NAN);
        let out = attention(&spec, &q, &k, &v, &one_sequence(3), None);
        assert!(out.slice(s![0..2, ..]).iter().all(|out| out.is_finite()));
        assert!(out.row(2).iter().all(|out| out.is_nan()));
    }

    #[test]
    fn a_row_that_may_attend_to_none_gives_zeros() {
        let spec = spec(2, 1, 3, false);
        let (q, k, v) = inputs(&spec, 2);
        let valid = Some(&[false, false][..]);
        assert_eq!(attention(&spec, &q, &k, &v, &one_sequence(2), valid), Array2::<f64>::zeros((2, 6)));
        let grads = attention_backward(&spec, &q, &k, &v, &one_sequence(2), valid, &random((2, 6), 4));
        assert_eq!(grads.dq, Array2::<f64>::zeros((2, 6)));
        assert_eq!((grads.dk, grads.dv), (Array2::zeros((2, 3)), Array2::zeros((2, 3))));
    }

    #[test]
    #[should_panic(expected = "attention: 3 query heads are not a multiple of 2 key/value heads")]
    fn uneven_groups_panic() {
        let x = Array2::zeros((1, 3));
        attention(&spec(3, 2, 1, false), &x, &x, &x, &[], None);
    }

    #[test]
    #[should_panic(expected = "attention: row 1 is in two sequences")]
    fn overlapping_sequences_panic() {
        let x = Array2::zeros((3, 1));
        attention(&spec(1, 1, 1, false), &x, &x, &x, &[0..2, 1..3], None);
    }

    #[test]
    #[should_panic(expected = "attention: sequence 2..4 is not a range of the 3 rows")]
    fn a_sequence_beyond_the_rows_panics() {
        let x = Array2::zeros((3, 1));
        attention(&spec(1, 1, 1, false), &x, &x, &x, &[0..2, 2..4], None);
    }
}
