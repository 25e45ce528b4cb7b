//! Gather and scatter-add on NVIDIA GPUs by the kernels of `cuda/gather.cu`.

use super::{Gather, NO_ROW, check};
use crate::{
    device::{
        Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::AccessPlan},
};

impl Gather for Cuda {
    fn gather<T: Element>(
        &self,
        table: MatRef<'_, T, Self>,
        ids: &[u32],
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gather", ids, y.dims(), table.dims())?;
        let (rows, cols, sy) = (y.rows(), y.cols(), y.dims().row_stride);
        // `by_rows` gets the larger number of rows, because it must check the alignment of the rows
        // of both matrices.
        let access = AccessPlan::by_rows(&[table.operand(), y.operand()], rows.max(table.rows()), cols);
        let y = y.into_data();
        let ids = self.table_u32(ids)?;
        let launch = self.kernel(Kernel::Gather, T::DTYPE);
        let launch = launch.ints([usize::from(access.packed), rows, cols]);
        let launch = launch.read(table.data()).int(table.dims().row_stride).table(&ids);
        // SAFETY: the arguments are those of the kernel gather. `check` has verified that y has one
        // row per id, and that the table has the rows of all ids but `NO_ROW`.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&y).int(sy).run(Grid::over(rows * cols))
        }
    }

    /// The host groups the rows by id. For each id and column, one thread then adds the rows in
    /// order, so the bits are deterministic.
    fn scatter_add<T: Element>(
        &self,
        ids: &[u32],
        dy: MatRef<'_, T, Self>,
        dtable: MatMut<'_, T::Acc, Self>,
    ) -> Result<()> {
        check("scatter_add", ids, dy.dims(), dtable.dims())?;
        let mut order: Vec<u32> = (0..ids.len() as u32).filter(|&row| ids[row as usize] != NO_ROW).collect();
        order.sort_by_key(|&row| ids[row as usize]);
        let (mut targets, mut begins) = (Vec::new(), Vec::new());
        for (at, &row) in order.iter().enumerate() {
            if targets.last() != Some(&ids[row as usize]) {
                targets.push(ids[row as usize]);
                begins.push(at as u32);
            }
        }
        begins.push(order.len() as u32);
        let (count, cols, stride) = (targets.len(), dy.cols(), dtable.dims().row_stride);
        let access =
            AccessPlan::by_rows(&[dy.operand(), dtable.operand()], ids.len().max(dtable.rows()), cols);
        let dtable = dtable.into_data();
        let (targets, begins, order) =
            (self.table_u32(&targets)?, self.table_u32(&begins)?, self.table_u32(&order)?);
        let launch = self.kernel(Kernel::ScatterAdd, T::DTYPE);
        let launch = launch.ints([usize::from(access.packed), count, cols]);
        let launch =
            launch.table(&targets).table(&begins).table(&order).read(dy.data()).int(dy.dims().row_stride);
        // SAFETY: the arguments are those of the kernel scatter_add. `check` has verified that dy
        // has one row per id, and that the table has the rows of all ids but `NO_ROW`, which
        // `order` leaves out. Each id occurs once in `targets`.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&dtable).int(stride).run(Grid::over(count * cols))
        }
    }
}
