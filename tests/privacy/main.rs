//! Tests private training. Feature `privacy`.

mod attacks;
mod audited;
mod canaries;
#[path = "../suite/claims.rs"]
mod claims;
mod keys;
mod mistakes;
mod models;
mod released;
mod replicas;
mod resumed;
mod stages;
