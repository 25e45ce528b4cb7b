//! Losses on a device without memory.

use super::{Loss, Targets, check_rows, check_same, check_targets};
use crate::{
    device::{Accumulator, Device, Element, Meta, MetaSlice, MetaSliceMut, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Loss for Meta {
    fn row_max<T: Element>(&self, x: MatRef<'_, T, Self>, max: MetaSliceMut<'_, T::Acc>) -> Result<()> {
        const OP: &str = "row maximum";
        check_same(OP, x.dims(), &[])?;
        check_rows(OP, "the maxima", Self::len_mut(&max), 1, x.rows())?;
        self.record_elementwise::<T>(WorkKind::Loss, x.bytes(), &[max.bytes()]);
        Ok(())
    }

    fn exp_sums<T: Element>(
        &self,
        targets: &Targets<'_>,
        x: MatRef<'_, T, Self>,
        max: MetaSlice<'_, T::Acc>,
        sums: MetaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        check_same(OP, x.dims(), &[])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", Self::len(max), 1, x.rows())?;
        check_rows(OP, "the sums", Self::len_mut(&sums), 3, x.rows())?;
        self.record_elementwise::<T>(WorkKind::Loss, x.bytes(), &[max.bytes(), sums.bytes()]);
        Ok(())
    }

    fn cross_entropy<A: Accumulator>(
        &self,
        targets: &Targets<'_>,
        max: MetaSlice<'_, A>,
        sums: MetaSlice<'_, A>,
        losses: MetaSliceMut<'_, A>,
        log: MetaSliceMut<'_, A>,
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        let rows = targets.classes.len();
        check_targets(OP, targets, rows, 0)?;
        check_rows(OP, "the maxima", Self::len(max), 1, rows)?;
        check_rows(OP, "the sums", Self::len(sums), 3, rows)?;
        check_rows(OP, "the losses", Self::len_mut(&losses), 1, rows)?;
        check_rows(OP, "the logs of sums", Self::len_mut(&log), 1, rows)?;
        self.record_elementwise::<A>(
            WorkKind::Loss,
            max.bytes(),
            &[sums.bytes(), losses.bytes(), log.bytes()],
        );
        Ok(())
    }

    fn cross_entropy_backward<T: Element>(
        &self,
        targets: &Targets<'_>,
        _: f64,
        x: MatRef<'_, T, Self>,
        max: MetaSlice<'_, T::Acc>,
        log: MetaSlice<'_, T::Acc>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "cross entropy backward";
        check_same(OP, x.dims(), &[("dx", dx.dims())])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", Self::len(max), 1, x.rows())?;
        check_rows(OP, "the logs of sums", Self::len(log), 1, x.rows())?;
        self.record_elementwise::<T>(WorkKind::Loss, x.bytes(), &[max.bytes(), log.bytes(), dx.bytes()]);
        Ok(())
    }

    fn squared_error<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        sums: MetaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        const OP: &str = "squared error";
        check_same(OP, x.dims(), &[("y", y.dims())])?;
        check_rows(OP, "the sums", Self::len_mut(&sums), 1, x.rows())?;
        self.record_elementwise::<T>(WorkKind::Loss, x.bytes(), &[y.bytes(), sums.bytes()]);
        Ok(())
    }

    fn squared_error_backward<T: Element>(
        &self,
        _: f64,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_same("squared error backward", x.dims(), &[("y", y.dims()), ("dx", dx.dims())])?;
        self.record_elementwise::<T>(WorkKind::Loss, x.bytes(), &[y.bytes(), dx.bytes()]);
        Ok(())
    }
}
