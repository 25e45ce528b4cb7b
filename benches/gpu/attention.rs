//! Causal attention of grouped heads, forward and backward.

use crate::{
    data::to_host,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result, Tensor,
    kernels::{Attention, AttentionChoices, AttentionSpec, QkvHeads},
    shard::Sequences,
};
use std::rc::Rc;

/// The numbers of query heads and of key/value heads.
pub(crate) fn heads(bench: &Bench) -> (usize, usize) {
    bench.pick((4, 2), (32, 8))
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (tokens, lengths) = bench.pick((128, [32, 64, 128]), (16384, [1024, 4096, 16384]));
    for dim in [64, 128] {
        for length in lengths {
            attend(bench, dim, length, tokens / length)?;
        }
    }
    Ok(())
}

/// Takes a sum and the sum of the squares of its terms. Returns the sum and its tolerance, which
/// covers the rounding of the sum and of the bf16 factor in each term.
fn near((sum, squares): (f64, f64)) -> (f64, f64) {
    (sum, sum.abs() / 128.0 + squares.sqrt() / 64.0)
}

/// Returns the softmax weights of the keys that a query attends to.
pub(crate) fn weights(q: &[f64], keys: &[f64], scale: f64) -> Vec<f64> {
    let score = |key: &[f64]| scale * q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
    let scores: Vec<f64> = keys.chunks(q.len()).map(score).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    scores.iter().map(|score| (score - most).exp() / total).collect()
}

/// Returns the weighted sum of vectors, with a tolerance for each feature.
pub(crate) fn weighted<'a>(
    weights: &[f64],
    vectors: impl Iterator<Item = &'a [f64]>,
    dim: usize,
) -> Vec<(f64, f64)> {
    let mut sums = vec![(0.0, 0.0); dim];
    for (weight, vector) in weights.iter().zip(vectors) {
        for ((sum, squares), x) in sums.iter_mut().zip(vector) {
            *sum += weight * x;
            *squares += (weight * x) * (weight * x);
        }
    }
    sums.into_iter().map(near).collect()
}

/// Returns causal attention with scale 1 / √dim and equally many query heads per key/value head.
pub(crate) fn causal(heads: usize, kv_heads: usize, head_dim: usize) -> QkvHeads {
    let kv_of_query = (0..heads).map(|head| head / (heads / kv_heads)).collect();
    QkvHeads { kv_of_query, kv_heads, head_dim, choices: AttentionChoices::CAUSAL }
}

fn attend(bench: &mut Bench, dim: usize, length: usize, count: usize) -> Result<()> {
    let shape = format!("D {dim} S {length} x {count}");
    bench.case(&format!("attention bf16 {shape}"), |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let (heads, kv_heads) = heads(bench);
        let (rows, sharing) = (length * count, heads / kv_heads);
        let (attending, sequences) = (causal(heads, kv_heads, dim), Sequences::packed(vec![length; count]));
        let spec = AttentionSpec { heads: &attending, sequences: &sequences };
        let scale = attending.scale();
        // q, k and v are adjacent columns, as a fused projection writes them.
        let qkv = data.fill::<bf16>([rows, (heads + 2 * kv_heads) * dim], 1.0)?;
        let (k_at, v_at) = (heads * dim, (heads + kv_heads) * dim);
        let (q, k) = (qkv.mat().columns(0..k_at), qkv.mat().columns(k_at..v_at));
        let v = qkv.mat().columns(v_at..v_at + kv_heads * dim);
        let mut out = Tensor::<bf16, _>::empty(&cuda, [rows, heads * dim])?;
        let mut lse = Tensor::<f32, _>::empty(&cuda, [rows, heads])?;
        let flops = 2.0 * (length * length * dim * heads * count) as f64;
        let bytes = 2.0 * (qkv.len() + out.len()) as f64;
        let forward = format!("attention forward bf16 {shape}");
        bench.time(&forward, Cost { bytes, flops }, |_| {
            cuda.attention(&spec, q, k, v, out.mat_mut()?, lse.slice_mut()?)
        })?;
        let dout = data.fill::<bf16>([rows, heads * dim], 1.0)?;
        let mut dqkv = Tensor::<bf16, _>::empty(&cuda, [rows, qkv.shape().cols()])?;
        let backward = format!("attention backward bf16 {shape}");
        bench.time(&backward, Cost { bytes: 2.0 * bytes, flops: 2.5 * flops }, |_| {
            cuda.attention_backward(&spec, q, k, v, out.mat(), lse.slice(), dout.mat(), dqkv.mat_mut()?)
        })?;

        // Checks the last sequence, for the first and the last key/value head.
        let first = rows - length;
        for kv in [0, kv_heads - 1] {
            let head_of =
                |all: &Tensor<bf16, _>, rows, at: usize| to_host(all.mat().block(rows, at..at + dim), &cuda);
            let keys = head_of(&qkv, first..rows, k_at + kv * dim)?;
            let values = head_of(&qkv, first..rows, v_at + kv * dim)?;
            // Returns the query, its output gradient, its softmax weights, its output and the
            // gradients of its scores.
            let of_query = |query: usize, head: usize| -> Result<_> {
                let row = first + query..first + query + 1;
                let (q, dout) = (head_of(&qkv, row.clone(), head * dim)?, head_of(&dout, row, head * dim)?);
                let p = weights(&q, &keys[..(query + 1) * dim], scale);
                let out = weighted(&p, values.chunks(dim), dim);
                let along: f64 = out.iter().zip(&dout).map(|((out, _), dout)| out * dout).sum();
                let dp = |v: &[f64]| v.iter().zip(&dout).map(|(v, d)| v * d).sum::<f64>();
                let ds: Vec<f64> =
                    p.iter().zip(values.chunks(dim)).map(|(p, v)| scale * p * (dp(v) - along)).collect();
                Ok((q, dout, p, out, ds))
            };
            for (query, head) in [(length / 2, kv * sharing), (length - 1, (kv + 1) * sharing - 1)] {
                let (_, _, _, want, ds) = of_query(query, head)?;
                let row = first + query..first + query + 1;
                bench.expect(&forward, &head_of(&out, row.clone(), head * dim)?, &want)?;
                bench.expect(
                    &backward,
                    &head_of(&dqkv, row, head * dim)?,
                    &weighted(&ds, keys.chunks(dim), dim),
                )?;
            }
            // Checks a key that only the last queries attend to.
            let key = length - 4;
            let (mut ds_of, mut p_of, mut queries, mut douts) = (vec![], vec![], vec![], vec![]);
            for head in kv * sharing..(kv + 1) * sharing {
                for query in key..length {
                    let (q, dout, p, _, ds) = of_query(query, head)?;
                    ds_of.push(ds[key]);
                    p_of.push(p[key]);
                    queries.push(q);
                    douts.push(dout);
                }
            }
            for (weights, vectors, at) in [(ds_of, queries, k_at), (p_of, douts, v_at)] {
                let want = weighted(&weights, vectors.iter().map(Vec::as_slice), dim);
                let row = first + key..first + key + 1;
                bench.expect(&backward, &head_of(&dqkv, row, at + kv * dim)?, &want)?;
            }
        }
        Ok(())
    })
}
