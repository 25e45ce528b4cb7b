//! The device of this binary: CUDA. The ranks get the GPUs in turn and form groups over NCCL.

use crate::support::say;
use shardwise::{
    Result,
    comm::{
        Group,
        nccl::{Options, Order},
    },
    device::{Cpu, Cuda},
    launch::Threads,
    security::Role,
};
use std::time::Duration;

/// The group sizes of slow tests.
pub(crate) const WORLDS: &[usize] = &[1, 3, 8];
/// The divisor of the number of random cases in slow tests.
pub(crate) const FEWER: u32 = 3;

pub(crate) type Dev = Cuda;
pub(crate) type Tensor<T = f32> = shardwise::Tensor<T, Dev>;
pub(crate) type DTensor<P, T = f32> = shardwise::parallel::DTensor<P, T, Dev>;

/// Creates a device whose fresh tensors are NaN. Without a GPU the process exits: see [`needed`].
pub(crate) fn poisoned() -> Dev {
    needed();
    Cuda::poisoned(0).unwrap()
}

/// Creates a device. Without a GPU the process exits: see [`needed`].
pub(crate) fn fresh() -> Dev {
    needed();
    Cuda::new(0).unwrap()
}

/// Returns another handle of a GPU, with its own stream.
pub(crate) fn another_handle(device: &Dev) -> Dev {
    Cuda::poisoned(device.ordinal()).unwrap()
}

/// Returns the number of GPUs. Without a GPU the process prints that no test was run and exits. It
/// exits with failure if `SHARDWISE_REQUIRE_GPU` is 1, otherwise with success.
pub(crate) fn needed() -> usize {
    match Cuda::count() {
        Ok(count) if count > 0 => count,
        outcome => {
            let why = outcome.err().map_or("there is no GPU".to_string(), |error| error.to_string());
            say(&format!(
                "CUDA's tests are NOT RUN: {why}\nscripts/cuda_standin.sh runs them without a GPU."
            ));
            let required = std::env::var_os("SHARDWISE_REQUIRE_GPU").is_some_and(|value| value == "1");
            std::process::exit(i32::from(required));
        }
    }
}

/// Thread ranks that have one GPU each and communicate over NCCL. If there are too few GPUs, the
/// ranks share GPUs and communicate through the host.
pub(crate) struct Ranks(Threads);

pub(crate) fn ranks(world: usize) -> Ranks {
    needed();
    // As on thread ranks: only the first rank may see the weights of the others.
    let role = |rank| if rank == 0 { Role::Checkpointer } else { Role::Trainer };
    Ranks(Threads::new(world).deadline(Duration::from_secs(60)).roles((0..world).map(role)))
}

impl Ranks {
    pub(crate) fn run<R: Send>(&self, rank: impl Fn(Group<Dev>) -> Result<R> + Sync) -> Result<Vec<R>> {
        self.0.run(|host| rank(group(&host)?))
    }

    pub(crate) fn run_each<R: Send>(
        &self,
        rank: impl Fn(Group<Dev>) -> Result<R> + Sync,
    ) -> Result<Vec<Result<R>>> {
        self.0.run_each(|host| rank(group(&host)?))
    }
}

/// Gives each rank of a host group a GPU. Sums are made in rank order, because the tests compare
/// their bits. NCCL's own order differs between an all-reduce and a reduce-scatter, and depends on
/// the tensor's size.
pub(crate) fn group(host: &Group<Cpu>) -> Result<Group<Dev>> {
    let cuda = of_rank(host)?;
    if !has(host.size()) {
        return Ok(host.staged(&cuda));
    }
    let options = Options { order: Order::Ranks, deadline: Duration::from_secs(60), ..Options::default() };
    host.over_nccl(&cuda, options)
}

/// Returns the GPU of a rank.
pub(crate) fn of_rank(host: &Group<Cpu>) -> Result<Dev> {
    Cuda::poisoned(host.rank() % needed())
}

/// Returns whether `world` ranks can use NCCL here. Some versions of NCCL do not support several
/// ranks on one GPU, so `NCCL_MULTI_RANK_GPU_ENABLE` must enable this.
fn has(world: usize) -> bool {
    world <= needed() || std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some()
}

/// Returns the numbers of ranks that can use NCCL here. Prints the others, which are not run.
pub(crate) fn worlds(worlds: impl IntoIterator<Item = usize>) -> impl Iterator<Item = usize> {
    let (run, not): (Vec<_>, Vec<_>) = worlds.into_iter().partition(|&world| has(world));
    if !not.is_empty() {
        let name = std::thread::current().name().unwrap_or("a test").to_string();
        say(&format!("{name}: NOT RUN over NCCL with {not:?} ranks: the number of GPUs is {}", needed()));
    }
    run.into_iter()
}
