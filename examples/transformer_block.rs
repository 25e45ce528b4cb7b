//! Runs a transformer block on N ranks and on one device. Compares the results, counts the elements
//! that the collectives move, and times both.
//!
//! `cargo run --release --example transformer_block -- --ranks 3 --heads 8 --kv-heads 2 --gated`

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, Op, Transfer},
    device::{Cpu, DType, Element, Meta},
    kernels::{Activation, AttentionChoices, Backend, Format, NormKind},
    launch,
    parallel::{
        AttentionConfig, BlockConfig, DTensor, Layer, NormPlacement, ResidualStream, TransformerBlock,
    },
    reference::worst,
    rng::Philox,
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{ParamRegion, Random, Weights},
    weights::Quantization,
};
use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Runs a transformer block forward and backward on N thread ranks and on one rank, and compares
/// the results.
#[derive(Parser, Debug)]
struct Args {
    /// The number of tensor-parallel ranks.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Sequences in the batch.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Features of the residual stream.
    #[arg(long, default_value_t = 768)]
    hidden: usize,
    /// Query heads.
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Key/value heads. The default is the number of query heads.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Features of a head. The default is hidden / heads.
    #[arg(long)]
    head_dim: Option<usize>,
    /// Features of the feed-forward layer.
    #[arg(long, default_value_t = 3072)]
    ffn: usize,
    /// The device of the ranks. With `cuda` each rank gets a GPU, and NCCL connects them. If there
    /// are fewer GPUs than ranks, the ranks share GPUs and exchange data through the host.
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
    /// The element type of weights and activations.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Llama's block: RMSNorm, SwiGLU, no biases. Otherwise GPT-2's: LayerNorm, GELU, biases.
    #[arg(long)]
    gated: bool,
    /// Normalize after the residual sums, as BERT does.
    #[arg(long)]
    post_norm: bool,
    /// Let tokens attend to later tokens.
    #[arg(long)]
    bidirectional: bool,
    /// Shard the residual stream by tokens.
    #[arg(long)]
    sequence_parallel: bool,
    /// Quantize the weights, and the activations of each product. Ranks then sum by canonical
    /// blocks, so that all ranks have the bits of one device.
    #[arg(long, value_enum)]
    quantize: Option<Quantize>,
    /// The number of timed repetitions, of which the example reports the median.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
enum On {
    Cpu,
    Cuda,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Quantize {
    /// 8 bits, with a scale for 32 weights.
    Int8,
    /// 4 bits, with a scale and a minimum for 32 weights.
    Int4,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let compared = match args.device {
        _ if args.quantize.is_some() && args.dtype == Dtype::F64 => Err(Error::Invalid {
            op: "transformer_block",
            reason: "--quantize rounds activations to 8 bits, which have no precision of f64".into(),
        }),
        On::Cpu => with_element(&args, |world| Ok(world.clone())),
        On::Cuda => on_cuda(&args),
    };
    if let Err(error) = compared {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Moves a rank's group to its device.
type Place<B> = fn(&Group<Cpu>) -> Result<Group<B>>;

fn with_element<B: Backend>(args: &Args, place: Place<B>) -> Result<()> {
    match args.dtype {
        Dtype::F64 => compare::<f64, B>(args, place),
        Dtype::F32 => compare::<f32, B>(args, place),
        Dtype::Bf16 => compare::<bf16, B>(args, place),
        Dtype::F16 => compare::<f16, B>(args, place),
    }
}

#[cfg(feature = "nccl")]
fn on_cuda(args: &Args) -> Result<()> {
    use shardwise::{comm::nccl::Options, device::Cuda};
    with_element(args, |world| {
        let gpus = Cuda::count()?.max(1);
        let cuda = Cuda::new(world.rank() % gpus)?;
        if world.size() <= gpus {
            world.over_nccl(&cuda, Options::default())
        } else {
            Ok(world.staged(&cuda))
        }
    })
}

#[cfg(not(feature = "nccl"))]
fn on_cuda(_: &Args) -> Result<()> {
    Err(Error::Unsupported {
        op: "transformer_block",
        reason: "it was built without the feature nccl".into(),
    })
}

/// One rank's results.
struct Report {
    /// y, dx, and the gradients of the rank's regions of the model's tensors, in f64.
    y: Vec<f64>,
    dx: Vec<f64>,
    grads: Vec<(ParamRegion, Vec<f64>)>,
    /// The rank's recorded transfers, forward and backward.
    recorded: [Vec<Transfer>; 2],
    /// The transfers of the plan.
    planned: [Vec<Transfer>; 2],
    parameters: usize,
    peak: usize,
    forward: Duration,
    step: Duration,
}

fn compare<T: Element, B: Backend>(args: &Args, place: Place<B>) -> Result<()> {
    let config = config(args)?;
    let sharded = if args.sequence_parallel {
        run::<Shard<0>, T, B>(args, &config, args.ranks, place)?
    } else {
        run::<Replicated, T, B>(args, &config, args.ranks, place)?
    };
    let one = run::<Replicated, T, B>(args, &config, 1, place)?;
    let (reports, one) = (sharded, &one[0]);

    let attention = &config.attention;
    println!(
        "{} block, {} x {} tokens, hidden {}, {} query and {} key/value heads of {}, ffn {}, {}",
        if args.gated { "Llama" } else { "GPT-2" },
        args.batch,
        args.tokens,
        attention.hidden,
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        config.ffn,
        T::DTYPE
    );
    let stream = if args.sequence_parallel { "sharded by tokens" } else { "replicated" };
    println!("{} ranks, residual stream {stream}\n", args.ranks);

    println!(
        "largest difference from one device, relative to the tensor's largest number (ε = {:.1e})",
        T::EPSILON
    );
    // With sequence parallelism a rank has its shard of the tokens, otherwise all tokens.
    let join =
        |part: fn(&Report) -> &Vec<f64>| -> Vec<f64> { reports.iter().flat_map(part).copied().collect() };
    let copies = if args.sequence_parallel { 1 } else { args.ranks };
    let mut all = 0.0_f64;
    let largest = |values: &[f64]| worst(values, &vec![0.0; values.len()]);
    let mut line = |name: &str, got: &[f64], want: &[f64], scale: f64| {
        let error = worst(got, want);
        let relative = if scale > 0.0 && scale.is_finite() { error / scale } else { error };
        println!("  {name:<22} {relative:9.2e}");
        all = all.max(relative);
    };
    line("y", &join(|report| &report.y), &one.y.repeat(copies), largest(&one.y));
    line("dx", &join(|report| &report.dx), &one.dx.repeat(copies), largest(&one.dx));
    let (got, want) = (whole(&reports), whole(std::slice::from_ref(one)));
    if !got.keys().eq(want.keys()) {
        let reason =
            format!("the ranks have gradients of {:?}, but one device has {:?}", got.keys(), want.keys());
        return Err(Error::Invalid { op: "transformer_block", reason });
    }
    for (name, values) in &want {
        // k's bias adds the same number to all scores of a query, which does not change their
        // softmax. So the gradient of k's bias is 0, and the computed gradient is rounding error.
        // It is compared with the size of q's gradient.
        let like = if name == "attention.k.bias" { "attention.q.bias" } else { name };
        line(&format!("d {name}"), &got[name], values, largest(&want[like]));
    }

    println!("\ncollectives of one step (bytes a rank sends at least)");
    for (title, recorded) in ["forward", "backward"].into_iter().zip(&reports[0].recorded) {
        for (op, (count, bytes)) in totals(recorded, args.ranks) {
            println!("  {title:<9} {count} x {:<15} {bytes:>12}", op.name());
        }
    }
    for (rank, Report { planned, recorded, .. }) in reports.iter().enumerate() {
        if planned != recorded {
            let reason = format!("rank {rank} planned {planned:?}, recorded {recorded:?}");
            return Err(Error::Invalid { op: "transformer_block", reason });
        }
    }
    println!("  planned = recorded on every rank");

    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    println!("\nper rank       parameters   peak memory");
    for (rank, report) in reports.iter().enumerate() {
        println!("  rank {rank:<3} {:>12} {:>9.1} MiB", report.parameters, mib(report.peak));
    }
    println!("  one device{:>11} {:>9.1} MiB", one.parameters, mib(one.peak));

    println!("\n                  one device    {} ranks   efficiency", args.ranks);
    let slowest = |part: fn(&Report) -> Duration| reports.iter().map(part).max().unwrap_or_default();
    for (name, ours, theirs) in [
        ("forward", slowest(|report| report.forward), one.forward),
        ("forward+backward", slowest(|report| report.step), one.step),
    ] {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let efficiency = ms(theirs) / (ms(ours) * args.ranks as f64) * 100.0;
        println!("  {name:<16} {:>8.2} ms {:>8.2} ms {efficiency:>9.0} %", ms(theirs), ms(ours));
    }
    // A block's numbers pass through about ten roundings (see tests/suite/block.rs).
    let (bound, name) = if args.quantize.is_some() { (0.0, "0") } else { (64.0 * T::EPSILON, "64 ε") };
    println!("\nlargest of all differences: {all:.2e} (bound {name} = {bound:.1e})");
    if all > bound {
        return Err(Error::Invalid {
            op: "transformer_block",
            reason: "the results of the ranks and of one device differ".into(),
        });
    }
    Ok(())
}

fn config(args: &Args) -> Result<BlockConfig> {
    let head_dim = args.head_dim.unwrap_or(args.hidden / args.heads.max(1));
    let eps = 1e-5;
    let norm = if args.gated { NormKind::RmsNorm { eps } } else { NormKind::LayerNorm { eps } };
    Ok(BlockConfig::new(
        AttentionConfig::new(args.hidden, args.heads)
            .with_kv_heads(args.kv_heads.unwrap_or(args.heads))
            .with_head_dim(head_dim)
            .with_choices(AttentionChoices { causal: !args.bidirectional, ..AttentionChoices::default() })
            .with_qkv_bias(!args.gated)
            .with_out_bias(!args.gated),
        args.ffn,
        if args.gated { Activation::Silu } else { Activation::GeluTanh },
        norm,
    )
    .with_gate(args.gated)
    .with_mlp_bias(!args.gated)
    .with_placement(if args.post_norm { NormPlacement::Post } else { NormPlacement::Pre }))
}

fn run<S: ResidualStream, T: Element, B: Backend>(
    args: &Args,
    config: &BlockConfig,
    ranks: usize,
    place: Place<B>,
) -> Result<Vec<Report>> {
    launch::threads(ranks, |host| rank::<S, T, B>(args, config, &place(&host)?))
}

fn load<S: ResidualStream, T: Element, B: Backend>(
    args: &Args,
    config: &BlockConfig,
    group: &Group<B>,
) -> Result<TransformerBlock<S, T, B>> {
    let source = Random::normal(1, 1.0 / (args.hidden as f64).sqrt());
    match args.quantize {
        None => TransformerBlock::load(group, &Weights::new(&source), config),
        Some(bits) => {
            let format = if bits == Quantize::Int8 { Format::Q8_0 } else { Format::Q4_1 };
            let source = Quantization::new(&source, format)?;
            TransformerBlock::load(group, &Weights::new(&source), config)
        }
    }
}

/// Returns the group with the reduction of the example.
fn summing<B: Backend>(args: &Args, group: &Group<B>) -> Group<B> {
    match args.quantize {
        None => group.clone(),
        // A sum in another order would be rounded differently, and so quantized differently.
        Some(_) => group.with_reduction(Reduction::Invariant { blocks: args.ranks }),
    }
}

/// Returns this rank's rows of a random `[tokens, hidden]` tensor.
fn random<S: ResidualStream, T: Element, B: Backend>(
    args: &Args,
    group: &Group<B>,
    name: &str,
) -> Result<DTensor<S, T, B>> {
    let (tokens, stream) = (args.batch * args.tokens, Philox::named(2, name));
    let rows = S::local_rows(group, tokens)?;
    let elements = rows.start * args.hidden..rows.end * args.hidden;
    let values: Vec<T> = elements.map(|index| T::from_f64(stream.normal(index as u64))).collect();
    let local = Tensor::from_slice(group.device(), [rows.len(), args.hidden], &values)?;
    S::of_local(group, tokens, local)?.with_sequences(Sequences::packed(vec![args.tokens; args.batch]))
}

/// Derives the transfers of a rank in a step, forward and backward, without data or other ranks.
///
/// The plan runs in bf16 for every element type T, so that it is compiled once. bf16's accumulator
/// is another type, so the plan shows which transfers carry T and which carry its accumulator.
fn plan<S: ResidualStream, T: Element>(
    args: &Args,
    config: &BlockConfig,
    rank: usize,
    ranks: usize,
) -> Result<[Vec<Transfer>; 2]> {
    let in_t = |planned: Transfer| match planned.dtype {
        DType::BF16 => Transfer { dtype: T::DTYPE, ..planned },
        _ => Transfer { dtype: T::Acc::DTYPE, ..planned },
    };
    let steps = plan_in_bf16::<S>(args, config, rank, ranks)?;
    Ok(steps.map(|transfers| transfers.into_iter().map(in_t).collect()))
}

/// Runs the model's code on a planned group.
fn plan_in_bf16<S: ResidualStream>(
    args: &Args,
    config: &BlockConfig,
    rank: usize,
    ranks: usize,
) -> Result<[Vec<Transfer>; 2]> {
    let (group, record) = Group::planned(&Meta::new(), rank, ranks)?;
    let group = summing(args, &group);
    let block = load::<S, bf16, Meta>(args, config, &group)?;
    record.take();
    let (_, saved) = block.forward(random(args, &group, "x")?)?;
    let forward = record.take();
    block.backward(saved, random(args, &group, "dy")?)?;
    Ok([forward, record.take()])
}

fn rank<S: ResidualStream, T: Element, B: Backend>(
    args: &Args,
    config: &BlockConfig,
    world: &Group<B>,
) -> Result<Report> {
    let (group, record) = summing(args, world).recorded();
    let block = load::<S, T, B>(args, config, &group)?;
    let (x, dy) = (random::<S, T, B>(args, &group, "x")?, random::<S, T, B>(args, &group, "dy")?);

    let (mut forwards, mut steps) = (Vec::new(), Vec::new());
    let mut results = None;
    for _ in 0..=args.repeat {
        for param in block.params() {
            param.zero_grad();
        }
        record.take();
        group.barrier()?;
        let start = Instant::now();
        let (y, saved) = block.forward(x.clone())?;
        group.device().synchronize()?;
        forwards.push(start.elapsed());
        let forward = record.take();
        let dx = block.backward(saved, dy.clone())?;
        group.device().synchronize()?;
        steps.push(start.elapsed());
        results = Some((y, dx, [forward, record.take()]));
    }
    let Some((y, dx, recorded)) = results else {
        return Err(Error::Invalid { op: "transformer_block", reason: "no repetition".into() });
    };
    let mut parameters = 0;
    let mut grads = Vec::new();
    for param in block.params() {
        parameters += param.shape().len();
        if param.is_quantized() {
            continue;
        }
        let grad = param.grad().ok_or_else(|| Error::Invalid {
            op: "transformer_block",
            reason: format!("{} has no gradient", param.name()),
        })?;
        let width: usize = grad.shape().dims()[1..].iter().product();
        let values: Vec<f64> = grad.to_vec()?.into_iter().map(Element::to_f64).collect();
        for own in param.regions().iter() {
            let start = own.row * width;
            grads.push((own.clone(), values[start..start + own.region.extent().len()].to_vec()));
        }
    }
    let wide = |tensor: &Tensor<T, B>| -> Result<Vec<f64>> {
        Ok(tensor.to_vec()?.into_iter().map(Element::to_f64).collect())
    };
    Ok(Report {
        y: wide(y.local())?,
        dx: wide(dx.local())?,
        grads,
        recorded,
        planned: plan::<S, T>(args, config, group.rank(), group.size())?,
        parameters,
        peak: group.device().memory().peak,
        forward: median(&mut forwards),
        step: median(&mut steps),
    })
}

/// Returns the median of all times but the first, which warms up. A single time is its own median.
fn median(times: &mut [Duration]) -> Duration {
    let timed = times.len().min(2) - 1;
    let times = &mut times[timed..];
    times.sort_unstable();
    times[times.len() / 2]
}

/// Assembles the gradients of the model's tensors from the ranks' regions. An element that no rank
/// has is NaN.
fn whole(reports: &[Report]) -> BTreeMap<String, Vec<f64>> {
    let mut tensors = BTreeMap::new();
    for (own, values) in reports.iter().flat_map(|report| &report.grads) {
        let tensor = tensors.entry(own.tensor.clone());
        let tensor = tensor.or_insert_with(|| vec![f64::NAN; own.region.shape().len()]);
        for (at, value) in own.region.runs().into_iter().flatten().zip(values) {
            tensor[at] = *value;
        }
    }
    tensors
}

/// Returns how often each operation occurs, and the minimum number of bytes that a rank sends for
/// it.
fn totals(transfers: &[Transfer], ranks: usize) -> BTreeMap<Op, (usize, usize)> {
    let mut totals = BTreeMap::new();
    for transfer in transfers {
        let (count, bytes) = totals.entry(transfer.op).or_insert((0, 0));
        *count += 1;
        *bytes += transfer.wire_bytes(ranks);
    }
    totals
}
