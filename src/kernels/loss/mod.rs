//! Losses of rows: cross entropy over all classes or a range of them, and squared error.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{
    MatMut, MatRef,
    view::{Dims, same_dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// The targets of a cross entropy.
///
/// The loss of a row with target t is L = log Σₖ e^xₖ − Σₖ qₖ xₖ + z (log Σₖ e^xₖ)², where qₜ =
/// `on` + `off` and qₖ = `off` for the other classes. The q of a row must sum to 1, because the
/// kernels rely on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets<'a> {
    /// The target class of each row, among all classes.
    pub classes: &'a [u32],
    /// The ignored class. Rows with this target have loss 0.
    pub ignored: Option<u32>,
    /// The number of classes, including those that other ranks hold.
    pub count: usize,
    /// The class of the first column. A rank may hold a range of the classes.
    pub first: usize,
    /// The weight of the target class in addition to `off`.
    pub on: f64,
    /// The weight of every class.
    pub off: f64,
    /// The weight z of the squared log-sum-exp (z-loss).
    pub z: f64,
}

impl Targets<'_> {
    /// The column of a row's target. `None` if the row is ignored or another rank holds the column.
    pub(crate) fn column(&self, row: usize, cols: usize) -> Option<usize> {
        let class = self.classes[row];
        let column = (class as usize).checked_sub(self.first).filter(|&column| column < cols);
        column.filter(|_| !self.is_ignored(row))
    }

    /// Whether a row is ignored.
    pub(crate) fn is_ignored(&self, row: usize) -> bool {
        self.ignored == Some(self.classes[row])
    }
}

/// Losses. Sums are kept in the accumulator type and do not overflow for finite logits.
///
/// A cross entropy over classes that are sharded over ranks takes four steps, with a reduction
/// after each of the first two: [`Loss::row_max`], [`Loss::exp_sums`], [`Loss::cross_entropy`],
/// [`Loss::cross_entropy_backward`] (Megatron-LM, `VocabParallelCrossEntropy`).
pub trait Loss: Device {
    /// max ← the maximum of each row: −∞ if the row is empty, NaN if an element is NaN.
    ///
    /// # Errors
    /// When sizes disagree.
    fn row_max<T: Element>(&self, x: MatRef<'_, T, Self>, max: Self::SliceMut<'_, T::Acc>) -> Result<()>;

    /// The contributions of these columns to each row. With m the row's maximum over all classes:
    /// `sums[row]` ← [Σ e^(x − m), xₜ − m, Σ (x − m)]. The second number is 0 if the row is ignored
    /// or another rank holds the target's column.
    ///
    /// `sums`: `[rows, 3]`. The third number is 0 if `off` is 0, so that a logit of −∞ has no
    /// effect then.
    ///
    /// # Errors
    /// When sizes disagree, or a target is not a class.
    fn exp_sums<T: Element>(
        &self,
        targets: &Targets<'_>,
        x: MatRef<'_, T, Self>,
        max: Self::Slice<'_, T::Acc>,
        sums: Self::SliceMut<'_, T::Acc>,
    ) -> Result<()>;

    /// losses ← the losses of the rows, from the maxima m and the sums over all classes. Ignored
    /// rows have loss 0. `log` ← log Σ e^(x − m).
    ///
    /// # Errors
    /// When sizes disagree, or a target is not a class.
    fn cross_entropy<A: crate::device::Accumulator>(
        &self,
        targets: &Targets<'_>,
        max: Self::Slice<'_, A>,
        sums: Self::Slice<'_, A>,
        losses: Self::SliceMut<'_, A>,
        log: Self::SliceMut<'_, A>,
    ) -> Result<()>;

    /// dx ← scale · ∂(Σ over rows of L)/∂x = scale · (p (1 + 2 z lse) − q), with p = e^((x − m) −
    /// log) and lse = m + log. dx of ignored rows is 0.
    ///
    /// m and `log` are separate arguments because of logits with a large common offset. For such
    /// logits, the rounding error of lse = m + log is so large that e^(x − lse) is not a
    /// probability. The difference x − m is exact.
    ///
    /// # Errors
    /// When sizes disagree, or a target is not a class.
    fn cross_entropy_backward<T: Element>(
        &self,
        targets: &Targets<'_>,
        scale: f64,
        x: MatRef<'_, T, Self>,
        max: Self::Slice<'_, T::Acc>,
        log: Self::Slice<'_, T::Acc>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// sums ← Σ over each row of (x − y)².
    ///
    /// # Errors
    /// When sizes disagree.
    fn squared_error<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        sums: Self::SliceMut<'_, T::Acc>,
    ) -> Result<()>;

    /// dx ← scale · 2 (x − y).
    ///
    /// # Errors
    /// When sizes disagree.
    fn squared_error_backward<T: Element>(
        &self,
        scale: f64,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

/// Checks that each row has one target, that each target is a class or the ignored class, and that
/// all columns are classes.
pub(crate) fn check_targets(op: &'static str, targets: &Targets<'_>, rows: usize, cols: usize) -> Result<()> {
    same_size(op, "the number of targets", targets.classes.len(), "the number of rows", rows)?;
    if targets.first.saturating_add(cols) > targets.count {
        return Err(Error::sizes(
            op,
            "the class after the last column",
            targets.first.saturating_add(cols),
            "the number of classes",
            targets.count,
        ));
    }
    let wrong = |class: &&u32| **class as usize >= targets.count && targets.ignored != Some(**class);
    match targets.classes.iter().find(wrong) {
        Some(class) => {
            Err(Error::invalid(op, format!("target {class} is none of the {} classes", targets.count)))
        }
        None => Ok(()),
    }
}

/// Checks that there are `each` numbers per row.
fn check_rows(op: &'static str, name: &str, len: usize, each: usize, rows: usize) -> Result<()> {
    let what = match each {
        1 => "the number of rows".to_string(),
        each => format!("{each} times the number of rows"),
    };
    same_size(op, name, len, &what, each.saturating_mul(rows))
}

/// Checks that all matrices have equal dimensions and unit column strides.
fn check_same(op: &'static str, x: Dims, others: &[(&str, Dims)]) -> Result<()> {
    unit_columns(op, x)?;
    others.iter().try_for_each(|(name, dims)| {
        unit_columns(op, *dims)?;
        same_dims(op, name, *dims, "x", x)
    })
}
