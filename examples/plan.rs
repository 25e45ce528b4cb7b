//! Plans a language model without data: the memory, operations and collectives of one rank in a
//! group of any size. The plan runs the model's own code.
//!
//! `cargo run --release --bin plan -- --model a/folder --ranks 64 --rank 5` takes under a
//! second. Without a folder the example plans Llama 2 with 70 billion parameters.

use clap::Parser;
use half::bf16;
use shardwise::{
    Error, Result,
    comm::{Group, Op, Transfer},
    device::{Device, Meta},
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    models::{Decoder, DecoderConfig, ModelConfig},
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig, BlockNames},
    shard::{Replicated, Sequences},
    tensor::Random,
};
use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Instant};

/// Plans one rank's inference, and its forward with backward.
#[derive(Parser)]
struct Args {
    /// A folder with a `config.json`.
    #[arg(long)]
    model: Option<PathBuf>,
    /// The number of tensor-parallel ranks.
    #[arg(long, default_value_t = 64)]
    ranks: usize,
    /// The rank that is planned.
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// The number of tokens in a sequence.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// The number of leading blocks that recompute their forward in the backward.
    #[arg(long, default_value_t = 0)]
    recomputed: usize,
}

/// Llama 2 of 70 billion parameters (Touvron et al., 2023).
fn llama_70b() -> DecoderConfig {
    let (hidden, heads) = (8192, 64);
    let (pairs, scaling) = (RopePairs::Halves, RopeScaling::None);
    let rope = RopeConfig { dim: hidden / heads, base: 1e4, pairs, scaling };
    let block = BlockConfig::new(
        AttentionConfig::new(hidden, heads)
            .with_kv_heads(8)
            .with_choices(AttentionChoices::CAUSAL)
            .with_rope(rope),
        28672,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true)
    .with_names(BlockNames::llama());
    let mut config = DecoderConfig::new(32000, block, 80);
    config.tied = false;
    config
}

fn main() -> ExitCode {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut config = match &args.model {
        None => llama_70b(),
        Some(folder) => match ModelConfig::read(folder)? {
            ModelConfig::Decoder(config) => config,
            _ => {
                return Err(Error::Invalid { op: "plan", reason: "the model is not a decoder".into() });
            }
        },
    };
    config.recomputed = args.recomputed;
    let device = Meta::new();
    let (group, record) = Group::planned(&device, args.rank, args.ranks)?;
    let model = Decoder::<Replicated, bf16, _>::load(&group, &Random::normal(1, 0.02), &config)?;
    let weights = device.memory().live;
    let (ids, sequences) = (vec![0; args.tokens], Sequences::one(args.tokens));
    println!("rank {} of {}, {} tokens, bf16", args.rank, args.ranks, args.tokens);
    println!("  weights                 {:>9.3} GiB", gib(weights));

    drop(model.infer(&ids, sequences.clone())?);
    let inference = device.flops();
    println!(
        "  inference, at most      {:>9.3} GiB, {:.2} TFLOP",
        gib(device.memory().peak),
        tera(inference)
    );
    list(&record.take(), args.ranks);

    let (logits, saved) = model.forward(&ids, sequences)?;
    let kept = device.memory().live - weights;
    model.backward(saved, logits)?;
    let training = device.flops() - inference;
    println!("  kept for the backward   {:>9.3} GiB", gib(kept));
    println!("  training, at most       {:>9.3} GiB, {:.2} TFLOP", gib(device.memory().peak), tera(training));
    list(&record.take(), args.ranks);
    println!("planned in {:.1?}", start.elapsed());
    Ok(())
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

fn tera(operations: u64) -> f64 {
    operations as f64 / 1e12
}

/// Prints the number of collectives of each kind, and the minimum number of bytes that the rank
/// sends for them.
fn list(moved: &[Transfer], ranks: usize) {
    let mut all: BTreeMap<Op, (usize, usize)> = BTreeMap::new();
    for transfer in moved {
        let (count, bytes) = all.entry(transfer.op).or_default();
        (*count, *bytes) = (*count + 1, *bytes + transfer.wire_bytes(ranks));
    }
    for (op, (count, bytes)) in all {
        println!("    {count:>5} x {:<15} {:>9.3} GiB sent", op.name(), gib(bytes));
    }
}
