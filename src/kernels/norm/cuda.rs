//! LayerNorm and RMSNorm on NVIDIA GPUs by the kernels of `cuda/norm.cu`.

use super::{Norm, NormKind, check};
use crate::{
    device::{
        Device, Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Grid, Kernel},
    },
    error::Result,
    kernels::{
        MatMut, MatRef, Pointwise,
        packs::AccessPlan,
        pointwise::cuda::{column_blocks, runs, vector},
    },
};

impl Norm for Cuda {
    fn normalize<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: CudaSlice<'_, T>,
        beta: Option<CudaSlice<'_, T>>,
        y: MatMut<'_, T, Self>,
        stats: CudaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        let beta_len = beta.map_or(y.cols(), Self::len);
        let vectors = [("gamma", Self::len(gamma)), ("beta", beta_len)];
        check("norm", &[("x", x.dims())], y.dims(), &vectors, Self::len_mut(&stats))?;
        let operands = [x.operand(), y.operand(), vector(gamma), vector(beta.unwrap_or(gamma))];
        let access = AccessPlan::by_rows(&operands, x.rows(), x.cols());
        let (sx, sy) = (x.dims().row_stride, y.dims().row_stride);
        let y = y.into_data();
        let launch = self.kernel(Kernel::Normalize, T::DTYPE).ints(access.arguments());
        let launch = launch.int(usize::from(kind.centers())).floats([kind.eps()]);
        let launch = launch.read(x.data()).int(sx).read(gamma).read_if(beta).write(&y).int(sy).write(&stats);
        // SAFETY: the arguments are those of the kernel normalize. `check` has verified that x and
        // y have the same dimensions, that gamma and beta have one element per column, and that the
        // statistics have two elements per row.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::rows(access.rows, access.cols))
        }
    }

    fn normalize_backward<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: CudaSlice<'_, T>,
        stats: CudaSlice<'_, T::Acc>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
        mut dgamma: CudaSliceMut<'_, T::Acc>,
        mut dbeta: Option<CudaSliceMut<'_, T::Acc>>,
    ) -> Result<()> {
        let dbeta_len = dbeta.as_ref().map_or(dx.cols(), Self::len_mut);
        let vectors = [("gamma", Self::len(gamma)), ("dgamma", Self::len_mut(&dgamma)), ("dbeta", dbeta_len)];
        let inputs = [("x", x.dims()), ("dy", dy.dims())];
        check("norm backward", &inputs, dx.dims(), &vectors, Self::len(stats))?;
        let (rows, cols) = (x.rows(), x.cols());
        if rows == 0 {
            self.fill(0.0, MatMut::<T::Acc, Self>::new(Self::reborrow(&mut dgamma), 1, cols)?)?;
            return dbeta.as_mut().map_or(Ok(()), |dbeta| {
                self.fill(0.0, MatMut::<T::Acc, Self>::new(Self::reborrow(dbeta), 1, cols)?)
            });
        }
        let access =
            AccessPlan::by_rows(&[x.operand(), dy.operand(), dx.operand(), vector(gamma)], rows, cols);
        let [sx, sdy, sdx] = [x.dims(), dy.dims(), dx.dims()].map(|dims| dims.row_stride);
        let dx = dx.into_data();
        let launch = self.kernel(Kernel::NormalizeBackward, T::DTYPE).ints(access.arguments());
        let launch = launch.int(usize::from(kind.centers())).read(x.data()).int(sx).read(gamma).read(stats);
        // SAFETY: the arguments are those of the kernel normalize_backward. `check` has compared
        // the dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(dy.data()).int(sdy).write(&dx).int(sdx).run(Grid::rows(rows, cols))?;
        }
        let (run, runs) = runs(rows);
        let mut partial = self.empty::<T::Acc>(2 * runs * cols)?;
        let (gammas, betas) = (0..runs * cols, runs * cols..2 * runs * cols);
        {
            let mut whole = Self::slice_mut(&mut partial);
            let gammas = Self::narrow_mut(Self::reborrow(&mut whole), gammas.clone());
            let access = AccessPlan::by_rows(&[x.operand(), dy.operand()], rows, cols);
            let launch = self.kernel(Kernel::NormalizeColumns, T::DTYPE).ints(access.arguments());
            let launch =
                launch.int(run).read(x.data()).int(sx).read(stats).read(dy.data()).int(sdy).write(&gammas);
            let betas = dbeta.is_some().then(|| Self::narrow_mut(whole, betas.clone()));
            // SAFETY: the arguments are those of the kernel normalize_columns. `partial` was
            // allocated for two sets of `runs` rows of `cols` columns. The kernel writes each set
            // through its own pointer.
            #[allow(unsafe_code)]
            unsafe {
                let launch = launch.write_if(betas.as_ref());
                launch.run(column_blocks(access, runs))?;
            }
        }
        self.add_runs(runs, Self::narrow(Self::slice(&partial), gammas), dgamma)?;
        dbeta.map_or(Ok(()), |dbeta| self.add_runs(runs, Self::narrow(Self::slice(&partial), betas), dbeta))
    }
}
