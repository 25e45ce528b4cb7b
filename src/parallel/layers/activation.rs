//! Activations and gates.

use crate::{
    device::Element,
    error::Result,
    kernels::{self, Backend},
    ops,
    parallel::{DTensor, Layer},
    shard::{Elementwise, Placement, Shard},
    tensor::Tensor,
};
use std::marker::PhantomData;

/// y = f(x), element by element: P → P, for any P whose elements are final values
/// ([`Elementwise`]). No collectives.
///
/// Backward: dx = dy f′(x).
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let x = Tensor::<f32, _>::from_slice(world.device(), [1, 3], &[-1.0, 2.0, -3.0])?;
///     let x = DTensor::replicated(&world, x)?.scatter::<1>(&world.even_partition(3)?)?;
///     let (y, _) = Activate::new(Activation::Relu).forward(x)?;
///     assert_eq!(y.all_gather()?.local().to_vec()?, [0.0, 2.0, 0.0]);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Activate<P> {
    f: kernels::Activation,
    placement: PhantomData<P>,
}

impl<P> Activate<P> {
    /// Makes the layer that applies `f`.
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
/// Backward: `[dy · up · f′(gate) | dy · f(gate)]`. Source: Shazeer, 2020: GLU Variants Improve
/// Transformer.
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let own = [[2.0, 10.0], [-3.0, 20.0]][world.rank()]; // one feature of the gate, one of up
///     let x = Tensor::<f32, _>::from_slice(world.device(), [1, 2], &own)?;
///     let x = DTensor::shard(&world, x, &Partition::from_sizes([2, 2]))?;
///     let (y, _) = Gate::new(Activation::Relu).forward(x)?;
///     assert_eq!(y.all_gather()?.local().to_vec()?, [20.0, 0.0]);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    f: kernels::Activation,
}

impl Gate {
    /// Makes the gate with activation `f`. With SiLU, this is SwiGLU.
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
        let partition = x.partition().map(|partition| partition.shrunk(2));
        Ok((x.with_features(y, x.shape().cols() / 2, partition), x.into_local()))
    }

    fn backward(&self, x: Self::Saved, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let dx = ops::gate_backward(self.f, &x, dy.local())?;
        let partition = dy.partition().map(|partition| partition.scaled(2));
        Ok(dy.with_features(dx, 2 * dy.shape().cols(), partition))
    }
}
