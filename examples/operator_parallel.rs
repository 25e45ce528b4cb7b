//! Operator parallelism. External: several ranks share one linear operator. Internal: one rank
//! computes several operators at the same time.
//!
//! `cargo run --release --bin operator_parallel [-- --ranks 2] [--threads 2]`

use clap::Parser;
use shardwise::{
    Result, Tensor,
    device::Cpu,
    launch, ops,
    parallel::{Bias, ColumnParallelLinear, Columns, DTensor, GatherFrom, Layer},
    reference::worst_relative,
    shard::Replicated,
    tensor::{Random, Weights},
};
use std::{num::NonZeroUsize, time::Instant};

/// y = x wᵀ with 512 rows, 1024 inputs and 2048 outputs.
#[derive(Parser)]
struct Args {
    /// The number of ranks that share the operator.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// The number of threads of the rank that computes several operators.
    #[arg(long, default_value_t = NonZeroUsize::new(2).unwrap())]
    threads: NonZeroUsize,
}

const ROWS: usize = 512;
const INPUTS: usize = 1024;
const OUTPUTS: usize = 2048;

/// Runs the operator over `ranks` ranks. Each rank returns y, dx, and the time of forward and
/// backward together.
fn external(ranks: usize) -> Result<Vec<(Vec<f32>, Vec<f32>, f64)>> {
    let source = Random::normal(1, 0.05);
    launch::threads(ranks, |world| {
        let columns = Columns::even(&world, OUTPUTS)?;
        let linear = ColumnParallelLinear::<Replicated, f32, Cpu>::load(
            &world,
            &Weights::new(&source),
            INPUTS,
            &columns,
            Bias::None,
        )?;
        let layer = Layer::<f32, Cpu>::then(linear, GatherFrom::<1>);
        let values: Vec<f32> = (0..ROWS * INPUTS).map(|at| (at % 17) as f32 / 17.0).collect();
        let x = DTensor::replicated(&world, Tensor::from_slice(world.device(), [ROWS, INPUTS], &values)?)?;
        let mut best = f64::INFINITY;
        let mut results = (Vec::new(), Vec::new());
        for _ in 0..5 {
            world.barrier()?;
            let start = Instant::now();
            let (y, saved) = layer.forward(x.clone())?;
            let dx = layer.backward(saved, y.clone())?;
            best = best.min(start.elapsed().as_secs_f64());
            results = (y.local().to_vec()?, dx.local().to_vec()?);
        }
        Ok((results.0, results.1, best))
    })
}

/// Runs three operators with one input at the same time. Returns their results and the best time.
fn internal(threads: NonZeroUsize) -> Result<(Vec<Vec<f32>>, f64)> {
    let cpu = Cpu::new().with_threads(threads);
    let x = Tensor::<f32>::full(&cpu, [ROWS, INPUTS], 0.5)?;
    let weights = (1..4).map(|at| Tensor::<f32>::full(&cpu, [OUTPUTS / 2, INPUTS], at as f64 / 8.0));
    let weights = weights.collect::<Result<Vec<_>>>()?;
    let mut best = f64::INFINITY;
    let mut results = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let pairs = weights.iter().map(|w| (x.mat(), w.mat().t())).collect();
        let products = ops::products::<f32, f32, Cpu>(&cpu, pairs)?;
        best = best.min(start.elapsed().as_secs_f64());
        results = products.iter().map(Tensor::to_vec).collect::<Result<_>>()?;
    }
    Ok((results, best))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (one, many) = (external(1)?, external(args.ranks)?);
    let one = &one[0];
    let dy = worst_relative(many.iter().flat_map(|rank| &rank.0), many.iter().flat_map(|_| &one.0));
    let ddx = worst_relative(many.iter().flat_map(|rank| &rank.1), many.iter().flat_map(|_| &one.1));
    println!("external: one linear operator over {} ranks, forward and backward", args.ranks);
    println!("  one device {:.2} ms, sharded {:.2} ms", one.2 * 1e3, many[0].2 * 1e3);
    println!("  largest relative difference: y {dy:.1e}, dx {ddx:.1e}");

    let ((alone, slow), (together, fast)) = (internal(NonZeroUsize::MIN)?, internal(args.threads)?);
    println!("internal: three linear operators on one device");
    println!(
        "  one after the other {:.2} ms, at the same time on {} threads {:.2} ms",
        slow * 1e3,
        args.threads,
        fast * 1e3
    );
    println!("  the same bits: {}", alone == together);
    // An element of y sums 1,024 products. An element of dx sums 2,048 products, in an order that
    // depends on the number of ranks.
    let bound = 2048.0 * f64::from(f32::EPSILON);
    if dy > bound || ddx > bound || alone != together {
        return Err(shardwise::Error::Invalid {
            op: "operator_parallel",
            reason: "the results differ".into(),
        });
    }
    Ok(())
}
