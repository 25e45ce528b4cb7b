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

/// Which features of a head turn together. Checkpoints differ, and their shapes do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Features i and i + dim / 2 ("rotate half"): Hugging Face's checkpoints, GPT-NeoX.
    Halves,
    /// Features 2 i and 2 i + 1: the paper, Meta's Llama checkpoints, GPT-J.
    Interleaved,
}

/// How the heads in the columns of a matrix are turned.
#[derive(Clone, Copy, Debug)]
pub struct RopeSpec<'a> {
    /// The features of one head.
    pub head_dim: usize,
    /// The angle that each pair of features turns by from one position to the next. The pairs are made of the first
    /// `2 · frequencies.len()` features of a head; the others stay.
    pub frequencies: &'a [f64],
    /// Which features make up a pair.
    pub pairs: RopePairs,
    /// What turned features are multiplied with: 1, but for YaRN.
    pub magnitude: f64,
}

impl RopeSpec<'_> {
    /// The places of a pair in its head.
    pub(crate) fn pair(&self, at: usize) -> (usize, usize) {
        match self.pairs {
            RopePairs::Halves => (at, at + self.frequencies.len()),
            RopePairs::Interleaved => (2 * at, 2 * at + 1),
        }
    }
}

/// Rotary position embedding (Su et al., 2021: RoFormer).
pub trait Rope: Device {
    /// Turns, in every head of a row at position p, pair i by the angle p · frequencyᵢ:
    /// (a, b) ← m (a cos − b sin, b cos + a sin), in place. `transposed` turns back instead, (a, b) ← m (a cos + b sin,
    /// b cos − a sin): the backward.
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
        let reason = format!("{} columns are no whole number of heads of {}", x.cols(), spec.head_dim);
        return Err(Error::invalid(OP, reason));
    }
    if 2 * spec.frequencies.len() > spec.head_dim {
        let reason =
            format!("{} pairs of features do not fit a head of {}", spec.frequencies.len(), spec.head_dim);
        return Err(Error::invalid(OP, reason));
    }
    Ok(())
}
