//! Cross entropy over classes that are cut over the ranks.

use super::{DTensor, Fits, sums::Sums};
use crate::{
    comm::ReduceOp,
    device::{Device, Element},
    error::{Error, Result},
    kernels::{Backend, Targets, check_targets},
    shard::Shard,
    tensor::Tensor,
};

/// How much of the target's probability goes to other classes (Szegedy et al., 2016). There are two conventions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Smoothing {
    /// All of it stays with the target.
    #[default]
    None,
    /// α is spread over all K classes, the target among them: q = 1 − α + α / K for the target, α / K for the others
    /// (PyTorch, Transformer Engine).
    OverAll(f64),
    /// α is spread over the K − 1 others: q = 1 − α for the target, α / (K − 1) for the others (Megatron-LM).
    OverOthers(f64),
}

/// The cross entropy of each token with its target class, over logits whose classes are cut over the ranks.
///
/// With lse = log Σₖ e^xₖ over all classes: L = lse − Σₖ qₖ xₖ + z lse², where q is 1 for the target and 0 elsewhere, or
/// smoothed ([`Smoothing`]), and z is the weight of the z-loss (Chowdhery et al., 2022: PaLM, section 5).
/// ∂L/∂xₖ = e^(xₖ − lse) (1 + 2 z lse) − qₖ. Both use xₖ − max x, so that an offset that the logits
/// of a token have in common costs no precision.
///
/// * Logits: [`Shard<1>`], `[tokens, classes]`, any number of classes on any number of ranks; never gathered.
/// * Arithmetic in the accumulator: f32, or f64 for f64 logits. The losses are equal on every rank.
/// * Collectives: forward an all-reduce (max) of one number a token and one (sum) of three; backward none.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3, whose smoothing sees the local classes only; here it sees all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct VocabParallelCrossEntropy {
    /// Label smoothing.
    pub smoothing: Smoothing,
    /// Tokens of this target have no loss and no gradient.
    pub ignored: Option<u32>,
    /// The weight of the z-loss.
    pub z: f64,
}

/// The losses of tokens.
#[derive(Debug)]
pub struct Losses<A: Element, B: Device> {
    rows: Tensor<A, B>,
    counted: usize,
}

impl<A: Element, B: Device> Losses<A, B> {
    /// The loss of each token, 0 where it is ignored.
    pub fn rows(&self) -> &Tensor<A, B> {
        &self.rows
    }

    /// The number of tokens that are not ignored.
    pub fn counted(&self) -> usize {
        self.counted
    }

    /// The sum of the losses.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sum(&self) -> Result<f64> {
        Ok(self.rows.to_vec()?.into_iter().map(Element::to_f64).sum())
    }

    /// The mean over the tokens that count; 0 if none does.
    ///
    /// # Errors
    /// When the device fails.
    pub fn mean(&self) -> Result<f64> {
        Ok(self.sum()? / self.counted.max(1) as f64)
    }
}

/// What the backward of a cross entropy needs.
#[derive(Debug)]
pub struct CrossEntropySaved<T: Element, B: Device> {
    logits: DTensor<Shard<1>, T, B>,
    targets: Vec<u32>,
    /// lse = `max` + `log`: the largest logit of a token, and log Σ e^(x − max).
    max: Tensor<T::Acc, B>,
    log: Tensor<T::Acc, B>,
}

impl VocabParallelCrossEntropy {
    fn targets<'a>(&self, classes: &'a [u32], count: usize, first: usize) -> Result<Targets<'a>> {
        let (on, off) = match self.smoothing {
            Smoothing::None => (1.0, 0.0),
            Smoothing::OverAll(alpha) => (1.0 - alpha, alpha / count as f64),
            Smoothing::OverOthers(_) if count == 1 => (1.0, 0.0),
            Smoothing::OverOthers(alpha) => {
                let off = alpha / (count - 1) as f64;
                (1.0 - alpha - off, off)
            }
        };
        match self.smoothing {
            Smoothing::OverAll(alpha) | Smoothing::OverOthers(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(Error::invalid("cross entropy", format!("a smoothing of {alpha} is not between 0 and 1")))
            }
            _ => Ok(Targets { classes, ignored: self.ignored, count, first, on, off, z: self.z }),
        }
    }

    /// The losses, and what the backward needs. `targets` has one class a token, the same on every rank.
    ///
    /// # Errors
    /// When there is not one target a token, a target is no class, or a collective fails.
    #[track_caller]
    pub fn forward<P: Fits<Shard<1>>, T: Element, B: Backend>(
        &self,
        logits: DTensor<P, T, B>,
        targets: &[u32],
    ) -> Result<(Losses<T::Acc, B>, CrossEntropySaved<T, B>)> {
        let logits = P::fit(logits);
        logits.check_rows("cross entropy")?;
        let (group, device, x) = (logits.group(), logits.group().device(), logits.local().mat());
        let tokens = logits.shape().rows();
        let spec = self.targets(targets, logits.shape().cols(), logits.local_range(1).start)?;
        // Before the first collective: a rank without classes does not look at targets.
        let all = self.targets(targets, logits.shape().cols(), 0)?;
        check_targets("cross entropy", &all, tokens, logits.shape().cols())?;
        let mut max = Tensor::<T::Acc, B>::empty(device, [tokens])?;
        device.row_max(x, max.slice_mut()?)?;
        group.all_reduce(ReduceOp::Max, &mut max)?;
        let sums = Sums::of(group)?;
        let leaves = sums.leaves("cross entropy", logits.shard_cut()?)?;
        let sums = sums.total::<T::Acc>([tokens, 3], |leaf, sums| {
            let classes = leaves.range(leaf);
            if classes.is_empty() {
                return device.fill(0.0, sums.mat_mut()?);
            }
            let spec = Targets { first: spec.first + classes.start, ..spec };
            device.exp_sums(&spec, x.columns(classes), max.slice(), sums.slice_mut()?)
        })?;
        let mut rows = Tensor::empty(device, [tokens])?;
        let mut log = Tensor::empty(device, [tokens])?;
        device.cross_entropy(&spec, max.slice(), sums.slice(), rows.slice_mut()?, log.slice_mut()?)?;
        let counted = targets.iter().filter(|class| self.ignored != Some(**class)).count();
        let saved = CrossEntropySaved { logits, targets: targets.to_vec(), max, log };
        Ok((Losses { rows, counted }, saved))
    }

    /// The gradient of `scale` · Σ over tokens of L: a `scale` of 1 / count makes it that of the mean.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward<T: Element, B: Backend>(
        &self,
        saved: CrossEntropySaved<T, B>,
        scale: f64,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let CrossEntropySaved { logits, targets, max, log } = saved;
        let spec = self.targets(&targets, logits.shape().cols(), logits.local_range(1).start)?;
        let mut dx = Tensor::empty(logits.group().device(), logits.local().shape())?;
        let device = logits.group().device();
        let x = logits.local().mat();
        device.cross_entropy_backward(&spec, scale, x, max.slice(), log.slice(), dx.mat_mut()?)?;
        logits.with_local(dx)
    }
}
