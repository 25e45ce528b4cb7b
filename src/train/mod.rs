//! Training on many ranks: data parallelism, pipelines, and consistency checks. This module uses
//! layers and groups, but no optimizers.
//!
//! | item | purpose |
//! |---|---|
//! | [`ShardedSampler`] | assigns the samples of each batch to data-parallel ranks |
//! | [`DataParallel`] | reduces gradients in buckets during the backward, to all ranks or to one |
//! | [`Schedule`] | the order of a pipeline's passes as data: GPipe, 1F1B, interleaved 1F1B |
//! | [`Pipeline`] | runs a schedule over the stages of a model |
//! | [`check_replicas`] | detects replicas that have drifted apart |

mod buckets;
mod data_parallel;
mod drift;
mod pipeline;
mod sampler;
mod schedule;

#[cfg(feature = "plan")]
pub(crate) use buckets::assign as assign_buckets;
#[cfg(feature = "plan")]
pub(crate) use data_parallel::BUCKET;
pub use data_parallel::{DataParallel, GradReduce};
pub use drift::check_replicas;
pub use pipeline::{Microbatch, Pipeline, PipelineEnds};
pub use sampler::ShardedSampler;
pub use schedule::{Action, Compute, Message, Pass, Schedule};
