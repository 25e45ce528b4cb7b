//! `shardwise privacy`: budgets of private training.

use shardwise::{
    Error, Result,
    privacy::{Budget, Event, epsilon, noise_for, steps_within},
};

/// Two of ε, σ and the number of steps. The third is computed.
#[derive(clap::Args)]
pub(crate) struct Request {
    /// q: the probability with which a sample is in a batch.
    #[arg(long)]
    rate: f64,
    /// δ of the budget.
    #[arg(long)]
    delta: f64,
    /// ε of the budget.
    #[arg(long)]
    epsilon: Option<f64>,
    /// σ: the standard deviation of the noise, in units of the norm of clipping.
    #[arg(long)]
    noise: Option<f64>,
    /// The number of steps.
    #[arg(long)]
    steps: Option<u64>,
}

impl Request {
    pub(crate) fn run(&self) -> Result<String> {
        let Self { rate, delta, .. } = *self;
        let (noise, steps, asked) = match (self.epsilon, self.noise, self.steps) {
            (Some(epsilon), None, Some(steps)) => {
                // Rounded up: with what is printed, all steps have to fit into the budget.
                let noise = (noise_for(&Budget { epsilon, delta }, rate, steps)? * 1e6).ceil() / 1e6;
                (noise, steps, format!("noise: {noise:.6}"))
            }
            (Some(epsilon), Some(noise), None) => {
                let steps = steps_within(&Budget { epsilon, delta }, noise, rate)?;
                (noise, steps, format!("steps: {steps}"))
            }
            (None, Some(noise), Some(steps)) => (noise, steps, String::new()),
            _ => {
                let reason = "give two of --epsilon, --noise and --steps: the third is computed";
                return Err(Error::Invalid { op: "privacy", reason: reason.into() });
            }
        };
        let spent = epsilon(&[Event { sigma: noise, rate, steps }], delta)?;
        let spent = format!("{steps} steps of q = {rate} and σ = {noise:.6} spend {spent}\n");
        Ok(if asked.is_empty() { spent } else { format!("{asked}\n{spent}") })
    }
}
