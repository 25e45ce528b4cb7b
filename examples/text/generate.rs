//! Continues a prompt with a language model in a Hugging Face format, sharded over any number of
//! ranks.
//!
//! ```text
//! cargo run --release -p text-examples --bin generate -- \
//!     FOLDER --prompt "Once upon a time" --ranks 2
//! ```
//!
//! The folder has config.json, tokenizer.json and model.safetensors (or several files with their
//! index), as on the Hugging Face Hub. Llama, Mistral, Ministral, Qwen2, Qwen3 and GPT-2 can be
//! read. Each rank reads only its shard of each tensor. At temperature 0 the text does not depend
//! on the number of ranks, unless the logits of two tokens differ only by rounding.
//!
//! The example applies no chat template. The prompt for a chat model must contain its template.

mod checkpoint;

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use shardwise::{
    Error, Result,
    comm::Group,
    device::{Cpu, Device, Element},
    launch,
    models::{Decoder, DecoderConfig, ModelConfig},
    ops::{RopeConfig, RopeScaling},
    parallel::{DTensor, KvCache, Sampler},
    shard::{Replicated, Shard},
    weights::Checkpoint,
};
use std::{
    io::Write,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};
use tokenizers::Tokenizer;

/// Continues a prompt.
#[derive(Parser, Debug)]
struct Args {
    /// The checkpoint's folder.
    model: PathBuf,
    /// The prompt.
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// The number of tensor-parallel ranks, at most the model's number of query heads.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// The element type of weights, activations and cache.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// The largest number of tokens to write. The text may get worse beyond the length that the
    /// model was trained on.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// The sampling temperature. Temperature 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// The largest number of candidates for a token (top-k).
    #[arg(long)]
    top_k: Option<usize>,
    /// The smallest total probability of the candidates (top-p).
    #[arg(long)]
    top_p: Option<f64>,
    /// The seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The number of prompt tokens that one step reads.
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
        return Err(fail("the model is not a decoder, so it cannot continue a text"));
    };
    checkpoint::check_ranks("generate", args.ranks, config.block.attention.heads)?;
    if args.chunk == 0 {
        return Err(fail("--chunk is 0, but a step reads at least one token"));
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = checkpoint::tokenizer(&args.model).map_err(fail)?;
    let prompt = tokenizer.encode(args.prompt.as_str(), true).map_err(fail)?.get_ids().to_vec();
    if prompt.is_empty() {
        return Err(fail("the prompt has no tokens, and the tokenizer adds none"));
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
    let Written { tokens, stopped, loading, reading, writing, .. } = &ranks[0];
    let rate = |count: usize, time: &Duration| count as f64 / time.as_secs_f64().max(1e-9);
    let memory: Vec<String> =
        ranks.iter().map(|rank| format!("{:.1}", rank.peak as f64 / (1 << 20) as f64)).collect();
    eprintln!(
        "\n\n{} ranks, {:?}: loaded in {loading:.0?}; read {} tokens at {:.0} a second; wrote {} at {:.0} a second, up to \
         {stopped}; peak MiB a rank: {}",
        args.ranks,
        args.dtype,
        prompt.len(),
        rate(prompt.len(), reading),
        tokens.len(),
        rate(tokens.len().saturating_sub(1), writing),
        memory.join(" ")
    );
    if tokens.is_empty() && args.tokens > 0 {
        eprintln!(
            "note: the model ended the text at once; if it was trained to answer, it needs its chat template"
        );
    }
    let length = prompt.len() + tokens.len();
    if let (None, Some(context)) = (config.positions, config.context.filter(|context| length > *context)) {
        eprintln!("note: {length} tokens are more than the {context} that the model was made for");
    }
    Ok(())
}

/// Returns the factor and trained length of dynamic NTK, or `None` if no layer uses this scaling.
fn dynamic(config: &DecoderConfig) -> Option<(f64, usize)> {
    config.layers.iter().find_map(|layer| match layer.rope {
        Some(RopeConfig { scaling: RopeScaling::DynamicNtk { factor, trained }, .. }) => {
            Some((factor, trained))
        }
        _ => None,
    })
}

struct Task<'a> {
    args: &'a Args,
    config: &'a DecoderConfig,
    checkpoint: &'a Checkpoint,
    tokenizer: &'a Tokenizer,
    prompt: &'a [u32],
}

/// One rank's result.
struct Written {
    tokens: Vec<u32>,
    /// The reason why the text ends here.
    stopped: String,
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
        // With learned positions the text ends at the last position. Otherwise the loop below reads
        // the text into a larger cache when this one is full.
        let room = prompt.len().saturating_add(args.tokens);
        let room = config.positions.map_or(room, |positions| room.min(positions.max(prompt.len())));
        let made_for = match dynamic(config) {
            Some((factor, trained)) => (factor * trained as f64) as usize,
            None => config.context.unwrap_or(0),
        };
        let mut cache = model.cache(1, room.min(made_for.max(prompt.len())))?;
        let (loading, start) = (start.elapsed(), Instant::now());

        let mut printed =
            Printer { tokenizer: self.tokenizer, ids: prompt.to_vec(), shown: 0, on: world.rank() == 0 };
        printed.show()?;
        let mut logits = self.read(&model, prompt, &mut cache)?;
        let (reading, start) = (start.elapsed(), Instant::now());

        let mut tokens = Vec::new();
        let stopped = loop {
            if tokens.len() == args.tokens {
                break format!("--tokens {}", args.tokens);
            }
            let token = sampler.sample(&logits, &[cache.len(0) as u64])?[0];
            if config.ends.contains(&token) {
                break format!("the token {token}, which ends a text");
            }
            tokens.push(token);
            printed.ids.push(token);
            printed.show()?;
            if tokens.len() == args.tokens {
                continue;
            }
            let text = &printed.ids;
            if text.len() > room {
                break format!("the model's {room} positions");
            }
            if cache.len(0) == cache.capacity() {
                cache = model.cache(1, room.min(2 * text.len()))?;
                logits = self.read(&model, text, &mut cache)?;
            } else {
                logits = model.step(&[token], &[0], &[1], &mut cache)?;
            }
        };
        let peak = world.device().memory().peak;
        Ok(Written { tokens, stopped, loading, reading, writing: start.elapsed(), peak })
    }

    /// Reads a text into an empty cache in chunks. Returns the logits of the next token.
    fn read<T: Element>(
        &self,
        model: &Decoder<Replicated, T, Cpu>,
        text: &[u32],
        cache: &mut KvCache<T, Cpu>,
    ) -> Result<DTensor<Shard<1>, T, Cpu>> {
        // Dynamic NTK's rotation depends on the length of the whole text, so the text is read at
        // once.
        let chunk = if dynamic(self.config).is_some() { text.len() } else { self.args.chunk };
        let (first, rest) = text.split_at(chunk.min(text.len()));
        let mut logits = model.step(first, &[0], &[first.len()], cache)?;
        for ids in rest.chunks(chunk) {
            logits = model.step(ids, &[0], &[ids.len()], cache)?;
        }
        Ok(logits)
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
        // The bytes of one character may come from several tokens. The character is printed when
        // the last of its bytes is known.
        if let (false, Some(new)) = (text.ends_with('\u{fffd}'), text.get(self.shown..)) {
            print!("{new}");
            std::io::stdout().flush().map_err(fail)?;
            self.shown = text.len();
        }
        Ok(())
    }
}
