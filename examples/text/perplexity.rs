//! Computes the perplexity of a text, e^(mean loss per token), under a language model sharded over
//! any number of ranks.
//!
//! ```text
//! cargo run --release -p text-examples --bin perplexity -- MODEL TEXT --ranks 2
//! ```
//!
//! The model is a folder in Hugging Face's format or a GGUF file, as for the example `generate`.
//! `--quantize`, `--by-row`, `--activations` and `--dequantize` choose the precision of weights.
//!
//! The text is split into windows. The model predicts each token from the earlier tokens of the
//! same window. No rank gathers the logits: each rank holds the logits of its vocabulary shard.

use checkpoint::{Model, Precision};
use clap::Parser;
use shardwise::{
    Error, Result,
    comm::Group,
    device::{Cpu, Element},
    launch,
    models::{Decoder, DecoderConfig},
    parallel::VocabParallelCrossEntropy,
    shard::{Replicated, Sequences},
    tensor::WeightSource,
};
use std::{path::PathBuf, process::ExitCode, time::Instant};

/// Prints the perplexity of a text.
#[derive(Parser, Debug)]
struct Args {
    /// The folder of a checkpoint, or a GGUF file.
    model: PathBuf,
    /// The text file.
    text: PathBuf,
    /// The number of tensor-parallel ranks, at most the model's number of query heads.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// The number of tokens in a window.
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// The largest number of windows.
    #[arg(long, default_value_t = usize::MAX)]
    windows: usize,
    /// Compute in bf16 rather than f32.
    #[arg(long)]
    bf16: bool,
    #[command(flatten)]
    precision: Precision,
}

fn main() -> ExitCode {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(args: &Args) -> Result<()> {
    let fail = |reason: String| Error::Invalid { op: "perplexity", reason };
    let model = Model::open("perplexity", &args.model, args.precision)?;
    checkpoint::check_ranks("perplexity", args.ranks, model.config.block.attention.heads)?;
    let text = std::fs::read_to_string(&args.text)
        .map_err(|error| fail(format!("{}: {error}", args.text.display())))?;
    let ids = model.tokenizer.encode(text, true).map_err(|error| fail(error.to_string()))?.get_ids().to_vec();
    let windows: Vec<&[u32]> =
        ids.chunks(args.window.max(2)).filter(|ids| ids.len() > 1).take(args.windows).collect();
    if windows.is_empty() {
        return Err(fail("there is no window of two tokens, so no token is predicted".into()));
    }
    let start = Instant::now();
    let sums = model.with_weights(|weights| {
        launch::threads(args.ranks, |world| {
            if args.bf16 {
                losses::<half::bf16>(&world, weights, &model.config, &windows)
            } else {
                losses::<f32>(&world, weights, &model.config, &windows)
            }
        })
    })?;
    if sums.iter().any(|sum| sum.to_bits() != sums[0].to_bits()) {
        return Err(fail("the ranks' losses differ".into()));
    }
    let count: usize = windows.iter().map(|ids| ids.len() - 1).sum();
    let mean = sums[0] / count.max(1) as f64;
    println!(
        "perplexity {:.4} (loss {mean:.5} over {count} tokens in {} windows; {} ranks, {:.1?})",
        mean.exp(),
        windows.len(),
        args.ranks,
        start.elapsed()
    );
    Ok(())
}

/// Returns the sum of the losses of all tokens except the first of each window.
fn losses<T: Element>(
    world: &Group<Cpu>,
    weights: &dyn WeightSource,
    config: &DecoderConfig,
    windows: &[&[u32]],
) -> Result<f64> {
    let model = Decoder::<Replicated, T, Cpu>::load(world, weights, config)?;
    let mut sum = 0.0;
    for ids in windows {
        let (targets, ids) = (&ids[1..], &ids[..ids.len() - 1]);
        let logits = model.infer(ids, Sequences::one(ids.len()))?;
        sum += VocabParallelCrossEntropy::default().forward(logits, targets)?.0.sum()?;
    }
    Ok(sum)
}
