//! DP-SGD on a mesh.

mod agreement;
mod ends;
mod step;

pub use ends::PrivateEnds;
pub use step::{Counts, Samples, Step};

use super::{accountant::Epsilon, key::RunKey, ledger::Ledger, sampler::PoissonSampler};
use crate::{
    comm::DeviceMesh,
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    security::audit::{self, Event},
    shard::Axis,
    tensor::Param,
};

const OP: &str = "private training";

/// The mechanism of private training. Every rank passes the same values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DpSgd {
    /// N: the number of samples that batches are drawn from.
    pub samples: usize,
    /// q: the probability with which each sample is in a batch.
    pub rate: f64,
    /// C: the largest norm of the gradient of a sample.
    pub clip: f64,
    /// σ: the standard deviation of the noise, in units of C.
    pub noise: f64,
    /// S: the factor by which the program multiplies its losses, such as 1. It must not depend on
    /// the data, so a [`LossScale`](crate::optim::LossScale) that adapts to overflows is not
    /// allowed.
    pub loss_scale: f64,
}

impl DpSgd {
    /// Returns the mechanism with a loss scale of 1.
    pub fn new(samples: usize, rate: f64, clip: f64, noise: f64) -> Self {
        Self { samples, rate, clip, noise, loss_scale: 1.0 }
    }

    fn check(&self) -> Result<()> {
        let Self { samples, rate, clip, noise, loss_scale } = *self;
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let refuse = |what: String| Err(Error::invalid(OP, what));
        match self {
            _ if samples == 0 => refuse("there are no samples".into()),
            _ if !(rate > 0.0 && rate <= 1.0) => refuse(format!("the rate is {rate}, not in (0, 1]")),
            _ if !positive(clip) => {
                refuse(format!("the norm of clipping is {clip}, not positive and finite"))
            }
            _ if !(noise >= 0.0 && noise.is_finite()) => {
                refuse(format!("the noise is {noise}, not at least 0 and finite"))
            }
            _ if !positive(loss_scale) => {
                refuse(format!("the loss scale is {loss_scale}, not positive and finite"))
            }
            _ => Ok(()),
        }
    }
}

/// Private training (DP-SGD) of a model on a mesh: clips the gradient of each sample, sums over the
/// batch, and adds noise.
///
/// ```text
/// g = (Σᵢ min(1, C / ‖gᵢ‖) gᵢ + σ C z) / (q N)
/// ```
///
/// The sum is over the samples of the batch. gᵢ is the gradient of the loss of sample i with
/// respect to all elements of the model, however they are sharded. z has independent elements of
/// N(0, 1). A sample is a sequence of the layers' input
/// ([`DTensor::with_sequences`](crate::parallel::DTensor::with_sequences), or the argument
/// `sequences` of a model's forward). Each of N samples is in the batch with probability q. The sum
/// is divided by the expected size of a batch, q N, because the true size is private. So the losses
/// of the samples must be summed, and the loss of a sample must not depend on other samples: do not
/// divide by the number of samples or tokens of a batch.
///
/// Each step of training, on every rank:
///
/// 1. [`Private::begin`] charges the ledger, and refuses the step if the budget would be exceeded.
/// 2. For each microbatch of [`Step::samples`]: forward, backward, [`Step::clip`]. A rank without
///    samples has no microbatch.
/// 3. [`Step::release`] sums over the replicas, adds the noise, and sets the parameters' gradients.
///    A rank without samples calls it too.
/// 4. An optimizer uses the gradients. What it does with them needs no budget.
///
/// ```
/// use shardwise::{optim::Sgd, prelude::*, privacy::*};
/// let source = Random::normal(1, 0.5);
/// let spent = launch::threads(2, |world| {
///     let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?; // 2 tensor-parallel ranks
///     let (tensor, cpu) = (mesh.group(Axis::Tensor), world.device());
///     let (weights, columns) = (Weights::new(&source), Columns::even(tensor, 4)?);
///     let model = ColumnLinear::<f64, _>::load(tensor, &weights, 3, &columns, Bias::Add)?;
///     let params = model.params();
///
///     let mechanism = DpSgd::new(100, 0.1, 1.0, 2.0);
///     let ledger = Ledger::new(Budget { epsilon: 2.0, delta: 1e-5 })?;
///     let key = RunKey::agree(&world)?;
///     let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger)?;
///     for _ in 0..5 {
///         let mut step = private.begin()?;
///         for microbatch in step.samples().to_vec().chunks(4) {
///             let count = microbatch.len();
///             let x = Tensor::full(cpu, [count, 3], 1.0)?; // in place of the samples' data
///             let x = DTensor::copied(tensor, x)?;
///             let x = x.with_sequences(Sequences::packed(vec![1; count]))?; // a row is a sample
///             let (y, saved) = model.forward(x)?;
///             model.backward(saved, y)?; // the gradient of ½ Σ y²
///             step.clip(count)?;
///         }
///         step.release(None)?; // one replica, so there is no `DataParallel`
///         Sgd::default().step(&params, 0.1, 1.0)?;
///     }
///     private.spent()
/// })?;
/// assert!(spent[0].epsilon < 2.0 && spent[0] == spent[1]);
/// # Ok::<(), Error>(())
/// ```
///
/// **Layers.** All layers of the library that have parameters work. A layer of your own has to pass
/// its terms to [`Param::keep_term`]; [`Param::add_grad`] returns an error. Operators that mix
/// samples (normalization over a batch, experts with a capacity) have no gradient of a sample.
///
/// **Pipelines.** With several stages the gradient of each part is clipped by itself, to norm C /
/// √P for P parts on all stages. Then the gradient of a sample has norm C at most, and its parts
/// need not wait for each other. [`PrivateEnds`] clips each part after its backward. A table that
/// is tied across stages is refused.
///
/// **Replicas.** Each replica of the mesh draws its part of the batch, and [`Step::release`] takes
/// the [`DataParallel`](crate::train::DataParallel) of all parameters. With an invariant reduction
/// over the replicas, every replica needs the same number of microbatches in each step: add
/// microbatches of padding ([`Samples::padded`]).
///
/// **Bits.** Batches and noise are functions of the key, the step, and global indices. So every
/// number of tensor-parallel ranks gives the same bits with an invariant reduction
/// ([`DeviceMesh::with_reduction`]).
///
/// **Not covered.** Sums are in floating point, whose rounding leaks a little in theory (Mironov,
/// 2012; Haney et al., 2022). The time that a step takes depends on its batch.
///
/// Sources: Abadi et al., 2016: Deep Learning with Differential Privacy; He et al., 2023: Exploring
/// the Limits of Differentially Private Deep Learning with Group-wise Clipping (the norms of
/// parts).
pub struct Private<T: Element, B: Backend> {
    mesh: DeviceMesh<B>,
    parts: Vec<Vec<Param<T, B>>>,
    /// The largest norm of a part's gradient: S C / √P.
    bound: f64,
    mechanism: DpSgd,
    key: RunKey,
    sampler: PoissonSampler,
    ledger: Ledger,
}

impl<T: Element, B: Backend> Private<T, B> {
    /// Trains the given parameters privately: their gradients are computed for each sample from now
    /// on, until the `Private` is dropped. List all parameters that are trained. Without a pipeline
    /// there is one part: the whole model.
    ///
    /// Collectives: an all-gather of a few hundred bytes over all ranks, one of 24 bytes for each
    /// tensor over the tensor-parallel ranks, and over the pipeline one of eight bytes for each
    /// tensor and an all-reduce of one number.
    ///
    /// # Errors
    /// When the mechanism is invalid; when ranks have other mechanisms, ledgers or keys; when a
    /// parameter is in two parts, another `Private` trains it, or it belongs to a tensor that no
    /// rank of this stage owns; when two parameters would have the same noise, because their
    /// tensors have the same name; when there is no part, or a collective fails.
    #[track_caller]
    pub fn new(
        mesh: &DeviceMesh<B>,
        parts: impl IntoIterator<Item = Vec<Param<T, B>>>,
        mechanism: DpSgd,
        key: RunKey,
        ledger: Ledger,
    ) -> Result<Self> {
        mechanism.check()?;
        agreement::check_equal(mesh.world(), &mechanism, &key, &ledger)?;
        let mut parts: Vec<_> = parts.into_iter().collect();
        parts.iter_mut().for_each(|part| part.retain(|param| !param.is_quantized()));
        let all = parts.concat();
        crate::tensor::check_once(OP, &all)?;
        // The end of the other `Private` would end the clipping of this one.
        if let Some(param) = all.iter().find(|param| param.keeps_terms()) {
            let reason = format!("another `Private` trains {}: drop it first", param.name());
            return Err(Error::invalid(OP, reason));
        }
        agreement::check_tensors(mesh, &all)?;
        let count = agreement::count(mesh.group(Axis::Pipeline), parts.len())?;
        audit::record(
            &Event::new("private_training")
                .number("samples", mechanism.samples as u64)
                .text("rate", mechanism.rate.to_string())
                .text("clip", mechanism.clip.to_string())
                .text("noise", mechanism.noise.to_string())
                .number("parts", count as u64)
                .number("steps_before", ledger.steps())
                .text("secret_key", if key.is_secret() { "yes" } else { "no" }),
        )?;
        let bound = mechanism.loss_scale * mechanism.clip / (count as f64).sqrt();
        let sampler = PoissonSampler::new(&key, mechanism.samples, mechanism.rate)?;
        parts.iter().flatten().for_each(|param| param.keep_terms(true));
        Ok(Self { mesh: mesh.clone(), parts, bound, mechanism, key, sampler, ledger })
    }

    /// Begins a step: charges the ledger, draws the batch, and clears the gradients.
    ///
    /// # Errors
    /// [`Error::PrivacyBudget`] when the step would exceed the budget: no sample has been drawn
    /// then, and nothing was charged. When a backward has run outside of a step.
    pub fn begin(&mut self) -> Result<Step<'_, T, B>> {
        self.check_clipped()?;
        let number = self.ledger.steps();
        self.ledger.charge(self.mechanism.noise, self.mechanism.rate)?;
        for param in self.parts.iter().flatten() {
            param.zero_grad();
            param.hold_grad(true);
        }
        let data = self.mesh.group(Axis::Data);
        let samples = self.sampler.part(number, data.rank(), data.size())?;
        Ok(Step::new(self, number, samples))
    }

    /// Returns the budget that all steps so far have spent.
    ///
    /// # Errors
    /// When the key is known, so that nothing is private.
    pub fn spent(&self) -> Result<Epsilon> {
        if !self.key.is_secret() {
            return Err(Error::invalid(OP, "the key of the noise is known, so the training is not private"));
        }
        Ok(self.ledger.spent())
    }

    /// Returns the ledger, to save it with a checkpoint.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Checks that no parameter keeps terms.
    fn check_clipped(&self) -> Result<()> {
        match self.parts.iter().flatten().find(|param| param.kept() > 0) {
            None => Ok(()),
            Some(param) => {
                let reason = format!(
                    "a backward that reached {} was not clipped: clip each microbatch, between `begin` and `release`",
                    param.name()
                );
                Err(Error::invalid(OP, reason))
            }
        }
    }
}

impl<T: Element, B: Backend> Drop for Private<T, B> {
    fn drop(&mut self) {
        for param in self.parts.iter().flatten() {
            param.keep_terms(false);
            // A step that was forgotten has left sums without noise.
            if param.holds_grad() {
                param.zero_grad();
                param.hold_grad(false);
            }
        }
    }
}
