//! Predicted against measured seconds of training steps on this machine.
//!
//! `cargo bench --features plan --bench planner [-- --rounds 5] [--json FILE]`
//!
//! Measures the machine, then trains three models under many strategies on one and two ranks, and
//! under a few on more ranks than two cores. Eight of the runs calibrate the machine, and the
//! others are predicted. Each round runs every strategy once, so that all share the noise of the
//! machine.

use clap::Parser;
use shardwise::{
    Result,
    device::{Cpu, DType},
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    launch::{Threads, threads},
    models::DecoderConfig,
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig},
    plan::{Goal, Job, Machine, Measure, Parts, Run, Strategy, Transport, parts, predict, time_steps},
};
use std::{num::NonZeroUsize, path::PathBuf};

/// Compares predicted with measured steps.
#[derive(Parser)]
struct Args {
    /// The number of rounds. The bench compares medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long to measure the machine.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Run only every n-th strategy.
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Read the machine from this file instead of measuring it.
    #[arg(long)]
    machine: Option<PathBuf>,
    /// Writes the results to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The number of runs that calibrate the machine.
const CALIBRATION: usize = 8;

struct Case {
    model: &'static str,
    job: Job,
    strategy: Strategy,
    parts: Parts,
    /// The measured seconds of each round.
    rounds: Vec<f64>,
}

impl Case {
    /// Whether each rank has a core of its own.
    fn is_honest(&self, cores: usize) -> bool {
        self.strategy.ranks() <= cores
    }

    fn seconds(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort_by(f64::total_cmp);
        rounds[rounds.len() / 2]
    }

    fn run(&self) -> Run {
        Run::new(format!("{}, {}", self.model, self.strategy), &self.job.goal, self.parts, self.seconds())
    }
}

/// A Llama with grouped key/value heads, a GPT-2 with a tied head, and a Llama in bf16 whose
/// vocabulary is large.
fn jobs() -> [(&'static str, Job); 3] {
    let rope = |dim| RopeConfig { dim, base: 1e4, pairs: RopePairs::Halves, scaling: RopeScaling::None };
    let llama = |hidden, heads, ffn, vocabulary, layers| {
        let attention = AttentionConfig::new(hidden, heads)
            .with_choices(AttentionChoices::CAUSAL)
            .with_kv_heads(2)
            .with_rope(rope(hidden / heads));
        let norm = NormKind::RmsNorm { eps: 1e-5 };
        let block = BlockConfig::new(attention, ffn, Activation::Silu, norm).with_gate(true);
        let mut config = DecoderConfig::new(vocabulary, block, layers);
        config.tied = false;
        config
    };
    let attention = AttentionConfig::new(256, 4)
        .with_choices(AttentionChoices::CAUSAL)
        .with_qkv_bias(true)
        .with_out_bias(true);
    let norm = NormKind::LayerNorm { eps: 1e-5 };
    let block = BlockConfig::new(attention, 1024, Activation::GeluTanh, norm).with_mlp_bias(true);
    let mut gpt = DecoderConfig::new(512, block, 4);
    gpt.positions = Some(256);
    [
        ("llama", Job::train(llama(192, 6, 512, 1000, 6), DType::F32, 8, 128)),
        ("gpt", Job::train(gpt, DType::F32, 4, 256)),
        ("bf16", Job::train(llama(128, 4, 352, 4000, 4), DType::BF16, 8, 96)),
    ]
}

/// The strategies of a job with this batch and number of blocks.
fn strategies(batch: usize, layers: usize) -> Vec<Strategy> {
    let mesh = |data: usize, pipeline, tensor, sequences: usize| {
        Strategy::new(data, pipeline, tensor, sequences).with_microbatches(batch / data / sequences)
    };
    let all = batch;
    vec![
        mesh(1, 1, 1, 1),
        mesh(1, 1, 1, 2),
        mesh(1, 1, 1, all),
        mesh(1, 1, 1, 2).with_recomputed(layers / 2),
        mesh(1, 1, 1, all).with_recomputed(layers),
        mesh(2, 1, 1, 1),
        mesh(2, 1, 1, 2),
        mesh(2, 1, 1, all / 2).with_recomputed(layers / 2),
        mesh(1, 1, 2, 1),
        mesh(1, 1, 2, all),
        mesh(1, 1, 2, 2).with_sequence_parallel(true),
        mesh(1, 1, 2, all).with_sequence_parallel(true),
        mesh(1, 1, 2, all).with_recomputed(layers),
        mesh(1, 2, 1, 1),
        mesh(1, 2, 1, 2),
        mesh(1, 2, 1, 1).with_chunks(2),
        mesh(1, 2, 1, 1).with_recomputed(layers),
        mesh(1, 1, 3, 2),
        mesh(1, 3, 1, 1),
        mesh(2, 1, 2, 2),
        mesh(2, 2, 1, 1),
        mesh(1, 2, 2, 1).with_sequence_parallel(true),
    ]
}

fn measure(seconds: f64) -> Result<Machine> {
    // Enough for any model here.
    let measure = Measure::new(Transport::Threads, 16 << 30).with_seconds(seconds);
    let cpu = |threads| Cpu::new().with_threads(threads);
    Ok(threads(4, |world| measure.run(&world, cpu))?.swap_remove(0))
}

/// The seconds of a step of a strategy.
fn time(case: &Case, threads: usize) -> Result<f64> {
    let threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
    let ranks = Threads::new(case.strategy.ranks()).gemm_threads(threads);
    let steps = ranks.run(|world| time_steps(&world, &case.job, &case.strategy, 2))?.swap_remove(0);
    Ok(steps.iter().sum::<f64>() / steps.len() as f64)
}

/// The mean of |predicted / measured − 1|.
fn mean_error(pairs: &[(f64, f64)]) -> f64 {
    pairs.iter().map(|(predicted, measured)| (predicted / measured - 1.0).abs()).sum::<f64>()
        / pairs.len() as f64
}

/// Kendall's rank correlation τ.
fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for (at, a) in pairs.iter().enumerate() {
        for b in &pairs[..at] {
            // Equal times are in no order.
            let product = (a.0 - b.0) * (a.1 - b.1);
            sum += if product == 0.0 { 0.0 } else { product.signum() };
            count += 1.0;
        }
    }
    sum / count
}

/// By how much the best of the three predicted to be best is slower than the best there is.
fn regret(pairs: &[(f64, f64)]) -> f64 {
    let least = |pairs: &[(f64, f64)]| pairs.iter().map(|pair| pair.1).fold(f64::INFINITY, f64::min);
    let mut sorted = pairs.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    sorted.truncate(3);
    least(&sorted) / least(pairs) - 1.0
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut machine = match &args.machine {
        Some(path) => Machine::read(path)?,
        None => measure(args.seconds)?,
    };
    let cores = std::thread::available_parallelism()?.get();
    let mut cases = Vec::new();
    for (model, job) in jobs() {
        let Goal::Train { batch, .. } = job.goal else { continue };
        for strategy in strategies(batch, job.model.layers.len()) {
            let parts = parts(&job, &machine, &strategy)?;
            cases.push(Case { model, job: job.clone(), strategy, parts, rounds: Vec::new() });
        }
    }
    let mut cases: Vec<_> = cases.into_iter().step_by(args.every.max(1)).collect();
    for _ in 0..args.rounds.max(1) {
        for case in &mut cases {
            let seconds = time(case, machine.rates(case.strategy.ranks())?.threads)?;
            case.rounds.push(seconds);
        }
    }
    let honest: Vec<_> = cases.iter().filter(|case| case.is_honest(cores)).collect();
    let spread = honest.len().div_ceil(CALIBRATION).max(1);
    machine.runs = honest.iter().step_by(spread).map(|case| case.run()).collect();
    let calibrating: Vec<_> = honest.iter().step_by(spread).map(|case| case.run().what).collect();

    println!(
        "{:<60} {:>9} {:>9} {:>7} {:>9} {:>7}",
        "step", "measured", "raw", "error", "predicted", "error"
    );
    let (mut raw, mut others, mut crowded, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for case in &cases {
        let (measured, before) = (case.seconds(), case.parts.total());
        let predicted = predict(&case.job, &machine, &case.strategy)?.seconds;
        if !(measured > 0.0 && predicted > 0.0 && (measured + predicted).is_finite()) {
            return Err(format!("{}: {measured} s, predicted {predicted} s", case.strategy).into());
        }
        let run = case.run();
        let is_calibrating = calibrating.contains(&run.what);
        println!(
            "{:<60} {:>7.1}ms {:>7.1}ms {:>6.1}% {:>7.1}ms {:>6.1}%{}",
            run.what,
            1e3 * measured,
            1e3 * before,
            100.0 * (before / measured - 1.0),
            1e3 * predicted,
            100.0 * (predicted / measured - 1.0),
            if is_calibrating { " c" } else { "" }
        );
        rows.push(serde_json::json!({
            "step": run.what, "measured_s": measured, "raw_s": before, "predicted_s": predicted,
            "calibrates": is_calibrating, "rounds_s": case.rounds, "parts": case.parts,
        }));
        if !case.is_honest(cores) {
            crowded.push((predicted, measured));
        } else if !is_calibrating {
            raw.push((before, measured));
            others.push((predicted, measured));
        }
    }
    let calibrated = machine.calibrated(&cases[0].job.goal);
    let summary = |what: &str, pairs: &[(f64, f64)]| {
        if pairs.len() > 1 {
            println!(
                "{what}: {} steps, mean error {:.1}%, rank correlation {:.2}",
                pairs.len(),
                100.0 * mean_error(pairs),
                correlation(pairs)
            );
        }
    };
    summary("without calibration", &raw);
    summary("calibrated on the others (c)", &others);
    summary("more ranks than cores", &crowded);
    for (model, _) in jobs() {
        let of_model = cases.iter().filter(|case| case.model == model);
        let pairs = of_model
            .map(|case| Ok((predict(&case.job, &machine, &case.strategy)?.seconds, case.seconds())))
            .collect::<Result<Vec<_>>>()?;
        if !pairs.is_empty() {
            println!(
                "{model}: the best of the three best is {:.1}% slower than the best",
                100.0 * regret(&pairs)
            );
        }
    }
    println!("uncertainty of the calibrated machine: {:.0}%", 100.0 * calibrated.error);
    if let Some(path) = args.json {
        let all = serde_json::json!({ "machine": machine, "steps": rows });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}
