//! Two column-parallel layers do not follow one another: between them the features are sharded.

use shardwise::{
    Result,
    device::Cpu,
    parallel::{ColumnLinear, Layer},
};

fn chains(first: ColumnLinear<f32, Cpu>, second: ColumnLinear<f32, Cpu>) {
    let _ = first.then(second);
}

fn main() -> Result<()> {
    Ok(())
}
