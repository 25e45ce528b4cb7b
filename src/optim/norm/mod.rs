//! The norm of a sharded gradient, and the norms of the gradients of samples.

mod blocks;
mod owned;
mod samples;
mod terms;

pub use samples::sample_norms;

use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result},
    kernels::{Backend, MatRef},
    tensor::Param,
};
use blocks::{ModelSum, Piece};
use terms::Terms;

const OP: &str = "gradient norm";

/// √ Σ g² over the gradient of the whole model: the norm that one device would compute. The norm is
/// not finite if an element of the gradient is not, for example after an overflow of a scaled loss.
///
/// An element counts once, even if several ranks hold a copy (the scales of norms, shared key/value
/// heads). Only the rank that owns the element ([`crate::tensor::ParamRegion::owned`]) adds it.
/// `groups` are the tensor- and pipeline-parallel groups. Do not pass the data-parallel group,
/// because its ranks have equal gradients after the reduction. Sums are in f64.
///
/// Collectives: one all-gather over each group, of three numbers a rank. Over a group with
/// [`Reduction::Invariant`](crate::shard::Reduction::Invariant), the all-gather also has one number
/// for each canonical block. A pipeline-parallel group of several ranks must not have an invariant
/// reduction.
///
/// ```
/// use shardwise::{optim::grad_norm, prelude::*};
/// let source = Random::normal(1, 0.02);
/// launch::threads(2, |world| {
///     let rank = world.rank();
///     let own = Region::whole([2]).narrow(0, rank..rank + 1);
///     let (cpu, weights) = (world.device(), Weights::new(&source));
///     let w = Param::<f32, _>::load_region(cpu, &weights, "w", Role::Bias, own, true)?;
///     w.set_grad(Tensor::full(cpu, [1], [3.0, 4.0][rank])?)?;
///     assert_eq!(grad_norm(&[w], &[&world])?, 5.0);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When the ranks of the groups do not own every element of the given tensors exactly once:
/// `groups` lacks a group over which tensors are sharded, or ranks of a given group own the same
/// regions. When a collective fails. When the sum cannot be invariant.
///
/// This function does not detect that a pipeline stage is missing, that no rank owns a tensor, or
/// that several ranks own the whole of a tensor and differ in their other tensors.
/// [`crate::weights::save`] detects the last two of these.
#[track_caller]
pub fn grad_norm<T: Element, B: Backend>(params: &[Param<T, B>], groups: &[&Group<B>]) -> Result<f64> {
    params.iter().try_for_each(|param| param.check_complete(OP))?;
    let (sum, mut terms) = (ModelSum::new(params, groups)?, Terms::default());
    for param in params {
        let Some(grad) = &param.grad() else { continue };
        let (rows, width) = match grad.shape().rank() {
            1 => (1, grad.len()),
            _ => (grad.shape().dims()[0], grad.shape().split_at(0).1),
        };
        let grad_mat = MatRef::<T::Acc, B>::new(grad.slice(), rows, width)?;
        for Piece { rows, cols, leaf } in sum.pieces(param)? {
            terms.squares(grad.device(), grad_mat.block(rows, cols), leaf)?;
        }
    }
    Ok(sum.total(1, terms)?[0].sqrt())
}

/// Returns the norm if it is finite, and otherwise an error that stops the training. The norm is
/// equal on every rank of the model, so every rank returns the same result.
///
/// # Errors
/// When the norm is NaN or infinite.
pub fn require_finite(norm: f64) -> Result<f64> {
    if norm.is_finite() {
        Ok(norm)
    } else {
        Err(Error::invalid(OP, format!("the gradient is not finite: its norm is {norm}")))
    }
}

/// min(1, max / (norm + 10⁻⁶)): the factor that scales a gradient of norm `norm` to at most norm
/// `max`, as `torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`. An infinite `max` does not
/// clip.
///
/// # Errors
/// When the norm is NaN, infinite or negative, or `max` is NaN or negative.
pub fn clip_scale(norm: f64, max: f64) -> Result<f64> {
    if !(0.0..f64::INFINITY).contains(&norm) || !(0.0..=f64::INFINITY).contains(&max) {
        let reason = format!("a gradient of norm {norm} cannot be clipped to a norm of {max}");
        return Err(Error::invalid("clip scale", reason));
    }
    Ok((max / (norm + 1e-6)).min(1.0))
}
