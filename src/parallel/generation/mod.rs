//! Text generation: the cache of keys and values, and sampling.

mod kv_cache;
mod sampler;

pub use {
    kv_cache::{Context, KvCache},
    sampler::Sampler,
};
