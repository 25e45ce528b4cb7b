//! Ranks with one GPU each, as threads of this process.

use shardwise::{
    Result,
    comm::{Group, nccl::Options},
    device::Cuda,
    launch::{self, Outcome},
};

/// Runs `rank` with the group of GPUs 0 to `ranks` − 1 over NCCL.
pub(crate) fn run<R: Outcome>(
    ranks: usize,
    rank: impl Fn(&Group<Cuda>) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    launch::threads(ranks, |world| {
        let gpu = Cuda::new(world.rank())?;
        rank(&world.over_nccl(&gpu, Options::default())?)
    })
}
