//! Blocked GEMM on the CPU: C ← α A B + β C.
//!
//! The loops are those of Goto and van de Geijn, "Anatomy of high-performance matrix
//! multiplication" (2008), as in BLIS:
//!
//! ```text
//! for C_ROWS rows of A and C
//!   for at most NC columns of B and C      a block of C: stays in L2, accumulated over the depth
//!     for KC of the depth                  a block of B: KC deep, packed, in L2
//!       for MC rows                        a block of A: MC x KC, packed, in L2; may be kept
//!         for NR = 2 vectors of columns    a micro-panel of B, KC deep: in L1
//!           for MR rows                    a micro-tile of C: MR x NR sums in registers
//! ```
//!
//! The third loop runs over the *steps* of `plan`, each a range of the depth. In a sum of products
//! along a reduction tree, the sums of a step go to the block of C or to a partial sum, which is a
//! block of the same shape. After the last step, an optional epilogue is applied to the block of C.
//!
//! If the depth is small, writing C takes most of the time. The last two loops are then exchanged,
//! so that C is written row by row.
//!
//! Packing widens bf16 and f16. A column-major B, such as the weight of a linear layer, is
//! transposed in vector registers while it is packed.
//!
//! An element of C is α · (the sum over the first KC of the depth, in order) + β C, plus α times
//! the sum over the next KC, and so on. Products are fused into sums where the processor has FMA.
//! This order is the same in every tile, for every number of rows and columns and for every kind of
//! vector. So the bits of an element do not change when a product is split by rows or columns. They
//! are the same on any x86-64 processor with AVX2, FMA and F16C.

mod pack;
mod plan;
mod tile;
mod vector;

pub(super) use plan::{Step, Steps, workspace};
pub(in crate::kernels) use vector::prefetch;

use crate::{
    device::{Accumulator, AnyMut, Cpu, Element},
    error::Result,
    kernels::view::Dims,
};
use pack::{pack_columns, pack_panel, pack_panels, pack_rows};
use plan::Loops;
use std::ops::Range;
use tile::{SumStack, merge, prefetch_c, store, sums_by_columns, sums_by_rows};
use vector::Vector;

/// The largest depth of a block of A and B.
const KC: usize = 384;

/// The largest number of rows of a block of A: a multiple of MR, which is 4, 6 or 8.
const MC: usize = 144;

/// The largest number of columns of a block of B: a multiple of NR for every kind of vector.
pub(super) const NC: usize = 960;

/// The largest number of rows of a block of C: a multiple of [`MC`].
const C_ROWS: usize = 8 * MC;

/// The largest number of elements that a block of C and its partial sums should have together. In
/// f32, so many elements fit an L2 cache of 2 MiB together with the blocks of A and B.
const C_BLOCK: usize = 192 << 10;

/// The largest depth at which writing C takes longer than computing its sums.
const SHALLOW: usize = 32;

/// The largest number of elements of A that stay packed for the next block of columns.
const KEPT_A: usize = 4 << 20;

/// The number of vectors in a row of a micro-tile: NR = V · LANES.
const V: usize = 2;

/// An accumulator and its vector types.
pub(super) trait Real: Accumulator {
    /// The vector type for every processor.
    type Portable: Vector<Real = Self>;
    /// The vector type for AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Vector<Real = Self>;
    /// The vector type for AVX-512.
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

/// One call of the blocked product.
pub(super) struct Job<'a, 'f, T: Element> {
    /// At least one step.
    pub(super) steps: &'a [Step<'a, T>],
    pub(super) alpha: T::Acc,
    pub(super) beta: T::Acc,
    pub(super) c: (&'a mut [T::Acc], Dims),
    pub(super) epilogue: Option<&'a mut BlockEpilogue<'f>>,
    /// Workspaces of the sizes that [`workspace`] returns.
    pub(super) workspace: [&'a mut [T::Acc]; 3],
}

/// A function that is applied to each block of C while the block is in L2. Its arguments are the
/// block's rows, the block's columns, and the memory of C from the block's first element on.
pub(super) type BlockEpilogue<'f> = dyn FnMut(Range<usize>, Range<usize>, AnyMut<'_, Cpu>) -> Result<()> + 'f;

/// C ← α A B + β C with the best instruction set that the processor has.
///
/// # Errors
/// Those of the epilogue.
pub(super) fn multiply<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if let Some(kind) = x86_64::InstructionSet::best() {
        return x86_64::multiply(kind, job);
    }
    // SAFETY: arrays need no vector instructions.
    #[allow(unsafe_code)]
    let zero = unsafe { <T::Acc as Real>::Portable::zero() };
    blocks::<_, T, 4>(zero, job)
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Job, Real, blocks, vector::Vector};
    use crate::{device::Element, error::Result};
    use std::arch::is_x86_feature_detected;

    /// An instruction set that this processor has. Only [`InstructionSet::all`] creates values,
    /// after it has detected the features.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct InstructionSet(Isa);

    #[derive(Clone, Copy, Debug)]
    enum Isa {
        Avx512,
        Avx2,
    }

    impl InstructionSet {
        /// The instruction sets that this processor has, the best first.
        pub(super) fn all() -> impl Iterator<Item = Self> {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f");
            let both = [avx512.then_some(Self(Isa::Avx512)), avx2.then_some(Self(Isa::Avx2))];
            both.into_iter().flatten()
        }

        pub(super) fn best() -> Option<Self> {
            Self::all().next()
        }
    }

    /// C ← α A B + β C with one instruction set.
    pub(super) fn multiply<T: Element<Acc: Real>>(kind: InstructionSet, job: Job<'_, '_, T>) -> Result<()> {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn with_avx512<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
            // SAFETY: `InstructionSet::all` has detected the features that this function enables.
            #[allow(unsafe_code)]
            let zero = unsafe { <T::Acc as Real>::Avx512::zero() };
            blocks::<_, T, 8>(zero, job)
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2<T: Element<Acc: Real>>(job: Job<'_, '_, T>) -> Result<()> {
            // SAFETY: `InstructionSet::all` has detected the features that this function enables.
            #[allow(unsafe_code)]
            let zero = unsafe { <T::Acc as Real>::Avx2::zero() };
            blocks::<_, T, 6>(zero, job)
        }
        // SAFETY: `InstructionSet::all` has detected the features that the called function enables.
        #[allow(unsafe_code)]
        unsafe {
            match kind.0 {
                Isa::Avx512 => with_avx512(job),
                Isa::Avx2 => with_avx2(job),
            }
        }
    }
}

#[inline(always)]
fn blocks<S: Vector<Real = T::Acc>, T: Element, const MR: usize>(zero: S, job: Job<'_, '_, T>) -> Result<()> {
    let Job { steps, alpha, beta, c: (c, cd), mut epilogue, workspace: [room_a, room_b, partials] } = job;
    let loops = Loops::of(steps, cd);
    let (room_b, wide) = (zero.in_memory(room_b), V * S::LANES);
    for first_c_row in (0..cd.rows).step_by(C_ROWS) {
        let c_rows = C_ROWS.min(cd.rows - first_c_row);
        for first_col in (0..cd.cols).step_by(loops.cols) {
            let cols = loops.cols.min(cd.cols - first_col);
            let corner = &mut c[first_c_row * cd.row_stride + first_col * cd.col_stride..];
            let mut stack =
                SumStack { c: corner, dims: cd, partials, cols: loops.cols, area: loops.area(cd) };
            for (number, step) in steps.iter().enumerate() {
                let ((a, ad), (b, bd)) = (step.a, step.b);
                let (depth, by_rows) = (step.depth(), step.by_rows());
                let beta = match step {
                    Step { accumulates: true, .. } => T::Acc::ONE,
                    Step { level: 0, .. } => beta,
                    Step { .. } => T::Acc::ZERO,
                };
                for first_row in (0..c_rows).step_by(MC) {
                    let rows = MC.min(c_rows - first_row);
                    let kept = number * c_rows.next_multiple_of(24) + first_row;
                    let room_a = &mut room_a[if loops.keeps_a { kept * KC } else { 0 }..];
                    if !loops.keeps_a || first_col == 0 {
                        let a = (&a[(first_c_row + first_row) * ad.row_stride..], ad);
                        if by_rows {
                            pack_rows::<T, MR>(a, (rows, depth), room_a.as_chunks_mut().0);
                        } else {
                            pack_columns::<T, MR>(a, (rows, depth), room_a);
                        }
                    }
                    let tiles = Tiles { step, a: room_a, alpha, beta, block: (first_row, rows) };
                    for (at, col) in (0..cols).step_by(wide).enumerate() {
                        let place = (col, wide.min(cols - col));
                        let room =
                            &mut room_b.as_chunks_mut().0[if loops.one_panel { 0 } else { at * depth }..];
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
            if let Some(epilogue) = &mut epilogue {
                let (rows, cols) = (first_c_row..first_c_row + c_rows, first_col..first_col + cols);
                epilogue(rows, cols, T::Acc::any_mut::<Cpu>(stack.c))?;
            }
        }
    }
    Ok(())
}

/// A packed block of A, and how to store the sums of its tiles.
struct Tiles<'a, T: Element> {
    step: &'a Step<'a, T>,
    a: &'a [T::Acc],
    alpha: T::Acc,
    beta: T::Acc,
    /// The block's first row in the block of C, and its number of rows.
    block: (usize, usize),
}

impl<T: Element> Tiles<'_, T> {
    /// Computes and stores the micro-tile at row `row` of the block of A and column `col` of the
    /// block of C.
    #[inline(always)]
    fn compute<S: Vector<Real = T::Acc>, const MR: usize>(
        &self,
        zero: S,
        row: usize,
        (col, cols): (usize, usize),
        panel: &[[S; V]],
        stack: &mut SumStack<'_, T::Acc>,
    ) {
        let Self { step, alpha, beta, block: (first, rows), .. } = *self;
        let (place, size) = ((first + row, col), (MR.min(rows - row), cols));
        prefetch_c::<S>(&stack.tile(step.level - step.merges, place, size));
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

    /// Multiplies row- or column-major A and B into a C that is filled with NaN.
    fn product<T: Element<Acc: Real>>(
        (m, k, n): (usize, usize, usize),
        (a_rows, b_rows): (bool, bool),
        number: impl Fn(u64) -> f64,
        multiply: impl Fn(Job<'_, '_, T>) -> Result<()>,
    ) -> Vec<T::Acc> {
        let layout = |rows, cols, by_rows| {
            if by_rows {
                Dims { rows, cols, row_stride: cols, col_stride: 1 }
            } else {
                Dims { rows, cols, row_stride: 1, col_stride: rows }
            }
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
        let [mut room_a, mut room_b, mut partials] =
            workspace(&steps, cd).map(|len| cpu.empty::<T::Acc>(len).unwrap());
        let (alpha, beta) = (T::Acc::ONE, T::Acc::ZERO);
        let workspace: [&mut [_]; 3] = [&mut room_a, &mut room_b, &mut partials];
        multiply(Job { steps: &steps, alpha, beta, c: (&mut c, cd), epilogue: None, workspace }).unwrap();
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

    /// Compares products of integers, whose sums are exact in any order.
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
        for kind in x86_64::InstructionSet::all() {
            whole::<f32>(|job| x86_64::multiply(kind, job));
            whole::<f64>(|job| x86_64::multiply(kind, job));
            whole::<bf16>(|job| x86_64::multiply(kind, job));
        }
    }

    /// Compares a product of several blocks with the product of its first rows alone, which is
    /// divided into blocks differently.
    #[test]
    fn an_element_has_the_same_bits_however_a_product_is_split() {
        let stream = Philox::named(2, "numbers");
        let number = |at: u64| stream.normal(at);
        for (m, k, n) in [(C_ROWS + 30, 2 * KC + 9, 350), (C_ROWS + 30, SHALLOW - 3, NC + 30)] {
            for layout in [(true, false), (false, true)] {
                let whole = product::<f32>((m, k, n), layout, number, multiply);
                for rows in [1, 24, 150, C_ROWS] {
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

    /// With fused multiply-add, all kinds of vectors round in the same way.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn all_fused_vectors_give_the_same_bits() {
        let stream = Philox::named(1, "numbers");
        for shape in SHAPES {
            for layout in [(true, false), (false, true)] {
                let with = |kind| {
                    product::<f32>(shape, layout, |at| stream.normal(at), |job| x86_64::multiply(kind, job))
                };
                let results: Vec<Vec<f32>> = x86_64::InstructionSet::all().map(with).collect();
                let bits = |c: &Vec<f32>| c.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
                assert!(results.windows(2).all(|pair| bits(&pair[0]) == bits(&pair[1])), "{shape:?}");
            }
        }
    }
}
