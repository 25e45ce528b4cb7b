//! Trains a classifier privately (DP-SGD) on 2 x 2 ranks: two replicas, each on two tensor-parallel
//! ranks. Prints the budget (ε, δ) that has been spent.
//!
//! `cargo run --release --features privacy --example private [-- --epsilon 2]`

use clap::Parser;
use safetensors::{Dtype, SafeTensors};
use shardwise::{
    optim::Sgd,
    prelude::*,
    privacy::{Budget, DpSgd, Ledger, Private, RunKey, noise_for},
    rng::Philox,
    train::DataParallel,
};
use std::path::PathBuf;

/// Trains features → hidden → ReLU → classes by DP-SGD.
#[derive(Clone, Parser)]
struct Args {
    /// The number of replicas.
    #[arg(long, default_value_t = 2)]
    dp: usize,
    /// The number of ranks that share a replica.
    #[arg(long, default_value_t = 2)]
    tp: usize,
    /// The budget ε.
    #[arg(long, default_value_t = 2.0)]
    epsilon: f64,
    /// The budget δ.
    #[arg(long, default_value_t = 1e-5)]
    delta: f64,
    /// The expected number of passes over the samples.
    #[arg(long, default_value_t = 10.0)]
    epochs: f64,
    /// The probability with which a sample is in a batch.
    #[arg(long, default_value_t = 0.025)]
    rate: f64,
    /// The largest norm of the gradient of a sample.
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// The learning rate.
    #[arg(long, default_value_t = 0.5)]
    learning_rate: f64,
    /// The number of samples that a replica computes at once.
    #[arg(long, default_value_t = 64)]
    microbatch: usize,
    /// The number of hidden features.
    #[arg(long, default_value_t = 64)]
    hidden: usize,
    /// The seed of the weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A safetensors file with `x` (f32 `[samples, features]`), `y` (i64 `[samples]`), `test_x` and
    /// `test_y`, in place of random points.
    #[arg(long)]
    data: Option<PathBuf>,
}

/// Points and their classes.
#[derive(Default)]
struct Points {
    features: usize,
    classes: usize,
    x: Vec<f32>,
    y: Vec<u32>,
}

impl Points {
    /// Points around ten centres.
    fn random(stream: u64, count: usize) -> Self {
        let (features, classes) = (16, 10);
        let noise = Philox::stream(3, stream);
        let mut points = Self { features, classes, ..Self::default() };
        for at in 0..count {
            let class = at % classes;
            let centre = Philox::stream(4, class as u64);
            let value = |feature: usize| {
                let (index, spread) = ((at * features + feature) as u64, 1.4);
                (centre.normal(feature as u64) + spread * noise.normal(index)) as f32
            };
            points.x.extend((0..features).map(value));
            points.y.push(class as u32);
        }
        points
    }

    fn read(
        file: &SafeTensors<'_>,
        x: &str,
        y: &str,
    ) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let (x, y) = (file.tensor(x)?, file.tensor(y)?);
        let (&[count, features], &[labels]) = (x.shape(), y.shape()) else {
            return Err(format!("the shapes are {:?} and {:?}", x.shape(), y.shape()).into());
        };
        if (x.dtype(), y.dtype(), count) != (Dtype::F32, Dtype::I64, labels) {
            return Err(format!("{:?} {:?} of {count} and {labels} samples", x.dtype(), y.dtype()).into());
        }
        let x = x.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4 bytes")));
        let y = y.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().expect("8 bytes")));
        let y: Vec<u32> = y.map(u32::try_from).collect::<std::result::Result<_, _>>()?;
        let classes = y.iter().max().map_or(0, |&last| last as usize + 1);
        Ok(Self { features, classes, x: x.collect(), y })
    }

    fn rows(&self, samples: &[usize]) -> (Vec<f32>, Vec<u32>) {
        let row = |&at: &usize| &self.x[at * self.features..(at + 1) * self.features];
        (samples.iter().flat_map(row).copied().collect(), samples.iter().map(|&at| self.y[at]).collect())
    }
}

/// Trains on all ranks. Returns the accuracy on the test points.
fn train(args: &Args, points: &Points, test: &Points, noise: f64, steps: u64) -> Result<f64> {
    let source = Random::normal(args.seed, 0.2);
    let ranks = launch::threads(args.dp * args.tp, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(args.dp, 1, args.tp)?)?;
        let (data, tensor, cpu) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor), world.device());
        let weights = Weights::new(&source);
        let (hidden, classes) = (Columns::even(tensor, args.hidden)?, Columns::even(tensor, points.classes)?);
        let up = ColumnParallelLinear::<Replicated, f32, Cpu>::load(
            tensor,
            &weights.at("up"),
            points.features,
            &hidden,
            Bias::Add,
        )?;
        let head = ColumnParallelLinear::load(tensor, &weights.at("head"), args.hidden, &classes, Bias::Add)?;
        let model = up.then(Activate::new(Activation::Relu)).then(GatherFrom::<1>).then(head);
        let (params, loss) = (model.params(), VocabParallelCrossEntropy::default());
        let replicas = DataParallel::new(data, &params)?;

        let mechanism = DpSgd::new(points.y.len(), args.rate, args.clip, noise);
        let ledger = Ledger::new(Budget { epsilon: args.epsilon, delta: args.delta })?;
        let key = RunKey::agree(&world)?;
        let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger)?;
        let mut sgd = Sgd::default();
        for number in 0..steps {
            let mut step = private.begin()?;
            for samples in step.samples().to_vec().chunks(args.microbatch) {
                let (x, targets) = points.rows(samples);
                let x = Tensor::from_vec(cpu, [samples.len(), points.features], x)?;
                // Each row is a sample.
                let rows = Sequences::packed(samples.iter().map(|_| 1));
                let (logits, saved) = model.forward(DTensor::replicated(tensor, x)?.with_sequences(rows)?)?;
                let (_, of_loss) = loss.forward(logits, &targets)?;
                // The gradient of the sum of the losses: `release` divides by the expected batch.
                model.backward(saved, loss.backward(of_loss, 1.0)?)?;
                step.clip(samples.len())?;
            }
            step.release(Some(&replicas))?;
            sgd.step(&params, args.learning_rate, 1.0)?;
            let done = number + 1;
            if world.rank() == 0 && (done % steps.div_ceil(5) == 0 || done == steps) {
                println!("step {done:>5}: spent {}", private.spent()?);
            }
        }

        // The test points are not training data, so what is computed from them needs no budget.
        let x = Tensor::from_vec(cpu, [test.y.len(), test.features], test.x.clone())?;
        let logits = model.infer(DTensor::replicated(tensor, x)?, &mut Context::default())?;
        let logits = logits.all_gather()?.into_local().to_vec()?;
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let right =
            logits.chunks(points.classes).zip(&test.y).filter(|(row, y)| best(row) == Some(**y as usize));
        Ok(right.count() as f64 / test.y.len() as f64)
    })?;
    Ok(ranks[0])
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let (points, test) = match &args.data {
        None => (Points::random(1, 8000), Points::random(2, 2000)),
        Some(path) => {
            let bytes = std::fs::read(path)?;
            let file = SafeTensors::deserialize(&bytes)?;
            (Points::read(&file, "x", "y")?, Points::read(&file, "test_x", "test_y")?)
        }
    };
    let steps = (args.epochs / args.rate).round() as u64;
    let budget = Budget { epsilon: args.epsilon, delta: args.delta };
    let noise = noise_for(&budget, args.rate, steps)?;
    println!(
        "{} samples, q = {}, {steps} steps, C = {}, σ = {noise:.4} on {} x {} ranks",
        points.y.len(),
        args.rate,
        args.clip,
        args.dp,
        args.tp
    );
    let accuracy = train(&args, &points, &test, noise, steps)?;
    println!("accuracy on {} test points: {accuracy:.4}", test.y.len());
    Ok(())
}
