//! Planning: which strategy fits a model and a machine, and how fast it is.

mod dry;
mod job;
mod limits;
mod machine;
pub mod megatron;
mod outcome;
mod preview;
mod reasons;
mod saved;
mod search;
mod stage;
mod strategy;
mod text;
mod timeline;
mod traffic;

pub use job::{Goal, Job};
pub use limits::Limits;
pub use machine::{Link, Machine, Rate};
pub use outcome::{Exposed, Memory, Plan, Plans, RankUse, Refusal, Verdict};
pub use preview::Preview;
pub use search::{plan, plan_within};
pub use strategy::Strategy;
pub use timeline::{Passes, Span, SpanWork, Timeline};
pub use traffic::{Traffic, Transfers};
