//! Stochastic gradient descent.

use super::state::States;
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
    kernels::{Backend, SgdStep},
    tensor::Visit,
};

/// The choices of an [`Sgd`]; by default plain gradient descent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdConfig {
    /// What the velocity keeps of itself; 0 for none.
    pub momentum: f64,
    /// Whether the step looks ahead along the velocity.
    pub nesterov: bool,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
}

/// Stochastic gradient descent: with g ← grad + decay · w, v ← momentum · v + g,
/// w ← w − lr · v, or w ← w − lr · (g + momentum · v) with Nesterov's momentum.
///
/// As `torch.optim.SGD` without dampening. Source: Sutskever et al., 2013.
#[derive(Debug)]
pub struct Sgd<T: Element = f32, B: Device = Cpu> {
    config: SgdConfig,
    states: States<T, B>,
}

impl<T: Element, B: Device> Default for Sgd<T, B> {
    fn default() -> Self {
        Self { config: SgdConfig::default(), states: States::new("sgd", &[]) }
    }
}

impl<T: Element, B: Backend> Sgd<T, B> {
    /// With these choices.
    pub fn new(config: SgdConfig) -> Self {
        let sums: &[&str] = if config.momentum == 0.0 { &[] } else { &["velocity"] };
        Self { config, states: States::new("sgd", sums) }
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// Velocities belong to a parameter's name: any parameters may be visited, in any order.
    ///
    /// # Errors
    /// When a name is visited twice or has another shape or other pieces than before, or the device fails. Nothing has
    /// changed after the former.
    pub fn step(&mut self, visit: impl Visit<T, B>, lr: f64, grad_scale: f64) -> Result<()> {
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        let step = SgdStep { lr, momentum, nesterov, weight_decay, grad_scale };
        self.states.each(visit, |param, grad, state| {
            let (master, mut velocity) = state.slices()?;
            let weight = param.update_mut().slice_mut()?;
            grad.device().sgd(&step, grad.slice(), weight, master, velocity.pop())
        })
    }
}
