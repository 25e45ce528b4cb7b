//! Skinny GEMM on the CPU: products of at most [`MAX_ROWS`] rows, as in decoding one token at a
//! time. Such a product takes as long as reading B once.
//!
//! The order in which an element of C is summed depends only on the depth and on whether B is
//! row-major. It does not depend on the number of rows and columns, nor on which of them are
//! computed together. So splitting a product by rows or columns leaves the bits unchanged.

use super::blocked::prefetch;
use crate::{
    device::{Accumulator, Element, Kernel, vectorized, widest},
    kernels::view::Dims,
};

/// The largest number of rows of A. With more rows, the blocked product is faster.
pub(in crate::kernels) const MAX_ROWS: usize = 8;

/// The number of partial sums of a dot product, as in `kernels::lanes`. Each is a lane of a SIMD
/// vector.
const LANES: usize = 16;

/// The number of columns of B whose dot products are computed together. Their sums are independent,
/// which hides the latency of additions.
const COLS: usize = 4;

/// The number of rows of A whose dot products are computed together, so that each element of B is
/// widened once for all of them.
const ROWS: usize = 4;

/// The number of rows of B that are added in one pass over the sums.
const STREAMS: usize = 4;

/// The number of columns of C whose sums stay in cache while rows of B are read.
const BLOCK: usize = 1024;

/// How to store a sum: C ← α · sum + β C.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Scale<A> {
    pub(in crate::kernels) alpha: A,
    pub(in crate::kernels) beta: A,
}

impl<A: Accumulator> Scale<A> {
    #[inline(always)]
    fn store<C: Element<Acc = A>>(self, to: &mut C, sum: A) {
        let sum = self.alpha * sum;
        *to = C::narrow(if self.beta == A::ZERO { sum } else { sum + self.beta * to.widen() });
    }
}

/// Whether A is row-major with at most [`MAX_ROWS`] rows and B has unit stride in one dimension. A
/// column-major A does not qualify, even if it has a single row and is therefore contiguous. The
/// same row of a taller column-major A would not qualify either, and splitting a product must not
/// change the bits.
pub(in crate::kernels) fn fits(a: Dims, b: Dims) -> bool {
    ((a.col_stride == 1 && a.row_stride != 1) || a.cols <= 1)
        && a.rows <= MAX_ROWS
        && (b.row_stride == 1 || b.rows <= 1 || b.col_stride == 1 || b.cols <= 1)
}

/// C ← α A B + β C for dimensions that [`fits`] accepts. `sums` has at least [`workspace`]
/// elements. Only a row-major B needs them.
pub(in crate::kernels) fn multiply<A, B, C>(
    a: (Dims, &[A]),
    b: (Dims, &[B]),
    c: (Dims, &mut [C]),
    scale: Scale<A::Acc>,
    sums: &mut [A::Acc],
) where
    A: Element,
    B: Element<Acc = A::Acc>,
    C: Element<Acc = A::Acc>,
{
    if by_dots(b.0) {
        // AVX-512 pays only if there is more work than reading B: several rows, or elements of B to
        // widen.
        let wide = c.0.rows >= ROWS || B::DTYPE != A::Acc::DTYPE;
        let dots = DotForm { a, b, c, scale };
        if wide { widest(dots) } else { vectorized(dots) }
    } else {
        vectorized(AxpyForm { a, b, c, scale, sums });
    }
}

/// C as dot products of rows of A and columns of B.
struct DotForm<'a, A: Element, B, C> {
    a: (Dims, &'a [A]),
    b: (Dims, &'a [B]),
    c: (Dims, &'a mut [C]),
    scale: Scale<A::Acc>,
}

impl<A: Element, B: Element<Acc = A::Acc>, C: Element<Acc = A::Acc>> Kernel for DotForm<'_, A, B, C> {
    type Output = ();

    #[inline(always)]
    fn compute(self) {
        let Self { a: (ad, a), b: (bd, b), c: (cd, c), scale } = self;
        let b_col = |col: usize| if bd.rows == 0 { &b[..0] } else { &b[col * bd.col_stride..][..bd.rows] };
        let at = |row: usize, col: usize| row * cd.row_stride + col * cd.col_stride;
        let whole = cd.cols / COLS * COLS;
        for first in (0..whole).step_by(COLS) {
            let cols = [b_col(first), b_col(first + 1), b_col(first + 2), b_col(first + 3)];
            let next = COLS * bd.col_stride;
            let mut store = |row: usize, sums: [A::Acc; COLS]| {
                for (col, sum) in sums.into_iter().enumerate() {
                    scale.store(&mut c[at(row, first + col)], sum);
                }
            };
            let whole_rows = cd.rows / ROWS * ROWS;
            for row in (0..whole_rows).step_by(ROWS) {
                let sums = dots(
                    [a_row(ad, a, row), a_row(ad, a, row + 1), a_row(ad, a, row + 2), a_row(ad, a, row + 3)],
                    cols,
                    next,
                );
                for (row, sums) in (row..).zip(sums) {
                    store(row, sums);
                }
            }
            for row in whole_rows..cd.rows {
                let [sums] = dots([a_row(ad, a, row)], cols, next);
                store(row, sums);
            }
        }
        for col in whole..cd.cols {
            for row in 0..cd.rows {
                let [[sum]] = dots([a_row(ad, a, row)], [b_col(col)], bd.col_stride);
                scale.store(&mut c[at(row, col)], sum);
            }
        }
    }
}

/// C as scaled sums of rows of B (axpy).
struct AxpyForm<'a, A: Element, B, C> {
    a: (Dims, &'a [A]),
    b: (Dims, &'a [B]),
    c: (Dims, &'a mut [C]),
    scale: Scale<A::Acc>,
    sums: &'a mut [A::Acc],
}

impl<A: Element, B: Element<Acc = A::Acc>, C: Element<Acc = A::Acc>> Kernel for AxpyForm<'_, A, B, C> {
    type Output = ();

    #[inline(always)]
    fn compute(self) {
        let Self { a: (ad, a), b: (bd, b), c: (cd, c), scale, sums } = self;
        for first in (0..cd.cols).step_by(BLOCK) {
            let cols = BLOCK.min(cd.cols - first);
            let sums = &mut sums[..cd.rows * cols];
            sums.fill(A::Acc::ZERO);
            let b_row = |row: usize| &b[row * bd.row_stride + first..][..cols];
            let whole = bd.rows / STREAMS * STREAMS;
            for depth in (0..whole).step_by(STREAMS) {
                let rows = [b_row(depth), b_row(depth + 1), b_row(depth + 2), b_row(depth + 3)];
                for (row, sums) in sums.chunks_exact_mut(cols).enumerate() {
                    let a = &a_row(ad, a, row)[depth..depth + STREAMS];
                    add_rows(sums, [a[0].widen(), a[1].widen(), a[2].widen(), a[3].widen()], rows);
                }
            }
            for depth in whole..bd.rows {
                for (row, sums) in sums.chunks_exact_mut(cols).enumerate() {
                    add_rows(sums, [a_row(ad, a, row)[depth].widen()], [b_row(depth)]);
                }
            }
            for (row, sums) in sums.chunks_exact(cols).enumerate() {
                for (col, sum) in sums.iter().enumerate() {
                    scale.store(&mut c[row * cd.row_stride + (first + col) * cd.col_stride], *sum);
                }
            }
        }
    }
}

#[inline(always)]
fn a_row<A>(dims: Dims, a: &[A], row: usize) -> &[A] {
    if dims.cols == 0 { &a[..0] } else { &a[row * dims.row_stride..][..dims.cols] }
}

/// The number of elements of the workspace `sums` of [`multiply`].
pub(in crate::kernels) fn workspace(b: Dims, c: Dims) -> usize {
    if by_dots(b) { 0 } else { c.rows * c.cols.min(BLOCK) }
}

/// Whether B is column-major, so that C is computed by dot products. A single column with both
/// strides 1 counts as row-major, because the same column of a wider row-major B does.
fn by_dots(b: Dims) -> bool {
    (b.row_stride == 1 && b.col_stride != 1) || b.rows <= 1
}

/// Σ aᵢ bᵢ for each a and b. Element i is added to SIMD lane i mod 16. The lanes are then summed
/// pairwise. Prefetches the elements of B that lie `next` elements further on.
#[inline(always)]
fn dots<A: Element, B: Element<Acc = A::Acc>, const M: usize, const N: usize>(
    a: [&[A]; M],
    b: [&[B]; N],
    next: usize,
) -> [[A::Acc; N]; M] {
    let mut lanes = [[[A::Acc::ZERO; LANES]; N]; M];
    let whole = a[0].len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for col in 0..N {
            prefetch(b[col].as_ptr().wrapping_add(next + at));
            let from = b[col][at..].first_chunk::<LANES>().expect("the vectors are equally long");
            let mut wide = [A::Acc::ZERO; LANES];
            for lane in 0..LANES {
                wide[lane] = from[lane].widen();
            }
            for row in 0..M {
                let a = a[row][at..].first_chunk::<LANES>().expect("the vectors are equally long");
                for lane in 0..LANES {
                    lanes[row][col][lane] += a[lane].widen() * wide[lane];
                }
            }
        }
    }
    // Without `black_box`, the compiler would vectorize the loop above two lanes at a time, as it
    // does with the pairwise sums below.
    let mut lanes = std::hint::black_box(lanes);
    let mut sums = [[A::Acc::ZERO; N]; M];
    for row in 0..M {
        for col in 0..N {
            let lanes = &mut lanes[row][col];
            for (lane, (a, b)) in a[row][whole..].iter().zip(&b[col][whole..]).enumerate() {
                lanes[lane] += a.widen() * b.widen();
            }
            let mut width = LANES / 2;
            while width > 0 {
                let (low, high) = lanes.split_at_mut(width);
                low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
                width /= 2;
            }
            sums[row][col] = lanes[0];
        }
    }
    sums
}

/// sums ← sums + a₀ b₀ + a₁ b₁ + …, from left to right.
#[inline(always)]
fn add_rows<B: Element, const N: usize>(sums: &mut [B::Acc], a: [B::Acc; N], b: [&[B]; N]) {
    let b = b.map(|b| &b[..sums.len()]);
    for (at, sum) in sums.iter_mut().enumerate() {
        let mut total = *sum;
        for row in 0..N {
            total += a[row] * b[row][at].widen();
        }
        *sum = total;
    }
}
