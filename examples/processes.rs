//! A tensor-parallel MLP with one process per rank, started by torchrun, mpirun or srun. Prints
//! each rank's result.
//!
//! ```text
//! cargo build --release --features cli --example processes
//! torchrun --no-python --nproc-per-node 4 target/release/examples/processes
//! ```
//!
//! Without a launcher there is one rank. TCP connections between the processes carry the
//! collectives, which is enough for a small model. With feature `nccl`, `--device cuda` gives each
//! process the GPU of its `LOCAL_RANK`. The connections then only bootstrap NCCL, and NCCL carries
//! the tensors.

use clap::{Parser, ValueEnum};
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::Cpu,
    kernels::{Activation, Backend},
    launch::Env,
    parallel::{DTensor, Layer, MlpNames, ParallelMlp},
    shard::Replicated,
    tensor::{Random, Weights},
    weights,
};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// One rank of a tensor-parallel MLP.
#[derive(Parser, Debug)]
struct Args {
    /// The device of the ranks.
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
    /// Saves the weights in this folder. With a membership file, a rank's role has to allow it.
    #[arg(long)]
    save: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum On {
    Cpu,
    Cuda,
}

fn rank<B: Backend>(world: &Group<B>, save: Option<&Path>) -> Result<()> {
    let source = Random::normal(1, 0.02);
    let (weights, names) = (Weights::new(&source), MlpNames::default());
    let mlp = ParallelMlp::<Replicated, f64, B>::load(
        world,
        &weights,
        &names,
        (64, 256),
        Activation::GeluErf,
        true,
    )?;
    let x = DTensor::replicated(world, Tensor::full(world.device(), [16, 64], 1.0)?)?;
    let (y, saved) = mlp.forward(x)?;
    let dx = mlp.backward(saved, y.clone())?;
    let squares =
        |tensor: &Tensor<f64, B>| Ok(tensor.to_vec()?.iter().map(|value| value * value).sum::<f64>());
    let (y, dx): (Result<f64>, Result<f64>) = (squares(y.local()), squares(dx.local()));
    println!("rank {} of {}: |y|² = {:.12}, |dx|² = {:.12}", world.rank(), world.size(), y?, dx?);
    save.map_or(Ok(()), |folder| weights::save(world, &mlp.params(), folder))
}

fn place(world: Group<Cpu>, local_rank: usize, args: &Args) -> Result<()> {
    match args.device {
        On::Cpu => rank(&world, args.save.as_deref()),
        On::Cuda => on_cuda(&world, local_rank, args.save.as_deref()),
    }
}

#[cfg(feature = "nccl")]
fn on_cuda(world: &Group<Cpu>, local_rank: usize, save: Option<&Path>) -> Result<()> {
    use shardwise::{comm::nccl::Options, device::Cuda};
    rank(&world.over_nccl(&Cuda::new(local_rank)?, Options::default())?, save)
}

#[cfg(not(feature = "nccl"))]
fn on_cuda(_: &Group<Cpu>, _: usize, _: Option<&Path>) -> Result<()> {
    Err(shardwise::Error::Unsupported {
        op: "processes",
        reason: "it was built without the feature nccl".into(),
    })
}

fn main() -> Result<()> {
    let args = Args::parse();
    let started = std::env::vars().any(|(name, _)| name.ends_with("RANK") || name == "SLURM_PROCID");
    if !started {
        return place(Group::solo(&Cpu::new()), 0, &args);
    }
    let env = Env::read()?;
    env.run(Duration::from_secs(60), |world| place(world, env.local_rank, &args))
}
