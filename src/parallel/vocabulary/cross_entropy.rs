//! Cross entropy over classes that are sharded over the ranks.

use crate::{
    comm::ReduceOp,
    device::{Device, Element},
    error::{Error, Result},
    kernels::{Backend, Targets, check_targets},
    parallel::{DTensor, Fits, sums::Sums},
    shard::Shard,
    tensor::Tensor,
};

/// Label smoothing moves a share α of the target's probability to other classes (Szegedy et al.,
/// 2016). Two conventions differ in the classes that get a part of α.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Smoothing {
    /// No smoothing.
    #[default]
    None,
    /// Spreads α over all K classes, including the target: q = 1 − α + α / K for the target, α / K
    /// for the others (PyTorch, Transformer Engine).
    OverAll(f64),
    /// Spreads α over the K − 1 other classes: q = 1 − α for the target, α / (K − 1) for the others
    /// (Megatron-LM).
    OverOthers(f64),
}

/// L = lse − Σₖ qₖ xₖ + z lse² for each token, with lse = log Σₖ e^xₖ over all classes. This is the
/// cross entropy of the token's logits x with its target class. The ranks hold shards of the
/// classes.
///
/// qₖ is 1 for the target class and 0 for the other classes, or smoothed ([`Smoothing`]). z is the
/// weight of the z-loss (Chowdhery et al., 2022: PaLM, section 5).
///
/// Backward: ∂L/∂xₖ = e^(xₖ − lse) (1 + 2 z lse) − qₖ. Forward and backward first subtract the
/// token's largest logit, so that an offset common to all logits of the token costs no precision.
///
/// * Logits: [`Shard<1>`], `[tokens, classes]`, any number of classes on any number of ranks. The
///   ranks never gather the logits.
/// * The arithmetic is in the accumulator type: f64 for f64 logits, otherwise f32. The losses are
///   equal on every rank.
/// * Collectives: the forward makes an all-reduce (max) of one number per token, and an all-reduce
///   (sum) of three numbers per token. The backward makes none.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3. Megatron-LM smooths over the classes of a
/// rank only. This layer smooths over all classes.
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let x = Tensor::<f64, _>::from_slice(world.device(), [1, 3], &[0.0, 1.0, 2.0])?;
///     let logits = DTensor::replicated(&world, x)?.scatter(&world.even_partition(3)?)?;
///     let loss = VocabParallelCrossEntropy::default();
///     let (losses, saved) = loss.forward(logits, &[2])?;
///     let sum = 1.0 + 1.0_f64.exp() + 2.0_f64.exp();
///     assert!((losses.mean()? - (sum.ln() - 2.0)).abs() < 1e-12);
///     let dx = loss.backward(saved, 1.0)?.all_gather()?.into_local().to_vec()?;
///     assert!((dx[0] - 1.0 / sum).abs() < 1e-12 && dx[2] < 0.0);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct VocabParallelCrossEntropy {
    /// Label smoothing.
    pub smoothing: Smoothing,
    /// Tokens with this target have no loss and no gradient (PyTorch's `ignore_index`).
    pub ignored: Option<u32>,
    /// The weight of the z-loss.
    pub z: f64,
}

/// The losses of the tokens.
#[derive(Debug)]
pub struct Losses<A: Element, B: Device> {
    rows: Tensor<A, B>,
    counted: usize,
}

impl<A: Element, B: Device> Losses<A, B> {
    /// Returns the loss of each token, which is 0 for ignored tokens.
    pub fn rows(&self) -> &Tensor<A, B> {
        &self.rows
    }

    /// Returns the number of tokens that are not ignored.
    pub fn counted(&self) -> usize {
        self.counted
    }

    /// Computes the sum of the losses.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sum(&self) -> Result<f64> {
        Ok(self.rows.to_vec()?.into_iter().map(Element::to_f64).sum())
    }

    /// Computes the mean loss of the tokens that are not ignored; 0 if all tokens are ignored.
    ///
    /// # Errors
    /// When the device fails.
    pub fn mean(&self) -> Result<f64> {
        Ok(self.sum()? / self.counted.max(1) as f64)
    }
}

/// The values that the forward of a cross entropy saves for its backward.
#[derive(Debug)]
pub struct CrossEntropySaved<T: Element, B: Device> {
    logits: DTensor<Shard<1>, T, B>,
    targets: Vec<u32>,
    /// `max` is the largest logit of each token, and `log` is log Σ e^(x − max). Their sum is lse.
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

    /// Computes the losses, and the saved values for the backward. `targets` has one class per
    /// token. Every rank passes the same targets.
    ///
    /// # Errors
    /// When there is not one target per token, a target is neither a class nor ignored, the
    /// smoothing is not between 0 and 1, or a collective fails.
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
        // Checks all targets before the first collective, because the kernels of a rank without
        // classes do not check any.
        let all = self.targets(targets, logits.shape().cols(), 0)?;
        check_targets("cross entropy", &all, tokens, logits.shape().cols())?;
        let mut max = Tensor::<T::Acc, B>::empty(device, [tokens])?;
        device.row_max(x, max.slice_mut()?)?;
        group.all_reduce(ReduceOp::Max, &mut max)?;
        let sums = Sums::of(group)?;
        let leaves = sums.leaves("cross entropy", logits.shard_partition()?)?;
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

    /// Computes the gradient of `scale` times the sum of all tokens' losses. With a `scale` of 1 /
    /// [`Losses::counted`], this is the gradient of the mean loss.
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
