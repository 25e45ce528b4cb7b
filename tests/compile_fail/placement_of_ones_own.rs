//! What layers prove by placements rests on there being four of them: nobody adds a fifth, which could then be passed
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
