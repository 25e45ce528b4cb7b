//! Tensor-parallel operators: the linear and attention layers of a transformer, sharded over the
//! ranks of a group, with forward and backward. The tests compare each operator with a
//! single-device reference.
//!
//! In a column-parallel layer, each rank computes a shard of the output features. In a row-parallel
//! layer, each rank multiplies a shard of the input features by its shard of the weight, and an
//! all-reduce adds the ranks' products. With sequence parallelism, an all-gather and a
//! reduce-scatter replace the all-reduce. The placement of a tensor is part of its type, so that a
//! program does not compile if it applies a non-linear function to an unreduced sum.
//!
//! ```
//! use shardwise::prelude::*;
//!
//! let source = Random::normal(1, 0.02);
//! let outputs = launch::threads(3, |world| {
//!     // Each rank holds a third of the 64 hidden features: 22, 21 and 21.
//!     let (weights, names) = (Weights::new(&source), MlpNames::default());
//!     let mlp = ParallelMlp::<Replicated, f32, Cpu>::load(
//!         &world, &weights, &names, (16, 64), Activation::GeluErf, true,
//!     )?;
//!     let x = DTensor::replicated(&world, Tensor::full(world.device(), [4, 16], 1.0)?)?;
//!     let (y, saved) = mlp.forward(x)?;
//!     let dx = mlp.backward(saved, y.clone())?;
//!     Ok((y.local().to_vec()?, dx.local().to_vec()?))
//! })?;
//! assert_eq!(outputs[0], outputs[2]); // the same bits on every rank
//! # Ok::<(), shardwise::Error>(())
//! ```
//!
//! # Modules
//!
//! | module | contents | builds on |
//! |---|---|---|
//! | [`shard`] | the arithmetic of partitions, placements, heads, blocks and meshes | nothing |
//! | [`device`] | element types and memory | nothing |
//! | [`kernels`] | the computations on one device, one folder per family | devices |
//! | [`tensor`] | tensors, parameters, sources of weights | kernels |
//! | [`ops`] | operators on tensors of one rank | tensors |
//! | [`comm`] | groups and collectives | tensors |
//! | [`launch`] | starting ranks | groups |
//! | [`parallel`] | sharded tensors and layers: **start here** | operators and groups |
//! | [`optim`] | optimizers, gradient norms, loss scales, learning rates | parameters |
//! | [`train`] | data parallelism, pipelines, checks | layers and groups |
//! | [`security`] | keys, signed lists of ranks, and which transports a job may use | errors |
//! | [`trace`] | the flight recorder: the last operations of each rank | element types and errors |
//! | [`weights`] | Hugging Face checkpoints; each rank reads only its shards | tensors |
//! | [`prelude`] | the names that most programs use | all |
//! | [`models`] | Llama, Mistral, Qwen, GPT-2 and BERT from checkpoints | layers and checkpoints |
#![cfg_attr(
    feature = "plan",
    doc = "| [`plan`](mod@plan) | which strategy fits a model and a machine, and how fast it is | models |"
)]
#![cfg_attr(
    feature = "privacy",
    doc = "| [`privacy`] | differential privacy: private training (DP-SGD), and what it spends of a budget | training and checkpoints |"
)]
#![cfg_attr(
    feature = "reference",
    doc = "| [`reference`](mod@reference) | the single-device reference, in ndarray and f64 | nothing |"
)]
//!
//! [`parallel`] lists the layers with their placements and collectives; [`shard::Placement`] lists
//! the placements.
//!
//! # Features
//!
//! | feature | default | effect |
//! |---|---|---|
//! | `reference` | yes | the single-device reference |
//! | `cuda` | no | tensors on NVIDIA GPUs; the libraries are loaded at run time |
//! | `cli` | no | the program `shardwise`: starts ranks, reads their records, plans models |
//! | `plan` | no | the planner, which `cli` has too |
//! | `mpi` | no | groups of processes over an MPI library, which has to be installed |
//! | `nccl` | no | groups of GPUs over NCCL |
//! | `privacy` | no | private training (DP-SGD) and its accountant, which `cli` has too |
//! | `tls` | no | connections between processes over TLS 1.3, which `cli` has too |

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod comm;
pub mod device;
mod error;
pub mod kernels;
pub mod launch;
pub mod models;
pub mod ops;
pub mod optim;
pub mod parallel;
#[cfg(feature = "plan")]
pub mod plan;
pub mod prelude;
#[cfg(feature = "privacy")]
pub mod privacy;
#[cfg(feature = "reference")]
pub mod reference;
pub mod rng;
pub mod security;
pub mod shard;
pub mod tensor;
pub mod trace;
pub mod train;
pub mod weights;

pub use error::{Error, LostReason, Mismatch, Refusal, Result, Site, SiteGuard};
pub use tensor::Tensor;

/// Runs the code of README.md and of the pages in docs/ as doc tests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/invariance.md")]
    mod invariance {}
    #[doc = include_str!("../docs/mpi.md")]
    mod mpi {}
}
