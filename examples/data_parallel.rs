//! Data parallelism: trains a linear regression on replicas that see different samples. The losses
//! and weights equal those of one device up to rounding.
//!
//! `cargo run --release --bin data_parallel [-- --ranks 4] [--central]`

use clap::Parser;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::Cpu,
    launch, ops,
    optim::Sgd,
    parallel::{Bias, ColumnParallelLinear, Columns, DTensor, Layer},
    reference::worst,
    rng::Philox,
    shard::{Partition, Replicated},
    tensor::{Random, Weights},
    train::{DataParallel, GradReduce, ShardedSampler},
};

const SAMPLES: usize = 1000;
const FEATURES: usize = 10;
const EPOCHS: u64 = 100;

/// Trains Linear(10, 1) by SGD: mean squared error, learning rate 0.01, 100 epochs.
#[derive(Parser)]
struct Args {
    /// The number of replicas.
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Reduce the gradients to one rank, which updates the parameters and broadcasts them.
    #[arg(long)]
    central: bool,
}

/// Returns a sample's features and its target. The target is a linear function of the features plus
/// noise.
fn sample(at: usize) -> ([f64; FEATURES], f64) {
    let stream = Philox::stream(7, at as u64);
    let x: [f64; FEATURES] = std::array::from_fn(|feature| stream.normal(feature as u64));
    let y: f64 = x.iter().enumerate().map(|(feature, x)| x * (feature as f64 - 4.5) / 3.0).sum();
    (x, y + 0.1 * stream.normal(FEATURES as u64))
}

/// Trains on `ranks` replicas. Returns each rank's loss per epoch and its weights.
fn train(ranks: usize, central: bool) -> Result<Vec<(Vec<f64>, Vec<f64>)>> {
    launch::threads(ranks, |world| {
        let (alone, source) = (Group::solo(world.device()), Random::normal(1, 0.1));
        let columns = Columns::even(&alone, 1)?;
        let model = ColumnParallelLinear::<Replicated, f64, Cpu>::load(
            &alone,
            &Weights::new(&source),
            FEATURES,
            &columns,
            Bias::Add,
        )?;
        let params = model.params();
        let replicas = if central {
            DataParallel::central(&world, &params, 0)?
        } else {
            DataParallel::new(&world, &params)?
        };
        let mut sgd = Sgd::default();
        let sampler = ShardedSampler { samples: SAMPLES, batch: 256, shuffle: Some(1) };
        let mut curve = Vec::new();
        for epoch in 0..EPOCHS {
            let (order, mut sum) = (sampler.order(epoch), 0.0);
            for batch in 0..sampler.batches() {
                let size = sampler.range(batch, 0, 1).len() as f64;
                let own = &order[sampler.range(batch, world.rank(), world.size())];
                let samples: Vec<_> = own.iter().map(|&at| sample(at)).collect();
                let x: Vec<f64> = samples.iter().flat_map(|(x, _)| *x).collect();
                let y: Vec<f64> = samples.iter().map(|(_, y)| *y).collect();
                let x = Tensor::from_slice(world.device(), [own.len(), FEATURES], &x)?;
                let y = Tensor::from_slice(world.device(), [own.len(), 1], &y)?;

                for param in &params {
                    param.zero_grad();
                }
                let (out, saved) = model.forward(DTensor::replicated(&alone, x)?)?;
                sum += ops::squared_error(out.local(), &y)?;
                // Each rank divides by the size of the whole batch, because `GradReduce::Sum` sums
                // the ranks' gradients.
                let dout = ops::squared_error_backward(out.local(), &y, 1.0 / size)?;
                replicas.begin(GradReduce::Sum)?;
                model.backward(saved, DTensor::shard(&alone, dout, &Partition::even(1, 1))?)?;
                replicas.finish()?;
                if replicas.steps() {
                    sgd.step(&params, 0.01, 1.0)?;
                }
                replicas.publish()?;
            }
            let mut sum = Tensor::from_slice(world.device(), [1], &[sum])?;
            world.all_reduce(shardwise::comm::ReduceOp::Sum, &mut sum)?;
            curve.push(sum.to_vec()?[0] / SAMPLES as f64);
        }
        let mut weights = Vec::new();
        for param in &params {
            weights.extend(param.value()?.to_vec()?);
        }
        Ok((curve, weights))
    })
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (one, many) = (train(1, false)?, train(args.ranks, args.central)?);
    let one = &one[0];
    println!("{:>6} {:>22} {:>22}", "epoch", "loss on one device", format!("on {} ranks", args.ranks));
    for epoch in (0..EPOCHS as usize).step_by(11) {
        println!("{epoch:>6} {:>22.16} {:>22.16}", one.0[epoch], many[0].0[epoch]);
    }
    let difference = worst(many.iter().flat_map(|rank| &rank.1), many.iter().flat_map(|_| &one.1));
    println!("largest difference of a weight after {EPOCHS} epochs: {difference:.1e}");
    if difference > 1e-12 {
        return Err(shardwise::Error::Invalid { op: "data_parallel", reason: "the weights differ".into() });
    }
    Ok(())
}
