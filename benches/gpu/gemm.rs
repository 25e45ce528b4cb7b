//! Matrix products by cuBLASLt.

use crate::{
    check::{BF16, F32, dot, positions},
    data::to_host,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{Result, Tensor, kernels::Gemm};
use std::rc::Rc;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (k, whole) = bench.pick((64, 128), (8192, 28672));
    let rows = if bench.quick { vec![16, 1] } else { vec![4096, 1, 16, 64] };
    for &m in &rows {
        for tp in [1, 8] {
            let n = whole / tp;
            product(bench, &format!("gemm bf16 {m} x {k} x {n} (tp {tp})"), (m, k, n))?;
        }
    }
    for tp in [1, 8] {
        weight_gradient(bench, tp, (rows[0], k, whole / tp))?;
        input_gradient(bench, tp, (rows[0], k, whole / tp))?;
    }
    Ok(())
}

/// Returns the cost of a product. `result` is the number of bytes of an element of the result.
fn cost((m, k, n): (usize, usize, usize), result: f64) -> Cost {
    let (m, k, n) = (m as f64, k as f64, n as f64);
    Cost { bytes: 2.0 * (m * k + k * n) + result * m * n, flops: 2.0 * m * k * n }
}

/// y = x wᵀ with weights of bf16.
pub(crate) fn product(bench: &mut Bench, name: &str, (m, k, n): (usize, usize, usize)) -> Result<()> {
    bench.case(name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let x = data.fill::<bf16>([m, k], 1.0)?;
        let copies = bench.copies(2 * n * k);
        let w = (0..copies).map(|_| data.fill::<bf16>([n, k], 1.0)).collect::<Result<Vec<_>>>()?;
        let mut y = Tensor::<bf16, _>::empty(&cuda, [m, n])?;
        let mut last = 0;
        bench.time(name, cost((m, k, n), 2.0), |call| {
            last = call % copies;
            cuda.gemm(1.0, x.mat(), w[last].mat().t(), 0.0, y.mat_mut()?)
        })?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (row, col) in positions(m, n) {
            got.extend(to_host(y.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let x = to_host(x.mat().block(row..row + 1, 0..k), &cuda)?;
            want.push(dot(&x, &to_host(w[last].mat().block(col..col + 1, 0..k), &cuda)?, BF16));
        }
        bench.expect(name, &got, &want)
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
        for (row, col) in positions(n, k) {
            got.extend(to_host(dw.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let dy = to_host(dy.mat().columns(row..row + 1), &cuda)?;
            want.push(dot(&dy, &to_host(x.mat().columns(col..col + 1), &cuda)?, F32));
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
        for (row, col) in positions(m, k) {
            got.extend(to_host(dx.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let dy = to_host(dy.mat().block(row..row + 1, 0..n), &cuda)?;
            want.push(dot(&dy, &to_host(w.mat().columns(col..col + 1), &cuda)?, BF16));
        }
        bench.expect(&name, &got, &want)
    })
}
