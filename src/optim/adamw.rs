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

/// The options of [`AdamW`]. The defaults are PyTorch's except for [`AdamWConfig::decay_vectors`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamWConfig {
    /// β₁, the decay rate of the first moment.
    pub beta1: f64,
    /// β₂, the decay rate of the second moment.
    pub beta2: f64,
    /// ε, added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// Whether the weight decay also applies to vectors (biases, the scales of norms). `false` by
    /// default.
    pub decay_vectors: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, decay_vectors: false }
    }
}

impl AdamWConfig {
    /// Sets β₁, the decay rate of the first moment.
    pub fn with_beta1(self, beta1: f64) -> Self {
        Self { beta1, ..self }
    }

    /// Sets β₂, the decay rate of the second moment.
    pub fn with_beta2(self, beta2: f64) -> Self {
        Self { beta2, ..self }
    }

    /// Sets ε, added to the root of the second moment.
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    /// Sets the weight decay.
    pub fn with_weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }

    /// Sets whether the weight decay also applies to vectors.
    pub fn with_decay_vectors(self, decay_vectors: bool) -> Self {
        Self { decay_vectors, ..self }
    }
}

/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
/// w ← w − lr · decay · w − lr · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).
///
/// Source: Loshchilov and Hutter, 2019.
///
/// ```
/// use shardwise::{optim::{AdamW, AdamWConfig}, prelude::*};
/// let mut arrays = Arrays::default();
/// arrays.0.insert("w".into(), ndarray::array![[2.0, 4.0]].into_dyn());
/// let (cpu, weights, whole) = (Cpu::new(), Weights::new(&arrays), Region::whole([1, 2]));
/// let w = Param::<f64, _>::load_region(&cpu, &weights, "w", Role::Weight, whole, true)?;
/// w.set_grad(Tensor::from_vec(&cpu, [1, 2], vec![0.3, -0.3])?)?;
/// AdamW::new(AdamWConfig::default().with_weight_decay(0.5)).step(&[w.clone()], 0.1, 1.0)?;
/// let w = w.value()?.to_vec()?; // 2 − 0.1 · 0.5 · 2 − 0.1, and 4 − 0.1 · 0.5 · 4 + 0.1
/// assert!((w[0] - 1.8).abs() < 1e-6 && (w[1] - 3.9).abs() < 1e-6);
/// # Ok::<(), Error>(())
/// ```
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
    /// Makes an optimizer without state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Reads the state of these parameters from a source, such as a checkpoint of [`AdamW::state`]
    /// saved on any mesh. A parameter without state in the source starts without state.
    ///
    /// Load the model before its state: a master weight of the source is kept only if it rounds to
    /// the parameter's current value. Otherwise the current value becomes the master weight.
    ///
    /// # Errors
    /// When the source has some but not all tensors of a parameter's state, or has them in another
    /// shape; when a name is listed twice.
    pub fn load(config: AdamWConfig, source: &dyn WeightSource, params: &[Param<T, B>]) -> Result<Self> {
        Ok(Self { config, states: States::load(LAYOUT, source, params)? })
    }

    /// Sets the function that returns the options of each parameter. Every step calls it.
    ///
    /// ```
    /// use shardwise::optim::{AdamW, ParamGroup};
    /// let group = ParamGroup::default();
    /// let adamw = AdamW::<f32>::default().groups(move |param| match param.name() {
    ///     norm if norm.ends_with("norm.weight") => {
    ///         ParamGroup { weight_decay: Some(0.0), ..group }
    ///     }
    ///     "embedding.weight" => ParamGroup { lr_scale: 0.1, ..group },
    ///     _ => group,
    /// });
    /// ```
    pub fn groups(mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) -> Self {
        self.states.set_groups(groups);
        self
    }

    /// Lists the state of each parameter that has had a gradient or whose state was loaded, in the
    /// order in which the states were made. All ranks that step the same parameters list the states
    /// in the same order.
    ///
    /// For a tensor `w` of the model the state has the tensors `adamw.m.w`, `adamw.v.w` and
    /// `adamw.step.w`, and also `adamw.master.w` if `w` is bf16 or f16. `adamw.step.w` has one
    /// element, the number of steps (exact up to 2²⁴ in f32). The rank that owns the first element
    /// of `w` owns `adamw.step.w`. The other tensors of the state are partitioned and owned as `w`
    /// is. If the caller sets a parameter of the returned list, the next step uses the new value.
    ///
    /// # Errors
    /// When the caller has set `adamw.step.w` to a value that is not a number of steps, or the
    /// device is out of memory.
    pub fn state(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        self.states.params()
    }

    /// Returns the largest number of steps of any parameter.
    pub fn steps(&self) -> u64 {
        self.states.steps()
    }

    /// Updates every parameter that has a gradient. Multiplies the gradient by `grad_scale` first.
    ///
    /// State is keyed by the parameter's name, and t counts the parameter's own steps, as in
    /// PyTorch. So each call may list any parameters in any order.
    ///
    /// # Errors
    /// Before any parameter changes: when a number is out of range (a negative or infinite rate or
    /// decay, a β outside [0, 1), an ε that is not positive, a `grad_scale` that is not finite);
    /// when a name is listed twice; when a parameter has another shape or other regions than its
    /// state; when a parameter with a gradient has no dense store; when terms of a gradient are not
    /// summed over the replicas yet. During the update: when the device fails. Some parameters may
    /// be updated then.
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
