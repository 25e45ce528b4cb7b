//! Dynamic loss scaling.

use crate::error::{Error, Result};
use std::ops::RangeInclusive;

/// A factor on the loss that keeps the gradients of f16 away from underflow (Micikevicius et al., 2018).
///
/// Multiply the loss's gradient with [`LossScale::scale`], and give `1 / scale` to the optimizer as part of its
/// `grad_scale`. After each backward, [`LossScale::update`] says whether the step may be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    scale: f64,
    growth: f64,
    backoff: f64,
    interval: u32,
    good: u32,
}

impl Default for LossScale {
    /// 2¹⁶, halved after an overflow, doubled after 2,000 steps without one.
    fn default() -> Self {
        Self { scale: 65536.0, growth: 2.0, backoff: 0.5, interval: 2000, good: 0 }
    }
}

/// What f32 holds without loss: gradients of the loss are multiplied with the scale in f32. Below,
/// the gradient itself, not its scale, is at fault.
const SCALES: RangeInclusive<f64> = f32::MIN_POSITIVE as f64..=f32::MAX as f64;

impl LossScale {
    /// This scale to begin with, doubled after `interval` steps without an overflow.
    ///
    /// # Errors
    /// When the scale is no positive normal number of f32, or the interval is 0.
    pub fn new(scale: f64, interval: u32) -> Result<Self> {
        let refuse = |reason| Err(Error::invalid("loss scale", reason));
        match (SCALES.contains(&scale), interval) {
            (false, _) => refuse(format!("{scale} is not in {SCALES:?}")),
            (true, 0) => refuse("it cannot grow after every 0 steps".to_string()),
            (true, _) => Ok(Self { scale, interval, ..Self::default() }),
        }
    }

    /// The factor.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Takes note of a gradient norm, which is not finite after an overflow, and says whether to
    /// make the step. The scale stays a positive normal number of f32.
    ///
    /// The norm is the same on every rank that shares the model, and so is the answer.
    pub fn update(&mut self, norm: f64) -> bool {
        if !norm.is_finite() {
            self.scale = (self.scale * self.backoff).max(*SCALES.start());
            self.good = 0;
            return false;
        }
        self.good += 1;
        if self.good == self.interval {
            let grown = self.scale * self.growth;
            self.scale = if SCALES.contains(&grown) { grown } else { self.scale };
            self.good = 0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_grows_after_good_steps_and_shrinks_at_once() {
        let mut scale = LossScale::new(8.0, 2).unwrap();
        assert!(scale.update(1.0) && scale.scale() == 8.0);
        assert!(scale.update(1.0) && scale.scale() == 16.0);
        assert!(!scale.update(f64::NAN) && scale.scale() == 8.0);
        assert!(!scale.update(f64::INFINITY) && scale.scale() == 4.0);
        assert!(scale.update(1.0) && scale.update(1.0) && scale.scale() == 8.0);
    }
}
