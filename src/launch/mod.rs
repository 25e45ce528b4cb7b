//! Starting ranks: as threads of this process, or as processes that a launcher has started.

mod env;
#[cfg(feature = "mpi")]
mod mpi;
mod rendezvous;
mod threads;

pub use env::Env;
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, mpi};
pub use threads::{Threads, threads};
