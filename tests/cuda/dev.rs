//! The device of this binary: GPUs, one for each rank in turn, with groups over NCCL.

use crate::support::say;
use shardwise::{
    Result,
    comm::{
        Group,
        nccl::{Options, Order},
    },
    device::{Cpu, Cuda},
    launch::Threads,
};
use std::time::Duration;

/// The group sizes that slow tests run on.
pub(crate) const WORLDS: &[usize] = &[1, 3, 8];
/// Divides the number of random cases of slow tests.
pub(crate) const FEWER: u32 = 3;

pub(crate) type Dev = Cuda;
pub(crate) type Tensor<T = f32> = shardwise::Tensor<T, Dev>;
pub(crate) type DTensor<P, T = f32> = shardwise::parallel::DTensor<P, T, Dev>;

/// A GPU whose fresh tensors are NaN. Where there is none, all tests end here, and say so.
pub(crate) fn poisoned() -> Dev {
    needed();
    Cuda::poisoned(0).unwrap()
}

/// A GPU.
pub(crate) fn fresh() -> Dev {
    needed();
    Cuda::new(0).unwrap()
}

/// Another handle of a GPU, with a stream of its own.
pub(crate) fn beside(device: &Dev) -> Dev {
    Cuda::poisoned(device.ordinal()).unwrap()
}

/// The number of GPUs. Without one the process ends, having said that nothing was run: with
/// success, or with failure where `SHARDWISE_REQUIRE_GPU` is 1.
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

/// Thread ranks with a GPU each, over NCCL; where there are fewer GPUs than ranks, by way of the host.
pub(crate) struct Ranks(Threads);

pub(crate) fn ranks(world: usize) -> Ranks {
    needed();
    Ranks(Threads::new(world).deadline(Duration::from_secs(60)))
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

/// The ranks of a host's group with a GPU each. Sums are made in rank order, because tests compare
/// their bits: NCCL's own order differs between an all-reduce and a reduce-scatter, and with the
/// size.
pub(crate) fn group(host: &Group<Cpu>) -> Result<Group<Dev>> {
    let cuda = of_rank(host)?;
    if !has(host.size()) {
        return Ok(host.staged(&cuda));
    }
    let options = Options { order: Order::Ranks, deadline: Duration::from_secs(60), ..Options::default() };
    host.over_nccl(&cuda, options)
}

/// The GPU of a rank.
pub(crate) fn of_rank(host: &Group<Cpu>) -> Result<Dev> {
    Cuda::poisoned(host.rank() % needed())
}

/// Whether so many ranks can have NCCL between them here: several on one GPU are not for every
/// NCCL.
fn has(world: usize) -> bool {
    world <= needed() || std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some()
}

/// Those numbers of ranks that can have NCCL between them here. The others are said not to be run.
pub(crate) fn worlds(worlds: impl IntoIterator<Item = usize>) -> impl Iterator<Item = usize> {
    let (run, not): (Vec<_>, Vec<_>) = worlds.into_iter().partition(|&world| has(world));
    if !not.is_empty() {
        let name = std::thread::current().name().unwrap_or("a test").to_string();
        say(&format!("{name}: NOT RUN over NCCL with {not:?} ranks: the number of GPUs is {}", needed()));
    }
    run.into_iter()
}
