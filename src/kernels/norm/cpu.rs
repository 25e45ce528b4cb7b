//! LayerNorm and RMSNorm on the CPU.

use super::{Norm, NormKind, check};
use crate::{
    device::{Accumulator, Cpu, Element, vectorized},
    error::Result,
    kernels::{MatMut, MatRef, lanes::lane_sum},
};

impl Norm for Cpu {
    #[inline(never)]
    fn normalize<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: &[T],
        beta: Option<&[T]>,
        mut y: MatMut<'_, T, Self>,
        stats: &mut [T::Acc],
    ) -> Result<()> {
        let beta_len = beta.map_or(y.cols(), <[T]>::len);
        check(
            "norm",
            &[("x", x.dims())],
            y.dims(),
            &[("gamma", gamma.len()), ("beta", beta_len)],
            stats.len(),
        )?;
        let (count, eps) = (T::Acc::from_f64(x.cols() as f64), T::Acc::from_f64(kind.eps()));
        vectorized(|| {
            for (row, stats) in stats.chunks_exact_mut(2).enumerate() {
                let (x, y) = (x.row(row), y.row(row));
                let mean = if kind.centers() { lane_sum([x], |[x]| x.widen()) / count } else { T::Acc::ZERO };
                let square = lane_sum([x], |[x]| (x.widen() - mean) * (x.widen() - mean)) / count;
                let scale = T::Acc::ONE / (square + eps).sqrt();
                stats.copy_from_slice(&[mean, scale]);
                let row = y.iter_mut().zip(x).zip(gamma);
                let scaled = |x: T, gamma: T| (x.widen() - mean) * scale * gamma.widen();
                match beta {
                    Some(beta) => row.zip(beta).for_each(|(((y, &x), &gamma), beta)| {
                        *y = T::narrow(scaled(x, gamma) + beta.widen());
                    }),
                    None => row.for_each(|((y, &x), &gamma)| *y = T::narrow(scaled(x, gamma))),
                }
            }
        });
        Ok(())
    }

    #[inline(never)]
    fn normalize_backward<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: &[T],
        stats: &[T::Acc],
        dy: MatRef<'_, T, Self>,
        mut dx: MatMut<'_, T, Self>,
        dgamma: &mut [T::Acc],
        mut dbeta: Option<&mut [T::Acc]>,
    ) -> Result<()> {
        let dbeta_len = dbeta.as_deref().map_or(dx.cols(), <[T::Acc]>::len);
        let rows = [("gamma", gamma.len()), ("dgamma", dgamma.len()), ("dbeta", dbeta_len)];
        check("norm backward", &[("x", x.dims()), ("dy", dy.dims())], dx.dims(), &rows, stats.len())?;
        let count = T::Acc::from_f64(x.cols() as f64);
        dgamma.fill(T::Acc::ZERO);
        if let Some(dbeta) = &mut dbeta {
            dbeta.fill(T::Acc::ZERO);
        }
        vectorized(|| {
            for (row, stats) in stats.chunks_exact(2).enumerate() {
                let (x, dy, dx) = (x.row(row), dy.row(row), dx.row(row));
                let (mean, scale) = (stats[0], stats[1]);
                let unit = |x: T| (x.widen() - mean) * scale;
                let g = |dy: T, gamma: T| dy.widen() * gamma.widen();
                let mean_g = if kind.centers() {
                    lane_sum([dy, gamma], |[dy, gamma]| g(dy, gamma)) / count
                } else {
                    T::Acc::ZERO
                };
                let mean_gx = lane_sum([x, dy, gamma], |[x, dy, gamma]| g(dy, gamma) * unit(x)) / count;
                for (((dx, &x), &dy), &gamma) in dx.iter_mut().zip(x).zip(dy).zip(gamma) {
                    *dx = T::narrow(scale * (g(dy, gamma) - mean_g - unit(x) * mean_gx));
                }
                for ((dgamma, &x), &dy) in dgamma.iter_mut().zip(x).zip(dy) {
                    *dgamma += dy.widen() * unit(x);
                }
                if let Some(dbeta) = &mut dbeta {
                    for (dbeta, dy) in dbeta.iter_mut().zip(dy) {
                        *dbeta += dy.widen();
                    }
                }
            }
        });
        Ok(())
    }
}
