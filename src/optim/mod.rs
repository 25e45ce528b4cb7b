//! Optimizers, gradient norms, loss scales and learning rates. Optimizers and norms take lists of
//! parameters. Only norms use groups.
//!
//! Every layer and model lists its parameters in `params`. An optimizer takes that list:
//!
//! ```
//! use shardwise::{optim::*, prelude::*};
//! # let world = Group::solo(&Cpu::new());
//! # let (source, columns) = (Random::normal(1, 0.02), Columns::even(&world, 8)?);
//! # let weights = Weights::new(&source);
//! # let model = ColumnLinear::<f32, _>::load(&world, &weights, 4, &columns, Bias::Add)?;
//! let mut optimizer = AdamW::default();
//! // after a backward …
//! let norm = grad_norm(&model.params(), &[&world])?;
//! optimizer.step(&model.params(), 1e-3, clip_scale(norm, 1.0)?)?;
//! # Ok::<(), Error>(())
//! ```
//!
//! Gradients have the accumulator type, and so have the master weights that an optimizer keeps of
//! bf16 and f16 parameters. After the caller sets a parameter's value, the next step updates the
//! parameter's master weights.
//!
//! State is keyed by the parameter's name. [`AdamW::state`] returns the state as a list of
//! parameters, and [`crate::weights::save`] can write this list like the parameters of a model.
//! [`AdamW::load`] reads the state on any mesh.

mod adamw;
mod learning_rate;
mod norm;
mod scale;
mod sgd;
mod state;

pub use adamw::{AdamW, AdamWConfig};
pub use learning_rate::{Decay, LearningRate};
pub use norm::{clip_scale, grad_norm, require_finite, sample_norms};
pub use scale::LossScale;
pub use sgd::{Sgd, SgdConfig};

use crate::error::{Error, Result};
use std::{fmt::Display, ops::Range};

/// Options of one parameter. The default keeps the options of the optimizer's configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamGroup {
    /// The factor that multiplies the learning rate.
    pub lr_scale: f64,
    /// The weight decay of this parameter, also if it is a vector. `None` keeps the
    /// configuration's.
    pub weight_decay: Option<f64>,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self { lr_scale: 1.0, weight_decay: None }
    }
}

/// Checks that an option lies in a range. NaN is outside every range.
fn within(op: &'static str, name: impl Display, value: f64, range: Range<f64>) -> Result<()> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(Error::invalid(op, format!("{name} is {value}, which is not in {range:?}")))
    }
}
