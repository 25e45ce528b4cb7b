//! Linear layers whose input features are cut over the ranks.

use super::{
    AddBias, DTensor, Layer, Leave, Linear, ResidualStream,
    dtensor::other_cut,
    overlap,
    sums::{Factors, Leaves, Sums, Through},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, Site, same_size},
    kernels::Backend,
    ops,
    shard::{Copied, Partial, Partition, Shard},
    tensor::{Param, Region, Role, Tensor, Weights},
};

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
    sums: Sums<B>,
    weight: Param<T, B>,
    cut: Partition,
    leaves: Leaves,
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
        let (parts, ranks) = (input_cut.shards(), group.size());
        same_size(OP, "the number of shards", parts, "the number of ranks", ranks)?;
        let region = Region::whole([outputs, input_cut.total()]).narrow(1, input_cut.range(group.rank()));
        let sums = Sums::of(group)?;
        let leaves = sums.leaves(OP, input_cut)?;
        let weight = Param::load_region(group.device(), weights, "weight", Role::Weight, region, true)?;
        let weight = sums.cut(weight, 1, &leaves);
        Ok(Self { sums, weight, cut: input_cut.clone(), leaves })
    }

    /// dX, and on through the activation in front of the layer.
    fn input_grad_through(
        &self,
        dy: &DTensor<Copied, T, B>,
        through: Through<'_, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let (columns, rows) = (dy.local().shape().cols(), self.weight.shape().rows());
        same_size(OP_BACKWARD, "columns of dy", columns, "rows of w", rows)?;
        let dx = self.sums.inputs(dy.local(), &self.weight, through, &self.leaves)?;
        Ok(dy.derive(dx, self.cut.total(), Some(self.cut.clone())))
    }
}

impl<T: Element, B: Backend> Linear<T, B> for RowLinear<T, B> {
    const OPS: [&'static str; 2] = [OP, OP_BACKWARD];

    fn group(&self) -> &Group<B> {
        self.sums.group()
    }

    fn site(&self) -> Site {
        self.weight.site()
    }

    fn features(&self) -> [usize; 2] {
        [self.cut.total(), self.weight.shape().rows()]
    }

    fn splits(&self) -> [bool; 2] {
        let device = self.sums.group().device();
        [overlap::splits(device, self.leaves.depths()), overlap::splits(device, [self.features()[1]])]
    }

    fn input_grad(&self, dy: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        self.input_grad_through(dy, None)
    }

    fn param_grads(&self, x: &Tensor<T, B>, dy: &DTensor<Copied, T, B>) -> Result<()> {
        let dy = dy.local();
        same_size(OP_BACKWARD, "rows of dy", dy.shape().rows(), "rows of x", x.shape().rows())?;
        self.sums.grads(&self.weight, (dy.mat(), x.mat()), (1, &self.leaves))
    }
}

impl<T: Element, B: Backend> Layer<T, B> for RowLinear<T, B> {
    type In = Shard<1>;
    type Out = Partial;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<Partial, T, B>, Self::Saved)> {
        x.check(OP, self.group())?;
        if x.partition() != Some(&self.cut) {
            let (x, w) = (("input's features", x.partition()), ("weight's columns", &self.cut));
            return Err(other_cut(OP, x, w));
        }
        let weight = self.weight.value()?;
        let factors = Factors { a: x.local().mat(), b: weight.mat().t(), leaves: &self.leaves };
        let y = self.sums.product(&x, self.features()[1], &[factors])?;
        Ok((y, x.into_local()))
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        dy.check(OP_BACKWARD, self.group())?;
        let dx = self.input_grad(&dy)?;
        self.param_grads(&x, &dy)?;
        Ok(dx)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        vec![self.weight.clone()]
    }
}

/// Y = Σᵣ Xᵣ Wᵣᵀ + b with its collectives: Shard<1> → S.
///
/// The same as [`RowLinear`], then [`DTensor::leave`], then [`AddBias`], bit for bit, with the
/// group's [`Overlap`](crate::comm::Overlap) in chunks. The bias is added once, after the sum.
///
/// * Forward: leaving the region: an all-reduce of Y for `Replicated`, a reduce-scatter for `Shard<0>`.
/// * Backward: entering it: nothing, or an all-gather of dY; with `Shard<0>` also an all-reduce of db.
///
/// For an input that is not cut yet, put [`crate::parallel::ScatterTo`]`::<1>` before it.
#[derive(Debug)]
pub struct RowParallelLinear<S: ResidualStream, T: Element, B: Device> {
    linear: Leave<S, RowLinear<T, B>>,
    bias: Option<AddBias<S, T, B>>,
}

impl<S: ResidualStream, T: Element, B: Backend> RowParallelLinear<S, T, B> {
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
        let linear = Leave::new(RowLinear::load(group, weights, input_cut, outputs)?);
        let bias = if bias { Some(AddBias::load(group, weights, outputs)?) } else { None };
        Ok(Self { linear, bias })
    }

    /// The backward, and on through the activation in front of the layer.
    #[track_caller]
    pub(super) fn backward_through(
        &self,
        through: Through<'_, T, B>,
        x: Tensor<T, B>,
        dy: DTensor<S, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let _site = self.linear.layer.site().enter();
        dy.check(OP_BACKWARD, self.linear.layer.group())?;
        let dy = match &self.bias {
            Some(bias) => bias.backward((), dy)?,
            None => dy,
        };
        if through.is_none() {
            return self.linear.backward(x, dy);
        }
        let layer = &self.linear.layer;
        let (dy, chunked) = match overlap::entering(&dy) {
            Some(chunks) => overlap::gather(&dy, &chunks, layer.splits()[1], &|dy| layer.input_grad(&dy))?,
            None => (dy.enter()?, None),
        };
        let dx = match (chunked, through) {
            (Some(dx), Some((f, pre))) => dx.map_local(|dx| ops::activate_backward(f, pre, &dx))?,
            _ => layer.input_grad_through(&dy, through)?,
        };
        layer.param_grads(&x, &dy)?;
        Ok(dx)
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for RowParallelLinear<S, T, B> {
    type In = Shard<1>;
    type Out = S;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let (y, saved) = self.linear.forward(x)?;
        match &self.bias {
            Some(bias) => Ok((bias.add_to(y)?, saved)),
            None => Ok((y, saved)),
        }
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        self.backward_through(None, x, dy)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.linear.params().into_iter().chain(self.bias.iter().flat_map(Layer::params)).collect()
    }
}
