//! Attention on the CPU: multiplies each tile of queries with all keys that these queries may
//! attend to.
//!
//! The kernels copy each head out of the fused projection and widen it to the accumulator type, so
//! that products run on short contiguous rows. In causal attention, they multiply a tile of queries
//! only with the keys up to the tile's last query.
//!
//! Masked values must have no influence. Their weight is 0, but 0 · NaN and 0 · ∞ are NaN. So the
//! kernels copy padding as zeros. The backward also copies queries without visible keys as zeros.
//! If a number is not finite, causal attention uses tiles of one query, because a single query
//! attends to every key that it is multiplied with.

use super::{
    Attention, AttentionSpec, CacheSpec, cached, check, check_append, check_cached, flops,
    softmax::{softmax_row, weights_row},
};
use crate::{
    device::{Accumulator, Cpu, CpuBuffer, Device, Element, vectorized},
    error::{Result, same_size},
    kernels::{
        MatMut, MatRef,
        gemm::cpu::by_blocks,
        lanes::lane_sum,
        view::{mat, mat_mut, unit_columns},
    },
};
use std::ops::Range;

/// The number of queries per tile. 128 rows of scores for 2048 keys take 1 MiB in f32.
const TILE: usize = 128;

impl Attention for Cpu {
    #[inline(never)]
    fn attention<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        mut out: MatMut<'_, T, Self>,
        lse: &mut [T::Acc],
    ) -> Result<()> {
        let kv_like = [("k", k.dims()), ("v", v.dims())];
        check("attention", spec, &[("q", q.dims()), ("out", out.dims())], &kv_like, lse.len())?;
        self.count(flops::forward(spec));
        let (heads, dim) = (spec.heads.kv_of_query.len(), spec.heads.head_dim);
        let longest = spec.sequences.iter().map(|rows| rows.len()).max().unwrap_or(0);
        let mut scores = self.empty::<T::Acc>(TILE.min(longest) * longest)?;
        let mut result = self.empty::<T::Acc>(TILE.min(longest) * dim)?;
        for rows in spec.sequences.iter() {
            for kv in 0..spec.heads.kv_heads {
                let attended = |row: usize| spec.attended(row);
                let keys = widened(self, k, rows.clone(), kv, dim, attended)?;
                let values = widened(self, v, rows.clone(), kv, dim, attended)?;
                let at_a_time = tile_len(spec, &[&values]);
                for head in heads_of(spec, kv) {
                    let queries = widened(self, q, rows.clone(), head, dim, |_| true)?;
                    for tile in tiles(rows.len(), at_a_time) {
                        let mask = TileMask::of(spec, &rows, &tile);
                        let (first, seen) = (mask.keys.start * dim, mask.keys.len());
                        let queries = mat(&queries[tile.start * dim..], tile.len(), dim)?;
                        let (keys, values) =
                            (mat(&keys[first..], seen, dim)?, mat(&values[first..], seen, dim)?);
                        let scores_mat = mat_mut(&mut scores, tile.len(), seen)?;
                        by_blocks(self, spec.heads.scale(), queries, keys.t(), 0.0, scores_mat)?;
                        vectorized(|| {
                            for (at, row) in scores[..tile.len() * seen].chunks_exact_mut(seen).enumerate() {
                                lse[(rows.start + tile.start + at) * heads + head] = mask.softmax(at, row);
                            }
                        });
                        let weights = mat(&scores, tile.len(), seen)?;
                        by_blocks(self, 1.0, weights, values, 0.0, mat_mut(&mut result, tile.len(), dim)?)?;
                        for (at, result) in result[..tile.len() * dim].chunks_exact(dim).enumerate() {
                            let row =
                                &mut out.row(rows.start + tile.start + at)[head * dim..(head + 1) * dim];
                            narrow(result, row);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn attention_backward<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatRef<'_, T, Self>,
        lse: &[T::Acc],
        dout: MatRef<'_, T, Self>,
        mut dqkv: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "attention backward";
        let query_like = [("q", q.dims()), ("out", out.dims()), ("dout", dout.dims())];
        check(OP, spec, &query_like, &[("k", k.dims()), ("v", v.dims())], lse.len())?;
        let (heads, dim) = (spec.heads.kv_of_query.len(), spec.heads.head_dim);
        unit_columns(OP, dqkv.dims())?;
        same_size(OP, "rows of the gradient", dqkv.rows(), "rows of q", q.rows())?;
        let width = (heads + 2 * spec.heads.kv_heads) * dim;
        same_size(OP, "columns of the gradient", dqkv.cols(), "those of q, k and v", width)?;
        self.count(flops::backward(spec));
        let longest = spec.sequences.iter().map(|rows| rows.len()).max().unwrap_or(0);
        let tile_rows = TILE.min(longest);
        let mut weights = self.empty::<T::Acc>(tile_rows * longest)?;
        let mut dweights = self.empty::<T::Acc>(tile_rows * longest)?;
        let mut dqueries = self.empty::<T::Acc>(tile_rows * dim)?;
        let mut dkeys = self.empty::<T::Acc>(longest * dim)?;
        let mut dvalues = self.empty::<T::Acc>(longest * dim)?;
        for rows in spec.sequences.iter() {
            for kv in 0..spec.heads.kv_heads {
                let attended = |row: usize| spec.attended(row);
                let keys = widened(self, k, rows.clone(), kv, dim, attended)?;
                let values = widened(self, v, rows.clone(), kv, dim, attended)?;
                dkeys.fill(T::Acc::ZERO);
                dvalues.fill(T::Acc::ZERO);
                for head in heads_of(spec, kv) {
                    let attends = |row: usize| lse[row * heads + head] != -T::Acc::NEG_INFINITY;
                    let queries = widened(self, q, rows.clone(), head, dim, attends)?;
                    let outs = widened(self, out, rows.clone(), head, dim, attends)?;
                    let douts = widened(self, dout, rows.clone(), head, dim, attends)?;
                    let at_a_time = tile_len(spec, &[&keys, &queries, &douts]);
                    for tile in tiles(rows.len(), at_a_time) {
                        let mask = TileMask::of(spec, &rows, &tile);
                        let (first, seen) = (mask.keys.start * dim, mask.keys.len());
                        let count = tile.len() * seen;
                        let queries = mat(&queries[tile.start * dim..], tile.len(), dim)?;
                        let dout = mat(&douts[tile.start * dim..], tile.len(), dim)?;
                        let (keys, values) =
                            (mat(&keys[first..], seen, dim)?, mat(&values[first..], seen, dim)?);
                        // P = e^(score − lse), where the scores have the same bits as in the
                        // forward.
                        by_blocks(
                            self,
                            spec.heads.scale(),
                            queries,
                            keys.t(),
                            0.0,
                            mat_mut(&mut weights, tile.len(), seen)?,
                        )?;
                        vectorized(|| {
                            for (at, row) in weights[..count].chunks_exact_mut(seen).enumerate() {
                                let lse = lse[(rows.start + tile.start + at) * heads + head];
                                mask.weights(at, row, lse);
                            }
                        });
                        let p = mat(&weights, tile.len(), seen)?;
                        by_blocks(self, 1.0, p.t(), dout, 1.0, mat_mut(&mut dvalues[first..], seen, dim)?)?;
                        by_blocks(
                            self,
                            1.0,
                            dout,
                            values.t(),
                            0.0,
                            mat_mut(&mut dweights, tile.len(), seen)?,
                        )?;
                        vectorized(|| {
                            for (at, (p, dp)) in weights[..count]
                                .chunks_exact_mut(seen)
                                .zip(dweights.chunks_exact(seen))
                                .enumerate()
                            {
                                let token = (tile.start + at) * dim;
                                let (o, d) = (&outs[token..token + dim], &douts[token..token + dim]);
                                let sum = lane_sum([o, d], |[o, d]| o * d);
                                let seen = mask.seen(at);
                                for (p, dp) in p[seen.clone()].iter_mut().zip(&dp[seen]) {
                                    *p = *p * (*dp - sum);
                                }
                            }
                        });
                        let ds = mat(&weights, tile.len(), seen)?;
                        by_blocks(
                            self,
                            spec.heads.scale(),
                            ds,
                            keys,
                            0.0,
                            mat_mut(&mut dqueries, tile.len(), dim)?,
                        )?;
                        by_blocks(
                            self,
                            spec.heads.scale(),
                            ds.t(),
                            queries,
                            1.0,
                            mat_mut(&mut dkeys[first..], seen, dim)?,
                        )?;
                        for (at, dq) in dqueries[..tile.len() * dim].chunks_exact(dim).enumerate() {
                            let row = dqkv.row(rows.start + tile.start + at);
                            narrow(dq, &mut row[head * dim..(head + 1) * dim]);
                        }
                    }
                }
                let grads = dkeys.chunks_exact_mut(dim).zip(dvalues.chunks_exact_mut(dim));
                for (row, (dk, dv)) in rows.clone().zip(grads) {
                    if !spec.attended(row) {
                        dk.fill(T::Acc::ZERO);
                        dv.fill(T::Acc::ZERO);
                    }
                    let row = dqkv.row(row);
                    let (dk_at, dv_at) = ((heads + kv) * dim, (heads + spec.heads.kv_heads + kv) * dim);
                    narrow(dk, &mut row[dk_at..dk_at + dim]);
                    narrow(dv, &mut row[dv_at..dv_at + dim]);
                }
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn append_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        mut keys: MatMut<'_, T, Self>,
        mut values: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let from = [("k", k.dims()), ("v", v.dims())];
        check_append(spec, cache, from, [("the keys", keys.dims()), ("the values", values.dims())])?;
        for (at, rows) in spec.sequences.iter().enumerate() {
            for kv in 0..spec.heads.kv_heads {
                let columns = kv * spec.heads.head_dim..(kv + 1) * spec.heads.head_dim;
                let first = cache.row(spec, cache.slots[at], kv) + spec.sequences.start(at);
                for (to, row) in (first..).zip(rows.clone()) {
                    keys.row(to).copy_from_slice(&k.row(row)[columns.clone()]);
                    values.row(to).copy_from_slice(&v.row(row)[columns.clone()]);
                }
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn attention_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let kv_like = [("the keys", k.dims()), ("the values", v.dims())];
        check_cached(spec, cache, &[("q", q.dims()), ("out", out.dims())], &kv_like)?;
        self.count(flops::cached(spec));
        cached::attention(self, spec, cache, q, k, v, out)
    }
}

/// The query heads that use a key/value head.
fn heads_of<'a>(spec: &AttentionSpec<'a>, kv: usize) -> impl Iterator<Item = usize> + 'a {
    let kv_of_query = &spec.heads.kv_of_query;
    (0..kv_of_query.len()).filter(move |&head| kv_of_query[head] == kv)
}

/// Splits the queries of a sequence into tiles.
fn tiles(len: usize, tile: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(tile).map(move |start| start..len.min(start + tile))
}

/// The number of queries per tile. `factors` are the matrices that are multiplied with masked
/// weights.
fn tile_len<A: Accumulator>(spec: &AttentionSpec<'_>, factors: &[&[A]]) -> usize {
    // 0 · x is 0, or NaN if x is not finite.
    let finite = |factor: &&[A]| vectorized(|| lane_sum([*factor], |[x]| x * A::ZERO)) == A::ZERO;
    if !spec.heads.choices.causal || factors.iter().all(finite) { TILE } else { 1 }
}

/// The mask of a tile of queries.
struct TileMask<'a> {
    /// The keys that at least one query of the tile attends to, as indices in the sequence.
    keys: Range<usize>,
    /// The index in `keys` of the tile's first query, if attention is causal.
    causal: Option<usize>,
    /// The largest number of keys that one query attends to.
    window: usize,
    /// One flag per key: false for padding.
    valid: Option<&'a [bool]>,
}

impl<'a> TileMask<'a> {
    fn of(spec: &AttentionSpec<'a>, rows: &Range<usize>, tile: &Range<usize>) -> Self {
        let keys = spec.first_key(tile.start)..if spec.heads.choices.causal { tile.end } else { rows.len() };
        let valid =
            spec.sequences.valid().map(|valid| &valid[rows.start + keys.start..rows.start + keys.end]);
        let causal = spec.heads.choices.causal.then_some(tile.start - keys.start);
        Self { keys, causal, window: spec.heads.choices.window.unwrap_or(usize::MAX), valid }
    }

    /// The keys that the query in this row of the tile attends to, as indices into `keys`. Includes
    /// padding.
    #[inline(always)]
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.causal.map_or(self.keys.len(), |first| first + row + 1);
        end.saturating_sub(self.window)..end
    }

    /// Softmax of a row of scores, in place. Returns log Σ e^score.
    #[inline(always)]
    fn softmax<A: Accumulator>(&self, at: usize, row: &mut [A]) -> A {
        let seen = self.seen(at);
        row[..seen.start].fill(A::ZERO);
        let valid = self.valid.map(|valid| &valid[seen.start..]);
        softmax_row(&mut row[seen.start..], seen.len(), valid)
    }

    /// Replaces the scores of a row by their softmax weights e^(score − lse).
    #[inline(always)]
    fn weights<A: Accumulator>(&self, at: usize, row: &mut [A], lse: A) {
        let seen = self.seen(at);
        row[..seen.start].fill(A::ZERO);
        let valid = self.valid.map(|valid| &valid[seen.start..]);
        weights_row(&mut row[seen.start..], seen.len(), valid, lse);
    }
}

/// Copies one head of some rows to contiguous rows of accumulator values. Rows for which
/// `takes_part` is false become 0.
fn widened<T: Element>(
    cpu: &Cpu,
    from: MatRef<'_, T, Cpu>,
    rows: Range<usize>,
    head: usize,
    dim: usize,
    takes_part: impl Fn(usize) -> bool,
) -> Result<CpuBuffer<T::Acc>> {
    let mut to = cpu.empty::<T::Acc>(rows.len() * dim)?;
    vectorized(|| {
        for (row, to) in rows.zip(to.chunks_exact_mut(dim)) {
            if !takes_part(row) {
                to.fill(T::Acc::ZERO);
                continue;
            }
            for (to, from) in to.iter_mut().zip(&from.row(row)[head * dim..(head + 1) * dim]) {
                *to = from.widen();
            }
        }
    });
    Ok(to)
}

fn narrow<T: Element>(from: &[T::Acc], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::narrow(*from);
    }
}
