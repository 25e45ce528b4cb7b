//! Writes on from a prompt with a language model of Hugging Face's formats, sharded over any number of ranks.
//!
//! ```text
//! cargo run --release --example generate -- FOLDER --prompt "Once upon a time" --ranks 2
//! ```
//!
//! The folder has config.json, tokenizer.json and model.safetensors (or several files with their index), as the hub has
//! them for Llama, Mistral, Qwen2, Qwen3 and GPT-2. Each rank reads only its part. At temperature 0 the text does not
//! depend on the number of ranks, as long as no two words are equally likely but for rounding.

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use shardwise::{
    Error, Result,
    comm::Group,
    device::{Cpu, Device, Element},
    launch,
    models::{Decoder, DecoderConfig, ModelConfig},
    parallel::Sampler,
    shard::Replicated,
    weights::Checkpoint,
};
use std::{
    io::Write,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};
use tokenizers::Tokenizer;

/// Writes on from a prompt.
#[derive(Parser, Debug)]
struct Args {
    /// The checkpoint's folder.
    model: PathBuf,
    /// Where to begin.
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The number of tensor-parallel ranks, up to the model's heads.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// The element of weights, activations and cache.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// The most tokens to write.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// 0 for the likeliest token each time.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// The most candidates for a token.
    #[arg(long)]
    top_k: Option<usize>,
    /// The share of the probability that candidates have at least.
    #[arg(long)]
    top_p: Option<f64>,
    /// What is drawn is a function of this.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How much of the prompt is read at once.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

fn main() -> ExitCode {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn fail(reason: impl ToString) -> Error {
    Error::Invalid { op: "generate", reason: reason.to_string() }
}

fn run(args: &Args) -> Result<()> {
    let ModelConfig::Decoder(config) = ModelConfig::read(&args.model)? else {
        return Err(fail("the model is not one that writes"));
    };
    let checkpoint = Checkpoint::open(&args.model)?;
    let words = args.model.join("tokenizer.json");
    let tokenizer =
        Tokenizer::from_file(&words).map_err(|error| fail(format!("{}: {error}", words.display())))?;
    let prompt = tokenizer.encode(args.prompt.as_str(), true).map_err(fail)?.get_ids().to_vec();
    if prompt.is_empty() || args.chunk == 0 {
        return Err(fail("nothing to begin with"));
    }
    let task =
        Task { args, config: &config, checkpoint: &checkpoint, tokenizer: &tokenizer, prompt: &prompt };
    let ranks = match args.dtype {
        Dtype::F64 => launch::threads(args.ranks, |world| task.generate::<f64>(&world)),
        Dtype::F32 => launch::threads(args.ranks, |world| task.generate::<f32>(&world)),
        Dtype::Bf16 => launch::threads(args.ranks, |world| task.generate::<bf16>(&world)),
        Dtype::F16 => launch::threads(args.ranks, |world| task.generate::<f16>(&world)),
    }?;
    if ranks.iter().any(|rank| rank.tokens != ranks[0].tokens) {
        return Err(fail("the ranks wrote different texts"));
    }
    let Written { tokens, loading, reading, writing, .. } = &ranks[0];
    let rate = |count: usize, time: &Duration| count as f64 / time.as_secs_f64().max(1e-9);
    let memory: Vec<String> =
        ranks.iter().map(|rank| format!("{:.1}", rank.peak as f64 / (1 << 20) as f64)).collect();
    eprintln!(
        "\n\n{} ranks, {:?}: loaded in {loading:.0?}; read {} tokens at {:.0} a second; wrote {} at {:.0} a second; \
         peak MiB a rank: {}",
        args.ranks,
        args.dtype,
        prompt.len(),
        rate(prompt.len(), reading),
        tokens.len(),
        rate(tokens.len().saturating_sub(1), writing),
        memory.join(" ")
    );
    Ok(())
}

struct Task<'a> {
    args: &'a Args,
    config: &'a DecoderConfig,
    checkpoint: &'a Checkpoint,
    tokenizer: &'a Tokenizer,
    prompt: &'a [u32],
}

/// What a rank has to tell.
struct Written {
    tokens: Vec<u32>,
    loading: Duration,
    reading: Duration,
    writing: Duration,
    peak: usize,
}

impl Task<'_> {
    fn generate<T: Element>(&self, world: &Group<Cpu>) -> Result<Written> {
        let Self { args, config, prompt, .. } = self;
        let sampler =
            Sampler { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
        let start = Instant::now();
        let model = Decoder::<Replicated, T, Cpu>::load(world, self.checkpoint, config)?;
        let room = prompt.len() + args.tokens;
        let room = config.context.map_or(room, |context| room.min(context.max(prompt.len())));
        let mut cache = model.cache(1, room)?;
        let (loading, start) = (start.elapsed(), Instant::now());

        let mut printed =
            Printer { tokenizer: self.tokenizer, ids: prompt.to_vec(), shown: 0, on: world.rank() == 0 };
        printed.show()?;
        let mut logits = None;
        for ids in prompt.chunks(args.chunk) {
            logits = Some(model.step(ids, &[0], &[ids.len()], &mut cache)?);
        }
        let (reading, start) = (start.elapsed(), Instant::now());

        let mut tokens = Vec::new();
        while let Some(scores) = logits.take().filter(|_| tokens.len() < args.tokens) {
            let token = sampler.sample(&scores, &[cache.len(0) as u64])?[0];
            if config.ends.contains(&token) {
                break;
            }
            tokens.push(token);
            printed.ids.push(token);
            printed.show()?;
            if cache.len(0) < cache.capacity() {
                logits = Some(model.step(&[token], &[0], &[1], &mut cache)?);
            }
        }
        let peak = world.device().memory().peak;
        Ok(Written { tokens, loading, reading, writing: start.elapsed(), peak })
    }
}

/// Prints a text as it grows.
struct Printer<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    shown: usize,
    on: bool,
}

impl Printer<'_> {
    fn show(&mut self) -> Result<()> {
        if !self.on {
            return Ok(());
        }
        let text = self.tokenizer.decode(&self.ids, true).map_err(fail)?;
        // A letter of several bytes may come in several tokens.
        if let (false, Some(new)) = (text.ends_with('\u{fffd}'), text.get(self.shown..)) {
            print!("{new}");
            std::io::stdout().flush().map_err(fail)?;
            self.shown = text.len();
        }
        Ok(())
    }
}
