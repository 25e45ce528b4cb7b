//! Dynamic loss scaling.

use crate::error::{Error, Result};
use std::ops::RangeInclusive;

/// A dynamic loss scale, which prevents the underflow of f16 gradients.
///
/// Multiply the gradient of the loss by [`LossScale::scale`], and pass `1 / scale` to the optimizer
/// as a factor of `grad_scale`. After each backward, [`LossScale::update`] returns whether to step
/// the optimizer. Source: Micikevicius et al., 2018.
///
/// ```
/// let mut scale = shardwise::optim::LossScale::new(8.0, 2)?;
/// assert!(scale.update(1.0) && scale.update(1.0));
/// assert_eq!(scale.scale(), 16.0); // doubled after two steps
/// assert!(!scale.update(f64::INFINITY)); // an overflow: skip the step
/// assert_eq!(scale.scale(), 8.0);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    scale: f64,
    growth: f64,
    backoff: f64,
    interval: u32,
    good: u32,
}

impl Default for LossScale {
    /// Starts at 2¹⁶. An overflow halves the scale, and 2,000 steps without an overflow double it.
    fn default() -> Self {
        Self { scale: 65536.0, growth: 2.0, backoff: 0.5, interval: 2000, good: 0 }
    }
}

/// The range of scales: the positive normal numbers of f32, because f32 is the type in which the
/// gradient of the loss is multiplied by the scale. A gradient that overflows at the smallest scale
/// is itself not finite.
const SCALES: RangeInclusive<f64> = f32::MIN_POSITIVE as f64..=f32::MAX as f64;

impl LossScale {
    /// Starts at `scale`. An overflow halves the scale, and `interval` steps without an overflow
    /// double it.
    ///
    /// # Errors
    /// When the scale is not a positive normal number of f32, or the interval is 0.
    pub fn new(scale: f64, interval: u32) -> Result<Self> {
        let refuse = |reason| Err(Error::invalid("loss scale", reason));
        if !SCALES.contains(&scale) {
            return refuse(format!("{scale} is not in {SCALES:?}"));
        }
        if interval == 0 {
            return refuse("the growth interval is 0".to_string());
        }
        Ok(Self { scale, interval, ..Self::default() })
    }

    /// Returns the current scale.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Updates the scale from the gradient norm. Returns whether the norm is finite: if not, skip
    /// the step. The scale stays a positive normal number of f32.
    ///
    /// The norm is equal on every rank of the model, so every rank returns the same result.
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
