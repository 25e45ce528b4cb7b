//! A stand-in for the CUDA driver, NVRTC, cuBLASLt and NCCL on a machine without a GPU, for tests only.
//!
//! Device memory is host memory in a checked table ([`memory`]), a stream is a queue of work ([`stream`]), kernels are the same
//! `.cu` files behind a header that makes them C++ ([`nvrtc`], [`kernel`]), and every operation carries a vector clock ([`clock`]).
//! Bounds, use after free, wrong device and races between streams are judged when an operation is enqueued, from what the program
//! ordered and not from how the threads happened to run: a planted bug is found every time. A graph's work ([`graph`]) is judged at each
//! launch.
//!
//! What a driver may do, this one does: calls that may wait for the whole device do ([`driver`]), and memory
//! that was freed is given out again ([`memory`]).
//!
//! | variable | meaning |
//! |---|---|
//! | `CUDA_STANDIN_DEVICES` | how many devices there are (8) |
//! | `CUDA_STANDIN_MEMORY` | the bytes of each (1 GiB) |
//! | `CUDA_STANDIN_SEED` | delays the streams' work at random |
//! | `CUDA_STANDIN_WAIT` | the seconds that a device may do nothing while a call waits for all of its work (10) |
//! | `CUDA_STANDIN_POOL` | `fresh`: no memory is given out twice |
//! | `CUDA_STANDIN_LT` | `varied`, `states`: see [`lt`] |
//! | `CUDA_MODULE_LOADING` | `EAGER`: kernels are loaded with their module, not when they are first asked for |
//! | `CUDA_STANDIN_CACHE` | where compiled kernels are kept |
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
