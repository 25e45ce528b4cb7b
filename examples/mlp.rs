//! A tensor-parallel MLP on four ranks, forward and backward. Each rank holds a quarter of both
//! weights.
//!
//! `cargo run --release --bin mlp`

use shardwise::prelude::*;

fn main() -> Result<()> {
    let source = Random::normal(1, 0.02);
    let squares = launch::threads(4, |world| {
        let weights = Weights::new(&source);
        let columns = Columns::even(&world, 1024)?;
        let up = ColumnLinear::<f32, Cpu>::load(&world, &weights.at("up"), 256, &columns, Bias::Add)?;
        let down = RowLinear::load(&world, &weights.at("down"), columns.partition(), 256)?;
        let mlp = CopyTo.then(up).then(Activate::new(Activation::GeluErf)).then(down).then(ReduceFrom);

        let x = DTensor::replicated(&world, Tensor::full(world.device(), [64, 256], 1.0)?)?;
        let (y, saved) = mlp.forward(x)?;
        let dx = mlp.backward(saved, y.clone())?;
        Ok((y.local().as_array().map(|v| v * v).sum(), dx.local().as_array().map(|v| v * v).sum()))
    })?;
    println!("|y|² and |dx|² on each rank: {squares:?}");
    Ok(())
}
