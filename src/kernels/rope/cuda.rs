//! Rotary position embedding on NVIDIA GPUs by the kernel of `cuda/rope.cu`.

use super::{Rope, RopePairs, RopeSpec, check};
use crate::{
    device::{
        Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{
        MatMut,
        packs::{AccessPlan, Operand},
        view::Dims,
    },
};

/// The number of threads that keep a GPU busy. If one thread per row gives fewer threads than this,
/// the heads of a row are divided among several threads.
const THREADS: usize = 1 << 16;

impl Rope for Cuda {
    fn rope<T: Element>(
        &self,
        spec: &RopeSpec<'_>,
        positions: &[u32],
        transposed: bool,
        x: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(spec, positions.len(), &x)?;
        let (rows, pairs, heads) = (x.rows(), spec.frequencies.len(), x.cols() / spec.head_dim);
        let sx = x.dims().row_stride;
        // The plan counts each head as a row. Packs need aligned rows of x and aligned heads. So
        // the plan gets x as two operands, one with the stride of a row and one with the stride of
        // a head.
        let of_heads = Operand { dims: Dims { row_stride: spec.head_dim, ..x.dims() }, ..x.operand() };
        let access = AccessPlan::by_rows(&[x.operand(), of_heads], rows * heads, pairs);
        let x = x.into_data();
        let (frequencies, positions) = (self.table_f64(spec.frequencies)?, self.table_u32(positions)?);
        let interleaved = usize::from(spec.pairs == RopePairs::Interleaved);
        let launch = self.kernel(Kernel::Rope, T::DTYPE);
        // The number of threads if each thread rotates all heads of a row.
        let threads = access.steps / heads.max(1);
        let parts = (THREADS / threads.max(1)).clamp(1, heads.max(1));
        let launch = launch.ints([usize::from(access.packed), rows, parts, pairs, heads]);
        let launch = launch.ints([spec.head_dim, interleaved]);
        let launch = launch.floats([spec.magnitude, if transposed { -1.0 } else { 1.0 }]);
        // SAFETY: the arguments are those of the kernel rope. `check` has verified that x has one
        // row per position and whole heads, and that the pairs fit a head.
        #[allow(unsafe_code)]
        unsafe {
            launch.table(&frequencies).table(&positions).write(&x).int(sx).run(Grid::over(threads * parts))
        }
    }
}
