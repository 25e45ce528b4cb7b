//! The proofs by placements rest on there being four of them. Nobody can add a fifth, to be passed
//! to a layer as if it were one.

use shardwise::{
    Result,
    shard::Placement,
};

#[derive(Debug)]
enum Half {}

impl Placement for Half {
    type Dual = Half;
    const NAME: &'static str = "Half";
}

fn main() -> Result<()> {
    Ok(())
}
