//! Dropout on the CPU.

use super::{Dropout, DropoutMask, check};
use crate::{
    device::{Accumulator, Cpu, Element},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Dropout for Cpu {
    #[inline(never)]
    fn dropout<T: Element>(
        &self,
        mask: &DropoutMask,
        x: MatRef<'_, T, Self>,
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(mask, x.dims(), y.dims())?;
        let threshold = mask.threshold();
        let scale = T::Acc::from_f64(1.0 / (1.0 - mask.probability));
        for row in 0..x.rows() {
            let first = mask.first_index(row);
            let mut random = mask.stream.block(first / 4);
            for (index, (y, x)) in (first..).zip(y.row(row).iter_mut().zip(x.row(row))) {
                if index.is_multiple_of(4) {
                    random = mask.stream.block(index / 4);
                }
                let kept = random[(index % 4) as usize] >= threshold;
                *y = T::narrow(if kept { x.widen() * scale } else { T::Acc::ZERO });
            }
        }
        Ok(())
    }
}
