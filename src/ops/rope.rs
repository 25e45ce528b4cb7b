//! Rotary position embedding of the heads in a tensor's columns, with the ways to stretch it to longer texts.

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

/// What a rotary position embedding is: pair i of the `dim` rotating features of a head turns by base^(−2 i / dim) from
/// one position to the next, before scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The features of a head that turn, its first; the others stay. An even number.
    pub dim: usize,
    /// The base of the frequencies, 10000 in the paper.
    pub base: f64,
    /// Which features make up a pair.
    pub pairs: RopePairs,
    /// How the frequencies change for texts that are longer than those of the training.
    pub scaling: RopeScaling,
}

/// How frequencies change for texts that are longer than those of the training. The names and the formulas are those of
/// Hugging Face's `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// They do not.
    None,
    /// All are divided by a factor (Chen et al., 2023: position interpolation).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the sequence's length L where that is more than the training's T:
    /// base (factor L / T − (factor − 1))^(dim / (dim − 2)). Each sequence has its own length; cached keys keep the
    /// frequencies of the step that made them.
    DynamicNtk {
        /// The factor.
        factor: f64,
        /// The training's length.
        trained: usize,
    },
    /// Wavelengths above T / low are stretched by the factor, those below T / high stay, between them both are mixed
    /// (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Where long wavelengths begin.
        low: f64,
        /// Where short ones end.
        high: f64,
        /// The training's length.
        trained: usize,
    },
    /// As Llama 3's, mixed by the number of turns in the training's length, and scores get sharper (Peng et al., 2023:
    /// YaRN).
    Yarn {
        /// The factor.
        factor: f64,
        /// The training's length.
        trained: usize,
        /// Pairs of more turns stay (32).
        fast: f64,
        /// Pairs of fewer turns are stretched by the factor (1).
        slow: f64,
        /// Whether the limits are rounded to whole pairs.
        truncate: bool,
        /// What turned features are multiplied with.
        magnitude: f64,
    },
}

impl RopeScaling {
    /// YaRN's usual magnitude for a factor: 0.1 ln(factor) + 1.
    pub fn yarn_magnitude(factor: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
    }
}

impl RopeConfig {
    /// The frequencies for a sequence of this length. Only [`RopeScaling::DynamicNtk`] depends on it.
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
                // The pair that makes so many turns in the training's length.
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
                format!("{dim} features of a head of {head_dim} cannot turn in pairs"),
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

/// A rotary position embedding, ready to turn.
#[derive(Clone, Debug)]
pub struct Rotary {
    config: RopeConfig,
    head_dim: usize,
    frequencies: Vec<f64>,
}

impl Rotary {
    /// For heads of `head_dim` features.
    ///
    /// # Errors
    /// When the features do not make pairs, or the configuration gives no frequencies.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Result<Self> {
        config.check(head_dim)?;
        Ok(Self { config: config.clone(), head_dim, frequencies: config.frequencies(0) })
    }

    fn spec<'a>(&self, frequencies: &'a [f64]) -> RopeSpec<'a> {
        let (pairs, magnitude) = (self.config.pairs, self.config.magnitude());
        RopeSpec { head_dim: self.head_dim, frequencies, pairs, magnitude }
    }

    /// Turns every head in some columns of `x` by its row's position; back again with `transposed`: the backward.
    /// See [`crate::kernels::Rope`].
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
