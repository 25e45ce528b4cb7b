//! Stochastic gradient descent.

use super::state::{State, States};
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
    plain: States<T, B, 0>,
    moving: States<T, B, 1>,
}

impl<T: Element, B: Device> Default for Sgd<T, B> {
    fn default() -> Self {
        Self { config: SgdConfig::default(), plain: States::default(), moving: States::default() }
    }
}

impl<T: Element, B: Backend> Sgd<T, B> {
    /// With these choices.
    pub fn new(config: SgdConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// # Errors
    /// When `visit` passes other parameters than at the first step, or the device fails.
    pub fn step(&mut self, visit: impl Visit<T, B>, lr: f64, grad_scale: f64) -> Result<()> {
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        let step = SgdStep { lr, momentum, nesterov, weight_decay, grad_scale };
        if momentum == 0.0 {
            return self.plain.each("sgd", visit, |device, grad, value, State { master, .. }| {
                let master = State::<T, B, 0>::master(master)?;
                device.sgd(&step, grad.slice(), value.slice_mut()?, master, None)
            });
        }
        self.moving.each("sgd", visit, |device, grad, value, State { master, sums: [velocity], .. }| {
            let master = State::<T, B, 1>::master(master)?;
            device.sgd(&step, grad.slice(), value.slice_mut()?, master, Some(velocity.slice_mut()?))
        })
    }
}
