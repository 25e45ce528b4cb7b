//! Memory-bound kernels, which read and write each element once or a few times.

use crate::{
    check::BF16,
    data::to_host,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::Cuda,
    kernels::{Activation, Norm, NormKind, Pointwise},
    parallel::{DTensor, VocabParallelCrossEntropy},
    shard::{Partition, Shard},
};
use std::rc::Rc;

const EPS: f64 = 1e-5;

/// Returns expected values, with the tolerance of one rounding.
fn rounded(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    values.map(|value| (value, BF16 * value.abs() + 1e-7)).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (rows, cols) = bench.pick((16, 64), (8192, 8192));
    elementwise(bench, rows, cols)?;
    norms(bench, rows, cols)?;
    let (tokens, classes) = bench.pick((16, 64), (4096, 32768));
    cross_entropy(bench, tokens, classes)
}

fn elementwise(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let size = 2.0 * (rows * cols) as f64;
    // The row to check, in the middle of each operand.
    let row = rows / 2..rows / 2 + 1;
    bench.case("elementwise", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let both = data.fill::<bf16>([rows, 2 * cols], 1.0)?;
        let (x, other) = (data.fill::<bf16>([rows, cols], 1.0)?, data.fill::<bf16>([rows, cols], 1.0)?);
        let mut y = Tensor::<bf16, _>::empty(&cuda, [rows, cols])?;
        let host = to_host(x.mat().block(row.clone(), 0..cols), &cuda)?;
        let result = |y: &Tensor<bf16, Cuda>| to_host(y.mat().block(row.clone(), 0..cols), &cuda);

        let name = format!("copy bf16 {rows} x {cols}");
        bench.time(&name, Cost::bytes(2.0 * size), |_| cuda.copy(x.mat(), y.mat_mut()?))?;
        bench.expect(&name, &result(&y)?, &rounded(host.iter().copied()))?;

        let name = format!("add bf16 {rows} x {cols}");
        bench.time(&name, Cost::bytes(3.0 * size), |_| cuda.add(x.mat(), other.mat(), y.mat_mut()?))?;
        let term = to_host(other.mat().block(row.clone(), 0..cols), &cuda)?;
        bench.expect(&name, &result(&y)?, &rounded(host.iter().zip(&term).map(|(a, b)| a + b)))?;

        let name = format!("silu bf16 {rows} x {cols}");
        let f = Activation::Silu;
        bench.time(&name, Cost::bytes(2.0 * size), |_| cuda.activate(f, x.mat(), y.mat_mut()?))?;
        bench.expect(&name, &result(&y)?, &rounded(host.iter().map(|&x| silu(x))))?;

        let name = format!("gate bf16 of [gate | up] {rows} x {cols}");
        let (gate, up) = (both.mat().columns(0..cols), both.mat().columns(cols..2 * cols));
        bench.time(&name, Cost::bytes(3.0 * size), |_| cuda.gate(f, gate, up, y.mat_mut()?))?;
        let host = to_host(both.mat().block(row.clone(), 0..2 * cols), &cuda)?;
        let (gate, up) = host.split_at(cols);
        bench.expect(&name, &result(&y)?, &rounded(gate.iter().zip(up).map(|(g, u)| silu(*g) * u)))
    })
}

fn norms(bench: &mut Bench, rows: usize, cols: usize) -> Result<()> {
    let size = 2.0 * (rows * cols) as f64;
    let row = rows - 1..rows;
    bench.case("RMSNorm", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let (x, dy) = (data.fill::<bf16>([rows, cols], 1.0)?, data.fill::<bf16>([rows, cols], 1.0)?);
        let gamma = data.fill::<bf16>([cols], 1.0)?;
        let mut y = Tensor::<bf16, _>::empty(&cuda, [rows, cols])?;
        let mut stats = Tensor::<f32, _>::empty(&cuda, [rows, 2])?;
        let kind = NormKind::RmsNorm { eps: EPS };
        let name = format!("RMSNorm bf16 {rows} x {cols}");
        bench.time(&name, Cost::bytes(2.0 * size), |_| {
            cuda.normalize(kind, x.mat(), gamma.slice(), None, y.mat_mut()?, stats.slice_mut()?)
        })?;
        let hosts = [&x, &dy].map(|all| to_host(all.mat().block(row.clone(), 0..cols), &cuda));
        let [host, dhost] = hosts;
        let (host, dhost, scale) = (host?, dhost?, to_host(gamma.mat(), &cuda)?);
        let root = 1.0 / (mean(host.iter().map(|x| x * x)) + EPS).sqrt();
        let got = to_host(y.mat().block(row.clone(), 0..cols), &cuda)?;
        bench.expect(&name, &got, &rounded(host.iter().zip(&scale).map(|(x, s)| x * root * s)))?;

        let name = format!("RMSNorm backward bf16 {rows} x {cols}");
        let mut dx = Tensor::<bf16, _>::empty(&cuda, [rows, cols])?;
        let mut dgamma = Tensor::<f32, _>::empty(&cuda, [cols])?;
        bench.time(&name, Cost::bytes(3.0 * size), |_| {
            let (dx, dgamma) = (dx.mat_mut()?, dgamma.slice_mut()?);
            cuda.normalize_backward(kind, x.mat(), gamma.slice(), stats.slice(), dy.mat(), dx, dgamma, None)
        })?;
        let g: Vec<f64> = dhost.iter().zip(&scale).map(|(d, s)| d * s).collect();
        let along = mean(g.iter().zip(&host).map(|(g, x)| g * x * root));
        let got = to_host(dx.mat().block(row, 0..cols), &cuda)?;
        let want = g.iter().zip(&host).map(|(g, x)| root * (g - x * root * along));
        bench.expect(&name, &got, &want.map(|x| (x, BF16 * x.abs() + 1e-5)).collect::<Vec<_>>())?;
        // Checks the gradient of one element of γ, which is a sum over all rows.
        let column = cols / 3..cols / 3 + 1;
        let [x, dy] = [&x, &dy].map(|all| to_host(all.mat().columns(column.clone()), &cuda));
        let (x, dy, roots) = (x?, dy?, to_host(stats.mat().columns(1..2), &cuda)?);
        let terms = || x.iter().zip(&dy).zip(&roots).map(|((x, dy), root)| x * dy * root);
        let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
        let got = to_host(dgamma.mat(), &cuda)?[column.start];
        bench.expect(&name, &[got], &[(sum, 1e-5 * size)])
    })
}

/// Times the loss as a model computes it. Each call uploads the targets.
fn cross_entropy(bench: &mut Bench, tokens: usize, classes: usize) -> Result<()> {
    let size = 2.0 * (tokens * classes) as f64;
    bench.case("cross entropy", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let group = Group::solo(&cuda);
        let x = data.fill::<bf16>([tokens, classes], 1.0)?;
        let logits = DTensor::<Shard<1>, bf16, Cuda>::shard(&group, x, &Partition::even(classes, 1))?;
        let targets: Vec<u32> = (0..tokens).map(|token| (token * 7919 % classes) as u32).collect();
        let loss = VocabParallelCrossEntropy::default();
        let name = format!("cross entropy forward bf16 {tokens} x {classes}");
        bench.time(&name, Cost::bytes(size), |_| loss.forward(logits.clone(), &targets).map(drop))?;
        let (losses, saved) = loss.forward(logits.clone(), &targets)?;
        let token = tokens - 1;
        let host = to_host(logits.local().mat().block(token..token + 1, 0..classes), &cuda)?;
        let lse = host.iter().map(|x| x.exp()).sum::<f64>().ln();
        let target = targets[token] as usize;
        let got = losses.rows().to_vec()?[token].into();
        bench.expect(&name, &[got], &[(lse - host[target], 1e-4)])?;

        let name = format!("cross entropy forward and backward bf16 {tokens} x {classes}");
        bench.time(&name, Cost::bytes(3.0 * size), |_| {
            let (_, saved) = loss.forward(logits.clone(), &targets)?;
            loss.backward(saved, 1.0).map(drop)
        })?;
        let dx = loss.backward(saved, 1.0)?;
        let got = to_host(dx.local().mat().block(token..token + 1, 0..classes), &cuda)?;
        let one = |class: usize| if class == target { 1.0 } else { 0.0 };
        let want = host.iter().enumerate().map(|(class, x)| (x - lse).exp() - one(class));
        bench.expect(&name, &got, &rounded(want))
    })
}
