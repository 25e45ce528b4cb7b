//! A stand-in for the CUDA driver, NVRTC, cuBLASLt and NCCL on a machine without a GPU. For tests
//! only.
//!
//! Device memory is host memory in a checked table ([`memory`]), a stream is a queue of work
//! ([`stream`]), kernels are the same `.cu` files compiled as C++ through a header ([`nvrtc`],
//! [`kernel`]), and every operation carries a vector clock ([`clock`]). Bounds, use after free,
//! wrong device and races between streams are derived from the order that the program established,
//! not from the timing of the threads: a planted bug is found every time. A kernel's accesses are
//! recorded while it runs and checked then; everything else is checked when it is enqueued. A
//! graph's work ([`graph`]) is checked at each launch.
//!
//! Whatever a driver may do, this one does: calls that may wait for the whole device wait
//! ([`driver`]), and freed memory is reused ([`memory`]).
//!
//! | variable | meaning |
//! |---|---|
//! | `CUDA_STANDIN_DEVICES` | the number of devices (8) |
//! | `CUDA_STANDIN_MEMORY` | the bytes of each device (1 GiB) |
//! | `CUDA_STANDIN_SEED` | delays the streams' work at random |
//! | `CUDA_STANDIN_WAIT` | seconds without progress after which a waiting call is a deadlock (10) |
//! | `CUDA_STANDIN_POOL` | `fresh`: memory is never reused |
//! | `CUDA_STANDIN_LT` | `varied`, `states`: see [`lt`] |
//! | `CUDA_MODULE_LOADING` | `EAGER`: kernels are loaded with their module, not on first use |
//! | `CUDA_STANDIN_CACHE` | the folder of compiled kernels |
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
