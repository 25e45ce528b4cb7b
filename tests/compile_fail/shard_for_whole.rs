//! A rank's part is not the whole that a column-parallel layer wants.

use shardwise::{
    Result,
    device::Cpu,
    parallel::{ColumnLinear, DTensor, Layer},
    shard::Shard,
};

fn feeds_a_part(column: &ColumnLinear<f32, Cpu>, x: DTensor<Shard<1>>) -> Result<()> {
    column.forward(x).map(|_| ())
}

fn main() -> Result<()> {
    Ok(())
}
