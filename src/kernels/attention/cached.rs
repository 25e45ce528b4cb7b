//! Attention to a KV cache on the CPU.
//!
//! One query per sequence (decoding) reads the cache in place. Up to [`MAX_ROWS`] query heads of a
//! key/value head share one pass over the cache. Several queries per sequence (prefill) are
//! computed in tiles, as in training.

use super::{AttentionSpec, CacheSpec, softmax::softmax_row};
use crate::{
    device::{Accumulator, Cpu, CpuBuffer, Device, Element, vectorized},
    error::Result,
    kernels::{
        MatMut, MatRef,
        gemm::{
            cpu::by_blocks,
            skinny::{self, MAX_ROWS, Scale},
        },
        view::{mat, mat_mut},
    },
};
use std::ops::Range;

/// The number of queries per tile.
const TILE: usize = 128;

pub(super) fn attention<T: Element>(
    cpu: &Cpu,
    spec: &AttentionSpec<'_>,
    cache: &CacheSpec<'_>,
    q: MatRef<'_, T, Cpu>,
    k: MatRef<'_, T, Cpu>,
    v: MatRef<'_, T, Cpu>,
    mut out: MatMut<'_, T, Cpu>,
) -> Result<()> {
    let dim = spec.heads.head_dim;
    for (sequence, rows) in spec.sequences.iter().enumerate() {
        if rows.is_empty() {
            continue;
        }
        let start = spec.sequences.start(sequence);
        let end = start + rows.len();
        let mut head = 0;
        while head < spec.heads.kv_of_query.len() {
            // Adjacent query heads with the same key/value head are computed together.
            let kv = spec.heads.kv_of_query[head];
            let sharing = spec.heads.kv_of_query[head..].iter().take_while(|&&other| other == kv).count();
            let first = cache.row(spec, cache.slots[sequence], kv);
            let seen = spec.first_key(start)..end;
            let in_cache = first + seen.start..first + seen.end;
            let (k, v) = (k.block(in_cache.clone(), 0..dim), v.block(in_cache, 0..dim));
            if rows.len() == 1 {
                let columns = head * dim..(head + sharing) * dim;
                let q = q.block(rows.clone(), columns.clone());
                one_token(cpu, (spec, cache.capacity), q, k, v, &mut out.row(rows.start)[columns])?;
            } else {
                let (keys, values) = (ContiguousRows::of(cpu, k)?, ContiguousRows::of(cpu, v)?);
                for head in head..head + sharing {
                    let columns = head * dim..(head + 1) * dim;
                    let queries = Queries { start, rows: rows.clone(), columns, seen: seen.clone() };
                    tiles(cpu, spec, &queries, q, keys.all(), values.all(), &mut out)?;
                }
            }
            head += sharing;
        }
    }
    Ok(())
}

/// Attention of one row for the query heads that share a key/value head. `q`: `[1, heads · dim]`;
/// `k`, `v`: `[positions, dim]`.
fn one_token<T: Element>(
    cpu: &Cpu,
    (spec, capacity): (&AttentionSpec<'_>, usize),
    q: MatRef<'_, T, Cpu>,
    k: MatRef<'_, T, Cpu>,
    v: MatRef<'_, T, Cpu>,
    out: &mut [T],
) -> Result<()> {
    let (seen, dim) = (k.rows(), spec.heads.head_dim);
    for (q, out) in q.row(0).chunks(MAX_ROWS * dim).zip(out.chunks_mut(MAX_ROWS * dim)) {
        let heads = q.len() / dim;
        // Allocates for the full capacity, so that every token asks for the same size and the pool
        // reuses the memory.
        let mut scores = cpu.empty::<T::Acc>(heads * capacity)?;
        let scores = &mut scores[..heads * seen];
        let score = Scale { alpha: T::Acc::from_f64(spec.heads.scale()), beta: T::Acc::ZERO };
        let q = mat(q, heads, dim)?;
        let dims = mat_mut(scores, heads, seen)?.dims();
        skinny::multiply((q.dims(), q.data()), (k.t().dims(), k.data()), (dims, scores), score, &mut []);
        vectorized(|| {
            for row in scores.chunks_exact_mut(seen) {
                softmax_row(row, seen, None);
            }
        });
        let plain = Scale { alpha: T::Acc::ONE, beta: T::Acc::ZERO };
        let to = mat_mut(out, heads, dim)?.dims();
        let mut sums = cpu.empty::<T::Acc>(skinny::workspace(v.dims(), to))?;
        skinny::multiply((dims, scores), (v.dims(), v.data()), (to, out), plain, &mut sums);
    }
    Ok(())
}

/// The queries of one head, and the keys that they attend to.
struct Queries {
    /// The position of the first query.
    start: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    /// The positions of the keys that [`tiles`] receives.
    seen: Range<usize>,
}

fn tiles<T: Element>(
    cpu: &Cpu,
    spec: &AttentionSpec<'_>,
    queries: &Queries,
    q: MatRef<'_, T, Cpu>,
    keys: &[T::Acc],
    values: &[T::Acc],
    out: &mut MatMut<'_, T, Cpu>,
) -> Result<()> {
    let Queries { start, rows, columns, seen } = queries;
    let dim = spec.heads.head_dim;
    // A masked weight is 0, but 0 · NaN is NaN. So if a value is not finite, each query is computed
    // alone, with its visible keys only.
    let finite =
        vectorized(|| values.iter().fold(T::Acc::ZERO, |sum, x| sum + *x * T::Acc::ZERO)) == T::Acc::ZERO;
    let most = if finite { TILE.min(rows.len()) } else { 1 };
    let mut wide = cpu.empty::<T::Acc>(most * dim)?;
    let mut scores = cpu.empty::<T::Acc>(most * seen.len())?;
    let mut result = cpu.empty::<T::Acc>(most * dim)?;
    for tile in (0..rows.len()).step_by(most) {
        let count = most.min(rows.len() - tile);
        for (row, wide) in wide.chunks_exact_mut(dim).enumerate().take(count) {
            for (to, from) in wide.iter_mut().zip(&q.row(rows.start + tile + row)[columns.clone()]) {
                *to = from.widen();
            }
        }
        // `first` and `end` are relative to the first key in `keys`.
        let first = spec.first_key(start + tile) - seen.start;
        let end = start + tile + count - seen.start;
        let len = end - first;
        let (keys, values) = (mat(&keys[first * dim..], len, dim)?, mat(&values[first * dim..], len, dim)?);
        let scores_mat = mat_mut(&mut scores, count, len)?;
        by_blocks(cpu, spec.heads.scale(), mat(&wide, count, dim)?, keys.t(), 0.0, scores_mat)?;
        vectorized(|| {
            for (row, scores) in scores[..count * len].chunks_exact_mut(len).enumerate() {
                let query = start + tile + row;
                let from = spec.first_key(query) - seen.start - first;
                scores[..from].fill(T::Acc::ZERO);
                softmax_row(&mut scores[from..], query + 1 - seen.start - first - from, None);
            }
        });
        by_blocks(cpu, 1.0, mat(&scores, count, len)?, values, 0.0, mat_mut(&mut result, count, dim)?)?;
        for (row, result) in result.chunks_exact(dim).enumerate().take(count) {
            for (to, from) in out.row(rows.start + tile + row)[columns.clone()].iter_mut().zip(result) {
                *to = T::narrow(*from);
            }
        }
    }
    Ok(())
}

/// Contiguous rows of accumulator values. They are borrowed if the source's rows are contiguous and
/// have the accumulator type, else copied.
enum ContiguousRows<'a, A: Accumulator> {
    Borrowed(&'a [A]),
    Copied(CpuBuffer<A>),
}

impl<'a, A: Accumulator> ContiguousRows<'a, A> {
    fn of<T: Element<Acc = A>>(cpu: &Cpu, from: MatRef<'a, T, Cpu>) -> Result<Self> {
        let len = from.rows() * from.cols();
        if let (true, Some(there)) =
            (from.dims().row_stride == from.cols(), A::of_ref::<Cpu>(T::any_ref::<Cpu>(from.data())))
        {
            return Ok(Self::Borrowed(&there[..len]));
        }
        let mut copy = cpu.empty::<A>(len)?;
        vectorized(|| {
            for (row, to) in copy.chunks_exact_mut(from.cols()).enumerate() {
                for (to, from) in to.iter_mut().zip(from.row(row)) {
                    *to = from.widen();
                }
            }
        });
        Ok(Self::Copied(copy))
    }

    fn all(&self) -> &[A] {
        match self {
            Self::Borrowed(all) => all,
            Self::Copied(all) => all,
        }
    }
}
