//! One rank a process, started by torchrun, mpirun or srun: a tensor-parallel MLP, and its result on every rank.
//!
//! ```text
//! cargo build --release --example processes
//! torchrun --no-python --nproc-per-node 4 target/release/examples/processes
//! ```
//!
//! Without a launcher it is one rank. The processes' own connections carry the collectives, which does for a small model; with
//! GPUs they carry what NCCL needs, and NCCL carries the tensors (`Group::over_nccl`).

use shardwise::{
    Result, Tensor,
    comm::Group,
    device::Cpu,
    kernels::Activation,
    launch::Env,
    parallel::{DTensor, Layer, MlpNames, ParallelMlp},
    shard::Replicated,
    tensor::{Random, Weights},
};
use std::time::Duration;

fn rank(world: Group<Cpu>) -> Result<()> {
    let source = Random::normal(1, 0.02);
    let (weights, names) = (Weights::new(&source), MlpNames::default());
    let sizes = (64, 256);
    let mut mlp = ParallelMlp::<Replicated, f64, Cpu>::load(
        &world,
        &weights,
        &names,
        sizes,
        Activation::GeluErf,
        true,
    )?;
    let x = DTensor::replicated(&world, Tensor::full(world.device(), [16, 64], 1.0)?)?;
    let (y, saved) = mlp.forward(&x)?;
    let dx = mlp.backward(saved, &y)?;
    let squares = |tensor: &Tensor<f64>| Ok(tensor.to_vec()?.iter().map(|value| value * value).sum::<f64>());
    let (y, dx): (Result<f64>, Result<f64>) = (squares(y.local()), squares(dx.local()));
    println!("rank {} of {}: |y|² = {:.12}, |dx|² = {:.12}", world.rank(), world.size(), y?, dx?);
    Ok(())
}

fn main() -> Result<()> {
    let started = std::env::vars().any(|(name, _)| name.ends_with("RANK") || name == "SLURM_PROCID");
    if !started {
        return rank(Group::solo(&Cpu::new()));
    }
    Env::read()?.run(Duration::from_secs(60), rank)
}
