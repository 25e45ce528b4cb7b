//! Linear layers at the entrance and exit of a tensor-parallel region, with their collectives.

use crate::{
    comm::Group,
    device::Element,
    error::{Result, Site},
    kernels::Backend,
    parallel::{DTensor, Layer, ResidualStream, dtensor::overlap},
    shard::{Copied, Partial, Placement, Shard},
    tensor::{Param, Tensor},
};
use std::marker::PhantomData;

type Dual<P> = <P as Placement>::Dual;

/// A linear layer that saves its input for the backward. The backward has two halves,
/// [`Linear::input_grad`] and [`Linear::param_grads`], so that [`Enter`] can overlap the second
/// half with the collective of the first half's result.
pub trait Linear<T: Element, B: Backend>: Layer<T, B, Saved = Tensor<T, B>> {
    /// The names of the forward and the backward in errors.
    const OPS: [&'static str; 2];

    /// Returns the group whose ranks share the layer.
    fn group(&self) -> &Group<B>;

    /// Returns the site that is named in errors of the layer.
    #[track_caller]
    fn site(&self) -> Site;

    /// Returns the numbers of features of the whole input and of the whole output.
    fn features(&self) -> [usize; 2];

    /// Returns whether the products can be split by rows without changing any bits: first for the
    /// forward, then for the gradient of the input.
    fn splits(&self) -> [bool; 2];

    /// Prepares the gradient of the output for both halves. If several ranks hold a feature, sums
    /// its gradient over these ranks. The default returns `dy` unchanged.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    #[track_caller]
    fn merged(&self, dy: DTensor<Dual<Self::Out>, T, B>) -> Result<DTensor<Dual<Self::Out>, T, B>> {
        Ok(dy)
    }

    /// Computes the first half: the gradient of the input.
    ///
    /// # Errors
    /// When sizes disagree.
    fn input_grad(&self, dy: &DTensor<Dual<Self::Out>, T, B>) -> Result<DTensor<Dual<Self::In>, T, B>>;

    /// Computes the second half: adds to the parameters' gradients.
    ///
    /// # Errors
    /// When sizes disagree.
    fn param_grads(&self, x: &Tensor<T, B>, dy: &DTensor<Dual<Self::Out>, T, B>) -> Result<()>;
}

/// Enters a tensor-parallel region and applies a linear layer L: S → Copied → Shard<1>.
///
/// The result has the bits of [`DTensor::enter`] followed by L. In the backward, the reduction of
/// dX overlaps the products for the parameters' gradients. The collectives run in chunks if the
/// group's [`Overlap`](crate::comm::Overlap) asks for chunks.
///
/// * Forward: no collective for `Replicated`, an all-gather of X for `Shard<0>`.
/// * Backward: an all-reduce of dX for `Replicated`, a reduce-scatter for `Shard<0>`.
#[derive(Debug)]
pub struct Enter<S, L> {
    pub(super) layer: L,
    stream: PhantomData<S>,
}

impl<S, L> Enter<S, L> {
    /// Makes the layer that enters the region before `layer`.
    pub fn new(layer: L) -> Self {
        Self { layer, stream: PhantomData }
    }
}

impl<S, T, B, L> Layer<T, B> for Enter<S, L>
where
    S: ResidualStream,
    T: Element,
    B: Backend,
    L: Linear<T, B, In = Copied, Out = Shard<1>>,
{
    type In = S;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        let _site = self.layer.site().enter();
        x.check(L::OPS[0], self.layer.group())?;
        if let Some(chunks) = overlap::entering(&x) {
            let map = |x: DTensor<_, _, _>| Ok(self.layer.forward(x)?.0);
            let (x, y) = overlap::gather(&x, &chunks, self.layer.splits()[0], &map)?;
            return match y {
                Some(y) => Ok((y, x.into_local())),
                None => self.layer.forward(x),
            };
        }
        self.layer.forward(x.enter()?)
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<S, T, B>> {
        let _site = self.layer.site().enter();
        dy.check(L::OPS[1], self.layer.group())?;
        let dy = self.layer.merged(dy)?;
        if let Some(chunks) = overlap::leaving(&dy, self.layer.features()[0])? {
            let map = |dy: DTensor<_, _, _>| self.layer.input_grad(&dy);
            let started = overlap::start_sum(&dy, &chunks, self.layer.splits()[1], &map)?;
            self.layer.param_grads(&x, &dy)?;
            return overlap::stacked(&dy, self.layer.features()[0], started);
        }
        let dx = self.layer.input_grad(&dy)?.start_leave::<S>()?;
        self.layer.param_grads(&x, &dy)?;
        dx.wait()
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.layer.params()
    }
}

/// Applies a linear layer L and leaves the tensor-parallel region: Shard<1> → Partial → S.
///
/// The result has the bits of L followed by [`DTensor::leave`]. The collectives run in chunks if
/// the group's [`Overlap`](crate::comm::Overlap) asks for chunks.
///
/// * Forward: an all-reduce of Y for `Replicated`, a reduce-scatter for `Shard<0>`.
/// * Backward: no collective for `Replicated`, an all-gather of dY for `Shard<0>`.
#[derive(Debug)]
pub struct Leave<S, L> {
    pub(super) layer: L,
    stream: PhantomData<S>,
}

impl<S, L> Leave<S, L> {
    /// Makes the layer that leaves the region after `layer`.
    pub fn new(layer: L) -> Self {
        Self { layer, stream: PhantomData }
    }
}

impl<S, T, B, L> Layer<T, B> for Leave<S, L>
where
    S: ResidualStream,
    T: Element,
    B: Backend,
    L: Linear<T, B, In = Shard<1>, Out = Partial>,
{
    type In = Shard<1>;
    type Out = S;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let _site = self.layer.site().enter();
        x.check(L::OPS[0], self.layer.group())?;
        if let Some(chunks) = overlap::leaving(&x, self.layer.features()[1])? {
            let map = |x: DTensor<_, _, _>| Ok(self.layer.forward(x)?.0);
            let started = overlap::start_sum(&x, &chunks, self.layer.splits()[0], &map)?;
            return Ok((overlap::stacked(&x, self.layer.features()[1], started)?, x.into_local()));
        }
        let (y, saved) = self.layer.forward(x)?;
        Ok((y.leave()?, saved))
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let _site = self.layer.site().enter();
        dy.check(L::OPS[1], self.layer.group())?;
        if let Some(chunks) = overlap::entering(&dy) {
            let map = |dy: DTensor<_, _, _>| self.layer.input_grad(&dy);
            let (dy, dx) = overlap::gather(&dy, &chunks, self.layer.splits()[1], &map)?;
            let dx = dx.map_or_else(|| self.layer.input_grad(&dy), Ok)?;
            self.layer.param_grads(&x, &dy)?;
            return Ok(dx);
        }
        self.layer.backward(x, dy.enter()?)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.layer.params()
    }
}
