//! Linear layers whose input features are cut over the ranks.

use super::{
    AddBias, DTensor, Layer, RowMap, Stream, Traffic,
    invariant::{self, Blocks, Factors, by_columns},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Activation, Backend},
    ops,
    shard::{Copied, Partial, Partition, Shape, Shard},
    tensor::{Param, Region, Role, Tensor, Weights},
};
use std::marker::PhantomData;

const OP: &str = "row linear";
const OP_BACKWARD: &str = "row linear backward";

/// Y = Σᵣ Xᵣ Wᵣᵀ: each rank multiplies its own input features. Shard<1> → Partial.
///
/// * X: `[tokens, inputs]`, of which rank r holds the columns Xᵣ; W: `[outputs, inputs]`, of which it holds the columns Wᵣ.
/// * Backward: dXᵣ = dY Wᵣ; dWᵣ = dYᵀ Xᵣ.
/// * Collectives: none.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3. As a layer with its collectives and bias: [`RowParallelLinear`].
#[derive(Debug)]
pub struct RowLinear<T: Element, B: Device> {
    group: Group<B>,
    weight: Param<T, B>,
    cut: Partition,
    blocks: Option<Blocks>,
    outputs: usize,
}

impl<T: Element, B: Backend> RowLinear<T, B> {
    /// Reads this rank's columns of `weight`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape, or the cut has not one part a rank.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        input_cut: &Partition,
        outputs: usize,
    ) -> Result<Self> {
        let (parts, ranks) = (input_cut.parts(), group.size());
        same_size(OP, "the parts of the cut", parts, "the ranks of the group", ranks)?;
        let region = Region::whole([outputs, input_cut.total()]).cut(1, input_cut.range(group.rank()));
        let blocks = invariant::blocks(OP, group, input_cut)?;
        let mut weight = Param::load_region(group.device(), weights, "weight", Role::Weight, region, true)?;
        invariant::cut_columns(&mut weight, group, blocks.as_ref());
        Ok(Self { group: group.clone(), weight, cut: input_cut.clone(), blocks, outputs })
    }
}

/// An activation in front of a layer, and what it was given.
pub(super) type Before<'a, T, B> = Option<(Activation, &'a Tensor<T, B>)>;

impl<T: Element, B: Backend> RowLinear<T, B> {
    fn output(&self, x: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        if x.cut() != Some(&self.cut) {
            let sizes = |cut: Option<&Partition>| cut.map(|cut| cut.sizes().collect::<Vec<_>>());
            let reason = format!(
                "the input's features are cut into {:?}, but the weight's columns into {:?}",
                sizes(x.cut()).unwrap_or_default(),
                sizes(Some(&self.cut)).unwrap_or_default()
            );
            return Err(Error::invalid(OP, reason));
        }
        match &self.blocks {
            None => Ok(x.derive(ops::linear(x.local(), self.weight.value(), None)?, self.outputs, None)),
            Some(blocks) => {
                let (a, b) = (x.local().mat(), self.weight.value().mat().t());
                invariant::product(x, self.outputs, &[Factors { a, b, blocks }])
            }
        }
    }

    fn input_grad(&self, dy: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let (w, device, shape) = (self.weight.value(), self.weight.value().device(), dy.local().shape());
        same_size(OP_BACKWARD, "columns of dy", shape.cols(), "rows of w", w.shape().rows())?;
        let mut dx = Tensor::empty(device, shape.with(shape.rank() - 1, w.shape().cols()))?;
        let runs = invariant::runs(self.blocks.as_ref());
        by_columns(device, runs, (dy.local().mat(), w.mat()), 0.0, dx.mat_mut()?)?;
        Ok(dy.derive(dx, self.cut.total(), Some(self.cut.clone())))
    }

    /// As [`RowLinear::input_grad`], and on through an activation, in one product where the device can.
    fn activated_grad(
        &self,
        (f, pre): (Activation, &Tensor<T, B>),
        dy: &DTensor<Copied, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        if self.blocks.is_none() {
            let dx = ops::linear_activate_backward(dy.local(), self.weight.value(), f, pre)?;
            return Ok(dy.derive(dx, self.cut.total(), Some(self.cut.clone())));
        }
        let dx = self.input_grad(dy)?;
        Ok(dx.with_local(ops::activate_backward(f, pre, dx.local())?))
    }

    fn weight_grad(&mut self, x: &Tensor<T, B>, dy: &Tensor<T, B>) -> Result<()> {
        same_size(OP_BACKWARD, "rows of dy", dy.shape().rows(), "rows of x", x.shape().rows())?;
        let (device, runs) = (x.device(), invariant::runs(self.blocks.as_ref()));
        let product = (dy.mat().t(), x.mat());
        self.weight.accumulate_grad(|beta, dw| by_columns(device, runs, product, beta, dw))
    }
}

impl<T: Element, B: Backend> Layer<T, B> for RowLinear<T, B> {
    type In = Shard<1>;
    type Out = Partial;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<Shard<1>, T, B>) -> Result<(DTensor<Partial, T, B>, Self::Saved)> {
        x.check(OP, &self.group)?;
        Ok((self.output(x)?, x.local().clone()))
    }

    #[track_caller]
    fn backward(&mut self, x: Self::Saved, dy: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        dy.check(OP_BACKWARD, &self.group)?;
        let dx = self.input_grad(dy)?;
        self.weight_grad(&x, dy.local())?;
        Ok(dx)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        f(&mut self.weight)
    }

    fn traffic(&self, _: &Group<B>, x: Shape) -> (Traffic, Shape) {
        (Traffic::default(), x.with(x.rank() - 1, self.outputs))
    }
}

/// Y = Σᵣ Xᵣ Wᵣᵀ + b with its collectives: Shard<1> → S.
///
/// The same as [`RowLinear`], then `S`'s leaving mapping, then [`AddBias`], bit for bit, with the group's
/// [`Overlap`](crate::comm::Overlap) in chunks. The bias is added once, after the sum.
///
/// * Forward: leaving the region: an all-reduce of Y for `Replicated`, a reduce-scatter for `Shard<0>`.
/// * Backward: entering it: nothing, or an all-gather of dY; with `Shard<0>` also an all-reduce of db.
///
/// For an input that is not cut yet, put [`crate::parallel::ScatterTo`]`::<1>` before it.
#[derive(Debug)]
pub struct RowParallelLinear<S: Stream, T: Element, B: Device> {
    linear: RowLinear<T, B>,
    bias: Option<AddBias<S, T, B>>,
    stream: PhantomData<S>,
}

impl<S: Stream, T: Element, B: Backend> RowParallelLinear<S, T, B> {
    /// Reads this rank's columns of `weight`, and `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or the cut has not one part a rank.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        input_cut: &Partition,
        outputs: usize,
        bias: bool,
    ) -> Result<Self> {
        let linear = RowLinear::load(group, weights, input_cut, outputs)?;
        let bias = match bias {
            true => Some(AddBias::load(group, weights, outputs)?),
            false => None,
        };
        Ok(Self { linear, bias, stream: PhantomData })
    }
}

impl<S: Stream, T: Element, B: Backend> RowParallelLinear<S, T, B> {
    /// The backward, and that of what is before the layer.
    #[track_caller]
    pub(super) fn backward_behind(
        &mut self,
        before: Before<'_, T, B>,
        saved: Tensor<T, B>,
        dy: &DTensor<S, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let _site = self.linear.weight.site().enter();
        dy.check(OP_BACKWARD, &self.linear.group)?;
        if let Some(bias) = &mut self.bias {
            bias.backward((), dy)?;
        }
        let linear = &self.linear;
        let splits = invariant::splits(saved.device(), None, linear.outputs);
        // A product of some rows has no function behind it.
        let (mut activated, tokens) = (false, dy.shape().rows());
        let mut map =
            |dy: &DTensor<Copied, T, B>| match before.filter(|_| dy.local().shape().rows() == tokens) {
                Some(before) => {
                    activated = true;
                    linear.activated_grad(before, dy)
                }
                None => linear.input_grad(dy),
            };
        let (dy, dx) = S::enter_to(dy, RowMap { features: linear.cut.total(), splits, map: &mut map })?;
        self.linear.weight_grad(&saved, dy.local())?;
        match before.filter(|_| !activated) {
            Some((f, pre)) => Ok(dx.with_local(ops::activate_backward(f, pre, dx.local())?)),
            None => Ok(dx),
        }
    }
}

impl<S: Stream, T: Element, B: Backend> Layer<T, B> for RowParallelLinear<S, T, B> {
    type In = Shard<1>;
    type Out = S;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<Shard<1>, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let linear = &self.linear;
        let _site = linear.weight.site().enter();
        x.check(OP, &linear.group)?;
        let (device, depth) = (x.local().device(), linear.weight.value().shape().cols());
        let splits = invariant::splits(device, linear.blocks.as_ref(), depth);
        let map = RowMap { features: linear.outputs, splits, map: &mut |x| linear.output(x) };
        let mut y = S::leave_of(x, map)?;
        if let Some(bias) = &self.bias {
            y = bias.add_to(y)?;
        }
        Ok((y, x.local().clone()))
    }

    #[track_caller]
    fn backward(&mut self, saved: Self::Saved, dy: &DTensor<S, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        self.backward_behind(None, saved, dy)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.linear.visit(f)?;
        self.bias.as_mut().map_or(Ok(()), |bias| bias.visit(f))
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        let (_, y) = Layer::<T, B>::traffic(&self.linear, group, x);
        let leave = S::leave_traffic::<T, B>(group, y);
        (self.bias.as_ref().map_or(leave.clone(), |bias| leave.then(bias.traffic(group, y).0)), y)
    }
}
