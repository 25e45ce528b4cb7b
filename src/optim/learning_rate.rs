//! Learning rate schedules.

/// The decay of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Decay {
    /// No decay.
    #[default]
    Constant,
    /// Linear decay.
    Linear,
    /// Half a cosine (Loshchilov and Hutter, 2017).
    Cosine,
}

/// A learning rate with a linear warm-up of `warmup` steps to `peak`, and a decay to `floor` at
/// step `steps`.
///
/// ```
/// use shardwise::optim::{Decay, LearningRate};
/// let rate = LearningRate::constant(1.0).with_warmup(4).with_decay(Decay::Linear, 0.5, 12);
/// assert_eq!([0, 3, 4, 8, 12, 99].map(|step| rate.at(step)), [0.25, 1.0, 1.0, 0.75, 0.5, 0.5]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LearningRate {
    /// The highest rate.
    pub peak: f64,
    /// The rate from step `steps` on, unless `decay` is [`Decay::Constant`].
    pub floor: f64,
    /// The number of warm-up steps. The first step has rate `peak / warmup`.
    pub warmup: u64,
    /// The number of steps, including the warm-up.
    pub steps: u64,
    /// The decay after the warm-up.
    pub decay: Decay,
}

impl LearningRate {
    /// Returns the schedule with the same rate at every step.
    pub fn constant(lr: f64) -> Self {
        Self { peak: lr, floor: lr, warmup: 0, steps: 0, decay: Decay::Constant }
    }

    /// Sets the number of warm-up steps.
    pub fn with_warmup(self, warmup: u64) -> Self {
        Self { warmup, ..self }
    }

    /// Sets the decay, which reaches `floor` at step `steps`, counted from the first warm-up step.
    pub fn with_decay(self, decay: Decay, floor: f64, steps: u64) -> Self {
        Self { decay, floor, steps, ..self }
    }

    /// Returns the rate at `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let left = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let part = ((step - self.warmup) as f64 / left).min(1.0);
        let fall = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Linear => 1.0 - part,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * part).cos()),
        };
        self.floor + (self.peak - self.floor) * fall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls() {
        let rates = |decay| LearningRate { peak: 1.0, floor: 0.2, warmup: 2, steps: 6, decay };
        let linear = rates(Decay::Linear);
        for (step, want) in [(0, 0.5), (1, 1.0), (2, 1.0), (4, 0.6), (6, 0.2), (9, 0.2)] {
            assert!((linear.at(step) - want).abs() < 1e-15, "step {step}");
        }
        let cosine = rates(Decay::Cosine);
        for (step, want) in [(2, 1.0), (4, 0.6), (6, 0.2), (100, 0.2)] {
            assert!((cosine.at(step) - want).abs() < 1e-15, "step {step}");
        }
        assert!((0..9).all(|step| LearningRate::constant(0.3).at(step) == 0.3));
    }
}
