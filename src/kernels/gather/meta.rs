//! Gather and scatter-add on a device without memory.

use super::{Gather, check};
use crate::{
    device::{Element, Meta, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Gather for Meta {
    fn gather<T: Element>(
        &self,
        table: MatRef<'_, T, Self>,
        ids: &[u32],
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gather", ids, y.dims(), table.dims())?;
        // A row of the table is read for each row of y.
        self.record_elementwise::<T>(WorkKind::Other, y.bytes(), &[y.bytes()]);
        Ok(())
    }

    fn scatter_add<T: Element>(
        &self,
        ids: &[u32],
        dy: MatRef<'_, T, Self>,
        dtable: MatMut<'_, T::Acc, Self>,
    ) -> Result<()> {
        check("scatter_add", ids, dy.dims(), dtable.dims())?;
        // A row of the table is updated for each row of dy.
        let updated = dy.dims().elements() * size_of::<T::Acc>() as u128;
        self.record_elementwise::<T>(WorkKind::Other, dy.bytes(), &[2 * updated]);
        Ok(())
    }
}
