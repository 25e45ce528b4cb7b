//! Trains a small character-level GPT on Shakespeare over a mesh of ranks: data, pipeline and
//! tensor parallel.
//!
//! `cargo run --release -p text-examples --bin train_text -- --tp 2` reaches a validation loss
//! below 2 nats per character in a few minutes on two cores. It writes the loss curve (`loss.png`),
//! its values (`loss.csv`), the weights (`model.safetensors`), and at the end a sample of text.
//! `--compare` trains on several meshes, and fails if their losses in the first 100 steps differ by
//! more than rounding.

mod model;
mod output;

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use model::{Batch, Config, Gpt};
use shardwise::{
    Error, Result,
    comm::DeviceMesh,
    device::Element,
    launch::{self, Threads},
    models::Decoder,
    optim::{AdamW, AdamWConfig, Decay, LearningRate, LossScale, clip_scale, require_finite},
    parallel::{ResidualStream, Sampler},
    plan::{Plan, Strategy},
    reference::worst,
    rng::Philox,
    shard::{Axis, Mesh, Reduction, Replicated, Shard},
    tensor::Random,
    train::{Schedule, check_replicas},
    weights::{self, Checkpoint},
};
use std::{num::NonZeroUsize, path::PathBuf, time::Instant};

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

/// A character-level GPT on a mesh of dp x pp x tp thread ranks.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The number of replicas, which see different samples (data parallelism).
    #[arg(long, default_value_t = 1)]
    dp: usize,
    /// The number of pipeline stages.
    #[arg(long, default_value_t = 1)]
    pp: usize,
    /// The number of ranks that share every operator (tensor parallelism).
    #[arg(long, default_value_t = 2)]
    tp: usize,
    /// Shard the tokens over the tensor-parallel ranks between the operators (sequence
    /// parallelism).
    #[arg(long)]
    sequence_parallel: bool,
    /// Split every sum into this many blocks, so that the bits of the loss do not depend on `--tp`.
    #[arg(long)]
    invariant: Option<usize>,
    /// The element type of the weights and activations.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    #[arg(long, default_value_t = 700)]
    steps: u64,
    /// The number of sequences in a batch, over all replicas.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// The number of microbatches of each replica.
    #[arg(long)]
    microbatches: Option<usize>,
    /// The number of model chunks on each stage: 1F1B with 1, interleaved with more.
    #[arg(long, default_value_t = 1)]
    chunks: usize,
    /// The number of characters in a sequence.
    #[arg(long, default_value_t = 64)]
    context: usize,
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// The number of leading blocks that keep only their input, and recompute their forward in the
    /// backward.
    #[arg(long, default_value_t = 0)]
    recompute: usize,
    /// Take the mesh, the schedule, sequence parallelism, recomputed blocks and threads from a plan
    /// of `shardwise plan --save`.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "dp", "pp", "tp", "sequence_parallel", "microbatches", "chunks", "recompute", "threads", "compare",
    ])]
    plan: Option<PathBuf>,
    /// The threads with which each rank computes matrix products.
    #[arg(long, default_value_t = NonZeroUsize::MIN)]
    threads: NonZeroUsize,
    /// The highest learning rate.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The number of steps between validations.
    #[arg(long, default_value_t = 100)]
    every: u64,
    /// Train on one device and on meshes of two ranks along each axis, and compare the curves.
    #[arg(long)]
    compare: bool,
    /// The text file.
    #[arg(long, default_value = "examples/text/data/tinyshakespeare.txt")]
    text: PathBuf,
    /// The folder for the curve and the weights.
    #[arg(long, default_value = "target/train_text")]
    out: PathBuf,
}

impl Args {
    /// Replaces the arguments by those of the plan, if there is one.
    fn planned(self) -> Result<Self> {
        let Some(path) = &self.plan else { return Ok(self) };
        let Plan { strategy: plan, threads, .. } = Plan::read(path)?;
        let Strategy { data, microbatches, sequences, .. } = plan;
        let own = self.batch.div_ceil(data.saturating_mul(microbatches));
        if own != sequences {
            let reason = format!(
                "--batch {} has microbatches of {own} sequences on {data} replicas with {microbatches} microbatches, \
                 but those of the plan have {sequences}",
                self.batch
            );
            return Err(Error::Invalid { op: "train_text", reason });
        }
        Ok(Self {
            dp: data,
            pp: plan.pipeline,
            tp: plan.tensor,
            chunks: plan.chunks,
            microbatches: Some(microbatches),
            recompute: plan.recomputed,
            sequence_parallel: plan.sequence_parallel,
            threads: NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN),
            ..self
        })
    }
}

/// A text as token ids. The last tenth is for validation.
struct Text {
    characters: Vec<char>,
    tokens: Vec<u32>,
    train: usize,
}

impl Text {
    fn read(path: &PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(&*path, &error))?;
        let mut characters: Vec<char> = text.chars().collect();
        characters.sort_unstable();
        characters.dedup();
        let number = |character: char| characters.binary_search(&character).map_or(0, |at| at as u32);
        let tokens: Vec<u32> = text.chars().map(number).collect();
        Ok(Self { train: tokens.len() / 10 * 9, tokens, characters })
    }

    /// Draws sequences that begin at random positions in the range `part` of the text.
    fn batch(
        &self,
        part: std::ops::Range<usize>,
        sequences: usize,
        context: usize,
        random: Philox,
    ) -> Result<Batch> {
        if part.len() <= context + 1 {
            let reason =
                format!("a text of {} characters is too short for sequences of {context}", part.len());
            return Err(Error::Invalid { op: "train_text", reason });
        }
        let start = |at: u64| part.start + (random.uniform(at) * (part.len() - context - 1) as f64) as usize;
        let mut batch = Batch { length: context, ..Batch::default() };
        for at in 0..sequences as u64 {
            let start = start(at);
            batch.tokens.extend(&self.tokens[start..start + context]);
            batch.targets.extend(&self.tokens[start + 1..start + context + 1]);
        }
        Ok(batch)
    }

    fn train(&self, args: &Args, step: u64) -> Result<Batch> {
        self.batch(
            0..self.train,
            args.batch,
            args.context,
            Philox::named(args.seed, "batches").substream(step),
        )
    }

    fn validation(&self, args: &Args) -> Result<Batch> {
        let sequences = 4 * args.batch;
        self.batch(
            self.train..self.tokens.len(),
            sequences,
            args.context,
            Philox::named(args.seed, "validation"),
        )
    }
}

/// The results of a training run.
struct Trained {
    /// Each step with its training loss.
    curve: Vec<(u64, f64)>,
    /// Each validated step with its validation loss.
    validation: Vec<(u64, f64)>,
}

fn config(args: &Args, text: &Text) -> Config {
    let Args { context, hidden, heads, layers, dropout, recompute: recomputed, .. } = *args;
    Config {
        vocabulary: text.characters.len(),
        context,
        hidden,
        heads,
        ffn: 4 * hidden,
        layers,
        dropout,
        recomputed,
    }
}

fn schedule(args: &Args) -> Result<Schedule> {
    let microbatches = args.microbatches.unwrap_or(if args.pp > 1 { 2 * args.pp } else { 1 });
    match args.chunks {
        1 => Ok(Schedule::one_forward_one_backward(args.pp, microbatches)),
        chunks => Schedule::interleaved(args.pp, chunks, microbatches),
    }
}

/// Trains on a mesh and saves the model. Only rank 0 shows progress.
fn train<S: ResidualStream, T: Element>(args: &Args, text: &Text) -> Result<Trained> {
    let rate = LearningRate::constant(args.lr).with_warmup(args.steps / 20).with_decay(
        Decay::Cosine,
        args.lr / 10.0,
        args.steps,
    );
    let threads = Threads::new(args.dp * args.pp * args.tp).gemm_threads(args.threads);
    let mut ranks = threads.run(|world| {
        let reduction = args.invariant.map_or(Reduction::Fast, |blocks| Reduction::Invariant { blocks });
        let world = world.with_reduction(reduction);
        let mesh = DeviceMesh::new(&world, Mesh::new(args.dp, args.pp, args.tp)?)?;
        let source = Random::normal(args.seed, 0.02);
        let model = Gpt::<S, T>::load(&mesh, &source, &config(args, text), schedule(args)?)?;
        let mut adamw = AdamW::new(AdamWConfig::default().with_beta2(0.99).with_weight_decay(0.1));
        // Only f16 needs a loss scale.
        let mut scale = match args.dtype {
            Dtype::F16 => LossScale::default(),
            _ => LossScale::new(1.0, u32::MAX)?,
        };
        let bar = match world.rank() {
            0 => ProgressBar::new(args.steps),
            _ => ProgressBar::hidden(),
        };
        let style = "{bar:30} {pos}/{len} {msg} ({elapsed} of {duration})";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (mut curve, mut validation) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for step in 0..=args.steps {
            if step % args.every == 0 || step == args.steps {
                let loss = model.loss(&text.validation(args)?)?;
                validation.push((step, loss));
                if world.rank() == 0 {
                    bar.suspend(|| println!("step {step}: validation loss {loss:.4}"));
                }
                // Replicated values must be equal on all ranks.
                for axis in [Axis::Data, Axis::Tensor] {
                    check_replicas(&model.params(), mesh.group(axis))?;
                }
            }
            if step == args.steps {
                break;
            }
            let batch = text.train(args, step)?;
            let (loss, norm) = model.gradients(&batch, step, scale.scale())?;
            let undo = 1.0 / scale.scale();
            if scale.update(norm) {
                adamw.step(&model.params(), rate.at(step), undo * clip_scale(norm * undo, 1.0)?)?;
            } else if args.dtype != Dtype::F16 {
                require_finite(norm)?;
            }
            curve.push((step, loss));
            let rate = (step + 1) as f64 * batch.tokens.len() as f64 / start.elapsed().as_secs_f64();
            bar.set_message(format!("loss {loss:.3}, {rate:.0} tokens/s"));
            bar.inc(1);
        }
        bar.finish();
        // All replicas hold the same parameters, so only the ranks of the first replica save them.
        let number = mesh.group(Axis::Data).rank();
        let replica = world.split_all(number as u64)?;
        if number == 0 {
            weights::save(&replica, &model.params(), &args.out)?;
        }
        Ok(Trained { curve, validation })
    })?;
    Ok(ranks.swap_remove(0))
}

fn dispatch(args: &Args, text: &Text) -> Result<Trained> {
    match (args.dtype, args.sequence_parallel) {
        (Dtype::F64, false) => train::<Replicated, f64>(args, text),
        (Dtype::F32, false) => train::<Replicated, f32>(args, text),
        (Dtype::Bf16, false) => train::<Replicated, bf16>(args, text),
        (Dtype::F16, false) => train::<Replicated, f16>(args, text),
        (Dtype::F64, true) => train::<Shard<0>, f64>(args, text),
        (Dtype::F32, true) => train::<Shard<0>, f32>(args, text),
        (Dtype::Bf16, true) => train::<Shard<0>, bf16>(args, text),
        (Dtype::F16, true) => train::<Shard<0>, f16>(args, text),
    }
}

/// Samples text from the saved model on one device in f32, whatever mesh the model was trained on.
fn sample(args: &Args, text: &Text, length: usize) -> Result<String> {
    let checkpoint = Checkpoint::open(&args.out)?;
    let mut all = launch::threads(1, |world| {
        let config = config(args, text).decoder();
        let model = Decoder::<Replicated, f32, _>::load(&world, &checkpoint, &config)?;
        let (sampler, mut cache) = (
            Sampler { temperature: 0.8, seed: args.seed, ..Sampler::greedy() },
            model.cache(1, args.context)?,
        );
        // The sample begins with a newline, as each speech of the text does.
        let mut tokens = vec![text.characters.binary_search(&'\n').unwrap_or(0) as u32];
        for at in 0..length {
            // Learned positions end at the context length. When the cache has this many tokens, it
            // is emptied, and the last half of the context is read again.
            let seen = if cache.len(0) < args.context {
                &tokens[at..]
            } else {
                cache.truncate(0, 0)?;
                &tokens[tokens.len() - args.context.div_ceil(2)..]
            };
            let logits = model.step(seen, &[0], &[seen.len()], &mut cache)?;
            tokens.extend(sampler.sample(&logits, &[at as u64])?);
        }
        Ok(tokens.iter().map(|&token| text.characters[token as usize]).collect::<String>())
    })?;
    Ok(all.swap_remove(0))
}

/// The number of steps whose losses are compared. Rounding differences grow with every step.
const COMPARED: u64 = 100;

/// Returns the largest allowed difference between the losses of two meshes in the first
/// [`COMPARED`] steps. With a small model, rounding alone gave 5e-15 in f64, 8e-7 in f32, 1e-2 in
/// bf16 and 1e-3 in f16.
fn bound(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F64 => 1e-11,
        Dtype::F32 => 1e-3,
        Dtype::Bf16 => 0.1,
        Dtype::F16 => 0.02,
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse().planned()?;
    let text = Text::read(&args.text)?;
    std::fs::create_dir_all(&args.out)?;
    println!("{} characters of {} kinds", text.tokens.len(), text.characters.len());
    let meshes = if args.compare {
        vec![(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
    } else {
        vec![(args.dp, args.pp, args.tp)]
    };
    let mut runs = Vec::new();
    for (dp, pp, tp) in meshes {
        let args = Args { dp, pp, tp, ..args.clone() };
        let mesh = format!("dp {dp}, pp {pp}, tp {tp}");
        println!("{mesh}, {:?}", args.dtype);
        // An invariant curve does not depend on the mesh, so its name leaves the mesh out.
        let name = args.invariant.map_or(mesh, |blocks| format!("{blocks} blocks"));
        let start = Instant::now();
        let trained = dispatch(&args, &text)?;
        let last = trained.validation.last().map_or(f64::NAN, |(_, loss)| *loss);
        println!("validation loss {last:.4} after {} steps, {:.1?}", args.steps, start.elapsed());
        runs.push((name, trained));
    }
    let losses = |run: &Trained, steps: u64| -> Vec<f64> {
        let all = [&run.curve[..], &run.validation].concat().into_iter();
        all.filter(|(step, _)| *step <= steps).map(|(_, loss)| loss).collect()
    };
    let (bound, mut far) = (bound(args.dtype), Vec::new());
    for (name, run) in &runs[1..] {
        let of = |steps| worst(&losses(run, steps), &losses(&runs[0].1, steps));
        let (first, all) = (of(COMPARED), of(u64::MAX));
        let one = &runs[0].0;
        println!(
            "{name}: a loss differs from {one}'s by at most {first:.1e} in {COMPARED} steps, {all:.1e} in all"
        );
        if first > bound {
            far.push(name.as_str());
        }
    }
    output::plot(&args.out.join("loss.png"), &runs)?;
    output::table(&args.out.join("loss.csv"), &runs)?;
    println!("wrote loss.png, loss.csv and model.safetensors to {}", args.out.display());
    if !far.is_empty() {
        let far = far.join("; ");
        let reason = format!("more than {bound:.1e} from one device's losses in {COMPARED} steps: {far}");
        return Err(Error::Invalid { op: "train_text", reason }.into());
    }
    println!("{}", sample(&args, &text, 300)?);
    Ok(())
}
