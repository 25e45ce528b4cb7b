//! Reference optimizers.

use ndarray::{ArrayD, Zip};

/// Stochastic gradient descent on one tensor, as `torch.optim.SGD` without dampening.
#[derive(Clone, Debug)]
pub struct Sgd {
    /// The learning rate.
    pub lr: f64,
    /// The momentum.
    pub momentum: f64,
    /// Whether to use Nesterov's momentum.
    pub nesterov: bool,
    /// The weight decay.
    pub weight_decay: f64,
    /// The velocity, `None` before the first step.
    pub velocity: Option<ArrayD<f64>>,
}

impl Sgd {
    /// Updates the weight.
    pub fn step(&mut self, weight: &mut ArrayD<f64>, grad: &ArrayD<f64>) {
        let grad = grad + &*weight * self.weight_decay;
        let velocity = match &self.velocity {
            Some(velocity) if self.momentum != 0.0 => velocity * self.momentum + &grad,
            _ => grad.clone(),
        };
        let direction = if self.nesterov { &grad + &velocity * self.momentum } else { velocity.clone() };
        *weight -= &(direction * self.lr);
        self.velocity = Some(velocity);
    }
}

/// AdamW on one tensor.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// The learning rate.
    pub lr: f64,
    /// β₁, the decay rate of the first moment.
    pub beta1: f64,
    /// β₂, the decay rate of the second moment.
    pub beta2: f64,
    /// ε, added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// The number of steps made.
    pub steps: i32,
    /// The first and second moment, `None` before the first step.
    pub moments: Option<(ArrayD<f64>, ArrayD<f64>)>,
}

impl AdamW {
    /// Updates the weight.
    pub fn step(&mut self, weight: &mut ArrayD<f64>, grad: &ArrayD<f64>) {
        self.steps += 1;
        let zeros = || (ArrayD::zeros(grad.raw_dim()), ArrayD::zeros(grad.raw_dim()));
        let (mut m, mut v) = self.moments.take().unwrap_or_else(zeros);
        let (left1, left2) = (1.0 - self.beta1.powi(self.steps), 1.0 - self.beta2.powi(self.steps));
        Zip::from(&mut *weight).and(&mut m).and(&mut v).and(grad).for_each(|w, m, v, g| {
            *m = self.beta1 * *m + (1.0 - self.beta1) * g;
            *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
            *w -= self.lr * self.weight_decay * *w;
            *w -= self.lr * (*m / left1) / ((*v / left2).sqrt() + self.eps);
        });
        self.moments = Some((m, v));
    }
}
