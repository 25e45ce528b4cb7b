//! Tiles of C: their sums are kept in registers while the depth of a block goes by.

use super::{
    KC, V,
    vector::{Vector, prefetch},
};
use crate::{device::Accumulator, kernels::view::Dims};

/// Numbers in a cache line: 64 bytes of f32.
const LINE: usize = 16;

/// Sums of the products of a tile's rows, of a panel's depth, with a panel.
#[inline(always)]
pub(super) fn sums_by_rows<S: Vector, const MR: usize>(
    a: &[[S::Real; KC]; MR],
    panel: &[[S; V]],
) -> [[S; V]; MR] {
    assert!(panel.len() <= KC);
    let mut sums = [[S::splat(S::Real::ZERO); V]; MR];
    let mut first = 0;
    while first < panel.len() {
        a.iter().for_each(|row| prefetch(row.as_ptr().wrapping_add(first + LINE)));
        let end = (first + LINE).min(panel.len());
        for depth in first..end {
            let b = panel[depth];
            for (sums, row) in sums.iter_mut().zip(a) {
                let a = S::splat(row[depth]);
                sums.iter_mut().zip(b).for_each(|(sum, b)| *sum = sum.add_product(a, b));
            }
        }
        first = end;
    }
    sums
}

/// Sums of the products of a tile's columns with a panel of the same depth.
#[inline(always)]
pub(super) fn sums_by_columns<S: Vector, const MR: usize>(
    a: &[[S::Real; MR]],
    panel: &[[S; V]],
) -> [[S; V]; MR] {
    /// How many columns of the next tile are asked for at a time.
    const STEP: usize = 4;
    let mut sums = [[S::splat(S::Real::ZERO); V]; MR];
    for (a, panel) in a.chunks(STEP).zip(panel.chunks(STEP)) {
        let next = a.as_ptr().wrapping_add(KC).cast::<S::Real>();
        prefetch(next);
        prefetch(next.wrapping_add(2 * MR));
        for (a, b) in a.iter().zip(panel) {
            for (sums, a) in sums.iter_mut().zip(a) {
                let a = S::splat(*a);
                sums.iter_mut().zip(b).for_each(|(sum, b)| *sum = sum.add_product(a, *b));
            }
        }
    }
    sums
}

/// Asks for the lines of C that a tile's sums go to, which are far apart: they come while the sums are made.
#[inline(always)]
pub(super) fn c_ahead<S: Vector>((c, dims): &(&mut [S::Real], Dims)) {
    if dims.col_stride == 1 {
        for row in 0..dims.rows {
            let start = c.as_ptr().wrapping_add(row * dims.row_stride);
            // A row that begins inside of a line ends in one more.
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
    let mix = |c: S::Real, sum: S::Real| {
        let sum = alpha * sum;
        if beta == S::Real::ZERO { sum } else { beta * c + sum }
    };
    for (row, sums) in sums.iter().enumerate().take(dims.rows) {
        let sums = &S::lanes(sums)[..dims.cols];
        let c = &mut c[row * dims.row_stride..];
        if dims.col_stride == 1 {
            for (c, sum) in c[..dims.cols].iter_mut().zip(sums) {
                *c = mix(*c, *sum);
            }
        } else {
            for (col, sum) in sums.iter().enumerate() {
                let c = &mut c[col * dims.col_stride];
                *c = mix(*c, *sum);
            }
        }
    }
}
