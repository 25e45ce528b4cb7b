//! Packing: copies blocks of A and micro-panels of B to the order in which tiles read them, and
//! widens bf16 and f16.

use super::{
    KC, V,
    vector::{Vector, prefetch},
};
use crate::{
    device::{Accumulator, Element},
    kernels::view::Dims,
};

/// Packs a block of A by rows, with [`KC`] elements for each row. Zero rows complete the last tile.
#[inline(always)]
pub(super) fn pack_rows<T: Element, const MR: usize>(
    (a, dims): (&[T], Dims),
    (rows, depth): (usize, usize),
    to: &mut [[T::Acc; KC]],
) {
    for (row, to) in to[..rows.next_multiple_of(MR)].iter_mut().enumerate() {
        let to = &mut to[..depth];
        if row >= rows {
            to.fill(T::Acc::ZERO);
            continue;
        }
        let from = &a[row * dims.row_stride..][..depth];
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }
}

/// Packs a block of A tile by tile, each tile by columns. Zeros complete the last tile.
#[inline(always)]
pub(super) fn pack_columns<T: Element, const MR: usize>(
    (a, dims): (&[T], Dims),
    (rows, depth): (usize, usize),
    to: &mut [T::Acc],
) {
    for (tile, to) in to.chunks_exact_mut(MR * depth).enumerate().take(rows.div_ceil(MR)) {
        let first = tile * MR;
        for (col, to) in to.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
            let from = &a[first * dims.row_stride + col * dims.col_stride..];
            match from.first_chunk::<MR>().filter(|_| dims.row_stride == 1 && first + MR <= rows) {
                Some(from) => {
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from.widen();
                    }
                }
                None => {
                    for (row, to) in to.iter_mut().enumerate() {
                        let inside = first + row < rows;
                        *to = if inside { from[row * dims.row_stride].widen() } else { T::Acc::ZERO };
                    }
                }
            }
        }
    }
}

/// Packs a micro-panel of B by rows. Columns beyond B's last are zeros.
#[inline(always)]
pub(super) fn pack_panel<S: Vector, T: Element<Acc = S::Real>>(
    zero: S,
    (b, dims): (&[T], Dims),
    cols: usize,
    panel: &mut [[S; V]],
) {
    let lanes = S::LANES;
    for v in 0..V {
        let first = v * lanes;
        let have = cols.saturating_sub(first).min(lanes);
        if have == 0 {
            panel.iter_mut().for_each(|row| row[v] = zero);
        } else if dims.row_stride == 1 && have == lanes {
            transpose(zero, &b[first * dims.col_stride..], dims.col_stride, v, panel);
        } else {
            let from = &b[first * dims.col_stride..];
            for (depth, row) in panel.iter_mut().enumerate() {
                let from = &from[depth * dims.row_stride..];
                row[v] = if dims.col_stride == 1 && have == lanes {
                    load(zero, from)
                } else {
                    gather(zero, (0..have).map(|col| from[col * dims.col_stride].widen()))
                };
            }
        }
    }
}

/// Packs all micro-panels of a row-major block of B, row by row, because the rows may be far apart
/// in memory.
#[inline(always)]
pub(super) fn pack_panels<S: Vector, T: Element<Acc = S::Real>>(
    zero: S,
    (b, dims): (&[T], Dims),
    cols: usize,
    depth: usize,
    panels: &mut [[S; V]],
) {
    let (lanes, whole) = (S::LANES, cols / (V * S::LANES));
    for row in 0..depth {
        let from = &b[row * dims.row_stride..][..cols];
        for (panel, from) in from.chunks_exact(V * lanes).enumerate() {
            panels[panel * depth + row] = std::array::from_fn(|v| load(zero, &from[v * lanes..]));
        }
    }
    if cols > whole * V * lanes {
        let rest = (&b[whole * V * lanes..], dims);
        pack_panel(zero, rest, cols - whole * V * lanes, &mut panels[whole * depth..][..depth]);
    }
}

/// Packs LANES columns of B into vector `v` of each row of a panel. Each column is contiguous, and
/// the columns are `stride` elements apart. Transposes squares of LANES x LANES elements in
/// registers by log₂ LANES perfect shuffles of the rows.
#[inline(always)]
fn transpose<S: Vector, T: Element<Acc = S::Real>>(
    zero: S,
    b: &[T],
    stride: usize,
    v: usize,
    panel: &mut [[S; V]],
) {
    let lanes = S::LANES;
    let mut depth = 0;
    while depth + lanes <= panel.len() {
        // 16 is the largest number of lanes of a vector type.
        let mut square = [zero; 16];
        for (col, vector) in square.iter_mut().enumerate().take(lanes) {
            let from = &b[col * stride + depth..];
            prefetch(from.as_ptr().wrapping_add(V * lanes * stride));
            *vector = load(zero, from);
        }
        for _ in 0..lanes.ilog2() {
            let before = square;
            for pair in 0..lanes / 2 {
                let (low, high) = before[pair].interleave(before[pair + lanes / 2]);
                (square[2 * pair], square[2 * pair + 1]) = (low, high);
            }
        }
        for (row, vector) in panel[depth..depth + lanes].iter_mut().zip(square) {
            row[v] = vector;
        }
        depth += lanes;
    }
    for (depth, row) in panel.iter_mut().enumerate().skip(depth) {
        row[v] = gather(zero, (0..lanes).map(|col| b[col * stride + depth].widen()));
    }
}

/// Loads a vector from the first elements of a slice, widened.
#[inline(always)]
fn load<S: Vector, T: Element<Acc = S::Real>>(zero: S, from: &[T]) -> S {
    let from = &from[..S::LANES];
    let mut wide = [S::Real::ZERO; 16];
    for (wide, from) in wide.iter_mut().zip(from) {
        *wide = from.widen();
    }
    zero.load(&wide)
}

/// A vector of at most LANES numbers, padded with zeros.
#[inline(always)]
fn gather<S: Vector>(zero: S, numbers: impl Iterator<Item = S::Real>) -> S {
    let mut all = [S::Real::ZERO; 16];
    for (to, number) in all.iter_mut().zip(numbers) {
        *to = number;
    }
    zero.load(&all)
}
