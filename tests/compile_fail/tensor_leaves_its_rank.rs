//! A tensor belongs to its rank's thread; its values may leave it.

use shardwise::{Result, Tensor, launch};

fn main() -> Result<()> {
    launch::threads(2, |world| Tensor::<f32>::zeros(world.device(), [2, 2]))?;
    Ok(())
}
