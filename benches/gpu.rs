//! What one GPU takes for the products of a shard, a block of a model, and kernels that memory limits, as parts of the limits of the
//! machine. `scripts/peers/gpu_torch.py` takes the same shapes; `scripts/gpu/run.sh` runs both in turn.
//!
//! ```text
//! cargo bench --features nccl --bench gpu
//! ```

use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::{Cuda, Device},
    kernels::{Activation, Backend, Gemm, Norm, NormKind, Pointwise, Softmax},
    parallel::{
        AttentionConfig, BlockConfig, BlockNames, DTensor, GatedMlp, Layer, NormPlacement, TransformerBlock,
    },
    shard::{Replicated, Sequences},
    tensor::{Random, Weights},
};
use std::time::{Duration, Instant};

/// The limits of an H200, which may be set otherwise: dense bf16, TFLOP/s, and memory, TB/s.
fn limits() -> (f64, f64) {
    let number =
        |name: &str, usual: f64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(usual);
    (number("GPU_TFLOPS", 790.0), number("GPU_TBPS", 4.3))
}

/// The median time of a call, the device being waited for after several of them.
fn time(cuda: &Cuda, quick: bool, mut call: impl FnMut() -> Result<()>) -> Result<Duration> {
    let (rounds, calls) = if quick { (1, 1) } else { (7, 10) };
    call()?;
    cuda.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        cuda.synchronize()?;
        times.push(begin.elapsed() / calls);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

fn line(name: &str, time: Duration, part: f64) {
    println!("{name:<44} {:>10.1} us {:>6.1} % of the limit", time.as_secs_f64() * 1e6, 100.0 * part);
}

/// y = x wᵀ with a shard of w: floor max(2 m n k / P, 2 (m k + k n + m n) / W).
fn products(cuda: &Cuda, quick: bool) -> Result<()> {
    let (tflops, tbps) = limits();
    let (k, whole) = if quick { (64, 128) } else { (8192, 28672) };
    for m in if quick { vec![4] } else { vec![4096, 1, 16, 64] } {
        for tp in [1, 2, 4, 8] {
            let n = whole / tp;
            let x = Tensor::<bf16, _>::full(cuda, [m, k], 0.5)?;
            let w = Tensor::<bf16, _>::full(cuda, [n, k], 0.25)?;
            let mut y = Tensor::<bf16, _>::zeros(cuda, [m, n])?;
            let took = time(cuda, quick, || cuda.gemm(1.0, x.mat(), w.mat().t(), 0.0, y.mat_mut()?))?;
            let wrong = y.to_vec()?.iter().filter(|value| value.to_f64() != 0.125 * k as f64).count();
            let (m, n, k) = (m as f64, n as f64, k as f64);
            let floor =
                (2.0 * m * n * k / (tflops * 1e12)).max(2.0 * (m * k + k * n + m * n) / (tbps * 1e12));
            line(&format!("gemm bf16 {m} x {k} x {n} (tp {tp})"), took, floor / took.as_secs_f64());
            assert_eq!(wrong, 0, "wrong elements");
        }
    }
    Ok(())
}

/// Kernels that read and write each element once.
fn streams(cuda: &Cuda, quick: bool) -> Result<()> {
    let (rows, cols) = if quick { (8, 64) } else { (8192, 8192) };
    let bytes = 2.0 * (rows * cols) as f64;
    let (_, tbps) = limits();
    let x = Tensor::<bf16, _>::full(cuda, [rows, cols], 0.5)?;
    let gamma = Tensor::<bf16, _>::full(cuda, [cols], 1.0)?;
    let mut y = Tensor::<bf16, _>::zeros(cuda, [rows, cols])?;
    let mut stats = Tensor::<f32, _>::zeros(cuda, [rows, 2])?;
    let part = |took: Duration, times: f64| times * bytes / (tbps * 1e12) / took.as_secs_f64();
    let took = time(cuda, quick, || cuda.copy(x.mat(), y.mat_mut()?))?;
    line("copy bf16", took, part(took, 2.0));
    let took = time(cuda, quick, || cuda.activate(Activation::Silu, x.mat(), y.mat_mut()?))?;
    line("silu bf16", took, part(took, 2.0));
    let took = time(cuda, quick, || cuda.gate(Activation::Silu, x.mat(), x.mat(), y.mat_mut()?))?;
    line("gate bf16", took, part(took, 3.0));
    let took = time(cuda, quick, || {
        let kind = NormKind::RmsNorm { eps: 1e-5 };
        cuda.normalize(kind, x.mat(), gamma.slice(), None, y.mat_mut()?, stats.slice_mut()?)
    })?;
    line("RMSNorm bf16", took, part(took, 2.0));
    let took = time(cuda, quick, || cuda.softmax(Default::default(), x.mat(), y.mat_mut()?))?;
    line("softmax bf16", took, part(took, 2.0));
    Ok(())
}

/// Llama's block, forward and backward, on one rank.
fn block<B: Backend>(group: &Group<B>, quick: bool) -> Result<()> {
    let (hidden, heads, kv_heads, ffn, tokens) =
        if quick { (64, 4, 2, 96, 8) } else { (4096, 32, 8, 14336, 4096) };
    let config = BlockConfig {
        attention: AttentionConfig { kv_heads, causal: true, ..AttentionConfig::new(hidden, heads) },
        ffn,
        activation: Activation::Silu,
        mlp_bias: false,
        norm: NormKind::RmsNorm { eps: 1e-5 },
        placement: NormPlacement::Pre,
        names: BlockNames::default(),
    };
    let source = Random::normal(1, 0.02);
    let mut block = TransformerBlock::<Replicated, GatedMlp<Replicated, bf16, B>, bf16, B>::load_gated(
        group,
        &Weights::new(&source),
        &config,
    )?;
    let x = Tensor::<bf16, B>::full(group.device(), [tokens, hidden], 0.5)?;
    let x = DTensor::replicated(group, x)?.with_sequences(Sequences::one(tokens))?;
    let (mut forwards, mut steps) = (Vec::new(), Vec::new());
    for _ in 0..if quick { 1 } else { 8 } {
        group.device().synchronize()?;
        let begin = Instant::now();
        let (y, saved) = block.forward(&x)?;
        group.device().synchronize()?;
        forwards.push(begin.elapsed());
        block.backward(saved, &y)?;
        group.device().synchronize()?;
        steps.push(begin.elapsed());
    }
    // Two products of a weight are made in the backward, and five of the attention's two; half of its scores are hidden.
    let kv_cols = kv_heads * hidden / heads;
    let weights = 2.0 * (tokens * hidden * (2 * hidden + 2 * kv_cols + 3 * ffn)) as f64;
    let attention = 2.0 * (tokens * tokens * hidden) as f64;
    let (tflops, _) = limits();
    for (name, times, products) in [
        ("block forward bf16", &mut forwards, weights + attention),
        ("block forward and backward bf16", &mut steps, 3.0 * weights + 3.5 * attention),
    ] {
        times.sort_unstable();
        let took = times[times.len() / 2];
        line(name, took, products / (tflops * 1e12) / took.as_secs_f64());
    }
    Ok(())
}

fn main() -> Result<()> {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let cuda = match Cuda::new(0) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    println!("{cuda:?}");
    products(&cuda, quick)?;
    streams(&cuda, quick)?;
    block(&Group::solo(&cuda), quick)
}
