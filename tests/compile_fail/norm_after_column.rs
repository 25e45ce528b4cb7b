//! Behind a column-parallel layer the features are sharded; a norm needs all of them.

use shardwise::{
    Result,
    device::Cpu,
    parallel::{ColumnParallelLinear, Layer, Normalize},
    shard::Replicated,
};

type Column = ColumnParallelLinear<Replicated, f32, Cpu>;
type Norm = Normalize<Replicated, f32, Cpu>;

fn forgets_to_gather(column: Column, norm: Norm) {
    let _ = column.then(norm);
}

fn main() -> Result<()> {
    Ok(())
}
