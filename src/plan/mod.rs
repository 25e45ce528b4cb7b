//! Planning: which strategy fits a model and a machine, and how fast it is.

mod job;
mod machine;
pub mod megatron;
mod outcome;
mod strategy;
mod timeline;

pub use job::{Goal, Job};
pub use machine::{Link, Machine, Rate};
pub use outcome::{Exposed, Memory, Passes, Plan, Plans, RankUse, Refusal, Verdict};
pub use strategy::Strategy;
pub use timeline::{Span, SpanWork, Timeline};
