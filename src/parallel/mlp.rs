//! Feed-forward layers: one column-parallel and one row-parallel linear layer with a non-linear function between.

use super::{Activate, Bias, Chain, ColumnParallelLinear, Columns, Gate, Layer, RowParallelLinear, Stream};
use crate::{
    comm::Group,
    device::Element,
    error::Result,
    kernels::{Activation, Backend},
    shard::{Partition, Shard},
    tensor::Weights,
};

/// Y = f(X Upᵀ + b₁) Downᵀ + b₂: S → S, cut over the features between the two.
///
/// Up: `[ffn, hidden]`, Down: `[hidden, ffn]`. One entering and one leaving collective each way: Shoeybi et al., 2019.
pub type ParallelMlp<S, T, B> =
    Chain<Chain<ColumnParallelLinear<S, T, B>, Activate<Shard<1>>>, RowParallelLinear<S, T, B>>;

/// Y = (f(X Gateᵀ) · (X Upᵀ)) Downᵀ: S → S, cut over the features between. With SiLU, SwiGLU (Shazeer, 2020).
///
/// Gate and Up: `[ffn, hidden]`, merged into one product; Down: `[hidden, ffn]`.
pub type GatedMlp<S, T, B> = Chain<Chain<ColumnParallelLinear<S, T, B>, Gate>, RowParallelLinear<S, T, B>>;

/// What the tensors of a feed-forward layer are called, relative to the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpNames {
    /// The gate, if there is one.
    pub gate: String,
    /// The projection up.
    pub up: String,
    /// The projection down.
    pub down: String,
}

impl Default for MlpNames {
    fn default() -> Self {
        Self { gate: "gate".into(), up: "up".into(), down: "down".into() }
    }
}

impl<S: Stream, T: Element, B: Backend> ParallelMlp<S, T, B> {
    /// Reads this rank's part of a feed-forward layer.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer features than ranks.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        names: &MlpNames,
        (hidden, ffn): (usize, usize),
        f: Activation,
        bias: bool,
    ) -> Result<Self> {
        let columns = Columns::even(group, ffn)?;
        let mode = if bias { Bias::Add } else { Bias::None };
        let up = ColumnParallelLinear::load(group, &weights.at(&names.up), hidden, &columns, mode)?;
        let down =
            RowParallelLinear::load(group, &weights.at(&names.down), columns.partition(), hidden, bias)?;
        Ok(Layer::<T, B>::then(Layer::<T, B>::then(up, Activate::new(f)), down))
    }
}

impl<S: Stream, T: Element, B: Backend> GatedMlp<S, T, B> {
    /// Reads this rank's part of a gated feed-forward layer.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer features than ranks.
    pub fn load_gated(
        group: &Group<B>,
        weights: &Weights<'_>,
        names: &MlpNames,
        (hidden, ffn): (usize, usize),
        f: Activation,
        bias: bool,
    ) -> Result<Self> {
        let columns = Columns::merged(group, &[&names.gate, &names.up], ffn)?;
        let mode = if bias { Bias::Add } else { Bias::None };
        let up = ColumnParallelLinear::load(group, weights, hidden, &columns, mode)?;
        let cut = Partition::by_unit("gated mlp", "features", ffn, 1, group.size())?;
        let down = RowParallelLinear::load(group, &weights.at(&names.down), &cut, hidden, bias)?;
        Ok(Layer::<T, B>::then(Layer::<T, B>::then(up, Gate::new(f)), down))
    }
}
