//! Starting ranks: as threads of this process, or as processes that a launcher has started.

mod env;
mod rendezvous;
mod threads;

pub use env::Env;
pub use threads::{Threads, threads};
