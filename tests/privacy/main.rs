//! Tests private training. Feature `privacy`.

mod attacks;
mod audited;
mod canaries;
mod mistakes;
mod models;
mod released;
mod replicas;
mod resumed;
mod stages;
