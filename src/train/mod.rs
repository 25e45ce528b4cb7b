//! Training on many ranks: data parallelism, pipelines, and checks. Stands on layers and groups; optimizers are apart.
//!
//! | what | how |
//! |---|---|
//! | [`ShardedSampler`] | which samples a data-parallel rank sees, in which batches |
//! | [`DataParallel`] | gradients reduced in buckets while the backward runs, or to one rank that updates |
//! | [`Schedule`] | the order of a pipeline's passes and messages, as data: GPipe, 1F1B, interleaved 1F1B |
//! | [`Pipeline`] | runs a schedule over the stages of a model |
//! | [`check_replicas`] | finds a replica that has drifted |

mod buckets;
mod data_parallel;
mod drift;
mod pipeline;
mod sampler;
mod schedule;

pub use data_parallel::{DataParallel, GradReduce};
pub use drift::check_replicas;
pub use pipeline::{Microbatch, Pipeline, PipelineEnds};
pub use sampler::ShardedSampler;
pub use schedule::{Action, Compute, Message, Pass, Schedule};
