//! Planning: which strategy fits a model and a machine, and how fast it is.
//!
//! seconds = pipeline + max(0, reduction − last backward) + update
//!
//! bytes = weights + gradients + optimizer + activations + transients + cache
//!
//! `pipeline` is the end of a [`Timeline`], `reduction` that of gradients over replicas, `update`
//! the gradient norm and AdamW. Bytes, operations and transfers are those of the library's own
//! layers, run without data on [`Meta`](crate::device::Meta) (`dry`). Only seconds are a model:
//! [`Machine::kernel`] and [`Machine::seconds`]. The page `docs/planning.md` says what is assumed.
//!
//! | item | purpose |
//! |---|---|
//! | [`plan()`], [`plan_within`] | the best plans of a [`Job`] on a [`Machine`] |
//! | [`Limits`] | values that a strategy has to have |
//! | [`Plans`], [`Plan`] | the results; a plan is read from a file by [`Plan::read`] |
//! | [`Strategy`] | the mesh, schedule and options that constructors take |
//! | [`Preview`] | what one rank of a strategy holds, computes and moves |
//! | [`predict`], [`parts`] | the plan of one strategy, and what its step consists of |
//! | [`time_steps`] | the seconds of steps that ranks run, with random weights |
//! | [`Machine`] | rates of kernels and links: a preset, a file, or measured by [`Measure`] |
//! | [`Timeline`] | the passes and exchanges of a pipeline |
//! | [`megatron`] | closed forms for models that Megatron-LM trains |

mod bounds;
mod dry;
mod job;
mod limits;
mod machine;
mod measure;
pub mod megatron;
mod outcome;
mod preview;
mod reasons;
mod saved;
mod search;
mod stage;
mod strategy;
pub mod text;
mod timeline;
mod traffic;
mod trial;

pub use job::{Goal, Job};
pub use limits::Limits;
pub use machine::{Collective, Link, Machine, Parts, Rate, Rates, Run, Transport, TypeRates};
pub use measure::Measure;
pub use outcome::{Exposed, Memory, Plan, Plans, RankUse, Refusal, Verdict};
pub use preview::Preview;
pub use search::{parts, plan, plan_within, predict};
pub use strategy::Strategy;
pub use timeline::{Passes, Span, SpanWork, Timeline};
pub use traffic::{Traffic, Transfers};
pub use trial::time_steps;
