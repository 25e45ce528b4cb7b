//! Element-wise kernels on NVIDIA GPUs, in `cuda/pointwise.cu`.

use super::{Activation, Pointwise, check, check_row};
use crate::{
    device::{
        Device, Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Grid, Kernel},
    },
    error::{Result, same_size},
    kernels::{
        MatMut, MatRef,
        packs::{AccessPlan, Operand},
        view::{Dims, same_dims, unit_columns},
    },
};

/// The number of an activation in `cuda/pointwise.cu`.
fn number(f: Activation) -> usize {
    match f {
        Activation::Relu => 0,
        Activation::Silu => 1,
        Activation::GeluErf => 2,
        Activation::GeluTanh => 3,
    }
}

impl<T: Element> MatRef<'_, T, Cuda> {
    pub(in crate::kernels) fn operand(&self) -> Operand {
        Operand { dims: self.dims(), address: self.data().address(), size: size_of::<T>() }
    }
}

impl<T: Element> MatMut<'_, T, Cuda> {
    pub(in crate::kernels) fn operand(&self) -> Operand {
        Operand { dims: self.dims(), address: self.shared().address(), size: size_of::<T>() }
    }
}

/// A vector as an operand that a kernel accesses in every row.
pub(in crate::kernels) fn vector<T: Element>(slice: CudaSlice<'_, T>) -> Operand {
    let dims = Dims { rows: 1, cols: Cuda::len(slice), row_stride: 0, col_stride: 1 };
    Operand { dims, address: slice.address(), size: size_of::<T>() }
}

impl Pointwise for Cuda {
    fn activate<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation", &[("x", x.dims())], ("y", y.dims()))?;
        let access = AccessPlan::flat(&[x.operand(), y.operand()]);
        let (sx, sy) = (x.dims().row_stride, y.dims().row_stride);
        let y = y.into_data();
        let launch = self.kernel(Kernel::Activate, T::DTYPE).ints(access.arguments()).int(number(f));
        // SAFETY: the arguments are those of the kernel activate. `check` has verified that x and y
        // have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(sx).write(&y).int(sy).run(Grid::over(access.steps))
        }
    }

    fn activate_backward<T: Element>(
        &self,
        f: Activation,
        x: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation backward", &[("x", x.dims()), ("dy", dy.dims())], ("dx", dx.dims()))?;
        let access = AccessPlan::flat(&[x.operand(), dy.operand(), dx.operand()]);
        let [sx, sdy, sdx] = [x.dims(), dy.dims(), dx.dims()].map(|dims| dims.row_stride);
        let dx = dx.into_data();
        let launch = self.kernel(Kernel::ActivateBackward, T::DTYPE).ints(access.arguments()).int(number(f));
        let launch = launch.read(x.data()).int(sx).read(dy.data()).int(sdy).write(&dx).int(sdx);
        // SAFETY: the arguments are those of the kernel activate_backward. `check` has verified
        // that all matrices have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(access.steps))
        }
    }

    fn gate<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gate", &[("gate", gate.dims()), ("up", up.dims())], ("y", y.dims()))?;
        let access = AccessPlan::flat(&[gate.operand(), up.operand(), y.operand()]);
        let [sg, su, sy] = [gate.dims(), up.dims(), y.dims()].map(|dims| dims.row_stride);
        let y = y.into_data();
        let launch = self.kernel(Kernel::Gate, T::DTYPE).ints(access.arguments()).int(number(f));
        let launch = launch.read(gate.data()).int(sg).read(up.data()).int(su).write(&y).int(sy);
        // SAFETY: the arguments are those of the kernel gate. `check` has verified that all
        // matrices have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(access.steps))
        }
    }

    fn gate_backward<T: Element>(
        &self,
        f: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        d: MatMut<'_, T, Self>,
    ) -> Result<()> {
        super::check_gate_backward(gate.dims(), up.dims(), dy.dims(), d.dims())?;
        let halves = [0, gate.cols()].map(|at| {
            let dims = Dims { cols: gate.cols(), ..d.dims() };
            Operand {
                dims,
                address: d.shared().address() + (at * size_of::<T>()) as u64,
                size: size_of::<T>(),
            }
        });
        let operands = [gate.operand(), up.operand(), dy.operand(), halves[0], halves[1]];
        let access = AccessPlan::by_rows(&operands, gate.rows(), gate.cols());
        let [sg, su, sdy, sd] = [gate.dims(), up.dims(), dy.dims(), d.dims()].map(|dims| dims.row_stride);
        let d = d.into_data();
        let launch = self.kernel(Kernel::GateBackward, T::DTYPE).ints(access.arguments()).int(number(f));
        let launch = launch
            .read(gate.data())
            .int(sg)
            .read(up.data())
            .int(su)
            .read(dy.data())
            .int(sdy)
            .write(&d)
            .int(sd);
        // SAFETY: the arguments are those of the kernel gate_backward. `check_gate_backward` has
        // verified that the inputs have the same dimensions, and that d is twice as wide.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(access.steps))
        }
    }

    fn add<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("add", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        self.of_two(Kernel::Add, a, b, y)
    }

    fn mul<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("mul", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        self.of_two(Kernel::Mul, a, b, y)
    }

    fn scale_rows<T: Element>(
        &self,
        s: CudaSlice<'_, T>,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        super::check_scale_rows(Self::len(s), x.dims(), y.dims())?;
        let access = AccessPlan::by_rows(&[x.operand(), y.operand()], x.rows(), x.cols());
        let (sx, sy) = (x.dims().row_stride, y.dims().row_stride);
        let y = y.into_data();
        let launch = self.kernel(Kernel::ScaleRows, T::DTYPE).ints(access.arguments());
        let launch = launch.read(s).read(x.data()).int(sx).write(&y).int(sy);
        // SAFETY: the arguments are those of the kernel scale_rows. `check_scale_rows` has compared
        // the dimensions of x and y, and the number of factors with the number of rows.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(access.steps))
        }
    }

    fn dot_rows<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        s: CudaSliceMut<'_, T>,
    ) -> Result<()> {
        super::check_dot_rows(a.dims(), b.dims(), Self::len_mut(&s))?;
        let access = AccessPlan::by_rows(&[a.operand(), b.operand()], a.rows(), a.cols());
        let (sa, sb) = (a.dims().row_stride, b.dims().row_stride);
        let launch = self.kernel(Kernel::DotRows, T::DTYPE).ints(access.arguments());
        let launch = launch.read(a.data()).int(sa).read(b.data()).int(sb).write(&s);
        // SAFETY: the arguments are those of the kernel dot_rows. `check_dot_rows` has compared the
        // dimensions of a and b, and the length of s with the number of rows.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::rows(access.rows, access.cols))
        }
    }

    fn accumulate<T: Element, Y: Element<Acc = T::Acc>>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, Y, Self>,
    ) -> Result<()> {
        check("accumulate", &[("x", x.dims())], ("y", y.dims()))?;
        let access = AccessPlan::flat(&[x.operand(), y.operand()]);
        let (sx, sy) = (x.dims().row_stride, y.dims().row_stride);
        let y = y.into_data();
        let launch = self.kernel_between(Kernel::Accumulate, T::DTYPE, Y::DTYPE).ints(access.arguments());
        // SAFETY: the arguments are those of the kernel accumulate. `check` has verified that x and
        // y have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(sx).write(&y).int(sy).run(Grid::over(access.steps))
        }
    }

    fn add_bias<T: Element>(&self, bias: CudaSlice<'_, T>, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("bias", y.dims())?;
        check_row("bias", "the bias", Self::len(bias), y.cols())?;
        let access = AccessPlan::by_rows(&[vector(bias), y.operand()], y.rows(), y.cols());
        let sy = y.dims().row_stride;
        let y = y.into_data();
        let launch = self.kernel(Kernel::AddBias, T::DTYPE).ints(access.arguments());
        // SAFETY: the arguments are those of the kernel add_bias. `check_row` has verified that the
        // bias has one element per column.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(bias).write(&y).int(sy).run(Grid::over(access.steps))
        }
    }

    fn sum_rows<T: Element>(&self, x: MatRef<'_, T, Self>, mut sums: CudaSliceMut<'_, T::Acc>) -> Result<()> {
        unit_columns("bias gradient", x.dims())?;
        check_row("bias gradient", "the gradient", Self::len_mut(&sums), x.cols())?;
        let (rows, cols) = (x.rows(), x.cols());
        if rows == 0 {
            return self.fill(0.0, MatMut::<T::Acc, Self>::new(Self::reborrow(&mut sums), 1, cols)?);
        }
        let (run, runs) = runs(rows);
        let mut partial = self.empty::<T::Acc>(runs * cols)?;
        let partial_mut = Self::slice_mut(&mut partial);
        let access = AccessPlan::by_rows(&[x.operand()], rows, cols);
        let launch = self.kernel(Kernel::ColumnRuns, T::DTYPE).ints(access.arguments());
        let launch = launch.int(run).read(x.data()).int(x.dims().row_stride).write(&partial_mut);
        // SAFETY: the arguments are those of the kernel column_runs. `partial` was allocated for
        // `runs` rows with the columns of x.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(column_blocks(access, runs))?;
        }
        self.add_runs::<T::Acc>(runs, Self::slice(&partial), sums)
    }

    fn copy<T: Element, Y: Element>(&self, x: MatRef<'_, T, Self>, y: MatMut<'_, Y, Self>) -> Result<()> {
        check("copy", &[("x", x.dims())], ("y", y.dims()))?;
        let access = AccessPlan::flat(&[x.operand(), y.operand()]);
        let (sx, sy) = (x.dims().row_stride, y.dims().row_stride);
        let y = y.into_data();
        let launch = self.kernel_between(Kernel::Copy, T::DTYPE, Y::DTYPE).ints(access.arguments());
        // SAFETY: the arguments are those of the kernel copy. `check` has verified that x and y
        // have the same dimensions.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(x.data()).int(sx).write(&y).int(sy).run(Grid::over(access.steps))
        }
    }

    fn scale<T: Element>(&self, alpha: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("scale", y.dims())?;
        self.in_place(Kernel::Scale, alpha, y)
    }

    fn fill<T: Element>(&self, value: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("fill", y.dims())?;
        self.in_place(Kernel::Fill, value, y)
    }
}

/// Returns the number of rows per run, which one block sums, and the number of runs. Both depend
/// only on the number of rows.
pub(in crate::kernels) fn runs(rows: usize) -> (usize, usize) {
    let run = rows.div_ceil(256).max(64);
    (run, rows.div_ceil(run))
}

/// The grid of the kernels that sum columns.
pub(in crate::kernels) fn column_blocks(access: AccessPlan, runs: usize) -> Grid {
    Grid { blocks: [(access.steps / access.rows.max(1)).div_ceil(32), runs], threads: [32, 8], shared: 0 }
}

impl Cuda {
    /// Launches an element-wise kernel of two matrices. The caller has compared their dimensions.
    fn of_two<T: Element>(
        &self,
        kernel: Kernel,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let access = AccessPlan::flat(&[a.operand(), b.operand(), y.operand()]);
        let [sa, sb, sy] = [a.dims(), b.dims(), y.dims()].map(|dims| dims.row_stride);
        let y = y.into_data();
        let launch = self.kernel(kernel, T::DTYPE).ints(access.arguments());
        let launch = launch.read(a.data()).int(sa).read(b.data()).int(sb).write(&y).int(sy);
        // SAFETY: the arguments are those of the kernels add and mul. The methods `add` and `mul`
        // have compared the dimensions of a, b and y by `check`.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(access.steps))
        }
    }

    /// Launches a kernel that updates y in place with one number.
    fn in_place<T: Element>(&self, kernel: Kernel, value: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        let access = AccessPlan::flat(&[y.operand()]);
        let sy = y.dims().row_stride;
        let y = y.into_data();
        let launch = self.kernel(kernel, T::DTYPE).ints(access.arguments()).floats([value]);
        // SAFETY: the arguments are those of the kernels scale and fill, which access y alone.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&y).int(sy).run(Grid::over(access.steps))
        }
    }

    /// sums ← Σ over the runs of their partial sums, in the order of the runs.
    pub(in crate::kernels) fn add_runs<A: Element>(
        &self,
        runs: usize,
        from: CudaSlice<'_, A>,
        sums: CudaSliceMut<'_, A>,
    ) -> Result<()> {
        let cols = Self::len_mut(&sums);
        same_size("column sums", "the sums of runs", Self::len(from), "runs times columns", runs * cols)?;
        let access = AccessPlan::by_rows(&[vector(from), vector(Self::shared(&sums))], 1, cols);
        let launch = self.kernel(Kernel::ColumnSums, A::DTYPE);
        let launch = launch.ints([usize::from(access.packed), runs, cols]);
        // SAFETY: the arguments are those of the kernel column_sums. `same_size` has compared the
        // sizes.
        #[allow(unsafe_code)]
        unsafe {
            launch.read(from).write(&sums).run(Grid::over(access.steps))
        }
    }

    /// to ← the reduction of `ranks` consecutive terms, in rank order and in the accumulator type.
    /// `how` is 0 for the sum, 1 for the maximum and 2 for the minimum. A result is NaN if one of
    /// its terms is NaN.
    #[cfg(feature = "nccl")]
    pub(crate) fn combine<T: Element>(
        &self,
        how: usize,
        ranks: usize,
        terms: CudaSlice<'_, T>,
        to: CudaSliceMut<'_, T>,
    ) -> Result<()> {
        let len = Self::len_mut(&to);
        same_size("reduction", "the terms", Self::len(terms), "ranks times elements", ranks * len)?;
        let access = AccessPlan::by_rows(&[vector(terms), vector(Self::shared(&to))], 1, len);
        let launch = self.kernel(Kernel::Reduce, T::DTYPE);
        let launch = launch.ints([usize::from(access.packed), ranks, len, how]).read(terms);
        // SAFETY: the arguments are those of the kernel reduce. `same_size` has compared the sizes.
        #[allow(unsafe_code)]
        unsafe {
            launch.write(&to).run(Grid::over(access.steps))
        }
    }

    /// y ← x, where x and y have any strides.
    pub(in crate::kernels) fn copy_strided<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        same_dims("copy", "x", x.dims(), "y", y.dims())?;
        let (from, to) = (x.dims(), y.dims());
        let y = y.into_data();
        let launch = self.kernel(Kernel::CopyStrided, T::DTYPE).ints([from.rows, from.cols]);
        let launch = launch
            .read(x.data())
            .ints([from.row_stride, from.col_stride])
            .write(&y)
            .ints([to.row_stride, to.col_stride]);
        // SAFETY: the arguments are those of the kernel copy_strided. `same_dims` has verified that
        // x and y have the same dimensions. Each view lies in its memory.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(from.rows * from.cols))
        }
    }
}
