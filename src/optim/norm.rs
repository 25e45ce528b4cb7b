//! The norm of a sharded gradient.

use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::{Error, Result},
    kernels::{Backend, MatRef},
    tensor::{Tensor, Visit},
};

/// √ Σ g² over the gradient of the whole model, wherever its parts are: what one device would find.
///
/// Every element counts once: it is owned by one rank ([`crate::tensor::Piece::owned`]), however many hold a copy
/// (norms' scales, key/value heads that ranks share). `groups` are those over which the model is spread: tensor and
/// pipeline parallel; not the data-parallel one, over which gradients are equal by now. Sums are made in f64.
///
/// Collectives: an all-reduce of one number over each group.
///
/// Not finite if any gradient is not, so that it also says whether a scaled loss overflowed.
///
/// # Errors
/// When a collective fails.
#[track_caller]
pub fn grad_norm<T: Element, B: Backend>(mut visit: impl Visit<T, B>, groups: &[&Group<B>]) -> Result<f64> {
    let mut sum = 0.0;
    visit(&mut |param| {
        let Some(grad) = param.grad() else { return Ok(()) };
        let (device, width) = (grad.device(), grad.shape().split_at(0).1);
        for piece in param.pieces().iter().filter(|piece| piece.owned) {
            let len = piece.region.extent().len();
            let part = B::narrow(grad.slice(), piece.row * width..piece.row * width + len);
            // A vector is one row.
            let cols = if width == 1 { len } else { width };
            let rows = len.checked_div(cols).unwrap_or(0);
            let mut sums = Tensor::<f64, B>::empty(device, [rows])?;
            device.square_sums(MatRef::<T::Acc, B>::new(part, rows, cols)?, sums.slice_mut()?)?;
            sum += sums.to_vec()?.into_iter().sum::<f64>();
        }
        Ok(())
    })?;
    for group in groups {
        let mut total = Tensor::from_slice(group.device(), [1], &[sum])?;
        group.all_reduce(ReduceOp::Sum, &mut total)?;
        sum = total.to_vec()?[0];
    }
    Ok(sum.sqrt())
}

/// The norm itself, if it is a number: training cannot go on from a gradient that is not. Every rank that shares the model
/// has the same norm, and gets the same error.
///
/// # Errors
/// When it is NaN or infinite.
pub fn require_finite(norm: f64) -> Result<f64> {
    match norm.is_finite() {
        true => Ok(norm),
        false => {
            Err(Error::invalid("gradient norm", format!("the gradient is not finite: its norm is {norm}")))
        }
    }
}

/// What to multiply a gradient of norm `norm` with so that its norm is `max` at most: min(1, max / (norm + 10⁻⁶)).
pub fn clip_scale(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
}
