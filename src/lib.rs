//! shardwise
#[macro_use]
mod error;
pub mod comm;
pub mod device;
pub mod kernels;
pub mod launch;
pub mod ops;
pub mod parallel;
pub mod rng;
pub mod shard;
pub mod tensor;
pub use error::{Error, Loss, Mismatch, Result, Site};
pub use tensor::Tensor;
pub mod weights;
#[cfg(feature = "reference")]
pub mod reference;
