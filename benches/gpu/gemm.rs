//! Products, by cuBLASLt.

use crate::{
    data::part,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{Result, Tensor, kernels::Gemm};
use std::rc::Rc;

/// How far a result may be from the exact one, by its rounding alone.
pub(crate) const BF16: f64 = 0.00390625;
const F32: f64 = 1e-7;

/// A sum of products, and how far off one may be that was added in f32 and rounded to the result.
pub(crate) fn dot(a: &[f64], b: &[f64], rounding: f64) -> (f64, f64) {
    let products = || a.iter().zip(b).map(|(a, b)| a * b);
    let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
    (sum, rounding * sum.abs() + 1e-5 * size)
}

/// A few places of a matrix.
pub(crate) fn places(rows: usize, cols: usize) -> [(usize, usize); 5] {
    [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3), (rows / 3, cols / 2), (rows - 1, 0)]
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (k, whole) = bench.pick((64, 128), (8192, 28672));
    let rows = if bench.quick { vec![16, 1] } else { vec![4096, 1, 16, 64] };
    for &m in &rows {
        for tp in [1, 8] {
            product(bench, tp, (m, k, whole / tp))?;
        }
    }
    for tp in [1, 8] {
        weight_gradient(bench, tp, (rows[0], k, whole / tp))?;
        input_gradient(bench, tp, (rows[0], k, whole / tp))?;
    }
    Ok(())
}

/// The cost of a product whose result has elements of so many bytes.
fn cost((m, k, n): (usize, usize, usize), result: f64) -> Cost {
    let (m, k, n) = (m as f64, k as f64, n as f64);
    Cost { bytes: 2.0 * (m * k + k * n) + result * m * n, flops: 2.0 * m * k * n }
}

/// y = x wᵀ with a shard of w.
fn product(bench: &mut Bench, tp: usize, (m, k, n): (usize, usize, usize)) -> Result<()> {
    let name = format!("gemm bf16 {m} x {k} x {n} (tp {tp})");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let x = data.fill::<bf16>([m, k], 1.0)?;
        let copies = bench.copies(2 * n * k);
        let w = (0..copies).map(|_| data.fill::<bf16>([n, k], 1.0)).collect::<Result<Vec<_>>>()?;
        let mut y = Tensor::<bf16, _>::empty(&cuda, [m, n])?;
        let mut last = 0;
        bench.time(&name, cost((m, k, n), 2.0), |call| {
            last = call % copies;
            cuda.gemm(1.0, x.mat(), w[last].mat().t(), 0.0, y.mat_mut()?)
        })?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (row, col) in places(m, n) {
            got.extend(part(y.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let x = part(x.mat().block(row..row + 1, 0..k), &cuda)?;
            want.push(dot(&x, &part(w[last].mat().block(col..col + 1, 0..k), &cuda)?, BF16));
        }
        bench.expect(&name, &got, &want)
    })
}

/// dw = dyᵀ x, in f32.
fn weight_gradient(bench: &mut Bench, tp: usize, (m, k, n): (usize, usize, usize)) -> Result<()> {
    let name = format!("gemm dW f32 of bf16 {n} x {m} x {k} (tp {tp})");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let (x, dy) = (data.fill::<bf16>([m, k], 1.0)?, data.fill::<bf16>([m, n], 1.0)?);
        let mut dw = Tensor::<f32, _>::empty(&cuda, [n, k])?;
        bench.time(&name, cost((n, m, k), 4.0), |_| {
            cuda.gemm(1.0, dy.mat().t(), x.mat(), 0.0, dw.mat_mut()?)
        })?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (row, col) in places(n, k) {
            got.extend(part(dw.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let dy = part(dy.mat().columns(row..row + 1), &cuda)?;
            want.push(dot(&dy, &part(x.mat().columns(col..col + 1), &cuda)?, F32));
        }
        bench.expect(&name, &got, &want)
    })
}

/// dx = dy w.
fn input_gradient(bench: &mut Bench, tp: usize, (m, k, n): (usize, usize, usize)) -> Result<()> {
    let name = format!("gemm dX bf16 {m} x {n} x {k} (tp {tp})");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let (w, dy) = (data.fill::<bf16>([n, k], 1.0)?, data.fill::<bf16>([m, n], 1.0)?);
        let mut dx = Tensor::<bf16, _>::empty(&cuda, [m, k])?;
        bench.time(&name, cost((m, n, k), 2.0), |_| cuda.gemm(1.0, dy.mat(), w.mat(), 0.0, dx.mat_mut()?))?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (row, col) in places(m, k) {
            got.extend(part(dx.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let dy = part(dy.mat().block(row..row + 1, 0..n), &cuda)?;
            want.push(dot(&dy, &part(w.mat().columns(col..col + 1), &cuda)?, BF16));
        }
        bench.expect(&name, &got, &want)
    })
}
