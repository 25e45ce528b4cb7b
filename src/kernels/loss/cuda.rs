//! Losses on NVIDIA GPUs by the kernels of `cuda/loss.cu`.

use super::{Loss, Targets, check_rows, check_same, check_targets};
use crate::{
    device::{
        Accumulator, Device, Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Grid, Kernel, Table},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::AccessPlan},
};

impl Cuda {
    /// Uploads the column of each row's target, or -1 if the row is ignored or another rank holds
    /// the column.
    fn columns(&self, targets: &Targets<'_>, cols: usize) -> Result<Table> {
        let column = |row| targets.column(row, cols).map_or(-1, |column| column as i64);
        self.table(&(0..targets.classes.len()).map(column).collect::<Vec<_>>())
    }

    fn ignored(&self, targets: &Targets<'_>) -> Result<Table> {
        self.table_of_flags((0..targets.classes.len()).map(|row| targets.is_ignored(row)))
    }
}

impl Loss for Cuda {
    fn row_max<T: Element>(&self, x: MatRef<'_, T, Self>, max: CudaSliceMut<'_, T::Acc>) -> Result<()> {
        const OP: &str = "row maximum";
        check_same(OP, x.dims(), &[])?;
        check_rows(OP, "the maxima", Self::len_mut(&max), 1, x.rows())?;
        let access = AccessPlan::by_rows(&[x.operand()], x.rows(), x.cols());
        let launch = self.kernel(Kernel::RowMax, T::DTYPE).ints(access.arguments());
        // SAFETY: the arguments are those of the kernel row_max. `check_rows` has verified that
        // there is one maximum per row.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(x.dims().row_stride).write(&max).run(Grid::rows(x.rows(), x.cols()))
        }
    }

    fn exp_sums<T: Element>(
        &self,
        targets: &Targets<'_>,
        x: MatRef<'_, T, Self>,
        max: CudaSlice<'_, T::Acc>,
        sums: CudaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        check_same(OP, x.dims(), &[])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", Self::len(max), 1, x.rows())?;
        check_rows(OP, "the sums", Self::len_mut(&sums), 3, x.rows())?;
        let columns = self.columns(targets, x.cols())?;
        let access = AccessPlan::by_rows(&[x.operand()], x.rows(), x.cols());
        let launch = self.kernel(Kernel::ExpSums, T::DTYPE).ints(access.arguments());
        let launch = launch.int(usize::from(targets.off != 0.0)).table(&columns);
        let launch = launch.read(x.data()).int(x.dims().row_stride).read(max).write(&sums);
        // SAFETY: the arguments are those of the kernel exp_sums. `check_rows` and `check_targets`
        // have verified the sizes, and `columns` holds only columns of x.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::rows(x.rows(), x.cols()))
        }
    }

    fn cross_entropy<A: Accumulator>(
        &self,
        targets: &Targets<'_>,
        max: CudaSlice<'_, A>,
        sums: CudaSlice<'_, A>,
        losses: CudaSliceMut<'_, A>,
        log: CudaSliceMut<'_, A>,
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        let rows = targets.classes.len();
        check_targets(OP, targets, rows, 0)?;
        check_rows(OP, "the maxima", Self::len(max), 1, rows)?;
        check_rows(OP, "the sums", Self::len(sums), 3, rows)?;
        check_rows(OP, "the losses", Self::len_mut(&losses), 1, rows)?;
        check_rows(OP, "the logs of sums", Self::len_mut(&log), 1, rows)?;
        let ignored = self.ignored(targets)?;
        let launch = self.kernel(Kernel::CrossEntropy, A::DTYPE).int(rows);
        let launch = launch.floats([targets.on, targets.off, targets.z]).table(&ignored);
        // SAFETY: the arguments are those of the kernel cross_entropy. `check_rows` has verified
        // the sizes.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(max).read(sums).write(&losses).write(&log).run(Grid::over(rows))
        }
    }

    fn cross_entropy_backward<T: Element>(
        &self,
        targets: &Targets<'_>,
        scale: f64,
        x: MatRef<'_, T, Self>,
        max: CudaSlice<'_, T::Acc>,
        log: CudaSlice<'_, T::Acc>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "cross entropy backward";
        check_same(OP, x.dims(), &[("dx", dx.dims())])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", Self::len(max), 1, x.rows())?;
        check_rows(OP, "the logs of sums", Self::len(log), 1, x.rows())?;
        let (columns, ignored) = (self.columns(targets, x.cols())?, self.ignored(targets)?);
        let access = AccessPlan::by_rows(&[x.operand(), dx.operand()], x.rows(), x.cols());
        let sdx = dx.dims().row_stride;
        let dx = dx.into_data();
        let launch = self.kernel(Kernel::CrossEntropyBackward, T::DTYPE).ints(access.arguments());
        let launch =
            launch.floats([targets.on, targets.off, targets.z, scale]).table(&columns).table(&ignored);
        let launch = launch.read(x.data()).int(x.dims().row_stride);
        let launch = launch.read(max).read(log).write(&dx).int(sdx);
        // SAFETY: the arguments are those of the kernel cross_entropy_backward. `check_same`,
        // `check_targets` and `check_rows` have verified the sizes.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::rows(x.rows(), x.cols()))
        }
    }

    fn squared_error<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        sums: CudaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        const OP: &str = "squared error";
        check_same(OP, x.dims(), &[("y", y.dims())])?;
        check_rows(OP, "the sums", Self::len_mut(&sums), 1, x.rows())?;
        let access = AccessPlan::by_rows(&[x.operand(), y.operand()], x.rows(), x.cols());
        let launch = self.kernel(Kernel::SquaredError, T::DTYPE).ints(access.arguments());
        let launch = launch.read(x.data()).int(x.dims().row_stride).read(y.data()).int(y.dims().row_stride);
        // SAFETY: the arguments are those of the kernel squared_error. `check_same` and
        // `check_rows` have verified the sizes.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&sums).run(Grid::rows(x.rows(), x.cols()))
        }
    }

    fn squared_error_backward<T: Element>(
        &self,
        scale: f64,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_same("squared error backward", x.dims(), &[("y", y.dims()), ("dx", dx.dims())])?;
        let access = AccessPlan::flat(&[x.operand(), y.operand(), dx.operand()]);
        let sdx = dx.dims().row_stride;
        let dx = dx.into_data();
        let launch = self.kernel(Kernel::SquaredErrorBackward, T::DTYPE).ints(access.arguments());
        let launch = launch.floats([scale]).read(x.data()).int(x.dims().row_stride);
        let launch = launch.read(y.data()).int(y.dims().row_stride).write(&dx).int(sdx);
        // SAFETY: the arguments are those of the kernel squared_error_backward. `check_same` has
        // compared the dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(x.rows() * x.cols()))
        }
    }
}
