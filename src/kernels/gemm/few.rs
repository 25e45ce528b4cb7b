//! Products of few rows on the CPU: what a token at a time needs, where all that counts is to read B once.
//!
//! Each element of C is summed in an order that depends on the depth alone: not on the number of rows or columns, nor on
//! which of them are computed together. So a product gives the same bits however its rows and columns are split.

use crate::{
    device::{Accumulator, Element, vectorized},
    kernels::view::Dims,
};

/// The most rows that are computed here. With more of them a blocked product is faster.
pub(in crate::kernels) const FEW: usize = 8;

/// Partial sums of a dot product, as in `lanes`.
const LANES: usize = 16;

/// Rows of Bᵀ that are read side by side.
const STREAMS: usize = 4;

/// Columns of C whose sums are kept in cache while rows of B go by.
const BLOCK: usize = 1024;

/// What to do with a sum: C ← α · sum + β C.
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

/// Whether there are few enough rows, and they lie in a way that this file reads.
pub(in crate::kernels) fn fits(a: Dims, b: Dims) -> bool {
    (a.col_stride == 1 || a.cols <= 1)
        && a.rows <= FEW
        && (b.row_stride == 1 || b.rows <= 1 || b.col_stride == 1 || b.cols <= 1)
}

/// C ← α A B + β C for dimensions that [`fits`]. `sums` has room for a block of sums of every row, for a row-major B:
/// [`room`] elements.
pub(in crate::kernels) fn multiply<A, B, C>(
    (ad, a): (Dims, &[A]),
    (bd, b): (Dims, &[B]),
    (cd, c): (Dims, &mut [C]),
    scale: Scale<A::Acc>,
    sums: &mut [A::Acc],
) where
    A: Element,
    B: Element<Acc = A::Acc>,
    C: Element<Acc = A::Acc>,
{
    let a_row = |row: usize| if ad.cols == 0 { &a[..0] } else { &a[row * ad.row_stride..][..ad.cols] };
    if by_dots(bd) {
        let b_col = |col: usize| if bd.rows == 0 { &b[..0] } else { &b[col * bd.col_stride..][..bd.rows] };
        vectorized(|| {
            for first in (0..cd.cols).step_by(STREAMS) {
                let at = |row: usize, col: usize| row * cd.row_stride + col * cd.col_stride;
                if first + STREAMS <= cd.cols {
                    let columns = std::array::from_fn::<_, STREAMS, _>(|col| b_col(first + col));
                    for row in 0..cd.rows {
                        for (col, sum) in dots(a_row(row), columns).into_iter().enumerate() {
                            scale.store(&mut c[at(row, first + col)], sum);
                        }
                    }
                } else {
                    for col in first..cd.cols {
                        for row in 0..cd.rows {
                            let [sum] = dots(a_row(row), [b_col(col)]);
                            scale.store(&mut c[at(row, col)], sum);
                        }
                    }
                }
            }
        });
    } else {
        for first in (0..cd.cols).step_by(BLOCK) {
            let cols = BLOCK.min(cd.cols - first);
            let sums = &mut sums[..cd.rows * cols];
            vectorized(|| {
                sums.fill(A::Acc::ZERO);
                let b_row = |row: usize| &b[row * bd.row_stride + first..][..cols];
                let whole = bd.rows / STREAMS * STREAMS;
                for depth in (0..whole).step_by(STREAMS) {
                    let rows = std::array::from_fn::<_, STREAMS, _>(|row| b_row(depth + row));
                    for (row, sums) in sums.chunks_exact_mut(cols).enumerate() {
                        let a = &a_row(row)[depth..depth + STREAMS];
                        add_rows(sums, std::array::from_fn(|at| a[at].widen()), rows);
                    }
                }
                for depth in whole..bd.rows {
                    for (row, sums) in sums.chunks_exact_mut(cols).enumerate() {
                        add_rows(sums, [a_row(row)[depth].widen()], [b_row(depth)]);
                    }
                }
                for (row, sums) in sums.chunks_exact(cols).enumerate() {
                    for (col, sum) in sums.iter().enumerate() {
                        scale.store(&mut c[row * cd.row_stride + (first + col) * cd.col_stride], *sum);
                    }
                }
            });
        }
    }
}

/// The elements of `sums` that [`multiply`] needs.
pub(in crate::kernels) fn room(b: Dims, c: Dims) -> usize {
    if by_dots(b) { 0 } else { c.rows * c.cols.min(BLOCK) }
}

/// Whether the columns of B are read as they lie, rather than its rows.
fn by_dots(b: Dims) -> bool {
    b.row_stride == 1 || b.rows <= 1
}

/// The dot products of one vector with several: element i goes to lane i mod 16, then the lanes are summed pairwise.
#[inline(always)]
fn dots<A: Element, B: Element<Acc = A::Acc>, const N: usize>(a: &[A], b: [&[B]; N]) -> [A::Acc; N] {
    let mut sums = [[A::Acc::ZERO; LANES]; N];
    let whole = a.len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let a = a[at..].first_chunk::<LANES>().expect("there are as many lanes left");
        for (sums, b) in sums.iter_mut().zip(b) {
            let b = b[at..].first_chunk::<LANES>().expect("the vectors are equally long");
            for lane in 0..LANES {
                sums[lane] += a[lane].widen() * b[lane].widen();
            }
        }
    }
    sums.iter_mut().zip(b).for_each(|(sums, b)| {
        for (lane, (a, b)) in a[whole..].iter().zip(&b[whole..]).enumerate() {
            sums[lane] += a.widen() * b.widen();
        }
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                sums[lane] = sums[lane] + sums[lane + width];
            }
            width /= 2;
        }
    });
    sums.map(|sums| sums[0])
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
