//! How the stream is held, the element and the device are chosen, not inferred.

use shardwise::{
    Result,
    kernels::Activation,
    launch,
    parallel::{Layer, MlpNames, ParallelMlp},
    tensor::{Random, Weights},
};

fn main() -> Result<()> {
    launch::threads(2, |world| {
        let source = Random::normal(1, 0.1);
        let names = MlpNames::default();
        let mlp = ParallelMlp::load(&world, &Weights::new(&source), &names, (4, 8), Activation::Silu, false)?;
        Ok(mlp.params().len())
    })?;
    Ok(())
}
