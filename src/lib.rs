//! shardwise
#[macro_use]
mod error;
pub mod device;
pub mod shard;
pub use error::{Error, Loss, Mismatch, Result, Site};
#[cfg(feature = "reference")]
pub mod reference;
