//! Softmax on the CPU. Attention uses the same row function.

use super::{Mask, Softmax, check};
use crate::{
    device::{Accumulator, Cpu, Device, Element, vectorized},
    error::Result,
    kernels::{
        MatMut, MatRef,
        lanes::{lane_max, lane_sum},
    },
};

impl Softmax for Cpu {
    fn softmax<T: Element>(
        &self,
        mask: Mask<'_>,
        x: MatRef<'_, T, Self>,
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("softmax", mask, &[("x", x.dims())], y.dims())?;
        let mut wide = self.empty::<T::Acc>(x.cols())?;
        vectorized(|| {
            for row in 0..x.rows() {
                for (wide, x) in wide.iter_mut().zip(x.row(row)) {
                    *wide = x.widen();
                }
                softmax_row(&mut wide, mask.visible(row, x.cols()), mask.valid);
                for (y, wide) in y.row(row).iter_mut().zip(wide.iter()) {
                    *y = T::narrow(*wide);
                }
            }
        });
        Ok(())
    }

    fn softmax_backward<T: Element>(
        &self,
        y: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        mut dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("softmax backward", Mask::default(), &[("y", y.dims()), ("dy", dy.dims())], dx.dims())?;
        vectorized(|| {
            for row in 0..y.rows() {
                let (y, dy) = (y.row(row), dy.row(row));
                let sum = lane_sum([y, dy], |[y, dy]| y.widen() * dy.widen());
                for ((dx, y), dy) in dx.row(row).iter_mut().zip(y).zip(dy) {
                    *dx = T::narrow(y.widen() * (dy.widen() - sum));
                }
            }
        });
        Ok(())
    }
}

/// Softmax of one row in place, of which the first `visible` columns, and of those the `valid` ones, are seen.
/// Returns log Σ e^x over the seen columns; +∞ where none is seen, so that e^(x − that) is 0.
#[inline(always)]
pub(in crate::kernels) fn softmax_row<A: Accumulator>(
    row: &mut [A],
    visible: usize,
    valid: Option<&[bool]>,
) -> A {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(A::ZERO);
    let valid = valid.map(|valid| &valid[..visible]);
    if let Some(valid) = valid {
        for (x, &valid) in seen.iter_mut().zip(valid) {
            *x = if valid { *x } else { A::NEG_INFINITY };
        }
    }
    let none = valid.map_or(visible == 0, |valid| !valid.contains(&true));
    if none {
        seen.fill(A::ZERO);
        return -A::NEG_INFINITY;
    }
    let max = lane_max(seen);
    for x in seen.iter_mut() {
        *x = (*x - max).exp();
    }
    let sum = lane_sum([&*seen], |[x]| x);
    let scale = A::ONE / sum;
    for x in seen.iter_mut() {
        *x = *x * scale;
    }
    // Not a number among the seen has spread over the row; what is masked stays 0.
    #[allow(clippy::eq_op)]
    if let (Some(valid), true) = (valid, sum != sum) {
        for (x, &valid) in seen.iter_mut().zip(valid) {
            *x = if valid { *x } else { A::ZERO };
        }
    }
    max + sum.ln()
}
