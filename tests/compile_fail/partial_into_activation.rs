//! The sum of a row-parallel linear layer has to be reduced before a non-linear function.

use shardwise::{
    Result,
    device::Cpu,
    kernels::Activation,
    parallel::{Activate, Chain, Layer, RowLinear},
};

fn forgets_to_reduce(row: RowLinear<f32, Cpu>) -> Chain<RowLinear<f32, Cpu>, impl Layer<f32, Cpu>> {
    row.then(Activate::new(Activation::GeluErf))
}

fn main() -> Result<()> {
    Ok(())
}
