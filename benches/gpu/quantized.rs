//! Products with quantized weights, and the same products with weights of bf16.

use crate::{
    check::{BF16, dot, positions},
    data::to_host,
    gemm,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result, Tensor,
    kernels::{Format, Quantized, QuantizedShape},
};
use std::rc::Rc;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let (k, n) = bench.pick((96, 40), (8192, 8192));
    for m in bench.pick([1, 20], [1, 512]) {
        gemm::product(bench, &format!("quantized, dense bf16 {m} x {k} x {n}"), (m, k, n))?;
        for format in [Format::Q8_0, Format::Q4_0] {
            product(bench, format, (m, k, n))?;
        }
    }
    Ok(())
}

/// Returns the cost of a product whose weights have this number of bytes.
fn cost((m, k, n): (usize, usize, usize), weights: usize) -> Cost {
    Cost { bytes: (weights + 2 * m * (k + n)) as f64, flops: 2.0 * (m * k) as f64 * n as f64 }
}

/// y = x wᵀ with quantized weights, and x rounded to 8 bits.
fn product(bench: &mut Bench, format: Format, (m, k, n): (usize, usize, usize)) -> Result<()> {
    let name = format!("quantized, {format} {m} x {k} x {n}");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        // A prime number of blocks, so that rows do not repeat.
        let values = to_host(data.fill::<bf16>([1, 4093 * format.weights()], 1.0)?.mat(), &cuda)?;
        let mut blocks = vec![0; 4093 * format.bytes()];
        for (values, block) in values.chunks(format.weights()).zip(blocks.chunks_mut(format.bytes())) {
            let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
            format.encode(&values, block)?;
        }
        let bytes = n * format.blocks(0..k).len() * format.bytes();
        let copies = bench.copies(bytes);
        let mut blocks = blocks.iter().cycle();
        let mut load = || {
            cuda.quantized_matrix(
                QuantizedShape { format, rows: n, columns: 0..k, order: None },
                &mut |_, out| {
                    out.iter_mut().zip(&mut blocks).for_each(|(to, byte)| *to = *byte);
                    Ok(())
                },
            )
        };
        let w = (0..copies).map(|_| load()).collect::<Result<Vec<_>>>()?;
        let (x, mut y) = (data.fill::<bf16>([m, k], 1.0)?, Tensor::<bf16, _>::empty(&cuda, [m, n])?);
        let mut last = 0;
        bench.time(&name, cost((m, k, n), bytes), |call| {
            last = call % copies;
            cuda.quantized_product(x.mat(), &w[last], 0..k, y.mat_mut()?)
        })?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        let mut weights = Tensor::<f32, _>::empty(&cuda, [1, k])?;
        for (row, col) in positions(m, n) {
            got.extend(to_host(y.mat().block(row..row + 1, col..col + 1), &cuda)?);
            let x = to_host(x.mat().block(row..row + 1, 0..k), &cuda)?;
            cuda.dequantize(&w[last], &[col as u32], 0..k, weights.mat_mut()?)?;
            let w = to_host(weights.mat(), &cuda)?;
            // Each activation is rounded to a multiple of the largest of its chunk / 127.
            let chunks = x.chunks(32).zip(w.chunks(32));
            let rounding: f64 = chunks
                .map(|(x, w)| {
                    let largest = x.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                    largest / 254.0 * w.iter().map(|w| w.abs()).sum::<f64>()
                })
                .sum();
            let (sum, off) = dot(&x, &w, BF16);
            want.push((sum, off + 1.001 * (1.0 + BF16) * rounding));
        }
        bench.expect(&name, &got, &want)
    })
}
