//! Learning rates over time.

/// How the learning rate falls after its warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Decay {
    /// Not at all.
    #[default]
    Constant,
    /// In a straight line.
    Linear,
    /// Along half a cosine (Loshchilov and Hutter, 2017).
    Cosine,
}

/// A learning rate that rises in a straight line for `warmup` steps to `peak`, then falls until step `steps` to `floor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// The highest rate.
    pub peak: f64,
    /// The rate from step `steps` on.
    pub floor: f64,
    /// The number of steps of the warm-up; the first of them has rate `peak` / `warmup`.
    pub warmup: u64,
    /// The number of all steps.
    pub steps: u64,
    /// How it falls.
    pub decay: Decay,
}

impl LearningRate {
    /// The same rate at every step.
    pub fn constant(lr: f64) -> Self {
        Self { peak: lr, floor: lr, warmup: 0, steps: 0, decay: Decay::Constant }
    }

    /// The rate of a step, counted from 0.
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
