//! What a chain that does not fit is used for does not hide why it does not.

use shardwise::{
    Result,
    device::Cpu,
    parallel::{ColumnParallelLinear, DTensor, Layer, Normalize},
    shard::Replicated,
};

type Column = ColumnParallelLinear<Replicated, f32, Cpu>;
type Norm = Normalize<Replicated, f32, Cpu>;

fn uses_it(column: Column, norm: Norm, x: DTensor<Replicated>) -> Result<()> {
    let model = column.then(norm);
    model.forward(x)?;
    Ok(())
}

fn main() -> Result<()> {
    Ok(())
}
