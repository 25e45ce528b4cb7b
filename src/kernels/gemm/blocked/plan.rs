//! The steps of a product, and how the loops over its blocks run.

use super::{C_BLOCK, C_ROWS, KC, KEPT_A, MC, NC, SHALLOW};
use crate::kernels::view::Dims;

/// A matrix: its memory, dimensions and strides.
pub(in super::super) type Mat<'a, T> = (&'a [T], Dims);

/// A range of the depth, at most [`KC`] long, and the destination of its sums.
///
/// The partial sums of a block of C form a stack. Level 0 of the stack is the block of C.
#[derive(Clone, Copy)]
pub(in super::super) struct Step<'a, T> {
    /// The columns of A in this range.
    pub(super) a: Mat<'a, T>,
    /// The rows of B in this range.
    pub(super) b: Mat<'a, T>,
    /// The level of the stack to which the sums belong.
    pub(super) level: usize,
    /// Whether the sums are added to that level. If not, they replace it.
    pub(super) accumulates: bool,
    /// The number of levels below `level` that are added to the sums of this step, the nearest
    /// level first. The result goes to the lowest of these levels.
    pub(super) merges: usize,
}

impl<'a, T> Step<'a, T> {
    /// The step for the rows of C from `row` on and the columns from `col` on.
    pub(in super::super) fn offset(&self, row: usize, col: usize) -> Self {
        let Self { a: (a, ad), b: (b, bd), level, accumulates, merges } = *self;
        Self {
            a: (&a[row * ad.row_stride..], ad),
            b: (&b[col * bd.col_stride..], bd),
            level,
            accumulates,
            merges,
        }
    }

    pub(in super::super) fn depth(&self) -> usize {
        self.a.1.cols
    }

    /// Whether A is packed by rows, not by columns.
    pub(super) fn by_rows(&self) -> bool {
        self.a.1.col_stride == 1
    }

    /// The same step with another element type, to which `f` casts the memory of A and B.
    pub(in super::super) fn map<U>(&self, f: impl Fn(&'a [T]) -> &'a [U]) -> Step<'a, U> {
        let Self { a, b, level, accumulates, merges } = *self;
        Step { a: (f(a.0), a.1), b: (f(b.0), b.1), level, accumulates, merges }
    }
}

/// Collects the steps of a product, or of a sum of products along a tree.
pub(in super::super) struct Steps<'a, T> {
    list: Vec<Step<'a, T>>,
    level: usize,
}

impl<'a, T> Steps<'a, T> {
    /// The steps of a single product; empty if the depth is 0.
    pub(in super::super) fn product(a: Mat<'a, T>, b: Mat<'a, T>) -> Vec<Step<'a, T>> {
        let mut steps = Self::new();
        steps.push([(a, b)], 0);
        steps.list
    }

    pub(in super::super) fn new() -> Self {
        Self { list: Vec::new(), level: 0 }
    }

    /// Pushes a term, the sum of `products` from left to right. Then adds the two topmost sums of
    /// the stack, `merges` times.
    pub(in super::super) fn push(
        &mut self,
        products: impl IntoIterator<Item = (Mat<'a, T>, Mat<'a, T>)>,
        merges: usize,
    ) {
        let (first, level) = (self.list.len(), self.level);
        for ((a, ad), (b, bd)) in products {
            for start in (0..ad.cols).step_by(KC) {
                let depth = KC.min(ad.cols - start);
                let a = (&a[start * ad.col_stride..], Dims { cols: depth, ..ad });
                let b = (&b[start * bd.row_stride..], Dims { rows: depth, ..bd });
                self.list.push(Step { a, b, level, accumulates: self.list.len() > first, merges: 0 });
            }
        }
        if let Some(last) = self.list.last_mut() {
            last.merges = merges;
        }
        self.level = level + 1 - merges;
    }

    pub(in super::super) fn list(self) -> Vec<Step<'a, T>> {
        self.list
    }
}

/// How the loops over a product's blocks run.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// Whether writing C takes most of the time. If so, tiles are computed row by row, with a block
    /// of B in L1.
    pub(super) shallow: bool,
    /// Whether all micro-panels of B share one buffer, because each is used for one block of A
    /// only. False if `shallow`. Also false for a row-major B: its rows may be far apart, so a
    /// whole block of them is packed at a time.
    pub(super) one_panel: bool,
    /// Whether the packed blocks of A are kept for the next block of columns.
    pub(super) keeps_a: bool,
    /// The number of columns of a block of B and C. Unless `shallow`, the block of C and the
    /// partial sums then stay in L2, where every step accumulates.
    pub(super) cols: usize,
    /// The number of partial sums, not counting the block of C.
    partials: usize,
}

impl Loops {
    pub(super) fn of<T>(steps: &[Step<'_, T>], c: Dims) -> Self {
        let shallow = steps.len() == 1 && steps[0].depth() <= SHALLOW;
        let one_panel = c.rows <= MC && steps.iter().all(|step| step.b.1.col_stride != 1) && !shallow;
        let partials = steps.iter().map(|step| step.level - step.merges).max().unwrap_or(0);
        let cols = if shallow {
            NC
        } else {
            (C_BLOCK / (1 + partials) / c.rows.clamp(1, C_ROWS) / 32 * 32).clamp(128, NC)
        };
        let keeps_a = c.cols > cols && c.rows.min(C_ROWS) * steps.len() * KC <= KEPT_A;
        Self { shallow, one_panel, keeps_a, cols, partials }
    }

    /// The number of elements of a block of C, and of a partial sum.
    pub(super) fn area(&self, c: Dims) -> usize {
        c.rows.min(C_ROWS) * self.cols
    }
}

/// The number of accumulator values in each workspace: for packed blocks of A, for packed blocks of
/// B, and for partial sums.
pub(in super::super) fn workspace<T>(steps: &[Step<'_, T>], c: Dims) -> [usize; 3] {
    let loops = Loops::of(steps, c);
    let (times, rows) = if loops.keeps_a { (steps.len(), c.rows.min(C_ROWS)) } else { (1, c.rows.min(MC)) };
    let cols = if loops.one_panel { 32 } else { c.cols.min(loops.cols) };
    let depth = steps.iter().map(Step::depth).max().unwrap_or(0);
    // Adds one vector, because panels begin at the first address that is aligned to a vector.
    let panels = cols.next_multiple_of(32) * depth + 16;
    [rows.next_multiple_of(24) * KC * times, panels, loops.partials * loops.area(c)]
}
