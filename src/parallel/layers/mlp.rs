//! Feed-forward layers: a column-parallel linear layer, an activation or gate, and a row-parallel
//! linear layer.

use super::{Bias, ColumnParallelLinear, Columns, Gate, Layer, RowParallelLinear};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::{Activation, Backend},
    parallel::{Context, DTensor, ResidualStream},
    tensor::{Param, Tensor, Weights},
};

/// Y = f(X Upᵀ + b₁) Downᵀ + b₂, or with a gate Y = (f(X Gateᵀ) · (X Upᵀ)) Downᵀ, with or without
/// biases: S → S. The `ffn` features are sharded. With SiLU the gated layer is SwiGLU (Shazeer,
/// 2020).
///
/// Gate and Up: `[ffn, hidden]`. One product multiplies X by both. Down: `[hidden, ffn]`.
/// Collectives: those of S entering and leaving, once in the forward and once in the backward
/// (Shoeybi et al., 2019). With `Shard<0>` and biases, the backward also makes an all-reduce of
/// db₂.
///
/// Computes the same function as two linear layers with [`Activate`](crate::parallel::Activate) or
/// [`Gate`] between them. Without a gate, the device may fuse the first product with the bias and
/// f. In the backward, the device may then fuse the second layer's product for dX with f′. A fused
/// product is not rounded before the activation or f′.
#[derive(Debug)]
pub struct ParallelMlp<S: ResidualStream, T: Element, B: Device> {
    up: ColumnParallelLinear<S, T, B>,
    f: Activation,
    gated: bool,
    down: RowParallelLinear<S, T, B>,
}

/// The values that the forward of a [`ParallelMlp`] saves for its backward: the inputs of Up, of f
/// or the gate, and of Down.
pub struct MlpSaved<T: Element, B: Device> {
    x: Tensor<T, B>,
    pre: Tensor<T, B>,
    hidden: Tensor<T, B>,
}

/// The names of the tensors of a feed-forward layer, relative to the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MlpNames {
    /// The gate's projection. Only gated layers read it.
    pub gate: String,
    /// The projection up.
    pub up: String,
    /// The projection down.
    pub down: String,
}

impl Default for MlpNames {
    /// `gate`, `up` and `down`.
    fn default() -> Self {
        Self::new("up", "down").with_gate("gate")
    }
}

impl MlpNames {
    /// Names the two projections of a layer without a gate.
    pub fn new(up: &str, down: &str) -> Self {
        Self { gate: String::new(), up: up.into(), down: down.into() }
    }

    /// Names the gate.
    pub fn with_gate(self, gate: &str) -> Self {
        Self { gate: gate.into(), ..self }
    }
}

impl<S: ResidualStream, T: Element, B: Backend> ParallelMlp<S, T, B> {
    /// Reads this rank's shard of a feed-forward layer without a gate.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
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
        Ok(Self { up, f, gated: false, down })
    }

    /// Reads this rank's shard of a gated feed-forward layer.
    ///
    /// # Errors
    /// As [`ParallelMlp::load`].
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
        let inputs = group.even_partition(ffn)?;
        let down = RowParallelLinear::load(group, &weights.at(&names.down), &inputs, hidden, bias)?;
        Ok(Self { up, f, gated: true, down })
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for ParallelMlp<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = MlpSaved<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let (hidden, pre, x) = if self.gated {
            let (pre, x) = self.up.forward(x)?;
            let (hidden, pre) = Gate::new(self.f).forward(pre)?;
            (hidden, pre, x)
        } else {
            self.up.activated(self.f, x)?
        };
        let (y, hidden) = self.down.forward(hidden)?;
        Ok((y, MlpSaved { x, pre, hidden }))
    }

    #[track_caller]
    fn infer(&self, x: DTensor<S, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<S, T, B>> {
        // Before the second product, frees the tensors that only a backward needs.
        let hidden = if self.gated {
            Gate::new(self.f).infer(self.up.infer(x, context)?, context)?
        } else {
            self.up.activated(self.f, x)?.0
        };
        self.down.infer(hidden, context)
    }

    #[track_caller]
    fn backward(&self, saved: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let MlpSaved { x, pre, hidden } = saved;
        let dpre = if self.gated {
            Gate::new(self.f).backward(pre, self.down.backward(hidden, dy)?)?
        } else {
            self.down.backward_with_activation(Some((self.f, &pre)), hidden, dy)?
        };
        self.up.backward(x, dpre)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        [self.up.params(), self.down.params()].concat()
    }
}
