//! Tests private training. Feature `privacy`.

mod attacks;
mod canaries;
mod mistakes;
mod models;
mod released;
mod replicas;
mod resumed;
mod stages;
