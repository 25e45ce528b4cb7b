//! One step of private training.

use super::{OP, Private};
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, same_size},
    kernels::Backend,
    optim::sample_norms,
    privacy::{disclosed::NonPrivate, noise::add_noise},
    shard::Axis,
    tensor::{Param, Tensor},
    train::DataParallel,
};

/// The samples of a microbatch: the first sequences of its tensors. Further sequences are padding,
/// whose gradients are not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    real: usize,
    sequences: usize,
}

impl Samples {
    /// The first `real` of `sequences` sequences are samples, the others are padding. So
    /// microbatches can have the same shapes in every step, although batches differ in size.
    ///
    /// # Errors
    /// When there are more samples than sequences.
    pub fn padded(real: usize, sequences: usize) -> Result<Self> {
        if real > sequences {
            return Err(Error::invalid(OP, format!("{real} samples in {sequences} sequences")));
        }
        Ok(Self { real, sequences })
    }
}

impl From<usize> for Samples {
    fn from(samples: usize) -> Self {
        Self { real: samples, sequences: samples }
    }
}

/// How many samples of a step were clipped, on this replica and pipeline stage. With several parts,
/// a sample is counted once for each part, because each part is clipped by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The number of samples.
    pub samples: usize,
    /// How many of them had a norm above the bound.
    pub clipped: usize,
    /// How many of them had a norm that is not finite. Their gradients were not added.
    pub not_finite: usize,
}

/// A step of [`Private`]. The drop of a step that was not released clears the gradients. The ledger
/// stays charged.
pub struct Step<'a, T: Element, B: Backend> {
    private: &'a mut Private<T, B>,
    number: u64,
    samples: Vec<usize>,
    /// The number of samples that each part has clipped.
    clipped: Vec<usize>,
    /// For each part, the number of changes of its parameters' gradients, all of them made here.
    changes: Vec<u64>,
    /// Whether a call has returned an error. Then a part of the gradients may have been added.
    failed: bool,
    counts: Counts,
    released: bool,
}

impl<'a, T: Element, B: Backend> Step<'a, T, B> {
    pub(super) fn new(private: &'a mut Private<T, B>, number: u64, samples: Vec<usize>) -> Self {
        let (clipped, counts) = (vec![0; private.parts.len()], Counts::default());
        let changes = private.parts.iter().map(|part| changes(part)).collect();
        Self { private, number, samples, clipped, changes, failed: false, counts, released: false }
    }

    /// Returns the number of steps before this one, over all starts of the run.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns the samples of the batch that this replica trains on: indices from 0 to N − 1, in
    /// order. Their number differs from step to step, and may be 0. Do not reveal them.
    pub fn samples(&self) -> &[usize] {
        &self.samples
    }

    /// Clips the gradients of the samples of a microbatch after its backward, and adds them to the
    /// parameters' gradients. Returns their norms before clipping, in the order of the samples.
    /// They are norms of the gradient of the loss times
    /// [`DpSgd::loss_scale`](super::DpSgd::loss_scale).
    ///
    /// Collectives: as [`sample_norms`], over the tensor-parallel ranks.
    ///
    /// # Errors
    /// When the model has several parts. As [`Step::clip_part`].
    #[track_caller]
    pub fn clip(&mut self, samples: impl Into<Samples>) -> Result<NonPrivate<Vec<f64>>> {
        let parts = self.private.parts.len();
        same_size(OP, "the parts that `clip` clips", 1, "the parts of this stage", parts)?;
        self.clip_part(0, samples)
    }

    /// As [`Step::clip`], of one part of the model. The part's index is that in [`Private::new`].
    ///
    /// # Errors
    /// When there is no such part; when a layer has computed the gradients of another number of
    /// sequences, for example because the input had no
    /// [`with_sequences`](crate::parallel::DTensor::with_sequences); when the terms of several
    /// backwards are kept, or there was no backward; when more samples are clipped than
    /// [`Step::samples`] has; when something else has changed a gradient; when a collective fails.
    /// After an error the step can only be dropped.
    #[track_caller]
    pub fn clip_part(&mut self, part: usize, samples: impl Into<Samples>) -> Result<NonPrivate<Vec<f64>>> {
        self.check_not_failed()?;
        self.failed = true;
        let norms = self.clip_kept(part, samples.into())?;
        self.failed = false;
        Ok(norms)
    }

    #[track_caller]
    fn clip_kept(&mut self, part: usize, samples: Samples) -> Result<NonPrivate<Vec<f64>>> {
        let private = &*self.private;
        let Some(params) = private.parts.get(part) else {
            let reason = format!("part {part} of {} parts", private.parts.len());
            return Err(Error::invalid(OP, reason));
        };
        self.check_unchanged(part)?;
        if samples.sequences > 0 && !params.is_empty() && params.iter().all(|param| param.kept() == 0) {
            let reason =
                format!("there was no backward of the {} sequences of part {part}", samples.sequences);
            return Err(Error::invalid(OP, reason));
        }
        let mut norms = sample_norms(params, &[private.mesh.group(Axis::Tensor)], samples.sequences)?;
        norms.truncate(samples.real);
        let factor = |&norm: &f64| if norm.is_finite() { (private.bound / norm).min(1.0) } else { 0.0 };
        let mut factors: Vec<f64> = norms.iter().map(factor).collect();
        factors.resize(samples.sequences, 0.0);
        params.iter().try_for_each(|param| param.add_kept(&factors))?;
        self.changes[part] = changes(params);

        self.counts.samples += samples.real;
        self.counts.clipped += norms.iter().filter(|norm| **norm > private.bound && norm.is_finite()).count();
        self.counts.not_finite += norms.iter().filter(|norm| !norm.is_finite()).count();
        self.clipped[part] += samples.real;
        if self.clipped[part] > self.samples.len() {
            return Err(self.wrong_number(part));
        }
        Ok(NonPrivate::new(norms))
    }

    /// Returns the number of parts of this stage.
    pub(super) fn parts(&self) -> usize {
        self.clipped.len()
    }

    fn check_not_failed(&self) -> Result<()> {
        if self.failed {
            return Err(Error::invalid(OP, "the step had an error before: drop it, and begin another one"));
        }
        Ok(())
    }

    /// Checks that the gradients of a part are what this step has added, and that the layers cannot
    /// add to them past the step.
    fn check_unchanged(&self, part: usize) -> Result<()> {
        let params = &self.private.parts[part];
        if let Some(param) = params.iter().find(|param| !param.is_quantized() && !param.keeps_terms()) {
            let reason =
                format!("{} keeps no terms any more, so its gradients are not clipped", param.name());
            return Err(Error::invalid(OP, reason));
        }
        if changes(params) != self.changes[part] {
            let reason = format!(
                "the gradient of a parameter of part {part} was changed within the step, by `set_grad`, `zero_grad`, \
                 `add_kept` or a `DataParallel`: only `clip` and `release` may change it"
            );
            return Err(Error::invalid(OP, reason));
        }
        Ok(())
    }

    fn wrong_number(&self, part: usize) -> Error {
        let reason = format!(
            "step {} drew {} samples for this replica, but {} were clipped for part {part}",
            self.number,
            self.samples.len(),
            self.clipped[part]
        );
        Error::invalid(OP, reason)
    }

    /// Sums the clipped gradients over the replicas, adds the noise and divides by q N S.
    /// Afterwards [`Param::grad`] has the released gradient. With an aggregator only that rank has
    /// gradients. A parameter without a gradient receives the noise alone.
    ///
    /// Collectives: those of [`DataParallel::begin`] and [`DataParallel::finish`].
    ///
    /// # Errors
    /// When the mesh has several replicas and there is no [`DataParallel`] that reduces the
    /// parameters over them, or it has begun already; when samples of this step were not clipped;
    /// when an earlier call has failed, or something else has changed a gradient; when a collective
    /// fails. The gradients are cleared then.
    #[track_caller]
    pub fn release(mut self, replicas: Option<&DataParallel<T, B>>) -> Result<NonPrivate<Counts>> {
        let private = &*self.private;
        self.check_not_failed()?;
        private.check_clipped()?;
        (0..self.clipped.len()).try_for_each(|part| self.check_unchanged(part))?;
        if let Some(part) = (0..self.clipped.len()).find(|&part| self.clipped[part] != self.samples.len()) {
            return Err(self.wrong_number(part));
        }
        let (data, params) = (private.mesh.group(Axis::Data), || private.parts.iter().flatten());
        if let Some(replicas) = replicas {
            check_reduces(replicas, data, params())?;
            replicas.begin(crate::train::GradReduce::Sum)?;
            replicas.finish()?;
        } else if data.size() > 1 {
            let reason = format!("the mesh has {} replicas: pass their `DataParallel`", data.size());
            return Err(Error::invalid(OP, reason));
        }
        params().for_each(|param| param.hold_grad(false));
        if replicas.is_none_or(DataParallel::steps) {
            params().try_for_each(|param| self.add_noise(param))?;
        }
        self.released = true;
        Ok(NonPrivate::new(self.counts))
    }

    fn add_noise(&self, param: &Param<T, B>) -> Result<()> {
        param.check_complete(OP)?;
        let Private { mechanism, key, .. } = &*self.private;
        let sum = match param.take_grad() {
            Some(sum) => sum,
            None => Tensor::zeros(param.device(), param.shape())?,
        };
        let deviation = mechanism.noise * mechanism.clip * mechanism.loss_scale;
        let scale = 1.0 / (mechanism.rate * mechanism.samples as f64 * mechanism.loss_scale);
        let mut released = add_noise(key, self.number, deviation, param, &sum)?;
        param.device().scale(scale, released.mat_mut()?)?;
        param.set_grad(released)
    }
}

impl<T: Element, B: Backend> Drop for Step<'_, T, B> {
    fn drop(&mut self) {
        if !self.released {
            for param in self.private.parts.iter().flatten() {
                param.keep_terms(true); // drops the kept terms
                param.zero_grad();
                param.hold_grad(false);
            }
        }
    }
}

/// How often the gradients of parameters were changed.
fn changes<T: Element, B: Backend>(params: &[Param<T, B>]) -> u64 {
    params.iter().map(Param::grad_changes).sum()
}

/// Checks that a `DataParallel` reduces the gradients of these parameters over the replicas.
fn check_reduces<'a, T: Element, B: Backend>(
    replicas: &DataParallel<T, B>,
    data: &Group<B>,
    mut params: impl Iterator<Item = &'a Param<T, B>>,
) -> Result<()> {
    if !replicas.group().is_same(data) {
        let (other, own) = (replicas.group().name(), data.name());
        return Err(Error::invalid(
            OP,
            format!("the `DataParallel` reduces over {other}, but the replicas are {own}"),
        ));
    }
    let missing = |param: &&Param<T, B>| !replicas.params().iter().any(|other| other.is_same(param));
    match params.find(missing) {
        None if replicas.has_begun() => {
            let reason = "the `DataParallel` has begun already: `release` begins and finishes its reduction";
            Err(Error::invalid(OP, reason))
        }
        None => Ok(()),
        Some(param) => {
            let reason = format!("the `DataParallel` does not reduce the gradient of {}", param.name());
            Err(Error::invalid(OP, reason))
        }
    }
}
