//! AdamW.

use super::state::States;
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
    kernels::{AdamWStep, Backend},
    tensor::Visit,
};

/// The choices of an [`AdamW`]. The defaults are PyTorch's, but for [`AdamWConfig::decay_vectors`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// What the first moment keeps of itself.
    pub beta1: f64,
    /// What the second moment keeps of itself.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The decay of weights.
    pub weight_decay: f64,
    /// Whether vectors (biases, the scales of norms) decay, too. Usually not: off by default.
    pub decay_vectors: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, decay_vectors: false }
    }
}

/// AdamW: m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
/// w ← w − lr · decay · w − lr · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).
///
/// Source: Loshchilov and Hutter, 2019.
#[derive(Debug)]
pub struct AdamW<T: Element = f32, B: Device = Cpu> {
    config: AdamWConfig,
    states: States<T, B>,
}

impl<T: Element, B: Device> Default for AdamW<T, B> {
    fn default() -> Self {
        Self { config: AdamWConfig::default(), states: States::new("adamw", &["m", "v"]) }
    }
}

impl<T: Element, B: Backend> AdamW<T, B> {
    /// With these choices.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// The number of steps made: the largest of any parameter.
    pub fn steps(&self) -> u64 {
        self.states.steps()
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// Moments belong to a parameter's name, and t is the number of the parameter's own steps, as in PyTorch: any
    /// parameters may be visited, in any order.
    ///
    /// # Errors
    /// When a name is visited twice or has another shape or other pieces than before, or the device fails. Nothing has
    /// changed after the former.
    pub fn step(&mut self, visit: impl Visit<T, B>, lr: f64, grad_scale: f64) -> Result<()> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay_vectors } = self.config;
        self.states.each(visit, |param, grad, state| {
            let decays = decay_vectors || param.value().shape().rank() > 1;
            let weight_decay = if decays { weight_decay } else { 0.0 };
            let step = AdamWStep { step: state.steps, lr, beta1, beta2, eps, weight_decay, grad_scale };
            let (master, moments) = state.slices()?;
            let moments = moments.try_into().ok().expect("the state has both moments");
            let weight = param.update_mut().slice_mut()?;
            grad.device().adamw(&step, grad.slice(), weight, master, moments)
        })
    }
}
