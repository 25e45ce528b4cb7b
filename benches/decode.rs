//! Decoding one token at a time: GPT-2 small's twelve blocks with 512 tokens in the cache, on one
//! and two thread ranks.
//!
//! `cargo bench --bench decode [-- --json FILE]`
//!
//! In each round every case decodes some tokens. The bench reports the median over the rounds.
//! Decoding a token reads all weights once, and these reads bound the speed. "GB/s" is the rate of
//! reading the weights and the KV cache. "of read" is this rate as a share of the rate at which
//! one thread per rank can read from memory, which the bench measures at the start. (The
//! share may exceed 100 % if the processor's last-level cache holds the weights.)

mod limits;

use clap::Parser;
use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::{AnyMut, Cpu, Device, Element},
    kernels::{Activation, AttentionChoices, NormKind},
    launch::Threads,
    parallel::{AttentionConfig, BlockConfig, DTensor, KvCache, Layer, TransformerBlock},
    reference::worst_relative,
    shard::Replicated,
    tensor::{Region, Role, WeightSource, Weights},
};
use std::{fs, io::Write, time::Instant};

#[derive(Parser)]
struct Args {
    /// The number of rounds. The bench reports the median.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Tokens per round.
    #[arg(long, default_value_t = 16)]
    tokens: usize,
    /// Appends one JSON line per case to this file.
    #[arg(long)]
    json: Option<String>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

const LAYERS: usize = 12;
const HIDDEN: usize = 768;
const CACHED: usize = 512;

fn main() -> Result<()> {
    let args = Args::parse();
    let limits = [limits::read(1), limits::read(2)];
    println!("read from memory: {:.1} GB/s by one thread, {:.1} by two", limits[0], limits[1]);
    println!(
        "{:<34} {:>6} {:>10} {:>10} {:>8} {:>8}",
        "case", "ranks", "median ms", "min ms", "GB/s", "of read"
    );
    let mut cases =
        [("f32", 1, Vec::new()), ("f32", 2, Vec::new()), ("bf16", 1, Vec::new()), ("bf16", 2, Vec::new())];
    for round in 0..=args.rounds {
        let mut one = Vec::new();
        for (dtype, ranks, times) in &mut cases {
            let (time, outputs, epsilon) = match *dtype {
                "f32" => round_of::<f32>(*ranks, args.tokens)?,
                _ => round_of::<bf16>(*ranks, args.tokens)?,
            };
            if round > 0 {
                times.push(time);
            }
            if *ranks == 1 {
                one = outputs.clone();
            }
            let apart = worst_relative(&outputs, &one.repeat(*ranks));
            if apart > 16.0 * epsilon {
                let reason = format!(
                    "{dtype} on {ranks} ranks: an output differs by {apart:.1e} from the output of one rank"
                );
                return Err(shardwise::Error::Invalid { op: "bench", reason });
            }
        }
    }
    for (dtype, ranks, times) in &mut cases {
        times.sort_by(f64::total_cmp);
        let (median, min) = (times[times.len() / 2] * 1e3, times[0] * 1e3);
        let elements = LAYERS * (12 * HIDDEN * HIDDEN + 2 * CACHED * HIDDEN);
        let bytes = elements as f64 * if *dtype == "f32" { 4.0 } else { 2.0 };
        let name = format!("gpt2 12 blocks, cache {CACHED}, {dtype}");
        let rate = bytes / median / 1e6;
        let share = rate / limits[*ranks - 1] * 100.0;
        println!("{name:<34} {ranks:>6} {median:>10.3} {min:>10.3} {rate:>8.1} {share:>6.0} %");
        if let Some(path) = &args.json {
            let line = format!(
                "{{\"case\":\"{name}\",\"ranks\":{ranks},\"median_ms\":{median:.4},\"min_ms\":{min:.4}}}\n"
            );
            let written = fs::OpenOptions::new().create(true).append(true).open(path);
            written
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .map_err(|error| shardwise::Error::io(path, &error))?;
        }
    }
    Ok(())
}

type Block<T> = TransformerBlock<Replicated, T, Cpu>;

/// Returns the mean seconds per token, the outputs of all ranks, and the ε of the element type. The
/// weights are not in the processor's cache.
fn round_of<T: Element>(ranks: usize, tokens: usize) -> Result<(f64, Vec<f64>, f64)> {
    let source = Ramp;
    let measured = Threads::new(ranks).run(|world| {
        let blocks = load::<T>(&world, &Weights::new(&source))?;
        let rows = |count: usize| -> Result<_> {
            let value = |at: usize| T::from_f64((at % 7) as f64 / 4.0 - 0.5);
            let values: Vec<T> = (0..count * HIDDEN).map(value).collect();
            DTensor::replicated(&world, Tensor::from_slice(world.device(), [count, HIDDEN], &values)?)
        };
        let mut cache = KvCache::<T, Cpu>::new(1, CACHED + 8)?;
        let (sequences, mut step) = cache.step(&[0], &[CACHED])?;
        blocks.infer(rows(CACHED)?.with_sequences(sequences)?, &mut step)?;
        step.finish()?;
        let x = rows(1)?;
        let mut token = || -> Result<_> {
            // Do not finish the step, so that every token has the same number of cached tokens.
            let (sequences, mut step) = cache.step(&[0], &[1])?;
            blocks.infer(x.clone().with_sequences(sequences)?, &mut step)
        };
        let y = token()?.local().to_vec()?;
        let live = world.device().memory();
        world.barrier()?;
        let start = Instant::now();
        for _ in 0..tokens {
            token()?;
        }
        world.barrier()?;
        let time = start.elapsed().as_secs_f64() / tokens as f64;
        assert_eq!(world.device().memory(), live, "a token needs more memory than the token before");
        Ok((time, y))
    })?;
    let outputs = measured.iter().flat_map(|(_, y)| y.iter().map(|value| value.to_f64())).collect();
    Ok((measured[0].0, outputs, T::EPSILON))
}

fn load<T: Element>(world: &Group<Cpu>, weights: &Weights<'_>) -> Result<Vec<Block<T>>> {
    let config = BlockConfig::new(
        AttentionConfig::new(HIDDEN, 12)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qkv_bias(true)
            .with_out_bias(true),
        4 * HIDDEN,
        Activation::GeluTanh,
        NormKind::LayerNorm { eps: 1e-5 },
    )
    .with_mlp_bias(true);
    (0..LAYERS).map(|layer| Block::load(world, &weights.at(&layer.to_string()), &config)).collect()
}

/// Small weights that are fast to compute. They do not depend on the number of ranks. Their values
/// do not change the time of a matrix product.
struct Ramp;

impl WeightSource for Ramp {
    fn read(&self, _: &str, _: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        fn fill<T: Element>(region: &Region, out: &mut [T]) {
            for (value, at) in out.iter_mut().zip(region.runs().into_iter().flatten()) {
                *value = T::narrow(T::Acc::from_f64((at % 15) as f64 / 256.0 - 0.03));
            }
        }
        match out {
            AnyMut::F64(out) => fill(region, out),
            AnyMut::F32(out) => fill(region, out),
            AnyMut::BF16(out) => fill(region, out),
            AnyMut::F16(out) => fill(region, out),
        }
        Ok(())
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}
