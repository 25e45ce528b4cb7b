//! Updates on NVIDIA GPUs by the kernels of `cuda/update.cu`.

use super::{AdamWStep, SgdStep, Update, check, check_square_sums};
use crate::{
    device::{
        Device, Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Grid, Kernel},
    },
    error::Result,
    kernels::{MatRef, packs::AccessPlan, pointwise::cuda::vector},
};

/// The access plan of a step over the weights, the gradient and the optimizer state.
fn access_plan<T: Element>(
    grad: CudaSlice<'_, T::Acc>,
    weight: &CudaSliceMut<'_, T>,
    others: &[Option<&CudaSliceMut<'_, T::Acc>>],
) -> AccessPlan {
    let mut operands = vec![vector(grad), vector(Cuda::shared(weight))];
    operands.extend(others.iter().flatten().map(|other| vector(Cuda::shared(other))));
    AccessPlan::by_rows(&operands, 1, Cuda::len_mut(weight))
}

fn len<A: Element>(slice: &Option<CudaSliceMut<'_, A>>) -> Option<usize> {
    slice.as_ref().map(Cuda::len_mut)
}

impl Update for Cuda {
    fn sgd<T: Element>(
        &self,
        step: &SgdStep,
        grad: CudaSlice<'_, T::Acc>,
        weight: CudaSliceMut<'_, T>,
        master: Option<CudaSliceMut<'_, T::Acc>>,
        velocity: Option<CudaSliceMut<'_, T::Acc>>,
    ) -> Result<()> {
        let count = Self::len_mut(&weight);
        let lens = [
            ("the gradient", Some(Self::len(grad))),
            ("the master weights", len(&master)),
            ("the velocity", len(&velocity)),
        ];
        check("sgd", count, &lens)?;
        let access = access_plan(grad, &weight, &[master.as_ref(), velocity.as_ref()]);
        let launch = self.kernel(Kernel::Sgd, T::DTYPE).ints(access.arguments());
        let launch = launch.floats([step.lr, step.momentum, step.weight_decay, step.grad_scale]);
        let launch = launch.int(usize::from(step.nesterov)).read(grad).write(&weight);
        // SAFETY: the arguments are those of the kernel sgd. `check` has verified that all slices
        // are as long as the weight.
        #[allow(unsafe_code)]
        unsafe {
            launch.write_if(master.as_ref()).write_if(velocity.as_ref()).run(Grid::over(access.steps))
        }
    }

    fn adamw<T: Element>(
        &self,
        step: &AdamWStep,
        grad: CudaSlice<'_, T::Acc>,
        weight: CudaSliceMut<'_, T>,
        master: Option<CudaSliceMut<'_, T::Acc>>,
        [first, second]: [CudaSliceMut<'_, T::Acc>; 2],
    ) -> Result<()> {
        let count = Self::len_mut(&weight);
        let lens = [
            ("the gradient", Some(Self::len(grad))),
            ("the master weights", len(&master)),
            ("the first moment", Some(Self::len_mut(&first))),
            ("the second moment", Some(Self::len_mut(&second))),
        ];
        check("adamw", count, &lens)?;
        let (size, root) = step.corrections();
        let access = access_plan(grad, &weight, &[master.as_ref(), Some(&first), Some(&second)]);
        let launch = self.kernel(Kernel::AdamW, T::DTYPE).ints(access.arguments());
        let launch = launch.floats([step.beta1, 1.0 - step.beta1, step.beta2, 1.0 - step.beta2, step.eps]);
        let launch = launch.floats([size, root, 1.0 - step.lr * step.weight_decay, step.grad_scale]);
        let launch = launch.read(grad).write(&weight).write_if(master.as_ref());
        // SAFETY: the arguments are those of the kernel adamw. `check` has verified that all slices
        // are as long as the weight.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&first).write(&second).run(Grid::over(access.steps))
        }
    }

    fn square_sums<T: Element>(&self, x: MatRef<'_, T, Self>, sums: CudaSliceMut<'_, f64>) -> Result<()> {
        check_square_sums(x.dims(), Self::len_mut(&sums))?;
        let access = AccessPlan::by_rows(&[x.operand()], x.rows(), x.cols());
        let launch = self.kernel(Kernel::SquareSums, T::DTYPE).ints(access.arguments());
        // SAFETY: the arguments are those of the kernel square_sums. `check_square_sums` has
        // verified that there is one sum per row.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(x.dims().row_stride).write(&sums).run(Grid::rows(x.rows(), x.cols()))
        }
    }
}
