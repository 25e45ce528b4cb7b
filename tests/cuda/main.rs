//! Tests of the CUDA device, and the operator suite on it.
//!
//! On a machine with GPUs they run there; `scripts/cuda_standin.sh cargo test --features nccl --test cuda` runs them on one without.
//! Otherwise they say that they were not run.

mod dev;
mod kernels;
