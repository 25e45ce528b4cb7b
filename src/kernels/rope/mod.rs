//! Rotary position embedding.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{MatMut, view::unit_columns};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// The pairing of a head's features. Checkpoints use one or the other, and their tensor shapes do
/// not show which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RopePairs {
    /// Features i and i + dim / 2 ("rotate half"): Hugging Face's checkpoints, GPT-NeoX.
    Halves,
    /// Features 2 i and 2 i + 1: the paper, Meta's Llama checkpoints, GPT-J.
    Interleaved,
}

/// The rotation of the heads in the columns of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct RopeSpec<'a> {
    /// The features per head.
    pub head_dim: usize,
    /// The angle per position of each pair of features. Only the first `2 · frequencies.len()`
    /// features of each head are rotated.
    pub frequencies: &'a [f64],
    /// Which features make up a pair.
    pub pairs: RopePairs,
    /// The factor of the rotated features: 1, except for YaRN.
    pub magnitude: f64,
}

impl RopeSpec<'_> {
    /// The indices of a pair's features in the head.
    pub(crate) fn pair(&self, at: usize) -> (usize, usize) {
        match self.pairs {
            RopePairs::Halves => (at, at + self.frequencies.len()),
            RopePairs::Interleaved => (2 * at, 2 * at + 1),
        }
    }
}

/// Rotary position embedding (Su et al., 2021: RoFormer).
pub trait Rope: Device {
    /// Rotates, in place, pair i of every head of a row at position p by the angle p · frequencyᵢ:
    /// (a, b) ← m (a cos − b sin, b cos + a sin), where m is the magnitude. `transposed` rotates by
    /// the negative angle, (a, b) ← m (a cos + b sin, b cos − a sin), which is the backward.
    ///
    /// * `x`: `[rows, heads · head_dim]`, any row stride; `positions`: `[rows]`.
    /// * Angles, sines and cosines are computed in f64 and rounded to the accumulator.
    ///
    /// # Errors
    /// When sizes disagree.
    fn rope<T: Element>(
        &self,
        spec: &RopeSpec<'_>,
        positions: &[u32],
        transposed: bool,
        x: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

fn check<T: Element, B: Device>(spec: &RopeSpec<'_>, positions: usize, x: &MatMut<'_, T, B>) -> Result<()> {
    const OP: &str = "rope";
    unit_columns(OP, x.dims())?;
    same_size(OP, "the number of positions", positions, "the number of rows", x.rows())?;
    if spec.head_dim == 0 || !x.cols().is_multiple_of(spec.head_dim) {
        let reason =
            format!("{} columns are not a multiple of the head dimension {}", x.cols(), spec.head_dim);
        return Err(Error::invalid(OP, reason));
    }
    if 2 * spec.frequencies.len() > spec.head_dim {
        let reason =
            format!("{} pairs of features do not fit a head of {}", spec.frequencies.len(), spec.head_dim);
        return Err(Error::invalid(OP, reason));
    }
    Ok(())
}
