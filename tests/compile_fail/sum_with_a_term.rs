//! A term of a sum is not added to a whole tensor: it would be counted once a rank.

use shardwise::{
    Result,
    parallel::DTensor,
    shard::{Partial, Replicated},
};

fn forgets_to_reduce(x: DTensor<Replicated>, y: DTensor<Partial>) -> Result<DTensor<Replicated>> {
    x.add(&y)
}

fn main() -> Result<()> {
    Ok(())
}
