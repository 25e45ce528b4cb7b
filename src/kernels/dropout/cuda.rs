//! Dropout on NVIDIA GPUs by the kernel of `cuda/dropout.cu`.

use super::{Dropout, DropoutMask, check};
use crate::{
    device::{
        Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::AccessPlan},
};

impl Dropout for Cuda {
    fn dropout<T: Element>(
        &self,
        mask: &DropoutMask,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(mask, x.dims(), y.dims())?;
        let (rows, cols, sx, sy) = (x.rows(), x.cols(), x.dims().row_stride, y.dims().row_stride);
        let access = AccessPlan::by_rows(&[x.operand(), y.operand()], rows, cols);
        let y = y.into_data();
        let [key0, key1] = mask.stream.key().map(|key| key as usize);
        let launch = self.kernel(Kernel::Dropout, T::DTYPE).ints(access.arguments());
        let launch =
            launch.ints([mask.first_index(0) as usize, mask.width, key0, key1, mask.threshold() as usize]);
        let launch = launch.floats([1.0 / (1.0 - mask.probability)]).read(x.data()).int(sx);
        // SAFETY: the arguments are those of the kernel dropout. `check` has verified that x and y
        // have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&y).int(sy).run(Grid::over(access.steps))
        }
    }
}
