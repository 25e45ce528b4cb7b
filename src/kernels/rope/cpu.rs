//! Rotary position embedding on the CPU.

use super::{Rope, RopeSpec, check};
use crate::{
    device::{Cpu, Device, Element, vectorized},
    error::Result,
    kernels::MatMut,
};

impl Rope for Cpu {
    #[inline(never)]
    fn rope<T: Element>(
        &self,
        spec: &RopeSpec<'_>,
        positions: &[u32],
        transposed: bool,
        mut x: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(spec, positions.len(), &x)?;
        let pairs = spec.frequencies.len();
        let mut turn = self.empty::<T::Acc>(2 * pairs)?;
        let (cos, sin) = turn.split_at_mut(pairs);
        for (row, &position) in positions.iter().enumerate() {
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin.iter_mut()).zip(spec.frequencies) {
                let (s, c) = (f64::from(position) * frequency).sin_cos();
                *cos = T::Acc::from_f64(spec.magnitude * c);
                *sin = T::Acc::from_f64(spec.magnitude * if transposed { -s } else { s });
            }
            let row = x.row(row);
            vectorized(|| {
                for head in row.chunks_exact_mut(spec.head_dim) {
                    for (at, (&cos, &sin)) in cos.iter().zip(sin.iter()).enumerate() {
                        let (first, second) = spec.pair(at);
                        let (a, b) = (head[first].widen(), head[second].widen());
                        head[first] = T::narrow(a * cos - b * sin);
                        head[second] = T::narrow(b * cos + a * sin);
                    }
                }
            });
        }
        Ok(())
    }
}
