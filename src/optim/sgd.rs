//! Stochastic gradient descent.

use super::{
    ParamGroup,
    state::{Layout, States},
    within,
};
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
    kernels::{Backend, SgdStep},
    tensor::{Param, WeightSource},
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

const OP: &str = "sgd";

/// Without momentum there is no velocity.
fn layout(config: &SgdConfig) -> Layout {
    let sums: &[&str] = if config.momentum == 0.0 { &[] } else { &["velocity"] };
    Layout { op: OP, sums, counts: false }
}

impl<T: Element, B: Device> Default for Sgd<T, B> {
    fn default() -> Self {
        let config = SgdConfig::default();
        Self { config, states: States::new(layout(&config)) }
    }
}

impl<T: Element, B: Backend> Sgd<T, B> {
    /// With these choices.
    pub fn new(config: SgdConfig) -> Self {
        Self { config, states: States::new(layout(&config)) }
    }

    /// Reads the states of some parameters from a source, as [`super::AdamW::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(config: SgdConfig, source: &dyn WeightSource, params: &[Param<T, B>]) -> Result<Self> {
        Ok(Self { config, states: States::load(layout(&config), source, params)? })
    }

    /// Gives each parameter the rate and the decay that `groups` says, as [`super::AdamW::groups`].
    pub fn groups(mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) -> Self {
        self.states.set_groups(groups);
        self
    }

    /// What is kept for each parameter that has had a gradient, as [`super::AdamW::state`]: for a
    /// tensor `w` of the model, with momentum `sgd.velocity.w`, and of bf16 and f16 `sgd.master.w`.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn state(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        self.states.params()
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// Velocities belong to a parameter's name: any parameters may be given, in any order.
    ///
    /// # Errors
    /// When a number makes no sense (a negative or infinite rate, momentum or decay, a `grad_scale`
    /// that is not finite), or a name is there twice or has another shape or other regions than
    /// before, or has a gradient and is not kept as a dense tensor, or one that is not summed over
    /// its replicas yet: nothing has changed then. When the device fails.
    pub fn step(&mut self, params: &[Param<T, B>], lr: f64, grad_scale: f64) -> Result<()> {
        let SgdConfig { momentum, nesterov, weight_decay } = self.config;
        within(OP, "lr", lr, 0.0..f64::INFINITY)?;
        within(OP, "grad_scale", grad_scale, f64::MIN..f64::INFINITY)?;
        within(OP, "momentum", momentum, 0.0..f64::INFINITY)?;
        within(OP, "weight_decay", weight_decay, 0.0..f64::INFINITY)?;
        self.states.each(params, |param, grad, group, state| {
            let weight_decay = group.weight_decay.unwrap_or(weight_decay);
            let lr = lr * group.lr_scale;
            let step = SgdStep { lr, momentum, nesterov, weight_decay, grad_scale };
            let device = param.device();
            state.write(|master, mut velocity| {
                device.sgd(&step, grad.slice(), param.value_mut()?.slice_mut()?, master, velocity.pop())
            })
        })
    }
}
