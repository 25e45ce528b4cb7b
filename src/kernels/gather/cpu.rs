//! Gather and scatter-add on the CPU.

use super::{Gather, NO_ROW, check};
use crate::{
    device::{Cpu, Element, vectorized},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Gather for Cpu {
    #[inline(never)]
    fn gather<T: Element>(
        &self,
        table: MatRef<'_, T, Self>,
        ids: &[u32],
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gather", ids, y.dims(), table.dims())?;
        for (row, &id) in ids.iter().enumerate() {
            match id {
                NO_ROW => y.row(row).fill(T::default()),
                id => y.row(row).copy_from_slice(table.row(id as usize)),
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn scatter_add<T: Element>(
        &self,
        ids: &[u32],
        dy: MatRef<'_, T, Self>,
        mut dtable: MatMut<'_, T::Acc, Self>,
    ) -> Result<()> {
        check("scatter_add", ids, dy.dims(), dtable.dims())?;
        vectorized(|| {
            for (row, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_ROW) {
                for (sum, dy) in dtable.row(id as usize).iter_mut().zip(dy.row(row)) {
                    *sum += dy.widen();
                }
            }
        });
        Ok(())
    }
}
