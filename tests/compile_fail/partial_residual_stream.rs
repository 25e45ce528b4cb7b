//! A residual stream is replicated or sharded by tokens; partial sums in it would be normalized.

use shardwise::{
    Result,
    device::Cpu,
    parallel::RowParallelLinear,
    shard::Partial,
};

fn leaves_the_sum(_: RowParallelLinear<Partial, f32, Cpu>) {}

fn main() -> Result<()> {
    Ok(())
}
