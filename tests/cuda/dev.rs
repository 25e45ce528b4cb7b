//! The device of this binary: GPUs, one for each rank in turn, with groups over NCCL.

use shardwise::{
    Result,
    comm::{Group, nccl::Options},
    device::{Cpu, Cuda},
    launch::Threads,
};
use std::{io::Write, time::Duration};

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

/// The number of GPUs; without one the process ends with success, having said that nothing was run.
pub(crate) fn needed() -> usize {
    match Cuda::count() {
        Ok(count) if count > 0 => count,
        outcome => {
            let why = outcome.err().map_or("there is no GPU".to_string(), |error| error.to_string());
            // Past libtest, which would swallow it.
            let words = format!(
                "\nCUDA's tests are NOT RUN: {why}\nscripts/cuda_standin.sh runs them without a GPU.\n"
            );
            let _ = std::io::stderr().write_all(words.as_bytes());
            std::process::exit(0);
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

/// The ranks of a host's group with a GPU each.
pub(crate) fn group(host: &Group<Cpu>) -> Result<Group<Dev>> {
    let cuda = of_rank(host)?;
    match worlds([host.size()]).next() {
        Some(_) => host.over_nccl(&cuda, Options { deadline: Duration::from_secs(60), ..Options::default() }),
        None => Ok(host.staged(&cuda)),
    }
}

/// The GPU of a rank.
pub(crate) fn of_rank(host: &Group<Cpu>) -> Result<Dev> {
    Cuda::poisoned(host.rank() % needed())
}

/// Those numbers of ranks that can have NCCL between them here: several on one GPU are not for every NCCL.
pub(crate) fn worlds(worlds: impl IntoIterator<Item = usize>) -> impl Iterator<Item = usize> {
    let many = std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some();
    let gpus = needed();
    worlds.into_iter().filter(move |&world| world <= gpus || many)
}
