//! A group belongs to its rank's thread.

use shardwise::{Result, comm::Group, device::Cpu};

fn sends(group: Group<Cpu>) {
    std::thread::spawn(move || group.barrier());
}

fn main() -> Result<()> {
    Ok(())
}
