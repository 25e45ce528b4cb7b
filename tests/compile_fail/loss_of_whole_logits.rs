//! The loss takes logits that are sharded over the ranks.

use shardwise::{
    Result,
    parallel::{DTensor, VocabParallelCrossEntropy},
    shard::Replicated,
};

fn gathers_too_early(loss: &VocabParallelCrossEntropy, logits: DTensor<Replicated>) -> Result<()> {
    loss.forward(logits, &[1]).map(|_| ())
}

fn main() -> Result<()> {
    Ok(())
}
