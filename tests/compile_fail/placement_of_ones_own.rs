//! What layers prove by placements rests on there being four of them.

use shardwise::shard::Placement;

enum Half {}

impl Placement for Half {
    type Dual = Half;
    const NAME: &'static str = "Half";
}

fn main() {}
