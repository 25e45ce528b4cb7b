//! Updates on the CPU.

use super::{AdamWStep, SgdStep, Update, check, check_square_sums};
use crate::{
    device::{Accumulator, Cpu, Element, vectorized},
    error::Result,
    kernels::{MatRef, lanes::lane_sum},
};

impl Update for Cpu {
    #[inline(never)]
    fn sgd<T: Element>(
        &self,
        step: &SgdStep,
        grad: &[T::Acc],
        weight: &mut [T],
        master: Option<&mut [T::Acc]>,
        velocity: Option<&mut [T::Acc]>,
    ) -> Result<()> {
        let lens = [
            ("the gradient", Some(grad.len())),
            ("the master weights", len(&master)),
            ("the velocity", len(&velocity)),
        ];
        check("sgd", weight.len(), &lens)?;
        let [lr, momentum, decay, scale] =
            [step.lr, step.momentum, step.weight_decay, step.grad_scale].map(T::Acc::from_f64);
        match velocity {
            None => each(weight, master, |at, w| w - lr * (scale * grad[at] + decay * w)),
            Some(velocity) => each(weight, master, |at, w| {
                let g = scale * grad[at] + decay * w;
                let v = momentum * velocity[at] + g;
                velocity[at] = v;
                w - lr * if step.nesterov { g + momentum * v } else { v }
            }),
        }
        Ok(())
    }

    #[inline(never)]
    fn adamw<T: Element>(
        &self,
        step: &AdamWStep,
        grad: &[T::Acc],
        weight: &mut [T],
        master: Option<&mut [T::Acc]>,
        [first, second]: [&mut [T::Acc]; 2],
    ) -> Result<()> {
        let lens = [
            ("the gradient", Some(grad.len())),
            ("the master weights", len(&master)),
            ("the first moment", Some(first.len())),
            ("the second moment", Some(second.len())),
        ];
        check("adamw", weight.len(), &lens)?;
        let (size, root) = step.corrections();
        let [beta1, beta2, eps, size, root, keep, scale] = [
            step.beta1,
            step.beta2,
            step.eps,
            size,
            root,
            1.0 - step.lr * step.weight_decay,
            step.grad_scale,
        ]
        .map(T::Acc::from_f64);
        let (rest1, rest2) = (T::Acc::from_f64(1.0 - step.beta1), T::Acc::from_f64(1.0 - step.beta2));
        // Slices of the same length let the compiler drop bounds checks.
        let (grad, first, second) =
            (&grad[..weight.len()], &mut first[..weight.len()], &mut second[..weight.len()]);
        each(weight, master, |at, w| {
            let g = scale * grad[at];
            let m = beta1 * first[at] + rest1 * g;
            let v = beta2 * second[at] + rest2 * (g * g);
            (first[at], second[at]) = (m, v);
            keep * w - size * m / (v.sqrt() * root + eps)
        });
        Ok(())
    }

    #[inline(never)]
    fn square_sums<T: Element>(&self, x: MatRef<'_, T, Self>, sums: &mut [f64]) -> Result<()> {
        check_square_sums(x.dims(), sums.len())?;
        vectorized(|| {
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = lane_sum([x.row(row)], |[x]| {
                    let x = x.to_f64();
                    x * x
                });
            }
        });
        Ok(())
    }
}

fn len<A>(slice: &Option<&mut [A]>) -> Option<usize> {
    slice.as_ref().map(|slice| slice.len())
}

/// w ← f(i, w) for every weight, computed from the master weight if there is one.
#[inline(always)]
fn each<T: Element>(
    weight: &mut [T],
    master: Option<&mut [T::Acc]>,
    mut f: impl FnMut(usize, T::Acc) -> T::Acc,
) {
    vectorized(|| match master {
        None => {
            for (at, weight) in weight.iter_mut().enumerate() {
                *weight = T::narrow(f(at, weight.widen()));
            }
        }
        Some(master) => {
            for (at, (weight, master)) in weight.iter_mut().zip(master).enumerate() {
                *master = f(at, *master);
                *weight = T::narrow(*master);
            }
        }
    });
}
