//! Softmax on NVIDIA GPUs: `cuda/softmax.cu`.

use super::{Mask, Softmax, check};
use crate::{
    device::{
        Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::Walk},
};

impl Softmax for Cuda {
    fn softmax<T: Element>(
        &self,
        mask: Mask<'_>,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("softmax", mask, &[("x", x.dims())], y.dims())?;
        let (rows, cols, sx, sy) = (x.rows(), x.cols(), x.dims().row_stride, y.dims().row_stride);
        let walk = Walk::by_rows(&[x.operand(), y.operand()], rows, cols);
        let y = y.into_data();
        // An offset beyond the columns hides nothing, like none, which is -1.
        let offset = mask.causal.map_or(-1, |offset| offset.min(cols) as i64);
        let valid = mask.valid.map(|valid| self.table_of_flags(valid.iter().copied())).transpose()?;
        let launch = self.kernel(Kernel::Softmax, T::DTYPE).ints(walk.words()).int(offset as usize);
        let launch = match &valid {
            Some(valid) => launch.table(valid),
            None => launch.null(),
        };
        // SAFETY: the arguments are softmax's; `check` has seen that x has the dimensions of y, and the mask a flag a column.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(sx).write(&y).int(sy).run(Grid::rows(rows, cols))
        }
    }

    fn softmax_backward<T: Element>(
        &self,
        y: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("softmax backward", Mask::default(), &[("y", y.dims()), ("dy", dy.dims())], dx.dims())?;
        let (rows, cols) = (y.rows(), y.cols());
        let [sy, sdy, sdx] = [y.dims(), dy.dims(), dx.dims()].map(|dims| dims.row_stride);
        let walk = Walk::by_rows(&[y.operand(), dy.operand(), dx.operand()], rows, cols);
        let dx = dx.into_data();
        let launch = self.kernel(Kernel::SoftmaxBackward, T::DTYPE).ints(walk.words());
        let launch = launch.read(y.data()).int(sy).read(dy.data()).int(sdy).write(&dx).int(sdx);
        // SAFETY: the arguments are softmax_backward's; `check` has compared the dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::rows(rows, cols))
        }
    }
}
