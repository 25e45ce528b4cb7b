//! Optimizers, gradient norms, loss scales and learning rates. Know parameters, and groups only to sum norms over.
//!
//! An optimizer is given the way to a model's parameters, which every layer and model has as `visit`:
//!
//! ```
//! # use shardwise::{Result, device::Cpu, comm::Group, optim::{AdamW, clip_scale, grad_norm}, parallel::*, tensor::{Random, Weights}};
//! # fn main() -> Result<()> {
//! # let world = Group::solo(&Cpu::new());
//! # let source = Random::normal(1, 0.02);
//! # let columns = Columns::even(&world, 8)?;
//! # let mut model = ColumnLinear::<f32, Cpu>::load(&world, &Weights::new(&source), 4, &columns, Bias::Add)?;
//! let mut optimizer = AdamW::default();
//! // after a backward …
//! let norm = grad_norm(|f| model.visit(f), &[&world])?;
//! optimizer.step(|f| model.visit(f), 1e-3, clip_scale(norm, 1.0)?)?;
//! # Ok(())
//! # }
//! # use shardwise::parallel::Layer;
//! ```
//!
//! Gradients are kept in the accumulator; parameters of bf16 and f16 have master weights there, too.

mod adamw;
mod learning_rate;
mod norm;
mod scale;
mod sgd;
mod state;

pub use adamw::{AdamW, AdamWConfig};
pub use learning_rate::{Decay, LearningRate};
pub use norm::{clip_scale, grad_norm, require_finite};
pub use scale::LossScale;
pub use sgd::{Sgd, SgdConfig};
