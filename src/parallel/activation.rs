//! Activations and gates on final values.

use super::{DTensor, Layer};
use crate::{
    device::Element,
    error::Result,
    kernels::{self, Backend},
    ops,
    shard::{Elementwise, Placement, Shard},
    tensor::Tensor,
};
use std::marker::PhantomData;

/// y = f(x), element by element: P → P, for any P whose elements are final values ([`Elementwise`]). No collectives.
///
/// Backward: dx = dy f′(x).
#[derive(Clone, Copy, Debug)]
pub struct Activate<P> {
    f: kernels::Activation,
    placement: PhantomData<P>,
}

impl<P> Activate<P> {
    /// This function.
    pub fn new(f: kernels::Activation) -> Self {
        Self { f, placement: PhantomData }
    }
}

impl<P: Elementwise, T: Element, B: Backend> Layer<T, B> for Activate<P> {
    type In = P;
    type Out = P;
    type Saved = Tensor<T, B>;

    fn forward(&self, x: DTensor<P, T, B>) -> Result<(DTensor<P, T, B>, Self::Saved)> {
        Ok((x.with_local(ops::activate(self.f, x.local())?)?, x.into_local()))
    }

    fn backward(
        &self,
        x: Self::Saved,
        dy: DTensor<<P as Placement>::Dual, T, B>,
    ) -> Result<DTensor<<P as Placement>::Dual, T, B>> {
        dy.with_local(ops::activate_backward(self.f, &x, dy.local())?)
    }
}

/// yᵣ = f(gateᵣ) · upᵣ, where rank r holds `[gateᵣ | upᵣ]`: Shard<1> → Shard<1>. No collectives.
///
/// Backward: `[dy · up · f′(gate) | dy · f(gate)]`. Source: Shazeer, 2020: GLU Variants Improve Transformer.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    f: kernels::Activation,
}

impl Gate {
    /// A gate with this function: SiLU makes it SwiGLU.
    pub fn new(f: kernels::Activation) -> Self {
        Self { f }
    }
}

impl<T: Element, B: Backend> Layer<T, B> for Gate {
    type In = Shard<1>;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        x.check_rows("gate")?;
        let y = ops::gate(self.f, x.local())?;
        let cut = x.partition().map(|cut| cut.shrunk(2));
        Ok((x.derive(y, x.shape().cols() / 2, cut), x.into_local()))
    }

    fn backward(&self, x: Self::Saved, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let dx = ops::gate_backward(self.f, &x, dy.local())?;
        Ok(dy.derive(dx, 2 * dy.shape().cols(), dy.partition().map(|cut| cut.scaled(2))))
    }
}
