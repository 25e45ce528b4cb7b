//! A stand-in for the CUDA driver, NVRTC, cuBLASLt and NCCL on a machine without a GPU, for tests only.
//!
//! Device memory is host memory in a checked table ([`memory`]), a stream is a queue of work ([`stream`]), kernels are the same
//! `.cu` files behind a header that makes them C++ ([`nvrtc`], [`kernel`]), and every operation carries a vector clock ([`clock`]).
//! Bounds, use after free, wrong device and races between streams are judged when an operation is enqueued, from what the program
//! ordered and not from how the threads happened to run: a planted bug is found every time. A graph's work ([`graph`]) is judged at each
//! launch.
#![allow(non_snake_case, clippy::missing_safety_doc)]

pub mod clock;
pub mod counts;
pub mod driver;
pub mod error;
pub mod graph;
pub mod kernel;
pub mod lt;
pub mod memory;
pub mod nccl;
pub mod nvrtc;
pub mod remote;
pub mod shared;
pub mod stream;
