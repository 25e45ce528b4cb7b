//! What a rank computes from all ranks' inputs: safe functions of slices, the same for every way the inputs arrive.

use super::{ReduceOp, Shards};
use crate::device::{Accumulator, Element, vectorized};
use std::ops::Range;

/// Elements that are reduced at a time: their accumulators stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// recv ← all ranks' parts side by side. `part(r)` is rank r's `[rows, size(r)]`.
pub(super) fn gather<'a, T: Element>(parts: &Shards, part: impl Fn(usize) -> &'a [T], recv: &mut [T]) {
    let total = parts.partition.total();
    for rank in 0..parts.partition.shards() {
        let (from, columns) = (part(rank), parts.partition.range(rank));
        for row in 0..parts.rows {
            let width = columns.len();
            recv[row * total..][columns.clone()].copy_from_slice(&from[row * width..(row + 1) * width]);
        }
    }
}

/// recv ← rank `rank`'s part of the reduction. `whole(r)` is rank r's `[rows, total]`.
pub(super) fn reduce_part<'a, T: Element>(
    op: ReduceOp,
    parts: &Shards,
    rank: usize,
    whole: impl Fn(usize) -> &'a [T],
    recv: &mut [T],
) {
    let (total, columns) = (parts.partition.total(), parts.partition.range(rank));
    if columns.is_empty() {
        return;
    }
    for (row, recv) in recv.chunks_exact_mut(columns.len()).enumerate() {
        let start = row * total + columns.start;
        reduce(op, parts.partition.shards(), |rank| &whole(rank)[start..start + columns.len()], recv);
    }
}

/// to ← the reduction over `ranks` ranks of `from(rank)`, in rank order.
pub(super) fn reduce<'a, T: Element>(
    op: ReduceOp,
    ranks: usize,
    from: impl Fn(usize) -> &'a [T],
    to: &mut [T],
) {
    let mut sums = [T::Acc::ZERO; BLOCK];
    for (at, to) in to.chunks_mut(BLOCK).enumerate() {
        let range = at * BLOCK..at * BLOCK + to.len();
        reduce_block(op, ranks, &from, range, &mut sums);
        store(&sums, to);
    }
}

/// to ← as many sums, rounded.
pub(super) fn store<T: Element>(sums: &[T::Acc; BLOCK], to: &mut [T]) {
    vectorized(|| {
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = T::narrow(*sum);
        }
    });
}

/// sums[..range.len()] ← the reduction over `ranks` ranks of `from(rank)[range]`, in rank order, in the accumulator.
pub(super) fn reduce_block<'a, T: Element>(
    op: ReduceOp,
    ranks: usize,
    from: &impl Fn(usize) -> &'a [T],
    range: Range<usize>,
    sums: &mut [T::Acc; BLOCK],
) {
    match op {
        ReduceOp::Sum => fold(ranks, from, range, sums, |a, b| a + b),
        ReduceOp::Max => fold(ranks, from, range, sums, T::Acc::max_nan),
        ReduceOp::Min => fold(ranks, from, range, sums, T::Acc::min_nan),
    }
}

#[inline(always)]
fn fold<'a, T: Element>(
    ranks: usize,
    from: &impl Fn(usize) -> &'a [T],
    range: Range<usize>,
    sums: &mut [T::Acc; BLOCK],
    combine: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    let sums = &mut sums[..range.len()];
    let part = |rank| &from(rank)[range.clone()];
    // A closure for each loop: compilers put only small ones into the function with the wider instructions.
    let first = part(0);
    if ranks == 1 {
        vectorized(|| {
            for (sum, a) in sums.iter_mut().zip(first) {
                *sum = a.widen();
            }
        });
        return;
    }
    // Two ranks, the most frequent number, in one pass.
    let second = part(1);
    vectorized(|| {
        for ((sum, a), b) in sums.iter_mut().zip(first).zip(second) {
            *sum = combine(a.widen(), b.widen());
        }
    });
    for rank in 2..ranks {
        let next = part(rank);
        vectorized(|| {
            for (sum, a) in sums.iter_mut().zip(next) {
                *sum = combine(*sum, a.widen());
            }
        });
    }
}
