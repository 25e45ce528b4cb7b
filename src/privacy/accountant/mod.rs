//! The privacy loss (ε, δ) of steps with Poisson sampling and Gaussian noise.

mod rdp;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use std::fmt;

const OP: &str = "privacy accountant";

/// The largest number of steps. All numbers up to it are exact in f64.
const MAX_STEPS: u64 = 1 << 53;

/// A number of equal steps: each draws every sample with probability q = `rate`, and adds noise
/// N(0, (σ C)²) to the sum of gradients of norm at most C.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// The standard deviation of the noise, divided by C.
    pub sigma: f64,
    /// The probability that a sample is drawn, q.
    pub rate: f64,
    /// The number of steps.
    pub steps: u64,
}

impl Event {
    /// # Errors
    /// When σ is negative or not finite, q is not in [0, 1], or there are too many steps.
    pub(super) fn check(&self) -> Result<()> {
        let Self { sigma, rate, steps } = *self;
        let reason = if !(sigma >= 0.0 && sigma.is_finite()) {
            format!("σ is {sigma}, but it has to be at least 0 and finite")
        } else if !(0.0..=1.0).contains(&rate) {
            format!("the sampling rate is {rate}, but it has to be in [0, 1]")
        } else if steps > MAX_STEPS {
            format!("there are {steps} steps, but the most is {MAX_STEPS}")
        } else {
            return Ok(());
        };
        Err(Error::invalid(OP, reason))
    }

    /// Returns ε(α) of one step at each order.
    pub(super) fn renyi(&self) -> Vec<f64> {
        rdp::renyi(self.sigma, self.rate)
    }
}

/// The most privacy loss that a run may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// The largest ε. Infinity allows everything, also training without noise.
    pub epsilon: f64,
    /// The δ, which should be well below 1 / N for N samples.
    pub delta: f64,
}

impl Budget {
    /// # Errors
    /// When ε is not positive, or δ is not in (0, 1).
    pub(super) fn check(&self) -> Result<()> {
        // False for NaN.
        let positive = self.epsilon > 0.0;
        if !positive {
            let reason = format!("ε is {}, but it has to be more than 0", self.epsilon);
            return Err(Error::invalid(OP, reason));
        }
        check_delta(self.delta)
    }
}

fn check_delta(delta: f64) -> Result<()> {
    if delta > 0.0 && delta < 1.0 {
        return Ok(());
    }
    Err(Error::invalid(OP, format!("δ is {delta}, but it has to be more than 0 and less than 1")))
}

/// A privacy loss: for any two data sets that differ in one sample added or removed, and for any
/// set of outcomes, P[outcome of one] ≤ e^ε P[outcome of the other] + δ.
///
/// `Display` has ε rounded up to four decimals, the unit and the relation.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Epsilon {
    /// ε, an upper bound.
    pub epsilon: f64,
    /// δ.
    pub delta: f64,
    /// The Rényi order α that gave the bound.
    pub order: f64,
}

impl Epsilon {
    /// Whether the order is the first or the last one of those that are tried. Then other orders
    /// could give a smaller ε. It is an upper bound all the same.
    pub fn is_at_end_of_orders(&self) -> bool {
        self.epsilon > 0.0 && rdp::ENDS.contains(&self.order)
    }
}

impl fmt::Display for Epsilon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let up = (self.epsilon * 1e4).ceil() / 1e4;
        write!(
            f,
            "ε ≤ {} at δ = {:e}, per sample (one sequence), added or removed; Poisson sampling, Rényi \
             order {}",
            // What is too large for the multiplication has no decimals.
            if up.is_finite() { up } else { self.epsilon },
            self.delta,
            self.order
        )?;
        if self.is_at_end_of_orders() {
            f.write_str(" (the end of the orders: others could give a smaller ε)")?;
        }
        Ok(())
    }
}

/// The sums of ε(α) over all events, and the privacy loss of such sums.
pub(super) struct Conversion {
    delta: f64,
    terms: Vec<f64>,
}

impl Conversion {
    /// # Errors
    /// When δ is not in (0, 1).
    pub(super) fn new(delta: f64) -> Result<Self> {
        check_delta(delta)?;
        Ok(Self { delta, terms: rdp::conversion(delta) })
    }

    /// Returns the privacy loss of events: for each, its number of steps and ε(α) of one step.
    pub(super) fn epsilon<'a>(&self, events: impl IntoIterator<Item = (u64, &'a [f64])>) -> Epsilon {
        let mut sums = vec![0.0; self.terms.len()];
        // 0 · ∞ is no number.
        for (steps, renyi) in events.into_iter().filter(|(steps, _)| *steps > 0) {
            let steps = steps as f64;
            sums.iter_mut().zip(renyi).for_each(|(sum, one)| *sum += steps * one);
        }
        let (epsilon, order) = rdp::epsilon(&sums, &self.terms);
        Epsilon { epsilon, delta: self.delta, order }
    }
}

/// Returns the privacy loss of events one after another, in any order. ε is infinite for steps
/// without noise.
///
/// ε = min over α of Σ ε(α) + ln((α − 1) / α) − (ln δ + ln α) / (α − 1), where ε(α) is the Rényi
/// divergence of a step. The orders α are 1.1, 1.2, …, 10.9, 12, 13, …, 63, as in Opacus, and
/// larger ones up to 1024. If σ < 0.1, only integers.
///
/// Sources: Mironov, Talwar and Zhang, 2019: Rényi Differential Privacy of the Sampled Gaussian
/// Mechanism; Balle et al., 2020: Hypothesis Testing Interpretations and Rényi Differential
/// Privacy.
///
/// ```
/// use shardwise::privacy::{Event, epsilon};
/// let spent = epsilon(&[Event { sigma: 1.5, rate: 0.04, steps: 2250 }], 1e-5)?;
/// assert_eq!((spent.order, (spent.epsilon * 1e6).round()), (3.9, 7329111.0));
/// assert!(spent.to_string().starts_with("ε ≤ 7.3292 at δ = 1e-5, per sample"));
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// When δ is not in (0, 1), a σ is negative or not finite, or a rate is not in [0, 1].
pub fn epsilon(events: &[Event], delta: f64) -> Result<Epsilon> {
    let conversion = Conversion::new(delta)?;
    events.iter().try_for_each(Event::check)?;
    let all: Vec<_> = events.iter().map(|event| (event.steps, event.renyi())).collect();
    Ok(conversion.epsilon(all.iter().map(|(steps, renyi)| (*steps, renyi.as_slice()))))
}

/// Returns the smallest σ with which a number of steps stays within a budget, to ten digits: ε is
/// at most that of the budget.
///
/// ```
/// use shardwise::privacy::{Budget, Event, epsilon, noise_for};
/// let budget = Budget { epsilon: 8.0, delta: 1e-5 };
/// let sigma = noise_for(&budget, 0.04, 2250)?;
/// assert!((sigma - 1.41579).abs() < 1e-5);
/// assert!(epsilon(&[Event { sigma, rate: 0.04, steps: 2250 }], 1e-5)?.epsilon <= 8.0);
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// When the budget's ε is not positive, its δ is not in (0, 1), or the rate is not in
/// [0, 1]. When the budget is so small that σ = 2²⁰ exceeds it.
pub fn noise_for(budget: &Budget, rate: f64, steps: u64) -> Result<f64> {
    const MOST: f64 = (1 << 20) as f64;
    budget.check()?;
    Event { sigma: 1.0, rate, steps }.check()?;
    let conversion = Conversion::new(budget.delta)?;
    let of = |sigma: f64| conversion.epsilon([(steps, rdp::renyi(sigma, rate).as_slice())]).epsilon;
    let fits = |sigma: f64| of(sigma) <= budget.epsilon;
    if fits(0.0) {
        return Ok(0.0);
    }
    let (mut low, mut high) = (0.0, 1.0);
    while !fits(high) {
        if high == MOST {
            let reason = format!(
                "no σ up to {MOST} gives ε ≤ {} at δ = {:e} with {steps} steps of rate {rate}: σ = {MOST} \
                 gives {}",
                budget.epsilon,
                budget.delta,
                of(MOST)
            );
            return Err(Error::invalid(OP, reason));
        }
        (low, high) = (high, 2.0 * high);
    }
    while high - low > 1e-10 * high {
        let middle = (low + high) / 2.0;
        if fits(middle) { high = middle } else { low = middle }
    }
    Ok(high)
}

/// Returns the largest number of steps that a budget allows, at most 2⁵³.
///
/// ```
/// use shardwise::privacy::{Budget, steps_within};
/// let budget = Budget { epsilon: 8.0, delta: 1e-5 };
/// assert_eq!(steps_within(&budget, 1.5, 0.04)?, 2622);
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// When the budget's ε is not positive, its δ is not in (0, 1), σ is negative or not
/// finite, or the rate is not in [0, 1].
pub fn steps_within(budget: &Budget, sigma: f64, rate: f64) -> Result<u64> {
    budget.check()?;
    let event = Event { sigma, rate, steps: 0 };
    event.check()?;
    let (conversion, renyi) = (Conversion::new(budget.delta)?, event.renyi());
    let fits = |steps: u64| conversion.epsilon([(steps, renyi.as_slice())]).epsilon <= budget.epsilon;
    if fits(MAX_STEPS) {
        return Ok(MAX_STEPS);
    }
    let (mut low, mut high) = (0, MAX_STEPS);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Ok(low)
}
