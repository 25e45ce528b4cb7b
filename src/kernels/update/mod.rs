//! Optimizer updates of parameters, element by element.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{MatRef, view::unit_columns};
use crate::{
    device::{Device, Element},
    error::{Result, same_size},
};

/// One step of stochastic gradient descent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    /// The learning rate.
    pub lr: f64,
    /// The decay of the velocity.
    pub momentum: f64,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// The weight decay λ, as an L2 penalty: λ · weight is added to the gradient.
    pub weight_decay: f64,
    /// The factor of the gradient, for loss scaling and clipping. Multiplies the gradient before
    /// anything else.
    pub grad_scale: f64,
}

/// One step of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// The learning rate.
    pub lr: f64,
    /// The decay of the first moment.
    pub beta1: f64,
    /// The decay of the second moment.
    pub beta2: f64,
    /// ε, added to the square root of the second moment.
    pub eps: f64,
    /// The decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this step, from 1.
    pub step: u64,
    /// The factor of the gradient, for loss scaling and clipping. Multiplies the gradient before
    /// anything else.
    pub grad_scale: f64,
}

impl AdamWStep {
    /// The step size lr / (1 − β₁ᵗ), and the factor of the square root, 1 / √(1 − β₂ᵗ), where t is
    /// `step`.
    pub(crate) fn corrections(&self) -> (f64, f64) {
        let left = |beta: f64| 1.0 - beta.powf(self.step as f64);
        (self.lr / left(self.beta1), 1.0 / left(self.beta2).sqrt())
    }
}

/// Updates of weights, computed in the accumulator type.
///
/// The optional `master` is the weight in the accumulator type. The step updates `master` and
/// rounds it to `weight`. Without `master`, the step widens, updates and rounds the weight. All
/// slices of a call have the same length.
pub trait Update: Device {
    /// With g ← scale · grad + decay · w: v ← momentum · v + g, then w ← w − lr · (g + momentum · v
    /// if Nesterov, else v). Without a velocity, w ← w − lr · g. (Sutskever et al., 2013, in
    /// PyTorch's form.)
    ///
    /// # Errors
    /// When sizes disagree.
    fn sgd<T: Element>(
        &self,
        step: &SgdStep,
        grad: Self::Slice<'_, T::Acc>,
        weight: Self::SliceMut<'_, T>,
        master: Option<Self::SliceMut<'_, T::Acc>>,
        velocity: Option<Self::SliceMut<'_, T::Acc>>,
    ) -> Result<()>;

    /// With g ← scale · grad: m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
    /// w ← w − lr · decay · w − lr · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ) and
    /// v̂ = v / (1 − β₂ᵗ) (Loshchilov and Hutter, 2019).
    ///
    /// # Errors
    /// When sizes disagree.
    fn adamw<T: Element>(
        &self,
        step: &AdamWStep,
        grad: Self::Slice<'_, T::Acc>,
        weight: Self::SliceMut<'_, T>,
        master: Option<Self::SliceMut<'_, T::Acc>>,
        moments: [Self::SliceMut<'_, T::Acc>; 2],
    ) -> Result<()>;

    /// sums ← Σ over each row of x², in f64 for every element type. A sum is not finite if one of
    /// its elements is not.
    ///
    /// # Errors
    /// When sizes disagree.
    fn square_sums<T: Element>(&self, x: MatRef<'_, T, Self>, sums: Self::SliceMut<'_, f64>) -> Result<()>;
}

/// Checks that all slices of a step are as long as the weight.
fn check(op: &'static str, weight: usize, others: &[(&str, Option<usize>)]) -> Result<()> {
    others.iter().try_for_each(|(name, len)| {
        len.map_or(Ok(()), |len| same_size(op, name, len, "the number of weights", weight))
    })
}

fn check_square_sums(x: super::view::Dims, sums: usize) -> Result<()> {
    const OP: &str = "square sums";
    unit_columns(OP, x)?;
    same_size(OP, "the sums", sums, "the number of rows", x.rows)
}
