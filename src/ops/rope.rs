//! Rotary position embedding of the heads in a tensor's columns, with scaling for long contexts.

use crate::{
    device::Element,
    error::{Error, Result, same_size},
    kernels::{Backend, RopePairs, RopeSpec},
    shard::Sequences,
    tensor::Tensor,
};
use std::{
    f64::consts::{PI, TAU},
    ops::Range,
};

/// The configuration of a rotary position embedding. Before scaling, pair i of a head's `dim`
/// rotated features turns by the angle base^(−2 i / dim) per position.
///
/// ```
/// use shardwise::{
///     kernels::RopePairs,
///     ops::{RopeConfig, RopeScaling},
/// };
///
/// let scaling = RopeScaling::DynamicNtk { factor: 2.0, trained: 64 };
/// let config = RopeConfig { dim: 4, base: 100.0, pairs: RopePairs::Halves, scaling };
/// // At twice the training length the base grows to 100 · (2 · 2 − 1)² = 900.
/// let frequencies = config.frequencies(128);
/// assert!(frequencies[0] == 1.0 && (frequencies[1] - 1.0 / 30.0).abs() < 1e-12);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The number of rotated features, which are the first of each head. Must be even.
    pub dim: usize,
    /// The base of the frequencies: 10000 in the paper.
    pub base: f64,
    /// Which features make up a pair.
    pub pairs: RopePairs,
    /// The scaling of the frequencies for contexts longer than in training.
    pub scaling: RopeScaling,
}

/// Scaling of the frequencies for contexts longer than in training. Names and formulas are those of
/// Hugging Face's `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// Divides all frequencies by a factor (Chen et al., 2023: position interpolation).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// If the sequence length L exceeds the training length T, replaces the base by base · (factor
    /// L / T − (factor − 1))^(dim / (dim − 2)). L is the length of each sequence by itself. Cached
    /// keys keep the frequencies of the step that computed them.
    DynamicNtk {
        /// The factor.
        factor: f64,
        /// The training length T.
        trained: usize,
    },
    /// Divides frequencies with wavelengths above T / low by the factor. Keeps frequencies with
    /// wavelengths below T / high, and interpolates in between (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Sets the shortest wavelength that is fully scaled, T / low.
        low: f64,
        /// Sets the longest wavelength that is not scaled, T / high.
        high: f64,
        /// The training length T.
        trained: usize,
    },
    /// Divides the frequencies of slow pairs by the factor and keeps those of fast pairs, as
    /// [`RopeScaling::Llama3`] does. For the pairs in between, interpolates linearly in the
    /// index of the pair. Also multiplies the rotated features by `magnitude`, which sharpens the
    /// softmax (Peng et al., 2023: YaRN).
    Yarn {
        /// The factor.
        factor: f64,
        /// The training length T.
        trained: usize,
        /// Pairs that make more turns than this in the training length are not scaled. Usually 32.
        fast: f64,
        /// Pairs that make fewer turns than this in the training length are fully scaled. Usually
        /// 1.
        slow: f64,
        /// Whether the limits of the interpolation are rounded outwards to whole pairs.
        truncate: bool,
        /// The factor of the rotated features.
        magnitude: f64,
    },
}

impl RopeScaling {
    /// YaRN's default magnitude for a factor: 0.1 ln(factor) + 1, or 1 if the factor is at most 1.
    pub fn yarn_magnitude(factor: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
    }
}

impl RopeConfig {
    /// The frequencies for a sequence of this length, one per pair. Only
    /// [`RopeScaling::DynamicNtk`] depends on the length.
    pub fn frequencies(&self, length: usize) -> Vec<f64> {
        let dim = self.dim as f64;
        let plain = |base: f64| (0..self.dim / 2).map(move |pair| base.powf(-2.0 * pair as f64 / dim));
        match self.scaling {
            RopeScaling::None => plain(self.base).collect(),
            RopeScaling::Linear { factor } => plain(self.base).map(|frequency| frequency / factor).collect(),
            RopeScaling::DynamicNtk { factor, trained } => {
                let stretch = factor * length.max(trained) as f64 / trained as f64 - (factor - 1.0);
                plain(self.base * stretch.powf(dim / (dim - 2.0))).collect()
            }
            RopeScaling::Llama3 { factor, low, high, trained } => {
                let scaled = |frequency: f64| {
                    let turns = trained as f64 * frequency / TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * (keep + (1.0 - keep) / factor)
                };
                plain(self.base).map(scaled).collect()
            }
            RopeScaling::Yarn { factor, trained, fast, slow, truncate, .. } => {
                // The index, not rounded, of the pair that makes this many turns in the training
                // length.
                let pair_of =
                    |turns: f64| dim * (trained as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.base.ln());
                let (mut first, mut last) = (pair_of(fast), pair_of(slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min(dim - 1.0));
                let width = if first == last { 0.001 } else { last - first };
                let scaled = |(pair, frequency): (usize, f64)| {
                    let stretched = ((pair as f64 - first) / width).clamp(0.0, 1.0);
                    frequency * (stretched / factor + 1.0 - stretched)
                };
                plain(self.base).enumerate().map(scaled).collect()
            }
        }
    }

    fn magnitude(&self) -> f64 {
        if let RopeScaling::Yarn { magnitude, .. } = self.scaling { magnitude } else { 1.0 }
    }

    fn check(&self, head_dim: usize) -> Result<()> {
        const OP: &str = "rope";
        let Self { dim, base, scaling, .. } = self;
        if dim % 2 == 1 || *dim > head_dim {
            return Err(Error::invalid(
                OP,
                format!("the number of rotated features is {dim}, but must be even and at most {head_dim}"),
            ));
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let sound = match *scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::DynamicNtk { factor, trained } => {
                *dim > 2 && factor >= 1.0 && positive(factor) && trained > 0
            }
            RopeScaling::Llama3 { factor, low, high, trained } => {
                positive(factor) && positive(low) && high > low && high.is_finite() && trained > 0
            }
            RopeScaling::Yarn { factor, trained, fast, slow, magnitude, .. } => {
                [factor, fast, slow, magnitude].into_iter().all(positive) && trained > 0 && *base != 1.0
            }
        };
        if !positive(*base) || !sound {
            return Err(Error::invalid(OP, format!("base {base} with {scaling:?} gives no frequencies")));
        }
        Ok(())
    }
}

/// A rotary position embedding with its frequencies.
#[derive(Clone, Debug)]
pub struct Rotary {
    config: RopeConfig,
    head_dim: usize,
    frequencies: Vec<f64>,
}

impl Rotary {
    /// Computes the frequencies for heads of `head_dim` features.
    ///
    /// # Errors
    /// When `dim` is odd or exceeds `head_dim`, or the configuration gives no valid frequencies.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Result<Self> {
        config.check(head_dim)?;
        Ok(Self { config: config.clone(), head_dim, frequencies: config.frequencies(0) })
    }

    fn spec<'a>(&self, frequencies: &'a [f64]) -> RopeSpec<'a> {
        let (pairs, magnitude) = (self.config.pairs, self.config.magnitude());
        RopeSpec { head_dim: self.head_dim, frequencies, pairs, magnitude }
    }

    /// Rotates every head in the columns `columns` of `x` by the position of the head's row.
    /// `transposed` rotates in the opposite direction, which is the backward. See
    /// [`crate::kernels::Rope`].
    ///
    /// # Errors
    /// When sizes disagree.
    pub fn turn<T: Element, B: Backend>(
        &self,
        x: &mut Tensor<T, B>,
        columns: Range<usize>,
        sequences: &Sequences,
        transposed: bool,
    ) -> Result<()> {
        let device = x.device().clone();
        let positions: Vec<u32> = sequences.positions().collect();
        let RopeScaling::DynamicNtk { trained, .. } = self.config.scaling else {
            let x = x.mat_mut()?.columns(columns);
            return device.rope(&self.spec(&self.frequencies), &positions, transposed, x);
        };
        same_size("rope", "rows of the sequences", positions.len(), "rows of x", x.shape().rows())?;
        for (at, rows) in sequences.iter().enumerate() {
            let length = sequences.end(at);
            let longer = (length > trained).then(|| self.config.frequencies(length));
            let frequencies = longer.as_ref().unwrap_or(&self.frequencies);
            let part = x.mat_mut()?.block(rows.clone(), columns.clone());
            device.rope(&self.spec(frequencies), &positions[rows], transposed, part)?;
        }
        Ok(())
    }
}
