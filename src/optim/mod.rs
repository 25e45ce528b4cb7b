//! Optimizers, gradient norms, loss scales and learning rates. Know parameters, and groups only to sum norms over.
//!
//! An optimizer is given a model's parameters, which every layer and model lists as `params`:
//!
//! ```
//! # use shardwise::{Result, device::Cpu, comm::Group, optim::{AdamW, clip_scale, grad_norm}, parallel::*, tensor::{Random, Weights}};
//! # fn main() -> Result<()> {
//! # let world = Group::solo(&Cpu::new());
//! # let source = Random::normal(1, 0.02);
//! # let columns = Columns::even(&world, 8)?;
//! # let model = ColumnLinear::<f32, Cpu>::load(&world, &Weights::new(&source), 4, &columns, Bias::Add)?;
//! let mut optimizer = AdamW::default();
//! // after a backward …
//! let norm = grad_norm(&model.params(), &[&world])?;
//! optimizer.step(&model.params(), 1e-3, clip_scale(norm, 1.0)?)?;
//! # Ok(())
//! # }
//! # use shardwise::parallel::Layer;
//! ```
//!
//! Gradients are kept in the accumulator; parameters of bf16 and f16 have master weights there,
//! too. A master follows a value that is set after it.
//!
//! What an optimizer keeps belongs to a parameter's name. [`AdamW::state`] lists it as
//! parameters, which are saved as a model's are, and [`AdamW::load`] reads it on any other mesh.

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

use crate::error::{Error, Result};
use std::{fmt::Display, ops::Range};

/// How an optimizer treats one parameter; by default as its configuration says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamGroup {
    /// Multiplied with the learning rate.
    pub lr_scale: f64,
    /// The decay instead of the configuration's, of vectors too.
    pub weight_decay: Option<f64>,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self { lr_scale: 1.0, weight_decay: None }
    }
}

/// `Ok` if a choice lies in a range, which NaN does not.
fn within(op: &'static str, name: impl Display, value: f64, range: Range<f64>) -> Result<()> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(Error::invalid(op, format!("{name} is {value}, which is not in {range:?}"))),
    }
}
