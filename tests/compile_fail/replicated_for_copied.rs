//! A replicated tensor has to be copied to the ranks first: its gradient would not be summed.

use shardwise::{
    Result,
    device::Cpu,
    parallel::{ColumnLinear, DTensor, Layer},
    shard::Replicated,
};

fn forgets_the_gradient(column: &ColumnLinear<f32, Cpu>, x: DTensor<Replicated>) -> Result<()> {
    column.forward(x).map(|_| ())
}

fn main() -> Result<()> {
    Ok(())
}
