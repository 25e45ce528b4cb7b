//! Sentence embeddings with all-MiniLM-L6-v2, a BERT encoder, sharded over any number of ranks up
//! to its 12 heads.
//!
//! ```text
//! scripts/fetch_model.sh minilm
//! cargo run --release -p text-examples --bin sentence_embedding -- \
//!     --ranks 5 "A cat sat." "It rained all day."
//! ```
//!
//! Each rank reads only its shard of the checkpoint's attention and feed-forward weights.

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use shardwise::{
    Error, Result,
    device::{Cpu, Device, Element},
    launch,
    models::{Bert, ModelConfig},
    reference::worst,
    shard::{Replicated, Sequences},
    weights::Checkpoint,
};
use std::{path::PathBuf, process::ExitCode, time::Instant};

/// Prints the embeddings of sentences and their pairwise cosines.
#[derive(Parser, Debug)]
struct Args {
    /// The sentences to embed. By default these are the sentences of the reference file.
    sentences: Vec<String>,
    /// The number of tensor-parallel ranks, 1 to 12.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// The element type of weights and activations.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// The folder with model.safetensors and tokenizer.json.
    #[arg(long, default_value = "examples/text/data/minilm")]
    model: PathBuf,
    /// Reference embeddings in f64, from PyTorch.
    #[arg(long, default_value = "examples/text/data/minilm_reference.json")]
    reference: PathBuf,
    /// Pack the sentences one after the other instead of padding them to the longest.
    #[arg(long)]
    packed: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

/// all-MiniLM-L6-v2's config.json.
const CONFIG: &str = r#"{
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12
}"#;

fn main() -> ExitCode {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(args: &Args) -> Result<()> {
    let fail = |reason: String| Error::Invalid { op: "sentence_embedding", reason };
    let known = known(args).map_err(fail)?;
    let sentences = if args.sentences.is_empty() {
        known.iter().map(|(sentence, _)| sentence.clone()).collect()
    } else {
        args.sentences.clone()
    };
    let mut tokenizer = checkpoint::tokenizer(&args.model)
        .map_err(|error| fail(format!("{error}; scripts/fetch_model.sh minilm fetches the model")))?;
    // The tokenizer must not pad, because `embed` pads the batch.
    tokenizer.with_padding(None);
    let tokens: Vec<Vec<u32>> = sentences
        .iter()
        .map(|sentence| Ok(tokenizer.encode(sentence.as_str(), true)?.get_ids().to_vec()))
        .collect::<tokenizers::Result<_>>()
        .map_err(|error| fail(error.to_string()))?;

    let checkpoint = Checkpoint::open(&args.model)?;
    let start = Instant::now();
    let ranks = match args.dtype {
        Dtype::F64 => embed::<f64>(args, &checkpoint, &tokens)?,
        Dtype::F32 => embed::<f32>(args, &checkpoint, &tokens)?,
        Dtype::Bf16 => embed::<bf16>(args, &checkpoint, &tokens)?,
        Dtype::F16 => embed::<f16>(args, &checkpoint, &tokens)?,
    };
    let elapsed = start.elapsed();
    if ranks.iter().any(|(embeddings, _)| *embeddings != ranks[0].0) {
        return Err(fail("the ranks' embeddings differ".into()));
    }
    let embeddings = &ranks[0].0;

    for (sentence, embedding) in sentences.iter().zip(embeddings) {
        let head: Vec<String> = embedding[..5].iter().map(|value| format!("{value:+.5}")).collect();
        println!("[{}, … {} more]  {sentence}", head.join(", "), embedding.len() - 5);
    }
    println!("\ncosines");
    for a in embeddings {
        let row: Vec<String> = embeddings
            .iter()
            .map(|b| format!("{:+.4}", a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>()))
            .collect();
        println!("  {}", row.join("  "));
    }
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let peaks: Vec<String> = ranks.iter().map(|(_, peak)| format!("{:.0}", mib(*peak))).collect();
    println!(
        "\n{} ranks, {:?}: {elapsed:.0?} with loading; peak MiB a rank: {}",
        args.ranks,
        args.dtype,
        peaks.join(" ")
    );

    let of = |sentence: &String| known.iter().find(|(known, _)| known == sentence).map(|(_, want)| want);
    let pairs = sentences.iter().zip(embeddings).filter_map(|(sentence, got)| Some((got, of(sentence)?)));
    let (got, want): (Vec<_>, Vec<_>) = pairs.unzip();
    if got.is_empty() {
        let reason = "none of the sentences is in the reference: nothing was compared";
        if args.sentences.is_empty() {
            return Err(fail(reason.into()));
        }
        // The reference need not have the sentences that a user passes, so their absence is no
        // error.
        println!("{reason}");
        return Ok(());
    }
    let bound = 64.0
        * match args.dtype {
            Dtype::F64 | Dtype::F32 => f64::from(f32::EPSILON),
            Dtype::Bf16 => bf16::EPSILON.to_f64(),
            Dtype::F16 => f16::EPSILON.to_f64(),
        };
    let (compared, worst) = (got.len(), worst(got.into_iter().flatten(), want.into_iter().flatten()));
    println!(
        "largest difference from PyTorch's f64 on {compared} sentences: {worst:.1e} (bound {bound:.1e})"
    );
    if worst > bound {
        return Err(fail("the embeddings differ from the reference".into()));
    }
    Ok(())
}

/// Reads the sentences of the reference with their embeddings.
fn known(args: &Args) -> Result<Vec<(String, Vec<f64>)>, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", args.reference.display());
    let text = std::fs::read_to_string(&args.reference).map_err(|error| named(&error))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| named(&error))?;
    let sentences = json["sentences"].as_array().ok_or_else(|| named(&"no `sentences`"))?;
    let one = |entry: &serde_json::Value| {
        let sentence = entry["sentence"].as_str()?.to_string();
        let values = entry["embedding"].as_array()?.iter().map(serde_json::Value::as_f64);
        Some((sentence, values.collect::<Option<Vec<f64>>>()?))
    };
    sentences.iter().map(one).collect::<Option<_>>().ok_or_else(|| named(&"an entry is not understood"))
}

/// Returns each rank's embeddings of all sentences and its peak memory.
fn embed<T: Element>(
    args: &Args,
    checkpoint: &Checkpoint,
    tokens: &[Vec<u32>],
) -> Result<Vec<(Vec<Vec<f64>>, usize)>> {
    let ModelConfig::Bert(config) = ModelConfig::parse(CONFIG).expect("CONFIG is valid") else {
        unreachable!("CONFIG's model type is bert");
    };
    let (features, heads) = (config.block.attention.hidden, config.block.attention.heads);
    checkpoint::check_ranks("sentence_embedding", args.ranks, heads)?;
    launch::threads(args.ranks, |group| {
        let encoder = Bert::<Replicated, T, Cpu>::load(&group, checkpoint, &config)?;
        let width = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        let (ids, sequences) = if args.packed {
            (tokens.to_vec(), Sequences::packed(lengths.iter().copied()))
        } else {
            let mut padded = tokens.to_vec();
            padded.iter_mut().for_each(|ids| ids.resize(width, 0));
            (padded, Sequences::padded(&lengths, width)?)
        };
        let hidden = encoder.infer(&ids.concat(), None, sequences.clone())?;
        let hidden = hidden.into_local().to_vec()?;
        let mean = |(rows, length): (std::ops::Range<usize>, usize)| {
            let mut mean = vec![0.0; features];
            for row in rows.take(length) {
                for (sum, value) in mean.iter_mut().zip(&hidden[row * features..]) {
                    *sum += value.to_f64() / length as f64;
                }
            }
            let norm = mean.iter().map(|value| value * value).sum::<f64>().sqrt();
            mean.iter().map(|value| value / norm).collect()
        };
        let embeddings = sequences.iter().zip(lengths).map(mean).collect();
        Ok((embeddings, group.device().memory().peak))
    })
}
