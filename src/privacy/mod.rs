//! Differential privacy: private training (DP-SGD), and an account of the privacy loss.
//!
//! Private training releases, in each step, a noisy mean of clipped gradients:
//!
//! ```text
//! (Σᵢ cᵢ gᵢ + σ C z) / (q N),   cᵢ = min(1, C / ‖gᵢ‖),   z ~ N(0, 1) for each element
//! ```
//!
//! The sum is over the samples of a batch. Each of the N samples is in the batch with probability
//! q, independently of the others (Poisson sampling). The divisor is the expected size of a batch,
//! q N, which is public, and not the size itself, which depends on the samples.
//!
//! **Unit.** A sample is one sequence: a row of a batch, or one of the sequences that a row packs.
//! Neighbouring data sets differ in one sample, added or removed. So the privacy loss (ε, δ) bounds
//! what a release shows about any one sequence. A person or a document with k sequences has less
//! protection: about k times the ε.
//!
//! | item | what |
//! |---|---|
//! | [`Private`], [`DpSgd`], [`Step`] | private training on a mesh: **start here** |
//! | [`PrivateEnds`] | private training of a pipeline |
//! | [`Samples`], [`Counts`] | the samples of a microbatch, and how many of a step were clipped |
//! | [`RunKey`] | the secret key of one start of a run, which determines batches and noise |
//! | [`PoissonSampler`] | the samples of each step, and of each data-parallel rank |
//! | [`Event`], [`epsilon()`] | the privacy loss of steps, as [`Epsilon`], by Rényi divergences |
//! | [`Budget`], [`noise_for`], [`steps_within`] | which σ, or how many steps, fit into a budget |
//! | [`Ledger`] | the steps of a run; refuses the step that exceeds the budget; in checkpoints |
//! | [`NonPrivate`] | a value without noise, whose disclosure the audit log records |
//!
//! What is not covered: (ε, δ) assumes exact arithmetic, and an observer who sees the released
//! gradients, but not how long a step takes.

mod accountant;
mod disclosed;
mod key;
mod ledger;
mod noise;
mod normal;
mod sampler;
mod training;

pub use {
    accountant::{Budget, Epsilon, Event, epsilon, noise_for, steps_within},
    disclosed::NonPrivate,
    key::RunKey,
    ledger::Ledger,
    sampler::PoissonSampler,
    training::{Counts, DpSgd, Private, PrivateEnds, Samples, Step},
};
