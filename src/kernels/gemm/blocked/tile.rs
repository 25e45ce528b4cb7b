//! Micro-kernels: the sums of a tile of C stay in registers over the depth of a block.

use super::{
    KC, Step, V,
    vector::{Vector, prefetch},
};
use crate::{device::Accumulator, kernels::view::Dims};

/// f32 elements per cache line of 64 bytes.
const LINE: usize = 16;

/// The largest number of columns of a tile.
const WIDEST: usize = 32;

/// The memory for the sums of a block of C. Level 0 is C itself, and the partial sums are the
/// levels above.
pub(super) struct SumStack<'a, R> {
    /// The memory of C from the block's first element on.
    pub(super) c: &'a mut [R],
    pub(super) dims: Dims,
    pub(super) partials: &'a mut [R],
    /// The row stride of a partial sum.
    pub(super) cols: usize,
    /// The number of elements from one partial sum to the next.
    pub(super) area: usize,
}

impl<R> SumStack<'_, R> {
    /// The tile at a position in the block, at one level of the stack.
    #[inline(always)]
    pub(super) fn tile(
        &mut self,
        level: usize,
        (row, col): (usize, usize),
        (rows, cols): (usize, usize),
    ) -> (&mut [R], Dims) {
        if level == 0 {
            let start = row * self.dims.row_stride + col * self.dims.col_stride;
            return (&mut self.c[start..], Dims { rows, cols, ..self.dims });
        }
        let start = (level - 1) * self.area + row * self.cols + col;
        (&mut self.partials[start..], Dims { rows, cols, row_stride: self.cols, col_stride: 1 })
    }
}

/// Computes the sums of a tile: the product of MR rows of A, packed by rows, with a micro-panel of
/// B.
#[inline(always)]
pub(super) fn sums_by_rows<S: Vector, const MR: usize>(
    zero: S,
    a: &[[S::Real; KC]; MR],
    panel: &[[S; V]],
) -> [[S; V]; MR] {
    assert!(panel.len() <= KC);
    let mut sums = [[zero; V]; MR];
    let mut first = 0;
    while first < panel.len() {
        a.iter().for_each(|row| prefetch(row.as_ptr().wrapping_add(first + LINE)));
        let end = (first + LINE).min(panel.len());
        for depth in first..end {
            add_products(&mut sums, |row| zero.splat(a[row][depth]), &panel[depth]);
        }
        first = end;
    }
    sums
}

/// As [`sums_by_rows`], with A packed by columns.
#[inline(always)]
pub(super) fn sums_by_columns<S: Vector, const MR: usize>(
    zero: S,
    a: &[[S::Real; MR]],
    panel: &[[S; V]],
) -> [[S; V]; MR] {
    /// The number of columns per step. Each step prefetches the same columns of the next tile of A.
    const STEP: usize = 4;
    let mut sums = [[zero; V]; MR];
    for (a, panel) in a.chunks(STEP).zip(panel.chunks(STEP)) {
        let next = a.as_ptr().wrapping_add(KC).cast::<S::Real>();
        prefetch(next);
        prefetch(next.wrapping_add(2 * MR));
        for (a, b) in a.iter().zip(panel) {
            add_products(&mut sums, |row| zero.splat(a[row]), b);
        }
    }
    sums
}

/// sums ← sums + a bᵀ, where `a(row)` is A's element in that row, broadcast to every SIMD lane.
///
/// The inner loop uses indices, because `Zip::new` is not `#[inline]`. Without link-time
/// optimization `Zip::new` would be a call, which moves the sums out of the registers.
#[inline(always)]
fn add_products<S: Vector, const MR: usize>(sums: &mut [[S; V]; MR], a: impl Fn(usize) -> S, b: &[S; V]) {
    for (row, sums) in sums.iter_mut().enumerate() {
        let a = a(row);
        for v in 0..V {
            sums[v] = sums[v].add_product(a, b[v]);
        }
    }
}

/// Prefetches the tile's rows of C, which may be far apart, so that they arrive while the sums are
/// computed.
#[inline(always)]
pub(super) fn prefetch_c<S: Vector>((c, dims): &(&mut [S::Real], Dims)) {
    if dims.col_stride == 1 {
        for row in 0..dims.rows {
            let start = c.as_ptr().wrapping_add(row * dims.row_stride);
            // A row that does not begin at the start of a cache line spans one line more.
            (0..=V * S::LANES / LINE).for_each(|line| prefetch(start.wrapping_add(line * LINE)));
        }
    }
}

/// C ← α · sums + β C.
#[inline(always)]
pub(super) fn store<S: Vector, const MR: usize>(
    sums: &[[S; V]; MR],
    alpha: S::Real,
    beta: S::Real,
    (c, dims): (&mut [S::Real], Dims),
) {
    if is_whole::<S, MR>(dims) {
        let (alpha, factor) = (sums[0][0].splat(alpha), sums[0][0].splat(beta));
        for (row, sums) in sums.iter().enumerate() {
            let c = &mut c[row * dims.row_stride..];
            for (v, sum) in sums.iter().enumerate() {
                let (c, sum) = (&mut c[v * S::LANES..], alpha.times(*sum));
                if beta == S::Real::ZERO { sum } else { factor.times(sum.load(c)).plus(sum) }.store(c);
            }
        }
        return;
    }
    for (row, sums) in sums.iter().enumerate().take(dims.rows) {
        for (col, sum) in S::lanes(sums)[..dims.cols].iter().enumerate() {
            let c = &mut c[row * dims.row_stride + col * dims.col_stride];
            let sum = alpha * *sum;
            *c = if beta == S::Real::ZERO { sum } else { beta * *c + sum };
        }
    }
}

/// Stores the sums of a step that merges levels of the stack. Multiplies the sums by α, adds the
/// step's own level if the step accumulates, and then adds the `merges` levels below, the nearest
/// level first. The result goes to the lowest of these levels.
#[inline(always)]
pub(super) fn merge<S: Vector, T, const MR: usize>(
    mut sums: [[S; V]; MR],
    (step, alpha): (&Step<'_, T>, S::Real),
    stack: &mut SumStack<'_, S::Real>,
    (place, size): ((usize, usize), (usize, usize)),
) {
    let alpha = sums[0][0].splat(alpha);
    sums.as_flattened_mut().iter_mut().for_each(|sum| *sum = alpha.times(*sum));
    let to = step.level - step.merges;
    let above = if step.accumulates { step.level + 1 } else { step.level };
    for level in (to..above).rev() {
        let (below, dims) = stack.tile(level, place, size);
        for (row, sums) in sums.iter_mut().enumerate().take(dims.rows) {
            let mut ragged = [S::Real::ZERO; WIDEST];
            let mut below = &below[row * dims.row_stride..];
            if !is_whole::<S, MR>(dims) {
                for (col, to) in ragged.iter_mut().enumerate().take(dims.cols) {
                    *to = below[col * dims.col_stride];
                }
                below = &ragged;
            }
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = sum.load(&below[v * S::LANES..]).plus(*sum);
            }
        }
    }
    store(&sums, S::Real::ONE, S::Real::ZERO, stack.tile(to, place, size));
}

/// Whether a tile is complete and row-major.
#[inline(always)]
fn is_whole<S: Vector, const MR: usize>(dims: Dims) -> bool {
    dims.rows == MR && dims.cols == V * S::LANES && dims.col_stride == 1
}
