//! A language model in a GGUF file: loading, a prompt, and decoding one token at a time.
//!
//! `cargo bench --bench gguf -- FILE.gguf [--ranks 1,2] [--json FILE]`
//!
//! In each round every case
//!
//! * loads the model alone in a new process. The growth of that process's peak resident memory is
//!   compared with the memory of the loaded weights: more than 1.1 times as much and 64 MiB is an
//!   error.
//! * takes a prompt in one step, and samples a token.
//! * decodes some tokens after a prompt of 64. Each token is sampled from the logits before.
//!
//! The bench reports the median over the rounds. A token reads the weights once, except those of an
//! embedding that is not the head. "GB/s" is the rate of these reads. "of read" is this rate as a
//! share of the rate at which one thread per rank reads from memory, the best of the rounds. (The
//! share may exceed 100 % if the processor's last-level cache holds the weights.)

mod limits;

use clap::{Parser, ValueEnum};
use serde_json::json;
use shardwise::{
    Error, Result,
    comm::Group,
    device::{Cpu, Device},
    kernels::Activations,
    launch::{self, Threads},
    models::{Decoder, DecoderConfig, ModelConfig},
    parallel::{DTensor, Sampler},
    shard::{Replicated, Shard},
    tensor::WeightSource,
    weights::Gguf,
};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

#[derive(Parser)]
struct Args {
    /// The GGUF file of a decoder. Nothing is measured without a file.
    file: Option<PathBuf>,
    /// The numbers of ranks, one case for each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    ranks: Vec<usize>,
    /// The number of rounds. The bench reports the median.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// The tokens that are decoded in a round.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// How products with quantized weights treat their other factor.
    #[arg(long, value_enum, default_value = "int8")]
    activations: Rounding,
    /// Load the quantized matrices as f32.
    #[arg(long)]
    dequantize: bool,
    /// Appends one JSON line per case to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only loads the model on so many ranks. The bench starts itself with this option.
    #[arg(long, hide = true)]
    loading: Option<usize>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Rounding {
    Int8,
    Exact,
}

impl Args {
    fn file(&self) -> Result<&Path> {
        self.file.as_deref().ok_or_else(|| bad("there is no file".into()))
    }
}

/// The cached tokens when decoding begins.
const CACHED: usize = 64;

/// The memory that loading may take in addition to 1.1 times the memory of the weights.
const SLACK: f64 = (64 << 20) as f64;

const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    let args = Args::parse();
    if args.file.is_none() {
        println!("NOT RUN: pass the path of a GGUF file");
        return Ok(());
    }
    if let Some(ranks) = args.loading {
        let (seconds, live, peak) = load_alone(&args, ranks)?;
        println!("{seconds} {live} {}", peak.map_or("-".into(), |peak| peak.to_string()));
        return Ok(());
    }
    let no_case = args.ranks.contains(&0) || args.ranks.is_empty();
    if no_case || args.rounds == 0 || args.prompt == 0 || args.tokens == 0 {
        return Err(bad(
            "ranks, rounds, and the tokens of the prompt and to decode have to be at least 1".into()
        ));
    }
    let (gguf, config) = open(&args)?;
    let sizes = Sizes::of(&gguf, &config)?;
    println!(
        "{}: {} weights, {:.4} bytes a weight; a token reads {:.1} MB",
        args.file()?.display(),
        sizes.weights,
        sizes.bytes / sizes.weights as f64,
        sizes.token / 1e6
    );
    let mut cases = vec![Vec::new(); args.ranks.len()];
    for _ in 0..args.rounds {
        for (ranks, rounds) in args.ranks.iter().zip(&mut cases) {
            let limit = limits::read(*ranks);
            let loading = load_in_process(&args, *ranks)?;
            let speed = speed_of(&gguf, &config, &args, *ranks)?;
            rounds.push(Round { limit, loading, speed });
        }
    }
    println!(
        "{:>5} {:>8} {:>11} {:>10} {:>12} {:>10} {:>10} {:>9} {:>8} {:>9} {:>8}",
        "ranks",
        "load s",
        "peak MiB",
        "held MiB",
        "prompt tok/s",
        "ms a token",
        "sampling",
        "tok/s",
        "GB/s",
        "read GB/s",
        "of read"
    );
    for (ranks, rounds) in args.ranks.iter().zip(&cases) {
        report(&args, &sizes, *ranks, rounds)?;
    }
    Ok(())
}

/// Prints the medians of a case, and writes them as a JSON line.
fn report(args: &Args, sizes: &Sizes, ranks: usize, rounds: &[Round]) -> Result<()> {
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let load = median(&|round| round.loading.seconds);
    let held = median(&|round| round.loading.held);
    let peak = rounds.iter().filter_map(|round| round.loading.peak).reduce(f64::max);
    let prompt = args.prompt as f64 / median(&|round| round.speed.prompt);
    let token = median(&|round| round.speed.token);
    let sampling = median(&|round| round.speed.sampling);
    let rate = sizes.token / token / 1e9;
    let limit = rounds.iter().map(|round| round.limit).fold(0.0, f64::max);
    println!(
        "{ranks:>5} {load:>8.2} {:>11} {:>10.1} {prompt:>12.1} {:>10.3} {:>10.3} {:>9.1} {rate:>8.1} {limit:>9.1} {:>6.0} %",
        peak.map_or("-".into(), |peak| format!("{:.1}", peak / MIB)),
        held / MIB,
        token * 1e3,
        sampling * 1e3,
        1.0 / token,
        rate / limit * 100.0
    );
    let Some(path) = &args.json else { return Ok(()) };
    let line = json!({
        "model": args.file()?.file_stem().map(|name| name.to_string_lossy()),
        "activations": format!("{:?}", args.activations).to_lowercase(),
        "dequantize": args.dequantize,
        "ranks": ranks,
        "load_s": load,
        "peak_bytes": peak,
        "held_bytes": held,
        "bytes_a_weight": sizes.bytes / sizes.weights as f64,
        "token_bytes": sizes.token,
        "prompt_per_s": prompt,
        "token_ms": token * 1e3,
        "sampling_ms": sampling * 1e3,
        "read_gb_s": rate,
        "limit_gb_s": limit,
    });
    let file = fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| writeln!(file, "{line}")).map_err(|error| Error::io(path, &error))
}

fn bad(reason: String) -> Error {
    Error::Invalid { op: "bench", reason }
}

fn open(args: &Args) -> Result<(Gguf, DecoderConfig)> {
    let activations = match args.activations {
        Rounding::Int8 => Activations::Int8,
        Rounding::Exact => Activations::Exact,
    };
    let gguf = Gguf::open(args.file()?)?.with_activations(activations);
    let gguf = if args.dequantize { gguf.dequantized() } else { gguf };
    match ModelConfig::of_gguf(&gguf)? {
        ModelConfig::Decoder(config) => Ok((gguf, config)),
        _ => Err(bad(format!("{}: the model is not a decoder", args.file()?.display()))),
    }
}

/// The sizes of a model's weights in the precision in which the ranks hold them.
struct Sizes {
    weights: usize,
    bytes: f64,
    /// The bytes that a token reads: all but the rows of an embedding that is not the head, and of
    /// learned positions.
    token: f64,
}

impl Sizes {
    fn of(gguf: &Gguf, config: &DecoderConfig) -> Result<Self> {
        let name = |end: &str| format!("{}.{end}.weight", config.names.prefix);
        let looked_up = [(config.tied, name(config.names.embedding)), (false, name(config.names.positions))];
        let mut sizes = Self { weights: 0, bytes: 0.0, token: 0.0 };
        for name in gguf.names() {
            let weights: usize = gguf.shape(name)?.iter().product();
            let a_weight = match gguf.format(name) {
                Some(format) => format.bytes() as f64 / format.weights() as f64,
                None => size_of::<f32>() as f64,
            };
            let bytes = weights as f64 * a_weight;
            sizes.weights += weights;
            sizes.bytes += bytes;
            if !looked_up.iter().any(|(read, table)| !read && table == name) {
                sizes.token += bytes;
            }
        }
        Ok(sizes)
    }
}

#[derive(Clone)]
struct Round {
    /// The rate of reading memory, in GB/s.
    limit: f64,
    loading: Loading,
    speed: Speed,
}

/// What loading takes: seconds, and bytes of all ranks together.
#[derive(Clone)]
struct Loading {
    seconds: f64,
    held: f64,
    /// The growth of the process's resident memory at its peak, where the system reports it.
    peak: Option<f64>,
}

/// Loads the model in a new process. The allocator of a process that has loaded it before may have
/// kept memory, which would hide the growth.
fn load_in_process(args: &Args, ranks: usize) -> Result<Loading> {
    let file = args.file()?;
    let run = || {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(file).arg("--loading").arg(ranks.to_string());
        command.args(args.dequantize.then_some("--dequantize")).output()
    };
    let output = run().map_err(|error| Error::io(file, &error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let words: Vec<_> = text.split_whitespace().map(str::parse::<f64>).collect();
    let (true, [Ok(seconds), Ok(held), peak]) = (output.status.success(), words.as_slice()) else {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(bad(format!("loading on {ranks} ranks: {}", reason.trim())));
    };
    let peak = peak.as_ref().ok().copied();
    let most = 1.1 * held + SLACK;
    if let Some(peak) = peak.filter(|peak| *peak > most) {
        return Err(bad(format!(
            "loading on {ranks} ranks: {:.1} MiB at the peak for {:.1} MiB of weights; at most {:.1} are allowed",
            peak / MIB,
            held / MIB,
            most / MIB
        )));
    }
    Ok(Loading { seconds: *seconds, held: *held, peak })
}

/// Loads the model. Returns the seconds, the bytes that the ranks' devices hold, and the growth of
/// the process's peak resident memory.
fn load_alone(args: &Args, ranks: usize) -> Result<(f64, usize, Option<u64>)> {
    let before = status("VmRSS:");
    let start = Instant::now();
    let (gguf, config) = open(args)?;
    let loaded = launch::threads(ranks, |world| {
        let _model = load(&world, &gguf, &config)?;
        world.barrier()?;
        Ok((start.elapsed().as_secs_f64(), world.device().memory().live))
    })?;
    let peak = before.zip(status("VmHWM:")).map(|(before, peak)| peak.saturating_sub(before));
    if cfg!(target_os = "linux") && peak.is_none() {
        let reason = "/proc/self/status has no VmRSS or VmHWM, so the peak of loading cannot be checked";
        return Err(bad(reason.into()));
    }
    Ok((loaded[0].0, loaded.iter().map(|(_, live)| live).sum(), peak))
}

/// Reads a number of bytes of the process's status on Linux.
fn status(key: &str) -> Option<u64> {
    let status = fs::read_to_string(Path::new("/proc/self/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

type Model = Decoder<Replicated, f32, Cpu>;

fn load(world: &Group<Cpu>, gguf: &Gguf, config: &DecoderConfig) -> Result<Model> {
    Model::load(world, gguf, config)
}

/// Seconds of a prompt, of a decoded token, and of sampling within a token.
#[derive(Clone)]
struct Speed {
    prompt: f64,
    token: f64,
    sampling: f64,
}

fn speed_of(gguf: &Gguf, config: &DecoderConfig, args: &Args, ranks: usize) -> Result<Speed> {
    let ids: Vec<u32> =
        (0..args.prompt.max(CACHED)).map(|at| ((at * 37 + 11) % config.vocabulary) as u32).collect();
    let measured = Threads::new(ranks).run(|world| {
        let model = load(&world, gguf, config)?;
        let mut cache = model.cache(1, args.prompt.max(CACHED + args.tokens))?;
        let mut sampled = Vec::new();
        let mut prompt = f64::NAN;
        // The first step allocates the memory of the second.
        for _ in 0..2 {
            cache.truncate(0, 0)?;
            world.barrier()?;
            let start = Instant::now();
            let logits = model.step(&ids[..args.prompt], &[0], &[args.prompt], &mut cache)?;
            sampled.extend(Sampler::greedy().sample(&logits, &[0])?);
            world.barrier()?;
            prompt = start.elapsed().as_secs_f64();
            check(&logits)?;
        }
        cache.truncate(0, 0)?;
        let first = model.step(&ids[..CACHED], &[0], &[CACHED], &mut cache)?;
        let first = Sampler::greedy().sample(&first, &[0])?;
        let mut decode = |tokens: usize| -> Result<_> {
            cache.truncate(0, CACHED)?;
            let (mut next, mut sampling, mut last) = (first.clone(), 0.0, None);
            world.barrier()?;
            let start = Instant::now();
            for _ in 0..tokens {
                let logits = model.step(&next, &[0], &[1], &mut cache)?;
                let from = Instant::now();
                next = Sampler::greedy().sample(&logits, &[0])?;
                sampling += from.elapsed().as_secs_f64();
                sampled.extend(&next);
                last = Some(logits);
            }
            world.barrier()?;
            let seconds = start.elapsed().as_secs_f64();
            last.iter().try_for_each(check)?;
            Ok((seconds / tokens as f64, sampling / tokens as f64))
        };
        decode(2)?;
        let (token, sampling) = decode(args.tokens)?;
        Ok((Speed { prompt, token, sampling }, sampled))
    })?;
    let (speed, first) = &measured[0];
    match measured.iter().position(|(_, sampled)| sampled != first) {
        None => Ok(speed.clone()),
        Some(rank) => Err(bad(format!("rank {rank} of {ranks} has sampled other tokens than rank 0"))),
    }
}

/// Checks that all logits are finite.
fn check(logits: &DTensor<Shard<1>, f32, Cpu>) -> Result<()> {
    match logits.local().to_vec()?.iter().find(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(logit) => Err(bad(format!("a logit is {logit}"))),
    }
}
