//! AdamW.

use super::{
    ParamGroup,
    state::{Layout, States},
    within,
};
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
    kernels::{AdamWStep, Backend},
    tensor::{Param, WeightSource},
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

const OP: &str = "adamw";
const LAYOUT: Layout = Layout { op: OP, sums: &["m", "v"], counts: true };

impl<T: Element, B: Device> Default for AdamW<T, B> {
    fn default() -> Self {
        Self { config: AdamWConfig::default(), states: States::new(LAYOUT) }
    }
}

impl<T: Element, B: Backend> AdamW<T, B> {
    /// With these choices.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Reads the states of some parameters from a source, such as a checkpoint of [`AdamW::state`],
    /// saved on any mesh. Parameters of which it has nothing begin anew.
    ///
    /// Load the model first: a master weight that does not round to the parameter's value is taken
    /// from the value.
    ///
    /// # Errors
    /// When the source has a part of a parameter's state only, or of another shape, or a name is
    /// there twice.
    pub fn load(config: AdamWConfig, source: &dyn WeightSource, params: &[Param<T, B>]) -> Result<Self> {
        Ok(Self { config, states: States::load(LAYOUT, source, params)? })
    }

    /// Gives each parameter the rate and the decay that `groups` says, which is asked at every step.
    ///
    /// ```
    /// use shardwise::optim::{AdamW, ParamGroup};
    /// let adamw = AdamW::<f32>::default().groups(|param| match param.name() {
    ///     name if name.ends_with("norm.weight") => ParamGroup { weight_decay: Some(0.0), ..ParamGroup::default() },
    ///     "embedding.weight" => ParamGroup { lr_scale: 0.1, ..ParamGroup::default() },
    ///     _ => ParamGroup::default(),
    /// });
    /// ```
    pub fn groups(mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) -> Self {
        self.states.set_groups(groups);
        self
    }

    /// What is kept for each parameter that has had a gradient, in the order of their first
    /// gradients, which is the same on every rank.
    ///
    /// That is, for a tensor `w` of the model, `adamw.m.w`, `adamw.v.w`, of bf16 and f16
    /// `adamw.master.w`, and `adamw.step.w`, the number of steps, exact up to 2²⁴ in f32. The last
    /// has one element, and is owned by the rank that owns the first element of `w`; the others are
    /// cut and owned as `w` is. What is written there is used from the next step on.
    ///
    /// # Errors
    /// When a number of steps was written that is none, or the device has no memory left.
    pub fn state(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        self.states.params()
    }

    /// The number of steps made: the largest of any parameter.
    pub fn steps(&self) -> u64 {
        self.states.steps()
    }

    /// One step on every parameter that has a gradient, which is multiplied with `grad_scale` first.
    ///
    /// Moments belong to a parameter's name, and t is the number of the parameter's own steps, as
    /// in PyTorch: any parameters may be given, in any order.
    ///
    /// # Errors
    /// When a number makes no sense (a negative or infinite rate or decay, a β outside [0, 1), an ε
    /// that is not positive, a `grad_scale` that is not finite), or a name is there twice or has
    /// another shape or other regions than before, or has a gradient and is not kept as a dense
    /// tensor, or one that is not summed over its replicas yet: nothing has changed then. When the
    /// device fails.
    pub fn step(&mut self, params: &[Param<T, B>], lr: f64, grad_scale: f64) -> Result<()> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay_vectors } = self.config;
        within(OP, "lr", lr, 0.0..f64::INFINITY)?;
        within(OP, "grad_scale", grad_scale, f64::MIN..f64::INFINITY)?;
        within(OP, "beta1", beta1, 0.0..1.0)?;
        within(OP, "beta2", beta2, 0.0..1.0)?;
        within(OP, "eps", eps, f64::MIN_POSITIVE..f64::INFINITY)?;
        within(OP, "weight_decay", weight_decay, 0.0..f64::INFINITY)?;
        self.states.each(params, |param, grad, group, state| {
            let decays = decay_vectors || param.shape().rank() > 1;
            let weight_decay = group.weight_decay.unwrap_or(if decays { weight_decay } else { 0.0 });
            let lr = lr * group.lr_scale;
            let step = AdamWStep { step: state.steps, lr, beta1, beta2, eps, weight_decay, grad_scale };
            let device = param.device();
            state.write(|master, moments| {
                let moments = moments.try_into().ok().expect("the state has both moments");
                device.adamw(&step, grad.slice(), param.value_mut()?.slice_mut()?, master, moments)
            })
        })
    }
}
