//! LayerNorm and RMSNorm.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;

use super::{
    MatMut, MatRef,
    view::{Dims, same_dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// The kind of normalization, with its ε.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum NormKind {
    /// (x − mean) / √(var + ε) · γ + β with the biased variance (Ba, Kiros and Hinton, 2016).
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// x / √(mean(x²) + ε) · γ (Zhang and Sennrich, 2019).
    RmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
}

impl NormKind {
    /// ε.
    pub fn eps(self) -> f64 {
        match self {
            Self::LayerNorm { eps } | Self::RmsNorm { eps } => eps,
        }
    }

    /// Returns an error if ε is negative or not finite.
    pub(crate) fn check(self) -> Result<()> {
        if self.eps().is_finite() && self.eps() >= 0.0 {
            return Ok(());
        }
        Err(Error::invalid("normalize", format!("ε is {}", self.eps())))
    }

    /// Whether the mean is subtracted.
    pub fn centers(self) -> bool {
        matches!(self, Self::LayerNorm { .. })
    }
}

/// Row normalization. The statistics are computed in the accumulator type. The variance is computed
/// in a second pass over the row.
pub trait Norm: Device {
    /// y ← norm(x), row by row.
    ///
    /// * `x`, `y`: `[rows, cols]`; `gamma` and the optional `beta`: `[cols]`.
    /// * `stats`: `[rows, 2]`, saved for the backward: the mean (0 for RMSNorm) and 1 / √(…) of
    ///   each row.
    ///
    /// # Errors
    /// When sizes disagree.
    fn normalize<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: Self::Slice<'_, T>,
        beta: Option<Self::Slice<'_, T>>,
        y: MatMut<'_, T, Self>,
        stats: Self::SliceMut<'_, T::Acc>,
    ) -> Result<()>;

    /// dx ← the gradient of x; dγ ← Σ over rows of dy · x̂; dβ ← Σ over rows of dy.
    ///
    /// With x̂ the normalized row, r = 1 / √(…) and g = dy · γ: dx = r (g − mean(g) − x̂ mean(g
    /// x̂)). RMSNorm omits the term mean(g).
    ///
    /// # Errors
    /// When sizes disagree.
    #[allow(clippy::too_many_arguments)]
    fn normalize_backward<T: Element>(
        &self,
        kind: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: Self::Slice<'_, T>,
        stats: Self::Slice<'_, T::Acc>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
        dgamma: Self::SliceMut<'_, T::Acc>,
        dbeta: Option<Self::SliceMut<'_, T::Acc>>,
    ) -> Result<()>;
}

fn check(
    op: &'static str,
    inputs: &[(&str, Dims)],
    y: Dims,
    rows: &[(&str, usize)],
    stats: usize,
) -> Result<()> {
    unit_columns(op, y)?;
    for (name, x) in inputs {
        unit_columns(op, *x)?;
        same_dims(op, name, *x, "the result", y)?;
    }
    for (name, len) in rows {
        same_size(op, name, *len, "the number of columns", y.cols)?;
    }
    same_size(op, "the statistics", stats, "twice the number of rows", y.rows.saturating_mul(2))
}
