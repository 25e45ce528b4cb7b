//! What a product consists of, and how the loops over its blocks run.

use super::{C_BLOCK, KC, KEPT, MANY, MC, NC, SHALLOW};
use crate::kernels::view::Dims;

/// A matrix: its memory, and where in it the elements lie.
pub(in super::super) type Mat<'a, T> = (&'a [T], Dims);

/// A stretch of the depth, of at most [`KC`], and what becomes of its sums.
///
/// Sums wait on a stack until they are added to one another. The lowest is C.
#[derive(Clone, Copy)]
pub(in super::super) struct Step<'a, T> {
    /// A's columns.
    pub(super) a: Mat<'a, T>,
    /// B's rows.
    pub(super) b: Mat<'a, T>,
    /// The sum's place on the stack.
    pub(super) level: usize,
    /// Whether it goes on with what is there.
    pub(super) goes_on: bool,
    /// How many sums below are complete with this step. They are added to it, the nearest first, and it takes the lowest one's place.
    pub(super) merges: usize,
}

impl<'a, T> Step<'a, T> {
    /// The step for the rows of C from `row` on, and its columns from `col` on.
    pub(in super::super) fn part(&self, row: usize, col: usize) -> Self {
        let Self { a: (a, ad), b: (b, bd), level, goes_on, merges } = *self;
        Self {
            a: (&a[row * ad.row_stride..], ad),
            b: (&b[col * bd.col_stride..], bd),
            level,
            goes_on,
            merges,
        }
    }

    pub(in super::super) fn depth(&self) -> usize {
        self.a.1.cols
    }

    /// Whether A's elements are packed row by row, not column by column.
    pub(super) fn by_rows(&self) -> bool {
        self.a.1.col_stride == 1
    }

    /// The same step of another type of element.
    pub(in super::super) fn map<U>(&self, f: impl Fn(&'a [T]) -> &'a [U]) -> Step<'a, U> {
        let Self { a, b, level, goes_on, merges } = *self;
        Step { a: (f(a.0), a.1), b: (f(b.0), b.1), level, goes_on, merges }
    }
}

/// The steps of a product, or of a sum of products along a tree.
pub(in super::super) struct Steps<'a, T> {
    list: Vec<Step<'a, T>>,
    level: usize,
}

impl<'a, T> Steps<'a, T> {
    /// A single product; none where it has no depth.
    pub(in super::super) fn product(a: Mat<'a, T>, b: Mat<'a, T>) -> Vec<Step<'a, T>> {
        let mut steps = Self::new();
        steps.push([(a, b)], 0);
        steps.list
    }

    pub(in super::super) fn new() -> Self {
        Self { list: Vec::new(), level: 0 }
    }

    /// A term of the sum: products, added from left to right. It completes so many sums before it.
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
                self.list.push(Step { a, b, level, goes_on: self.list.len() > first, merges: 0 });
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
    /// Whether C is written once and soon: then it is, row by row of tiles, with a block of B in the first cache.
    pub(super) shallow: bool,
    /// Whether a panel of B is used for one block of A only, and all go to the same place. Rows of a row-major B are packed a block at
    /// a time: they are far apart.
    pub(super) once: bool,
    /// Whether all blocks of A are kept once they are packed: they are needed for every block of columns.
    pub(super) kept: bool,
    /// The columns of a block of B and C: as many as leave C's block, and the sums that wait, in the second cache, where they are
    /// added to in every step.
    pub(super) cols: usize,
    /// The sums that wait beside C.
    waiting: usize,
}

impl Loops {
    pub(super) fn of<T>(steps: &[Step<'_, T>], c: Dims) -> Self {
        let shallow = steps.len() == 1 && steps[0].depth() <= SHALLOW;
        let once = c.rows <= MC && steps.iter().all(|step| step.b.1.col_stride != 1) && !shallow;
        let waiting = steps.iter().map(|step| step.level - step.merges).max().unwrap_or(0);
        let cols = match shallow {
            true => NC,
            false => (C_BLOCK / (1 + waiting) / c.rows.clamp(1, MANY) / 32 * 32).clamp(128, NC),
        };
        let kept = c.cols > cols && c.rows.min(MANY) * steps.len() * KC <= KEPT;
        Self { shallow, once, kept, cols, waiting }
    }

    /// The elements of a block of C, and of a sum that waits.
    pub(super) fn area(&self, c: Dims) -> usize {
        c.rows.min(MANY) * self.cols
    }
}

/// The room, in elements of the accumulator, that packed blocks of A and of B and sums that wait want.
pub(in super::super) fn room<T>(steps: &[Step<'_, T>], c: Dims) -> [usize; 3] {
    let loops = Loops::of(steps, c);
    let (times, rows) = if loops.kept { (steps.len(), c.rows.min(MANY)) } else { (1, c.rows.min(MC)) };
    let cols = if loops.once { 32 } else { c.cols.min(loops.cols) };
    let depth = steps.iter().map(Step::depth).max().unwrap_or(0);
    // A vector more, since these begin at a vector's boundary.
    let panels = cols.next_multiple_of(32) * depth + 16;
    [rows.next_multiple_of(24) * KC * times, panels, loops.waiting * loops.area(c)]
}
