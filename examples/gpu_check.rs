//! Checks whether this machine's GPU can be used. Prints the versions of the libraries, compares
//! every kernel family on the GPU with the same family on the CPU in all four element types, and
//! runs NCCL with one rank.
//!
//! ```text
//! cargo run --release --features nccl --example gpu_check
//! cargo run --release --features nccl --example gpu_check -- --precompile 9.0 --precompile 10.0
//! ```
//!
//! `--precompile` needs NVRTC but no GPU. It fills the kernel cache (`SHARDWISE_CACHE`) for another
//! machine.

use clap::Parser;
use half::{bf16, f16};
use shardwise::{
    Error, Result, Tensor,
    comm::{ReduceOp, nccl},
    device::{Cpu, Cuda, DType, Device, Element, cuda},
    kernels::{
        Activation, AdamWStep, AttentionChoices, AttentionSpec, Backend, Batch, CacheSpec, DropoutMask,
        Epilogue, Format, NO_ROW, NormKind, QkvHeads, QuantizedShape, RopePairs, RopeSpec, Targets,
    },
    launch,
    reference::worst_relative,
    rng::Philox,
    shard::Sequences,
};
use std::{process::ExitCode, time::Instant};

#[derive(Parser)]
#[command(about = "Checks whether this machine's GPU can be used")]
struct Args {
    /// The index of the GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Check the kernels only, because NCCL is slow under memory checkers.
    #[arg(long)]
    kernels: bool,
    /// Only compile the kernels for a compute capability, such as 9.0, and store them in the cache.
    #[arg(long, value_parser = capability)]
    precompile: Vec<(u32, u32)>,
}

fn capability(text: &str) -> std::result::Result<(u32, u32), String> {
    let numbers =
        text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| format!("{text} is no compute capability: expected major.minor, such as 9.0"))
}

/// Returns a tensor of normal random numbers, the same on every device.
fn random<T: Element, B: Device>(device: &B, seed: u64, shape: [usize; 2]) -> Result<Tensor<T, B>> {
    let stream = Philox::stream(seed, 1);
    let values: Vec<T> = (0..(shape[0] * shape[1]) as u64).map(|at| T::from_f64(stream.normal(at))).collect();
    Tensor::from_slice(device, shape, &values)
}

/// Returns the elements of a tensor as f64.
fn numbers<T: Element, B: Device>(tensor: &Tensor<T, B>) -> Result<Vec<f64>> {
    Ok(tensor.to_vec()?.into_iter().map(T::to_f64).collect())
}

const ROWS: usize = 150;
const COLS: usize = 256;

fn pointwise<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let (x, mut y) = (random::<T, B>(device, 1, [ROWS, COLS])?, random::<T, B>(device, 2, [ROWS, COLS])?);
    device.accumulate(x.mat(), y.mat_mut()?)?;
    let mut z = Tensor::<T, B>::empty(device, [ROWS, COLS])?;
    device.gate(Activation::Silu, x.mat(), y.mat(), z.mat_mut()?)?;
    let mut sums = Tensor::<T::Acc, B>::empty(device, [COLS])?;
    device.sum_rows(z.mat(), sums.slice_mut()?)?;
    Ok([numbers(&z)?, numbers(&sums)?].concat())
}

fn norm<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let kind = NormKind::RmsNorm { eps: 1e-5 };
    let (x, dy) = (random::<T, B>(device, 3, [ROWS, COLS])?, random::<T, B>(device, 4, [ROWS, COLS])?);
    let gamma = random::<T, B>(device, 5, [1, COLS])?;
    let [mut y, mut dx] =
        [Tensor::<T, B>::empty(device, [ROWS, COLS])?, Tensor::empty(device, [ROWS, COLS])?];
    let mut stats = Tensor::<T::Acc, B>::empty(device, [ROWS, 2])?;
    let mut dgamma = Tensor::<T::Acc, B>::zeros(device, [COLS])?;
    device.normalize(kind, x.mat(), gamma.slice(), None, y.mat_mut()?, stats.slice_mut()?)?;
    let (stats, dgammas) = (stats.slice(), dgamma.slice_mut()?);
    device.normalize_backward(kind, x.mat(), gamma.slice(), stats, dy.mat(), dx.mat_mut()?, dgammas, None)?;
    Ok([numbers(&y)?, numbers(&dx)?, numbers(&dgamma)?].concat())
}

/// Attention: causal over two sequences, forward and backward, and one decoding step from a cache.
/// bf16 and f16 use tensor cores.
fn attention<T: Element, B: Backend>(device: &B, head_dim: usize) -> Result<Vec<f64>> {
    let (kv_of_query, choices) = (vec![0, 0, 1, 1], AttentionChoices::CAUSAL);
    let heads = QkvHeads { kv_of_query, kv_heads: 2, head_dim, choices };
    let sequences = Sequences::packed([ROWS - 20, 20]);
    let spec = AttentionSpec { heads: &heads, sequences: &sequences };
    let (width, kv_width) = (heads.query_width(), heads.kv_width());
    let [q, dout] = [random::<T, B>(device, 7, [ROWS, width])?, random(device, 8, [ROWS, width])?];
    let [k, v] = [random::<T, B>(device, 9, [ROWS, kv_width])?, random(device, 10, [ROWS, kv_width])?];
    let mut out = Tensor::<T, B>::empty(device, [ROWS, width])?;
    let mut lse = Tensor::<T::Acc, B>::empty(device, [ROWS, heads.kv_of_query.len()])?;
    let mut dqkv = Tensor::<T, B>::empty(device, [ROWS, heads.width()])?;
    device.attention(&spec, q.mat(), k.mat(), v.mat(), out.mat_mut()?, lse.slice_mut()?)?;
    let (qkv, saved) = ([q.mat(), k.mat(), v.mat()], lse.slice());
    device.attention_backward(
        &spec,
        qkv[0],
        qkv[1],
        qkv[2],
        out.mat(),
        saved,
        dout.mat(),
        dqkv.mat_mut()?,
    )?;

    // Decodes one more token for two sequences. One of them is long enough for split attention.
    let capacity = 600;
    let [keys, values] =
        [11, 12].map(|seed| random::<T, B>(device, seed, [2 * heads.kv_heads * capacity, head_dim]));
    let (mut keys, mut values) = (keys?, values?);
    let sequences = Sequences::packed([1, 1]).starting_at(&[70, 599])?;
    let spec = AttentionSpec { sequences: &sequences, ..spec };
    let [q, k] = [random::<T, B>(device, 13, [2, width])?, random(device, 14, [2, kv_width])?];
    let mut step = Tensor::<T, B>::empty(device, [2, width])?;
    let cache = CacheSpec { slots: &[1, 0], capacity };
    device.append_cached(&spec, &cache, k.mat(), k.mat(), keys.mat_mut()?, values.mat_mut()?)?;
    device.attention_cached(&spec, &cache, q.mat(), keys.mat(), values.mat(), step.mat_mut()?)?;
    Ok([numbers(&out)?, numbers(&lse)?, numbers(&dqkv)?, numbers(&step)?].concat())
}

fn rope<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let mut x = random::<T, B>(device, 14, [ROWS, COLS])?;
    let frequencies: Vec<f64> = (0..32).map(|pair| 10_000_f64.powf(-f64::from(pair) / 32.0)).collect();
    let spec = RopeSpec { head_dim: 64, frequencies: &frequencies, pairs: RopePairs::Halves, magnitude: 1.0 };
    let positions: Vec<u32> = (0..ROWS as u32).map(|row| 7 * row).collect();
    device.rope(&spec, &positions, false, x.mat_mut()?)?;
    numbers(&x)
}

fn gather<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let table = random::<T, B>(device, 15, [90, COLS])?;
    let ids: Vec<u32> = (0..ROWS as u32).map(|row| row * row % 90).collect();
    let mut rows = Tensor::<T, B>::empty(device, [ROWS, COLS])?;
    let mut sums = Tensor::<T::Acc, B>::zeros(device, [90, COLS])?;
    device.gather(table.mat(), &ids, rows.mat_mut()?)?;
    device.scatter_add(&ids, rows.mat(), sums.mat_mut()?)?;
    Ok([numbers(&rows)?, numbers(&sums)?].concat())
}

fn loss<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let x = random::<T, B>(device, 16, [ROWS, COLS])?;
    let classes: Vec<u32> = (0..ROWS as u32).map(|row| row * 31 % COLS as u32).collect();
    let targets =
        Targets { classes: &classes, ignored: Some(31), count: COLS, first: 0, on: 0.9, off: 4e-4, z: 1e-3 };
    let mut max = Tensor::<T::Acc, B>::empty(device, [ROWS])?;
    let mut sums = Tensor::<T::Acc, B>::empty(device, [ROWS, 3])?;
    let [mut losses, mut log] = [Tensor::<T::Acc, B>::empty(device, [ROWS])?, Tensor::empty(device, [ROWS])?];
    let mut dx = Tensor::<T, B>::empty(device, [ROWS, COLS])?;
    device.row_max(x.mat(), max.slice_mut()?)?;
    device.exp_sums(&targets, x.mat(), max.slice(), sums.slice_mut()?)?;
    device.cross_entropy(&targets, max.slice(), sums.slice(), losses.slice_mut()?, log.slice_mut()?)?;
    device.cross_entropy_backward(&targets, 1.0, x.mat(), max.slice(), log.slice(), dx.mat_mut()?)?;
    Ok([numbers(&losses)?, numbers(&dx)?].concat())
}

fn dropout<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let x = random::<T, B>(device, 17, [ROWS, COLS])?;
    let mut y = Tensor::<T, B>::empty(device, [ROWS, COLS])?;
    let mask =
        DropoutMask { probability: 0.3, stream: Philox::stream(18, 1), row: 5, column: 0, width: COLS };
    device.dropout(&mask, x.mat(), y.mat_mut()?)?;
    numbers(&y)
}

fn update<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let mut weight = random::<T, B>(device, 19, [ROWS, COLS])?;
    let mut master = random::<T::Acc, B>(device, 19, [ROWS, COLS])?;
    let grad = random::<T::Acc, B>(device, 20, [ROWS, COLS])?;
    let [mut first, mut second] =
        [Tensor::<T::Acc, B>::zeros(device, [ROWS, COLS])?, Tensor::zeros(device, [ROWS, COLS])?];
    let step = AdamWStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 0.5,
    };
    let moments = [first.slice_mut()?, second.slice_mut()?];
    device.adamw(&step, grad.slice(), weight.slice_mut()?, Some(master.slice_mut()?), moments)?;
    Ok([numbers(&weight)?, numbers(&master)?, numbers(&second)?].concat())
}

/// Products: with transposed and plain operands, with a result of the accumulator type, with a
/// fused bias, with a fused bias and GELU, and as a batch.
fn gemm<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let (m, k, n) = (72, 96, 128);
    let (a, b) = (random::<T, B>(device, 21, [m, k])?, random::<T, B>(device, 22, [n, k])?);
    let (bias, mut c) = (random::<T, B>(device, 23, [1, n])?, Tensor::<T, B>::empty(device, [m, n])?);
    let mut results = Vec::new();
    device.gemm(1.0, a.mat(), b.mat().t(), 0.0, c.mat_mut()?)?;
    results.push(numbers(&c)?);
    let mut gradient = Tensor::<T::Acc, B>::empty(device, [n, k])?;
    device.gemm(1.0, c.mat().t(), a.mat(), 0.0, gradient.mat_mut()?)?;
    results.push(numbers(&gradient)?);
    device.linear(a.mat(), b.mat(), Epilogue { bias: Some(bias.slice()), activation: None }, c.mat_mut()?)?;
    results.push(numbers(&c)?);
    let mut pre = Tensor::<T, B>::empty(device, [m, n])?;
    let activation = Some((Activation::GeluTanh, pre.mat_mut()?));
    device.linear(a.mat(), b.mat(), Epilogue { bias: Some(bias.slice()), activation }, c.mat_mut()?)?;
    results.push(numbers(&c)?);
    let batch = Batch { count: 3, a: 8 * k, b: 16 * k, c: 8 * n };
    let mut parts = Tensor::<T, B>::zeros(device, [24, n])?;
    device.gemm_batched(
        batch,
        0.5,
        a.mat().block(0..8, 0..k),
        b.mat().block(0..16, 0..k).t(),
        0.0,
        parts.mat_mut()?.block(0..8, 0..16),
    )?;
    results.push(numbers(&parts)?);
    Ok(results.concat())
}

/// Products with quantized weights, and dequantized rows. f64 has no product with activations of 8
/// bits.
fn quantized<T: Element, B: Backend>(device: &B) -> Result<Vec<f64>> {
    let (x, columns) = (random::<T, B>(device, 24, [ROWS, COLS])?, 0..COLS);
    let mut results = Vec::new();
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
        let values = Philox::stream(25, 1);
        let shape = QuantizedShape { format, rows: 72, columns: columns.clone(), order: None };
        let w = device.quantized_matrix(shape, &mut |rows, out| {
            let first = (rows.start * COLS) as u64;
            for (block, out) in out.chunks_exact_mut(format.bytes()).enumerate() {
                let weights = first + (block * format.weights()) as u64..;
                let weights: Vec<f32> =
                    weights.take(format.weights()).map(|at| values.normal(at) as f32).collect();
                format.encode(&weights, out)?;
            }
            Ok(())
        })?;
        if T::DTYPE != DType::F64 {
            let mut y = Tensor::<T, B>::empty(device, [ROWS, 72])?;
            device.quantized_product(x.mat(), &w, columns.clone(), y.mat_mut()?)?;
            results.push(numbers(&y)?);
        }
        let mut rows = Tensor::<T, B>::empty(device, [3, COLS])?;
        device.dequantize(&w, &[71, NO_ROW, 3], columns.clone(), rows.mat_mut()?)?;
        results.push(numbers(&rows)?);
    }
    Ok(results.concat())
}

/// The number of failed checks.
#[derive(Default)]
struct Failures(usize);

impl Failures {
    fn say(&mut self, name: &str, begin: Instant, outcome: Result<String>) {
        let took = begin.elapsed().as_secs_f64() * 1e3;
        match outcome {
            Ok(detail) => println!("ok      {name:<34} {took:>9.1} ms  {detail}"),
            Err(error) => {
                self.0 += 1;
                println!("FAILED  {name:<34} {took:>9.1} ms  {error}");
            }
        }
    }
}

/// Compares kernel families on the GPU with the CPU, each within the bound of its element type.
macro_rules! compare {
    ($failures:ident, $cuda:ident, $($name:literal => $family:ident ($($more:expr),*)),* $(,)?) => {$(
        compare!(@of $failures, $cuda, $name, $family, ($($more),*), f32 1e-5, f64 1e-12, bf16 3e-2, f16 4e-3)
    );*};
    (@of $failures:ident, $cuda:ident, $name:literal, $family:ident, $more:tt, $($element:ident $most:literal),*) => {$(
        compare!(@one $failures, $cuda, $name, $family, $more, $element, $most)
    );*};
    (@one $failures:ident, $cuda:ident, $name:literal, $family:ident, ($($more:expr),*), $element:ident, $most:literal) => {
        let begin = Instant::now();
        let outcome = $family::<$element, _>(&$cuda $(, $more)*).and_then(|got| {
            let want = $family::<$element, _>(&Cpu::new() $(, $more)*)?;
            if got.len() != want.len() || want.is_empty() {
                let detail = format!("{} numbers on the GPU, but {} on the CPU", got.len(), want.len());
                return Err(Error::invalid($name, detail));
            }
            let far = worst_relative(&got, &want);
            let detail = format!("differs from the CPU by {far:.1e}, at most {:.0e} expected", $most);
            if far <= $most { Ok(detail) } else { Err(Error::invalid($name, detail)) }
        });
        $failures.say(concat!($name, " ", stringify!($element)), begin, outcome);
    };
}

fn kernels(cuda: &Cuda, failures: &mut Failures) {
    let cuda = cuda.clone();
    compare! {
        failures, cuda,
        "pointwise" => pointwise(),
        "gemm" => gemm(),
        "quantized" => quantized(),
        "norm" => norm(),
        "rope" => rope(),
        "gather" => gather(),
        "loss" => loss(),
        "dropout" => dropout(),
        "update" => update(),
        "attention, heads of 64" => attention(64),
        "attention, heads of 128" => attention(128),
    }
}

/// Checks NCCL with one rank: creates a communicator, splits it, all-reduces over both groups, and
/// runs a barrier.
fn one_rank(gpu: usize, order: nccl::Order) -> Result<String> {
    let sums = launch::threads(1, |host| {
        let cuda = Cuda::new(gpu)?;
        let group = host.over_nccl(&cuda, nccl::Options { order, ..nccl::Options::default() })?;
        let mut x = Tensor::<f32, _>::full(&cuda, [1000], 1.5)?;
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        let part =
            group.split(Some(0), 0)?.ok_or_else(|| Error::invalid("split", "the rank got no group"))?;
        part.all_reduce(ReduceOp::Sum, &mut x)?;
        if group.split(None, 0)?.is_some() {
            return Err(Error::invalid("split", "a rank without a color got a group"));
        }
        group.barrier()?;
        x.to_vec()
    })?;
    if sums.concat() == vec![1.5; 1000] {
        Ok("sums are right".into())
    } else {
        Err(Error::invalid("NCCL", "wrong sums"))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut failures = Failures::default();
    for capability in &args.precompile {
        let begin = Instant::now();
        let outcome = cuda::precompile(*capability).map(|folder| folder.display().to_string());
        failures.say(&format!("kernels for {}.{}", capability.0, capability.1), begin, outcome);
    }
    if args.precompile.is_empty() {
        check(&args, &mut failures);
    }
    println!("{} failed", failures.0);
    if failures.0 == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check(args: &Args, failures: &mut Failures) {
    for library in cuda::versions().into_iter().chain([nccl::version()]) {
        println!("{}", library.map_or_else(|error| error.to_string(), |library| library.to_string()));
    }
    let begin = Instant::now();
    let cuda = match Cuda::new(args.gpu) {
        Ok(cuda) => cuda,
        Err(error) => return failures.say("GPU", begin, Err(error)),
    };
    failures.say("GPU", begin, Ok(format!("{cuda:?}")));
    kernels(&cuda, failures);
    if !args.kernels {
        for order in [nccl::Order::Any, nccl::Order::Ranks] {
            failures.say(
                &format!("NCCL, one rank, sums by {order:?}"),
                Instant::now(),
                one_rank(args.gpu, order),
            );
        }
    }
}
