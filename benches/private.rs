//! A step of private training (DP-SGD) of two transformer blocks, compared with a plain step on the
//! same samples.
//!
//! `cargo bench --features privacy --bench private [-- --rounds 9]`
//!
//! Each round runs a plain and a private step one after the other, and the bench reports the median
//! of the ratio of their times. "ratio less noise" is that without the release of the private step,
//! which sums over replicas and adds the noise: its time does not grow with the batch. "apart" is
//! the largest difference between the plain gradient and the private one, without noise and with a
//! bound that no sample reaches, relative to the largest element. The bench fails if "apart"
//! exceeds 1e-4.

use clap::Parser;
use shardwise::{
    optim::Sgd,
    prelude::*,
    privacy::{Budget, DpSgd, Ledger, Private, RunKey},
    reference::worst_relative,
    rng::Philox,
    shard::Mesh,
};
use std::time::Instant;

#[derive(Parser)]
struct Args {
    /// The number of rounds. The bench reports the median.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// The number of tokens of a sample.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// The number of features.
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// The number of samples of a microbatch.
    #[arg(long, default_value_t = 8)]
    samples: usize,
    /// The number of microbatches of a step.
    #[arg(long, default_value_t = 4)]
    microbatches: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

type Block = TransformerBlock<Replicated, f32, Cpu>;

/// A model, and the input and the gradient of each microbatch.
struct Case {
    model: Vec<Block>,
    params: Vec<Param<f32, Cpu>>,
    batches: Vec<(DTensor<Replicated>, Tensor)>,
}

impl Case {
    fn new(args: &Args, tensor: &Group<Cpu>) -> Result<Self> {
        let attention = AttentionConfig::new(args.hidden, 8)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qkv_bias(true)
            .with_out_bias(true);
        let norm = NormKind::LayerNorm { eps: 1e-5 };
        let config =
            BlockConfig::new(attention, 4 * args.hidden, Activation::GeluTanh, norm).with_mlp_bias(true);
        let source = Random::normal(1, 0.02);
        let block = |at: usize| Block::load(tensor, &Weights::new(&source).at(&at.to_string()), &config);
        let model = (0..2).map(block).collect::<Result<Vec<_>>>()?;
        let rows = args.samples * args.tokens;
        let random = |name: &str| {
            let stream = Philox::named(1, name);
            let values = (0..(rows * args.hidden) as u64).map(|at| stream.normal(at) as f32).collect();
            Tensor::from_vec(tensor.device(), [rows, args.hidden], values)
        };
        let batch = |at: usize| {
            let x = DTensor::replicated(tensor, random(&format!("x{at}"))?)?;
            let x = x.with_sequences(Sequences::packed(vec![args.tokens; args.samples]))?;
            Ok((x, random(&format!("dy{at}"))?))
        };
        let batches = (0..args.microbatches).map(batch).collect::<Result<_>>()?;
        Ok(Self { params: model.params(), model, batches })
    }

    fn backward(&self, at: usize) -> Result<()> {
        let (x, dy) = &self.batches[at];
        let (y, saved) = self.model.forward(x.clone())?;
        self.model.backward(saved, y.with_local(dy.clone())?).map(drop)
    }

    fn gradients(&self) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for param in &self.params {
            let grad =
                param.grad().ok_or_else(|| Error::invalid("bench", "a parameter without a gradient"))?;
            all.extend(grad.to_vec()?.into_iter().map(f64::from));
        }
        Ok(all)
    }
}

/// Returns, for each round, the seconds of a plain step, of a private step, and of its release.
fn rounds(args: &Args, tp: usize) -> Result<(Vec<[f64; 3]>, f64)> {
    let ranks = launch::threads(tp, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, tp)?)?;
        let case = Case::new(args, mesh.group(Axis::Tensor))?;
        let samples = args.samples * args.microbatches;
        let mut sgd = Sgd::default();
        let plain = |case: &Case| {
            case.params.iter().for_each(Param::zero_grad);
            (0..args.microbatches).try_for_each(|at| case.backward(at))
        };
        let private = |clip: f64, noise: f64| {
            let mechanism = DpSgd::new(samples, 1.0, clip, noise);
            let ledger = Ledger::new(Budget { epsilon: f64::INFINITY, delta: 1e-5 })?;
            Private::new(&mesh, [case.params.clone()], mechanism, RunKey::agree(&world)?, ledger)
        };
        plain(&case)?;
        let want = case.gradients()?;
        let mut unclipped = private(1e30, 0.0)?;
        let mut step = unclipped.begin()?;
        for at in 0..args.microbatches {
            case.backward(at)?;
            step.clip(args.samples)?;
        }
        step.release(None)?;
        let got: Vec<f64> = case.gradients()?.into_iter().map(|g| g * samples as f64).collect();
        let apart = worst_relative(&got, &want);
        drop(unclipped);

        let mut times = Vec::new();
        for _ in 0..args.rounds {
            world.barrier()?;
            let start = Instant::now();
            plain(&case)?;
            sgd.step(&case.params, 1e-9, 1.0)?;
            world.barrier()?;
            let of_plain = start.elapsed().as_secs_f64();

            let mut private = private(1.0, 1.0)?;
            world.barrier()?;
            let start = Instant::now();
            let mut step = private.begin()?;
            for at in 0..args.microbatches {
                case.backward(at)?;
                step.clip(args.samples)?;
            }
            let released = Instant::now();
            step.release(None)?;
            let of_release = released.elapsed().as_secs_f64();
            sgd.step(&case.params, 1e-9, 1.0)?;
            world.barrier()?;
            times.push([of_plain, start.elapsed().as_secs_f64(), of_release]);
        }
        Ok((times, apart))
    })?;
    Ok(ranks.into_iter().next().unwrap_or_default())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let args = Args::parse();
    println!(
        "2 blocks of {} features, {} x {} samples of {} tokens, f32",
        args.hidden, args.microbatches, args.samples, args.tokens
    );
    println!(
        "{:>5} {:>10} {:>12} {:>7} {:>16} {:>9}",
        "ranks", "plain ms", "private ms", "ratio", "ratio less noise", "apart"
    );
    for tp in [1, 2] {
        let (times, apart) = rounds(&args, tp)?;
        let of = |f: fn(&[f64; 3]) -> f64| median(times.iter().map(f));
        println!(
            "{tp:>5} {:>10.1} {:>12.1} {:>7.3} {:>16.3} {apart:>9.1e}",
            1e3 * of(|[plain, ..]| *plain),
            1e3 * of(|[_, private, _]| *private),
            of(|[plain, private, _]| private / plain),
            of(|[plain, private, release]| (private - release) / plain),
        );
        // False for NaN, so a NaN fails too.
        let close = apart < 1e-4;
        if !close {
            return Err(Error::invalid("bench", format!("the gradients on {tp} ranks are {apart:e} apart")));
        }
    }
    Ok(())
}
