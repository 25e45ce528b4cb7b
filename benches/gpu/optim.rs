//! An optimizer step, and the gradient norm.

use crate::{
    data::to_host,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result,
    comm::Group,
    device::{Cuda, Element},
    optim::{AdamW, AdamWConfig, grad_norm},
    tensor::{Param, Region, Role, Weights},
};
use std::rc::Rc;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (count, side) = bench.pick((2, 16), (25, 2048));
    adamw::<bf16>(bench, "bf16 with f32 master weights", 30, count, side)?;
    adamw::<f32>(bench, "f32", 28, count, side)?;
    let (count, side) = bench.pick((5, 16), (300, 512));
    norm(bench, count, side)
}

/// Returns square parameters with random gradients.
fn params<T: Element>(bench: &Bench, count: usize, side: usize) -> Result<Vec<Param<T, Cuda>>>
where
    T::Acc: Element,
{
    let source = bench.data.weights(1.0);
    let weights = Weights::new(&source);
    let load = |at: usize| {
        let (name, region) = (format!("weight{at}"), Region::whole([side, side]));
        let param = Param::load_region(&bench.cuda, &weights, &name, Role::Weight, region, true)?;
        param.add_grad(bench.data.fill([side, side], 1.0)?)?;
        Ok(param)
    };
    (0..count).map(load).collect()
}

/// Repeats steps with the same gradient, so that m̂ = g and v̂ = g² at every step.
fn adamw<T: Element>(bench: &mut Bench, kind: &str, each: usize, count: usize, side: usize) -> Result<()> {
    let elements = count * side * side;
    let name = format!("AdamW {kind}, {elements} elements");
    bench.case(&name, |bench| {
        let cuda = bench.cuda.clone();
        let params = params::<T>(bench, count, side)?;
        let (first, lr) = (0..1, 1e-3);
        let before = to_host(params[0].value()?.mat().block(first.clone(), 0..side), &cuda)?;
        let mut adamw = AdamW::<T, Cuda>::default();
        bench.time(&name, Cost::bytes((each * elements) as f64), |_| adamw.step(&params, lr, 1.0))?;
        let Some(grad) = params[0].grad() else { return Ok(()) };
        let grad = to_host(grad.mat().block(first.clone(), 0..side), &cuda)?;
        let AdamWConfig { eps, weight_decay, .. } = AdamWConfig::default();
        let end = |(weight, grad): (&f64, &f64)| {
            let step = |weight, _| weight * (1.0 - lr * weight_decay) - lr * grad / (grad.abs() + eps);
            let end = (0..adamw.steps()).fold(*weight, step);
            (end, T::EPSILON * end.abs() + 1e-4)
        };
        let want: Vec<_> = before.iter().zip(&grad).map(end).collect();
        bench.expect(&name, &to_host(params[0].value()?.mat().block(first, 0..side), &cuda)?, &want)
    })
}

/// Times the gradient norm as training computes it before each step.
fn norm(bench: &mut Bench, count: usize, side: usize) -> Result<()> {
    let name = format!("gradient norm f32, {count} parameters of {side} x {side}");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let group = Group::solo(&cuda);
        let params = params::<bf16>(bench, count, side)?;
        // One gradient has another scale, so that an omitted parameter changes the norm.
        params[count / 2].zero_grad();
        params[count / 2].add_grad(data.fill([side, side], 30.0)?)?;
        let mut found = 0.0;
        bench.time(&name, Cost::bytes((4 * count * side * side) as f64), |_| {
            found = grad_norm(&params, &[&group])?;
            Ok(())
        })?;
        let mut sum = 0.0;
        for grad in params.iter().filter_map(Param::grad) {
            sum += grad.to_vec()?.into_iter().map(|g| f64::from(g).powi(2)).sum::<f64>();
        }
        bench.expect(&name, &[found], &[(sum.sqrt(), 1e-9 * sum.sqrt())])
    })
}
