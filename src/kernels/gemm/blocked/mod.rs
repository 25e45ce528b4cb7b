//! C ← α A B + β C by blocks on the CPU.
//!
//! The loops are those of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), as in BLIS:
//!
//! ```text
//! for MANY rows of A and C
//!   for as many columns of B and C that a block of C stays in the second cache, where it is added to again and again
//!     for KC of the depth                a block of B: KC deep, packed into the second cache
//!       for MC rows                      a block of A: MC x KC, packed into the second cache, or kept from the columns before
//!         for 2 vectors of columns       a panel of B, KC deep: in the first cache
//!           for MR rows                  a tile of C: MR x 2 vectors of sums in registers, KC additions each
//! ```
//!
//! The third loop goes over *steps* (`plan`): in a sum of products along a tree their sums go to C or to sums that wait beside it, blocks
//! like C's. Behind it a block of C is finished, if something is to be made of it.
//!
//! Where the depth is small it counts most to write C: then the last two loops are exchanged, and rows of C are written through.
//!
//! Packing widens bf16 and f16, and turns a transposed B, which a linear layer's weight is, by vectors.
//!
//! An element of C is α · (the sum over the first KC of the depth, in order) + β C, plus α times that over the next KC, and so
//! on, each product fused into its sum where the processor can. That order is the same in every tile, for every number of
//! rows and columns and on every kind of vector, so an element has the same bits however a product is cut along its rows and
//! columns, and on any x86-64 processor with AVX2 and FMA.

mod pack;
mod plan;
mod tile;
mod vector;

pub(super) use plan::{Step, Steps, room};
pub(super) use vector::prefetch;

use crate::{
    device::{Accumulator, AnyMut, Cpu, Element},
    error::Result,
    kernels::view::Dims,
};
use pack::{pack_columns, pack_panel, pack_panels, pack_rows};
use plan::Loops;
use std::ops::Range;
use tile::{Stack, c_ahead, merge, store, sums_by_columns, sums_by_rows};
use vector::Vector;

/// The depth of a block.
const KC: usize = 384;

/// The rows of a block of A: a multiple of 6 and 8, the rows of the tiles.
const MC: usize = 144;

/// The columns of a block of B: a multiple of two vectors of any kind.
pub(super) const NC: usize = 960;

/// The rows of C that are computed at a time: a multiple of [`MC`].
const MANY: usize = 8 * MC;

/// The elements of a block of C: with A's and B's blocks they leave room in a second cache of 2 MiB.
const C_BLOCK: usize = 192 << 10;

/// The depth up to which it counts most to write C, not to make its sums.
const SHALLOW: usize = 32;

/// The elements of A that are kept packed.
const KEPT: usize = 4 << 20;

/// Vectors of columns in a tile.
const V: usize = 2;

/// An accumulator and its kinds of vectors.
pub(super) trait Real: Accumulator {
    /// What every processor has.
    type Portable: Vector<Real = Self>;
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Real = Self>;
    /// AVX-512.
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Real = Self>;
}

impl Real for f32 {
    type Portable = [f32; 4];
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512;
}

impl Real for f64 {
    type Portable = [f64; 2];
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256d;
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512d;
}

/// A product.
pub(super) struct Job<'a, 'f, T: Element> {
    /// There is one at least.
    pub(super) steps: &'a [Step<'a, T>],
    pub(super) alpha: T::Acc,
    pub(super) beta: T::Acc,
    pub(super) c: (&'a mut [T::Acc], Dims),
    pub(super) finish: Option<&'a mut Finish<'f>>,
    /// As [`room`] says.
    pub(super) room: [&'a mut [T::Acc]; 3],
}

/// What is made of each block of C, while it is in the second cache: of these rows and columns, in the memory from its first element on.
pub(super) type Finish<'f> = dyn FnMut(Range<usize>, Range<usize>, AnyMut<'_, Cpu>) -> Result<()> + 'f;

/// C ← α A B + β C, on the best vectors that the processor has.
///
/// # Errors
/// Those of finishing.
pub(super) fn multiply<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if let Some(kind) = x86_64::Kind::best() {
        return x86_64::multiply(kind, job);
    }
    // SAFETY: arrays need no instructions.
    #[allow(unsafe_code)]
    let zero = unsafe { <T::Acc as Real>::Portable::zero() };
    blocks::<_, T, 4>(zero, job)
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Job, Real, blocks, vector::Vector};
    use crate::{device::Element, error::Result};
    use std::arch::is_x86_feature_detected;

    /// Vectors that this processor has. There is no other way to one than [`Kind::all`].
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Kind(Instructions);

    #[derive(Clone, Copy, Debug)]
    enum Instructions {
        Avx512,
        Avx2,
    }

    impl Kind {
        /// All that this processor has, the best first.
        pub(super) fn all() -> impl Iterator<Item = Self> {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f");
            let both =
                [avx512.then_some(Self(Instructions::Avx512)), avx2.then_some(Self(Instructions::Avx2))];
            both.into_iter().flatten()
        }

        pub(super) fn best() -> Option<Self> {
            Self::all().next()
        }
    }

    /// C ← α A B + β C on one kind of vector.
    pub(super) fn multiply<T: Element<Acc: Real>>(kind: Kind, job: Job<'_, '_, T>) -> Result<()> {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn with_avx512<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
            // SAFETY: `Kind::all` has detected what this function, too, is compiled for.
            #[allow(unsafe_code)]
            let zero = unsafe { <T::Acc as Real>::Avx512::zero() };
            blocks::<_, T, 8>(zero, job)
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            let zero = unsafe { <T::Acc as Real>::Avx2::zero() };
            blocks::<_, T, 6>(zero, job)
        }
        // SAFETY: the processor has the features that the function enables: `Kind::all` has detected them.
        #[allow(unsafe_code)]
        unsafe {
            match kind.0 {
                Instructions::Avx512 => with_avx512(job),
                Instructions::Avx2 => with_avx2(job),
            }
        }
    }
}

#[inline(always)]
fn blocks<S: Vector<Real = T::Acc>, T: Element, const MR: usize>(zero: S, job: Job<'_, '_, T>) -> Result<()> {
    let Job { steps, alpha, beta, c: (c, cd), mut finish, room: [room_a, room_b, waiting] } = job;
    let loops = Loops::of(steps, cd);
    let (room_b, wide) = (zero.in_memory(room_b), V * S::LANES);
    for many in (0..cd.rows).step_by(MANY) {
        let many_rows = MANY.min(cd.rows - many);
        for first_col in (0..cd.cols).step_by(loops.cols) {
            let cols = loops.cols.min(cd.cols - first_col);
            let corner = &mut c[many * cd.row_stride + first_col * cd.col_stride..];
            let mut stack = Stack { c: corner, dims: cd, waiting, cols: loops.cols, area: loops.area(cd) };
            for (number, step) in steps.iter().enumerate() {
                let ((a, ad), (b, bd)) = (step.a, step.b);
                let (depth, by_rows) = (step.depth(), step.by_rows());
                let beta = match step {
                    Step { goes_on: true, .. } => T::Acc::ONE,
                    Step { level: 0, .. } => beta,
                    Step { .. } => T::Acc::ZERO,
                };
                for first_row in (0..many_rows).step_by(MC) {
                    let rows = MC.min(many_rows - first_row);
                    let kept = number * many_rows.next_multiple_of(24) + first_row;
                    let room_a = &mut room_a[if loops.kept { kept * KC } else { 0 }..];
                    if !loops.kept || first_col == 0 {
                        let a = (&a[(many + first_row) * ad.row_stride..], ad);
                        if by_rows {
                            pack_rows::<T, MR>(a, (rows, depth), room_a.as_chunks_mut().0);
                        } else {
                            pack_columns::<T, MR>(a, (rows, depth), room_a);
                        }
                    }
                    let tiles = Tiles { step, a: room_a, alpha, beta, block: (first_row, rows) };
                    for (at, col) in (0..cols).step_by(wide).enumerate() {
                        let place = (col, wide.min(cols - col));
                        let room = &mut room_b.as_chunks_mut().0[if loops.once { 0 } else { at * depth }..];
                        if first_row == 0 {
                            let b = (&b[(first_col + col) * bd.col_stride..], bd);
                            if bd.col_stride != 1 {
                                pack_panel(zero, b, place.1, &mut room[..depth]);
                            } else if col == 0 {
                                pack_panels(zero, b, cols, depth, room);
                            }
                        }
                        if loops.shallow {
                            continue;
                        }
                        for row in (0..rows).step_by(MR) {
                            tiles.compute::<S, MR>(zero, row, place, &room[..depth], &mut stack);
                        }
                    }
                    if !loops.shallow {
                        continue;
                    }
                    for row in (0..rows).step_by(MR) {
                        for (at, col) in (0..cols).step_by(wide).enumerate() {
                            let place = (col, wide.min(cols - col));
                            let panel = &room_b.as_chunks().0[at * depth..][..depth];
                            tiles.compute::<S, MR>(zero, row, place, panel, &mut stack);
                        }
                    }
                }
            }
            if let Some(finish) = &mut finish {
                let (rows, cols) = (many..many + many_rows, first_col..first_col + cols);
                finish(rows, cols, T::Acc::any_mut::<Cpu>(stack.c))?;
            }
        }
    }
    Ok(())
}

/// The tiles of a packed block of A, and what becomes of their sums.
struct Tiles<'a, T: Element> {
    step: &'a Step<'a, T>,
    a: &'a [T::Acc],
    alpha: T::Acc,
    beta: T::Acc,
    /// The first of its rows in C's block, and their number.
    block: (usize, usize),
}

impl<T: Element> Tiles<'_, T> {
    /// The sums of the block's rows from `row` on, and of a panel of so many columns from `col` of C's block on.
    #[inline(always)]
    fn compute<S: Vector<Real = T::Acc>, const MR: usize>(
        &self,
        zero: S,
        row: usize,
        (col, cols): (usize, usize),
        panel: &[[S; V]],
        stack: &mut Stack<'_, T::Acc>,
    ) {
        let Self { step, alpha, beta, block: (first, rows), .. } = *self;
        let (place, size) = ((first + row, col), (MR.min(rows - row), cols));
        c_ahead::<S>(&stack.tile(step.level - step.merges, place, size));
        let sums = if step.by_rows() {
            sums_by_rows(zero, &self.a.as_chunks().0.as_chunks::<MR>().0[row / MR], panel)
        } else {
            sums_by_columns::<S, MR>(
                zero,
                &self.a.as_chunks().0[row / MR * panel.len()..][..panel.len()],
                panel,
            )
        };
        if step.merges == 0 {
            return store(&sums, alpha, beta, stack.tile(step.level, place, size));
        }
        merge(sums, (step, alpha), stack, (place, size));
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::Device, rng::Philox};
    use half::bf16;

    /// C of a product, whose memory was NaN before; A and B with elements side by side in rows or in columns.
    fn product<T: Element<Acc: Real>>(
        (m, k, n): (usize, usize, usize),
        (a_rows, b_rows): (bool, bool),
        number: impl Fn(u64) -> f64,
        multiply: impl Fn(Job<'_, '_, T>) -> Result<()>,
    ) -> Vec<T::Acc> {
        let layout = |rows, cols, by_rows| match by_rows {
            true => Dims { rows, cols, row_stride: cols, col_stride: 1 },
            false => Dims { rows, cols, row_stride: 1, col_stride: rows },
        };
        let (ad, bd, cd) = (layout(m, k, a_rows), layout(k, n, b_rows), layout(m, n, true));
        let fill = |dims: Dims, seed: u64| {
            let mut memory = vec![T::NAN; dims.extent()];
            for row in 0..dims.rows {
                for col in 0..dims.cols {
                    let at = (row * dims.cols + col) as u64;
                    memory[row * dims.row_stride + col * dims.col_stride] =
                        T::from_f64(number(seed + 2 * at));
                }
            }
            memory
        };
        let (a, b, mut c) = (fill(ad, 0), fill(bd, 1), vec![T::Acc::NAN; m * n]);
        let steps = Steps::product((&a, ad), (&b, bd));
        let cpu = Cpu::poisoned();
        let [mut room_a, mut room_b, mut waiting] =
            room(&steps, cd).map(|len| cpu.empty::<T::Acc>(len).unwrap());
        let (alpha, beta) = (T::Acc::ONE, T::Acc::ZERO);
        let room: [&mut [_]; 3] = [&mut room_a, &mut room_b, &mut waiting];
        multiply(Job { steps: &steps, alpha, beta, c: (&mut c, cd), finish: None, room }).unwrap();
        c
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (3, 2, 5),
        (8, 16, 32),
        (7, 31, 33),
        (24, 256, 64),
        (25, 257, 31),
        (MC + 1, 40, 70),
        (2 * MC, 2 * KC + 3, 17),
        (150, 20, NC + 40),
    ];

    /// Whole numbers, whose sums are exact in any order.
    fn whole<T: Element<Acc: Real>>(multiply: impl Fn(Job<'_, '_, T>) -> Result<()>) {
        let number = |at: u64| (at * 7919 % 13) as f64 - 6.0;
        for (m, k, n) in SHAPES {
            for layout in [(true, true), (true, false), (false, true), (false, false)] {
                let got = product::<T>((m, k, n), layout, number, &multiply);
                for (at, got) in got.iter().enumerate() {
                    let (row, col) = (at / n, at % n);
                    let term =
                        |i: usize| number(2 * (row * k + i) as u64) * number(1 + 2 * (i * n + col) as u64);
                    assert_eq!(
                        got.to_f64(),
                        (0..k).map(term).sum::<f64>(),
                        "{m} x {k} x {n}, {layout:?}, {row}, {col}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_of_whole_numbers_are_exact_on_all_vectors() {
        whole::<f32>(|job| blocks::<_, _, 4>([0.0_f32; 4], job));
        whole::<f64>(|job| blocks::<_, _, 4>([0.0_f64; 2], job));
        whole::<bf16>(|job| blocks::<_, _, 4>([0.0_f32; 4], job));
        #[cfg(target_arch = "x86_64")]
        for kind in x86_64::Kind::all() {
            whole::<f32>(|job| x86_64::multiply(kind, job));
            whole::<f64>(|job| x86_64::multiply(kind, job));
            whole::<bf16>(|job| x86_64::multiply(kind, job));
        }
    }

    /// Products of several blocks of each kind, and of their first rows by themselves, which are in other blocks then.
    #[test]
    fn an_element_has_the_same_bits_wherever_a_product_is_cut() {
        let stream = Philox::named(2, "numbers");
        let number = |at: u64| stream.normal(at);
        for (m, k, n) in [(MANY + 30, 2 * KC + 9, 350), (MANY + 30, SHALLOW - 3, NC + 30)] {
            for layout in [(true, false), (false, true)] {
                let whole = product::<f32>((m, k, n), layout, number, multiply);
                for rows in [1, 24, 150, MANY] {
                    let part = product::<f32>((rows, k, n), layout, number, multiply);
                    let bits = |c: &[f32]| c.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
                    assert!(
                        bits(&part) == bits(&whole[..rows * n]),
                        "{m} x {k} x {n}, {layout:?}, {rows} rows"
                    );
                }
            }
        }
    }

    /// Where there is a fused multiply-add, one kind of vector rounds as another.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn all_fused_vectors_give_the_same_bits() {
        let stream = Philox::named(1, "numbers");
        for shape in SHAPES {
            for layout in [(true, false), (false, true)] {
                let with = |kind| {
                    product::<f32>(shape, layout, |at| stream.normal(at), |job| x86_64::multiply(kind, job))
                };
                let results: Vec<Vec<f32>> = x86_64::Kind::all().map(with).collect();
                let bits = |c: &Vec<f32>| c.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
                assert!(results.windows(2).all(|pair| bits(&pair[0]) == bits(&pair[1])), "{shape:?}");
            }
        }
    }
}
