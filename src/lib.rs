//! Tensor-parallel operators: the linear and attention layers of a transformer, split over the ranks of a group, forward and
//! backward, each verified against a single-device reference.
//!
//! A column-parallel layer computes its own output features, a row-parallel one multiplies its own input features, and an
//! all-reduce, or an all-gather and a reduce-scatter, puts the parts together. How a tensor is spread over the ranks is part
//! of its type: a sum that was not reduced cannot be fed to a non-linear function, because that does not compile.
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
//! # Where things are
//!
//! | module | what | knows |
//! |---|---|---|
//! | [`shard`] | partitions, placements, heads, blocks, meshes: arithmetic | sizes |
//! | [`device`] | elements and memory | |
//! | [`kernels`] | the mathematics on one device, a folder a family | devices |
//! | [`tensor`] | tensors, parameters, sources of weights | kernels |
//! | [`ops`] | operators on one rank's tensors | tensors |
//! | [`comm`] | groups and collectives | tensors |
//! | [`launch`] | starting ranks | groups |
//! | [`parallel`] | sharded tensors and layers: **start here** | operators and groups |
//! | [`optim`] | optimizers, gradient norms, loss scales, learning rates | parameters |
//! | [`train`] | data parallelism, pipelines, checks | layers and groups |
//! | [`trace`] | what each rank has done last, and who broke a job | elements and errors |
//! | [`weights`] | Hugging Face checkpoints, read in parts | tensors |
//! | [`prelude`] | the names that most programs use | all |
//! | [`models`] | Llama, Mistral, Qwen, GPT-2 and BERT from checkpoints | layers and checkpoints |
#![cfg_attr(
    feature = "reference",
    doc = "| [`reference`](mod@reference) | the single-device reference, in ndarray and f64 | nothing |"
)]
//!
//! The layers with their placements and collectives are listed in [`parallel`], the placements in [`shard::Placement`].
//!
//! # Features
//!
//! | feature | default | what |
//! |---|---|---|
//! | `reference` | yes | the single-device reference |
//! | `cuda` | no | tensors on NVIDIA GPUs; libraries are loaded at run time |
//! | `cli` | no | the program `shardwise`, which starts ranks on a machine |
//! | `mpi` | no | ranks that an MPI library connects; it has to be installed |
//! | `nccl` | no | groups of GPUs over NCCL |

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
pub mod prelude;
#[cfg(feature = "reference")]
pub mod reference;
pub mod rng;
pub mod shard;
pub mod tensor;
pub mod trace;
pub mod train;
pub mod weights;

pub use error::{Error, LostReason, Mismatch, Result, Site, SiteGuard};
pub use tensor::Tensor;
