//! A norm of a part of the features is not the norm of all.

use shardwise::{Result, device::Cpu, parallel::Normalize, shard::Shard};

fn normalizes_a_part(_: Normalize<Shard<1>, f32, Cpu>) {}

fn main() -> Result<()> {
    Ok(())
}
