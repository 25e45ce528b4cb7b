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

/// The options of [`Sgd`]. The default is plain gradient descent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SgdConfig {
    /// The momentum, 0 for none.
    pub momentum: f64,
    /// Whether to use Nesterov's momentum.
    pub nesterov: bool,
    /// The weight decay.
    pub weight_decay: f64,
}

impl SgdConfig {
    /// Sets the momentum, 0 for none.
    pub fn with_momentum(self, momentum: f64) -> Self {
        Self { momentum, ..self }
    }

    /// Sets whether to use Nesterov's momentum.
    pub fn with_nesterov(self, nesterov: bool) -> Self {
        Self { nesterov, ..self }
    }

    /// Sets the weight decay.
    pub fn with_weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }
}

/// g ← grad + decay · w, v ← momentum · v + g, w ← w − lr · v: stochastic gradient descent. With
/// Nesterov's momentum, w ← w − lr · (g + momentum · v).
///
/// As `torch.optim.SGD` without dampening. Source: Sutskever et al., 2013.
///
/// ```
/// use shardwise::{optim::{Sgd, SgdConfig}, prelude::*};
/// let mut arrays = Arrays::default();
/// arrays.0.insert("w".into(), ndarray::array![1.0].into_dyn());
/// let (cpu, weights, whole) = (Cpu::new(), Weights::new(&arrays), Region::whole([1]));
/// let w = Param::<f64, _>::load_region(&cpu, &weights, "w", Role::Bias, whole, true)?;
/// w.set_grad(Tensor::from_vec(&cpu, [1], vec![2.0])?)?;
/// let mut sgd = Sgd::new(SgdConfig::default().with_momentum(0.5));
/// (0..2).try_for_each(|_| sgd.step(&[w.clone()], 0.25, 1.0))?;
/// assert_eq!(w.value()?.to_vec()?, [1.0 - 0.25 * 2.0 - 0.25 * (0.5 * 2.0 + 2.0)]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Sgd<T: Element = f32, B: Device = Cpu> {
    config: SgdConfig,
    states: States<T, B>,
}

const OP: &str = "sgd";

/// Returns the layout of the state, which has a velocity only with momentum.
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
    /// Makes an optimizer without state.
    pub fn new(config: SgdConfig) -> Self {
        Self { config, states: States::new(layout(&config)) }
    }

    /// Reads the state of these parameters from a source, as [`super::AdamW::load`].
    ///
    /// # Errors
    /// As [`super::AdamW::load`].
    pub fn load(config: SgdConfig, source: &dyn WeightSource, params: &[Param<T, B>]) -> Result<Self> {
        Ok(Self { config, states: States::load(layout(&config), source, params)? })
    }

    /// Sets the function that returns the options of each parameter, as [`super::AdamW::groups`].
    pub fn groups(mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) -> Self {
        self.states.set_groups(groups);
        self
    }

    /// Lists the state of each parameter, as [`super::AdamW::state`]. For a tensor `w` of the model
    /// the state has `sgd.velocity.w` if the optimizer has momentum, and `sgd.master.w` if `w` is
    /// bf16 or f16.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn state(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        self.states.params()
    }

    /// Updates every parameter that has a gradient. Multiplies the gradient by `grad_scale` first.
    ///
    /// State is keyed by the parameter's name, so each call may list any parameters in any order.
    ///
    /// # Errors
    /// Before any parameter changes: when a number is out of range (a negative or infinite rate,
    /// momentum or decay, a `grad_scale` that is not finite), and in the other cases of
    /// [`super::AdamW::step`]. During the update: when the device fails. Some parameters may be
    /// updated then.
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
