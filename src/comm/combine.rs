//! Gathers and reduces all ranks' inputs on the host. Every host transport uses these safe
//! functions of slices.

use super::{ReduceOp, Shards};
use crate::device::{Accumulator, Element, vectorized};
use std::ops::Range;

/// The number of elements reduced at a time. Their accumulators fit into the L1 cache.
pub(super) const BLOCK: usize = 1024;

/// recv ← the shards of all ranks, concatenated. `shard(r)` is the shard of rank r,
/// `[rows, size(r)]`.
pub(super) fn gather<'a, T: Element>(shards: &Shards, shard: impl Fn(usize) -> &'a [T], recv: &mut [T]) {
    let total = shards.partition.total();
    for rank in 0..shards.partition.shards() {
        let (from, columns) = (shard(rank), shards.partition.range(rank));
        for row in 0..shards.rows {
            let width = columns.len();
            recv[row * total..][columns.clone()].copy_from_slice(&from[row * width..(row + 1) * width]);
        }
    }
}

/// recv ← rank `rank`'s shard of the reduction. `whole(r)` is the input of rank r, `[rows, total]`.
pub(super) fn reduce_shard<'a, T: Element>(
    op: ReduceOp,
    shards: &Shards,
    rank: usize,
    whole: impl Fn(usize) -> &'a [T],
    recv: &mut [T],
) {
    let (total, columns) = (shards.partition.total(), shards.partition.range(rank));
    if columns.is_empty() {
        return;
    }
    for (row, recv) in recv.chunks_exact_mut(columns.len()).enumerate() {
        let start = row * total + columns.start;
        reduce(op, shards.partition.shards(), |rank| &whole(rank)[start..start + columns.len()], recv);
    }
}

/// to ← the reduction of `from(rank)` over `ranks` ranks, in rank order, rounded once.
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

/// to ← the first `to.len()` sums, rounded to the element type.
pub(super) fn store<T: Element>(sums: &[T::Acc; BLOCK], to: &mut [T]) {
    vectorized(|| {
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = T::narrow(*sum);
        }
    });
}

/// sums[..range.len()] ← the reduction of `from(rank)[range]` over `ranks` ranks. It adds in rank
/// order, as values of the accumulator type. `from` is a trait object, so that the loops are
/// compiled only once for each element type and `op`.
pub(super) fn reduce_block<'a, T: Element>(
    op: ReduceOp,
    ranks: usize,
    from: &dyn Fn(usize) -> &'a [T],
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
    from: &dyn Fn(usize) -> &'a [T],
    range: Range<usize>,
    sums: &mut [T::Acc; BLOCK],
    combine: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    let sums = &mut sums[..range.len()];
    let input = |rank| &from(rank)[range.clone()];
    // One closure per loop, because compilers inline only small closures into the function that
    // `vectorized` compiles for wide vector instructions.
    let first = input(0);
    if ranks == 1 {
        vectorized(|| {
            for (sum, a) in sums.iter_mut().zip(first) {
                *sum = a.widen();
            }
        });
        return;
    }
    // Reduces the first two ranks in one pass, because groups of two ranks are the most frequent.
    let second = input(1);
    vectorized(|| {
        for ((sum, a), b) in sums.iter_mut().zip(first).zip(second) {
            *sum = combine(a.widen(), b.widen());
        }
    });
    for rank in 2..ranks {
        let next = input(rank);
        vectorized(|| {
            for (sum, a) in sums.iter_mut().zip(next) {
                *sum = combine(*sum, a.widen());
            }
        });
    }
}
