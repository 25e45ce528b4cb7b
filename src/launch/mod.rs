//! Starting ranks.

mod threads;

pub use threads::{Threads, threads};
