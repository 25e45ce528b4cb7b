//! AdamW.

use super::state::{State, States};
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
    steps: u64,
    states: States<T, B, 2>,
}

impl<T: Element, B: Device> Default for AdamW<T, B> {
    fn default() -> Self {
        Self { config: AdamWConfig::default(), steps: 0, states: States::default() }
    }
}

impl<T: Element, B: Backend> AdamW<T, B> {
    /// With these choices.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// The number of steps made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// # Errors
    /// When `visit` passes other parameters than at the first step, or the device fails.
    pub fn step(&mut self, visit: impl Visit<T, B>, lr: f64, grad_scale: f64) -> Result<()> {
        self.steps += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay_vectors } = self.config;
        let all = AdamWStep { step: self.steps, lr, beta1, beta2, eps, weight_decay, grad_scale };
        self.states.each(
            "adamw",
            visit,
            |device, grad, value, State { master, sums: [first, second], .. }| {
                let decays = decay_vectors || value.shape().rank() > 1;
                let step = AdamWStep { weight_decay: if decays { weight_decay } else { 0.0 }, ..all };
                let master = State::<T, B, 2>::master(master)?;
                let moments = [first.slice_mut()?, second.slice_mut()?];
                device.adamw(&step, grad.slice(), value.slice_mut()?, master, moments)
            },
        )
    }
}
