//! GEMM, the feed-forward layer and the GPT-2-small block on one and two thread ranks, compared
//! with the peak of the processor.
//!
//! `cargo bench --bench layers [-- --filter mlp] [--json FILE]`
//!
//! "of peak" is the share of the cores' rate of fused multiply-adds, which the bench measures at
//! the start. "apart" is the largest difference between any rank's output or gradient and the
//! result on one rank, divided by the largest number of that result or by 1, whichever is larger.
//! The bench fails if "apart" exceeds 1e-4.
//!
//! In each round, every mode of a case (number of ranks, reduction) runs a short batch. The bench
//! reports the median over the rounds. The cost of invariant sums is a ratio of two times of the
//! same round, because the machine's speed changes from second to second.

mod limits;

use clap::Parser;
use shardwise::{
    Result, Tensor,
    device::Cpu,
    kernels::{Activation, AttentionChoices, Gemm, NormKind},
    launch::Threads,
    parallel::{AttentionConfig, BlockConfig, DTensor, Layer, MlpNames, ParallelMlp, TransformerBlock},
    reference::worst_relative,
    rng::Philox,
    shard::{Reduction, Replicated},
    tensor::{Random, Weights},
};
use std::{fs, io::Write, time::Instant};

#[derive(Parser)]
struct Args {
    /// Runs only cases whose name contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// The number of rounds. The bench reports the median.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Appends one JSON line per case to this file.
    #[arg(long)]
    json: Option<String>,
    /// The peak of one core, in GFLOP/s; measured by default.
    #[arg(long)]
    peak: Option<f64>,
    /// Also runs on two ranks with invariant sums in this many blocks, and reports the cost of
    /// these sums.
    #[arg(long)]
    invariant: Option<usize>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    let peak = *args.peak.get_or_insert_with(limits::fused);
    println!("one core: {peak:.0} GFLOP/s of fused multiply-adds");
    println!(
        "{:<34} {:>6} {:>10} {:>10} {:>9} {:>8} {:>8}",
        "case", "ranks", "median ms", "min ms", "GFLOP/s", "of peak", "apart"
    );
    for (m, n, k) in
        [(1024, 1024, 1024), (2048, 2048, 2048), (512, 4096, 1024), (16, 4096, 4096), (1, 4096, 4096)]
    {
        gemm(&args, m, n, k)?;
    }
    for tokens in [512, 16] {
        let flops = 4.0 * tokens as f64 * 1024.0 * 4096.0;
        layer(&args, &format!("mlp 1024-4096-1024 tok={tokens}"), tokens, 1024, flops, |group, weights| {
            let (names, sizes) = (MlpNames::default(), (1024, 4096));
            ParallelMlp::<Replicated, f32, Cpu>::load(
                group,
                weights,
                &names,
                sizes,
                Activation::GeluErf,
                true,
            )
        })?;
    }
    let gpt2 = block(768, 12, 12, 3072, false);
    let flops = 2.0 * 512.0 * 768.0 * (3.0 * 768.0 + 768.0 + 2.0 * 3072.0) + 2.0 * 512.0 * 512.0 * 768.0;
    layer(&args, "gpt2 block 1x512", 512, 768, flops, |group, weights| {
        TransformerBlock::<Replicated, f32, Cpu>::load(group, weights, &gpt2)
    })?;
    let llama = block(1024, 16, 4, 2816, true);
    let flops =
        2.0 * 512.0 * 1024.0 * (1024.0 + 512.0 + 1024.0 + 3.0 * 2816.0) + 2.0 * 512.0 * 512.0 * 1024.0;
    layer(&args, "llama block 1x512", 512, 1024, flops, |group, weights| {
        TransformerBlock::<Replicated, f32, Cpu>::load(group, weights, &llama)
    })
}

fn block(hidden: usize, heads: usize, kv_heads: usize, ffn: usize, gated: bool) -> BlockConfig {
    let attention = AttentionConfig::new(hidden, heads)
        .with_kv_heads(kv_heads)
        .with_choices(AttentionChoices::CAUSAL)
        .with_qkv_bias(!gated)
        .with_out_bias(!gated);
    BlockConfig::new(
        attention,
        ffn,
        if gated { Activation::Silu } else { Activation::GeluTanh },
        if gated { NormKind::RmsNorm { eps: 1e-5 } } else { NormKind::LayerNorm { eps: 1e-5 } },
    )
    .with_gate(gated)
    .with_mlp_bias(!gated)
}

fn random(device: &Cpu, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
    let stream = Philox::named(1, name);
    let values: Vec<f32> = (0..(rows * cols) as u64).map(|at| stream.normal(at) as f32).collect();
    Tensor::from_slice(device, [rows, cols], &values)
}

/// y = x wᵀ on one thread.
fn gemm(args: &Args, m: usize, n: usize, k: usize) -> Result<()> {
    let name = format!("gemm {m} x {n} x {k}");
    if !name.contains(&args.filter) {
        return Ok(());
    }
    let cpu = Cpu::new();
    let (x, w) = (random(&cpu, "x", m, k)?, random(&cpu, "w", n, k)?);
    let mut y = Tensor::<f32>::empty(&cpu, [m, n])?;
    let mut times = Vec::new();
    let flops = 2.0 * (m * n * k) as f64;
    let batch = (5e9 / flops).ceil().min(200.0) as usize;
    for _ in 0..=args.rounds {
        let start = Instant::now();
        for _ in 0..batch {
            cpu.gemm(1.0, x.mat(), w.mat().t(), 0.0, y.mat_mut()?)?;
        }
        times.push(start.elapsed().as_secs_f64() / batch as f64);
    }
    // Compares a few elements with sums in f64.
    let (x, w, y) = (x.to_vec()?, w.to_vec()?, y.to_vec()?);
    let by_hand = |at: usize| {
        let (row, col) = (at / n, at % n);
        (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[col * k + i])).sum::<f64>()
    };
    let some: Vec<usize> = (0..y.len()).step_by((y.len() / 997).max(1)).collect();
    let (got, want): (Vec<_>, Vec<_>) = some.into_iter().map(|at| (y[at], by_hand(at))).unzip();
    report(args, &name, (1, flops, worst_relative(&got, &want)), &mut times[1..])
}

/// Times a layer's forward, and its forward and backward, on one rank and on two ranks in turn.
fn layer<L: Layer<f32, Cpu, In = Replicated, Out = Replicated>>(
    args: &Args,
    name: &str,
    tokens: usize,
    hidden: usize,
    flops: f64,
    load: impl Fn(&shardwise::comm::Group<Cpu>, &Weights<'_>) -> Result<L> + Sync,
) -> Result<()> {
    if !name.contains(&args.filter) {
        return Ok(());
    }
    let source = Random::normal(1, 0.02);
    let mut times = [(); 6].map(|()| Vec::new());
    let mut results: Vec<[Vec<f32>; 2]> = Vec::new();
    let mut modes = vec![(0, 1, Reduction::Fast), (2, 2, Reduction::Fast)];
    modes.extend(args.invariant.map(|blocks| (4, 2, Reduction::Invariant { blocks })));
    for round in 0..=args.rounds {
        for &(slot, ranks, reduction) in &modes {
            let measured = Threads::new(ranks).run(|world| {
                let world = world.with_reduction(reduction);
                let layer = load(&world, &Weights::new(&source))?;
                let x = DTensor::replicated(&world, random(world.device(), "x", tokens, hidden)?)?;
                let batch = (2e9 / flops).ceil().min(50.0) as usize;
                let forward = || layer.forward(x.clone()).map(|(y, _)| y);
                let y = forward()?.local().to_vec()?;
                world.barrier()?;
                let start = Instant::now();
                for _ in 0..batch {
                    forward()?;
                }
                world.barrier()?;
                let forward = start.elapsed().as_secs_f64() / batch as f64;
                let step = || {
                    for param in layer.params() {
                        param.zero_grad();
                    }
                    let (y, saved) = layer.forward(x.clone())?;
                    layer.backward(saved, y)
                };
                let dx = step()?.local().to_vec()?;
                world.barrier()?;
                let start = Instant::now();
                for _ in 0..batch {
                    step()?;
                }
                world.barrier()?;
                Ok((forward, start.elapsed().as_secs_f64() / batch as f64, [y, dx]))
            })?;
            if round == 0 {
                results.push([0, 1].map(|of| measured.iter().flat_map(|rank| rank.2[of].clone()).collect()));
            } else {
                times[slot].push(measured[0].0);
                times[slot + 1].push(measured[0].1);
            }
        }
    }
    let cost = |slot: usize| {
        let mut ratios: Vec<f64> = times[slot + 4].iter().zip(&times[slot + 2]).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).map(|ratio| (ratio - 1.0) * 100.0)
    };
    let costs = [cost(0), cost(1)];
    let [y, dx] = &results[0];
    for ((slot, ranks, reduction), [got_y, got_dx]) in modes.into_iter().zip(&results) {
        let kind = if reduction == Reduction::Fast { "" } else { " invariant" };
        let apart = [worst_relative(got_y, &y.repeat(ranks)), worst_relative(got_dx, &dx.repeat(ranks))];
        report(args, &format!("{name}{kind} f"), (ranks, flops, apart[0]), &mut times[slot])?;
        report(args, &format!("{name}{kind} f+b"), (ranks, 3.0 * flops, apart[1]), &mut times[slot + 1])?;
    }
    if let [Some(forward), Some(both)] = costs {
        println!("{name}: invariant sums cost {forward:.1} % forward, {both:.1} % with the backward");
    }
    Ok(())
}

/// Prints a case and appends it to the JSON file.
fn report(
    args: &Args,
    name: &str,
    (ranks, flops, apart): (usize, f64, f64),
    times: &mut [f64],
) -> Result<()> {
    times.sort_by(f64::total_cmp);
    let (median, min) = (times[times.len() / 2] * 1e3, times[0] * 1e3);
    let rate = flops / median / 1e6;
    let share = rate / (args.peak.unwrap_or(f64::NAN) * ranks as f64) * 100.0;
    println!("{name:<34} {ranks:>6} {median:>10.3} {min:>10.3} {rate:>9.1} {share:>6.0} % {apart:>8.1e}");
    // The limit is far above rounding errors, and below the effect of a missing product.
    if apart > 1e-4 {
        let reason = format!("{name}: a result differs by {apart:.1e} from the expected one");
        return Err(shardwise::Error::Invalid { op: "bench", reason });
    }
    let Some(path) = &args.json else { return Ok(()) };
    let line = format!(
        "{{\"case\":\"{name}\",\"ranks\":{ranks},\"median_ms\":{median:.4},\"min_ms\":{min:.4},\"gflops\":{rate:.2},\"of_peak\":{share:.1}}}\n"
    );
    let written = fs::OpenOptions::new().create(true).append(true).open(path);
    written
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .map_err(|error| shardwise::Error::io(path, &error))
}
