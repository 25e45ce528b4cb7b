//! Losses on the CPU.

use super::{Loss, Targets, check_rows, check_same, check_targets};
use crate::{
    device::{Accumulator, Cpu, Element, vectorized},
    error::Result,
    kernels::{
        MatMut, MatRef,
        lanes::{lane_max, lane_sum},
    },
};

impl Loss for Cpu {
    #[inline(never)]
    fn row_max<T: Element>(&self, x: MatRef<'_, T, Self>, max: &mut [T::Acc]) -> Result<()> {
        const OP: &str = "row maximum";
        check_same(OP, x.dims(), &[])?;
        check_rows(OP, "the maxima", max.len(), 1, x.rows())?;
        vectorized(|| {
            for (row, max) in max.iter_mut().enumerate() {
                *max = lane_max(x.row(row));
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn exp_sums<T: Element>(
        &self,
        targets: &Targets<'_>,
        x: MatRef<'_, T, Self>,
        max: &[T::Acc],
        sums: &mut [T::Acc],
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        check_same(OP, x.dims(), &[])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", max.len(), 1, x.rows())?;
        check_rows(OP, "the sums", sums.len(), 3, x.rows())?;
        vectorized(|| {
            for (row, (sums, &max)) in sums.chunks_exact_mut(3).zip(max).enumerate() {
                let x = x.row(row);
                sums[0] = lane_sum([x], |[x]| (x.widen() - max).exp());
                sums[1] = targets.column(row, x.len()).map_or(T::Acc::ZERO, |column| x[column].widen() - max);
                sums[2] =
                    if targets.off == 0.0 { T::Acc::ZERO } else { lane_sum([x], |[x]| x.widen() - max) };
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn cross_entropy<A: Accumulator>(
        &self,
        targets: &Targets<'_>,
        max: &[A],
        sums: &[A],
        losses: &mut [A],
        log: &mut [A],
    ) -> Result<()> {
        const OP: &str = "cross entropy";
        let rows = targets.classes.len();
        check_targets(OP, targets, rows, 0)?;
        check_rows(OP, "the maxima", max.len(), 1, rows)?;
        check_rows(OP, "the sums", sums.len(), 3, rows)?;
        check_rows(OP, "the losses", losses.len(), 1, rows)?;
        check_rows(OP, "the logs of sums", log.len(), 1, rows)?;
        let [on, off, z] = [targets.on, targets.off, targets.z].map(A::from_f64);
        for (row, (loss, log)) in losses.iter_mut().zip(log).enumerate() {
            let sums = &sums[3 * row..3 * row + 3];
            *log = sums[0].ln();
            let lse = max[row] + *log;
            *loss = if targets.is_ignored(row) {
                A::ZERO
            } else {
                *log - on * sums[1] - off * sums[2] + z * lse * lse
            };
        }
        Ok(())
    }

    #[inline(never)]
    fn cross_entropy_backward<T: Element>(
        &self,
        targets: &Targets<'_>,
        scale: f64,
        x: MatRef<'_, T, Self>,
        max: &[T::Acc],
        log: &[T::Acc],
        mut dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "cross entropy backward";
        check_same(OP, x.dims(), &[("dx", dx.dims())])?;
        check_targets(OP, targets, x.rows(), x.cols())?;
        check_rows(OP, "the maxima", max.len(), 1, x.rows())?;
        check_rows(OP, "the logs of sums", log.len(), 1, x.rows())?;
        let [on, off, z, scale] = [targets.on, targets.off, 2.0 * targets.z, scale].map(T::Acc::from_f64);
        vectorized(|| {
            for (row, (&max, &log)) in max.iter().zip(log).enumerate() {
                let (x, dx) = (x.row(row), dx.row(row));
                if targets.is_ignored(row) {
                    dx.fill(T::narrow(T::Acc::ZERO));
                    continue;
                }
                let weight = T::Acc::ONE + z * (max + log);
                for (dx, x) in dx.iter_mut().zip(x) {
                    *dx = T::narrow(scale * (((x.widen() - max) - log).exp() * weight - off));
                }
                if let Some(column) = targets.column(row, x.len()) {
                    // Recomputes p from the logit, because dx is already rounded.
                    let p = ((x[column].widen() - max) - log).exp() * weight;
                    dx[column] = T::narrow(scale * (p - off - on));
                }
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn squared_error<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        sums: &mut [T::Acc],
    ) -> Result<()> {
        const OP: &str = "squared error";
        check_same(OP, x.dims(), &[("y", y.dims())])?;
        check_rows(OP, "the sums", sums.len(), 1, x.rows())?;
        vectorized(|| {
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = lane_sum([x.row(row), y.row(row)], |[x, y]| {
                    let difference = x.widen() - y.widen();
                    difference * difference
                });
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn squared_error_backward<T: Element>(
        &self,
        scale: f64,
        x: MatRef<'_, T, Self>,
        y: MatRef<'_, T, Self>,
        mut dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_same("squared error backward", x.dims(), &[("y", y.dims()), ("dx", dx.dims())])?;
        let scale = T::Acc::from_f64(2.0 * scale);
        vectorized(|| {
            for row in 0..x.rows() {
                for ((dx, x), y) in dx.row(row).iter_mut().zip(x.row(row)).zip(y.row(row)) {
                    *dx = T::narrow(scale * (x.widen() - y.widen()));
                }
            }
        });
        Ok(())
    }
}
