//! Runs ranks: as threads of this process, or as processes that a launcher has started.

mod env;
#[cfg(feature = "mpi")]
mod mpi;
mod processes;
mod rank;
mod rendezvous;
mod threads;

pub use env::Env;
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, mpi};
pub use threads::{Outcome, Threads, threads};

/// The maximum number of ranks, which no real job reaches. It bounds memory, because every process
/// keeps a list of all ranks, and a thread rank takes about 40 kB.
const MAX_RANKS: usize = 1 << 16;
