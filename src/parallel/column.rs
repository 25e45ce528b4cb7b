//! Linear layers whose output features are cut over the ranks.

use super::{
    Bias, Columns, DTensor, Enter, Layer, Linear, Stream, Traffic, overlap,
    sums::{Affine, AffineMut, Factors, Leaves, Sums},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, Site, same_size},
    kernels::{Activation, Backend, MatRef},
    ops,
    shard::{Copied, Partial, Partition, Shape, Shard},
    tensor::{Param, Role, Tensor, Weights},
};

const OP: &str = "column linear";
const OP_BACKWARD: &str = "column linear backward";

/// Yᵣ = X Wᵣᵀ + bᵣ: each rank computes its own output features. Copied → Shard<1>.
///
/// * X: `[tokens, inputs]`; W: `[outputs, inputs]`, of which rank r holds the rows Wᵣ; Y: `[tokens, outputs]`.
/// * Backward: dX is the [`Partial`] sum of dYᵣ Wᵣ; dWᵣ = dYᵣᵀ X; dbᵣ = Σ over tokens of dYᵣ.
/// * Collectives: none. With key/value heads that several ranks hold, the backward begins with an all-reduce of their columns
///   of dY: the sum over the holders is the gradient of a head. With
///   [`Reduction::Invariant`](crate::shard::Reduction::Invariant) it is canonical blocks that hold such heads. W and b have a
///   head once, Y once for each of the rank's blocks that holds it.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3. As a layer with its collectives: [`ColumnParallelLinear`].
#[derive(Debug)]
pub struct ColumnLinear<T: Element, B: Device> {
    sums: Sums<B>,
    columns: Columns,
    weight: Param<T, B>,
    bias: Option<Param<T, B>>,
    bias_mode: Bias,
}

/// Yᵣ = X Wᵣᵀ + bᵣ with its collectives: S → Shard<1>.
///
/// Loaded with [`Columns::merged`] this is the field's `MergedColumnParallelLinear` (gate and up of a gated MLP), with
/// [`Columns::qkv`] its `QKVParallelLinear`. For `gather_output`, chain [`crate::parallel::GatherFrom`]`::<1>`.
pub type ColumnParallelLinear<S, T, B> = Enter<S, ColumnLinear<T, B>>;

impl<T: Element, B: Backend> ColumnLinear<T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or the bias is to be skipped where it has fewer elements than the output
    /// has columns.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: usize,
        columns: &Columns,
        bias_mode: Bias,
    ) -> Result<Self> {
        let (device, sums, rows) = (group.device(), Sums::of(group)?, columns.rows());
        columns.allow(OP, bias_mode, &sums)?;
        let load = |name: &str, role, shape: &[usize], width| {
            let pieces = columns.pieces(weights, name, width);
            let param = Param::load(device, weights, name, role, Shape::new(shape), pieces)?;
            Ok(sums.cut(param, 0, columns.leaves()))
        };
        let weight = load("weight", Role::Weight, &[rows, inputs], Some(inputs))?;
        let bias = match bias_mode {
            Bias::None => None,
            Bias::Add | Bias::Skip => Some(load("bias", Role::Bias, &[rows], None)?),
        };
        Ok(Self { sums, columns: columns.clone(), weight, bias, bias_mode })
    }

    /// How the output features, and the weight's rows, are cut.
    pub(super) fn columns(&self) -> &Columns {
        &self.columns
    }

    /// The weight and the bias to be added, and where their leaves are.
    pub(super) fn params(&self) -> (Affine<'_, T, B>, &Leaves) {
        let bias = self.bias.as_ref().filter(|_| self.bias_mode == Bias::Add);
        ((&self.weight, bias), self.columns.leaves())
    }

    /// The same, to get gradients.
    pub(super) fn trained(&mut self) -> (AffineMut<'_, T, B>, &Leaves) {
        let bias = self.bias.as_mut().filter(|_| self.bias_mode == Bias::Add);
        ((&mut self.weight, bias), self.columns.leaves())
    }

    /// The bias of this rank's rows, if there is one. With [`Bias::Skip`] adding it is up to the caller, and so is
    /// adding to its gradient.
    pub fn bias_mut(&mut self) -> Option<&mut Param<T, B>> {
        self.bias.as_mut()
    }

    /// f(Yᵣ) and Yᵣ; without f, Yᵣ twice.
    fn output(
        &self,
        x: &DTensor<Copied, T, B>,
        f: Option<Activation>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>)> {
        let (params, leaves) = self.params();
        let (y, pre) = self.sums.outputs(x.local(), params, f, leaves)?;
        let cut = self.columns.partition();
        Ok((x.derive(self.columns.spread(y)?, cut.total(), Some(cut.clone())), pre))
    }

    /// The term of dX, whose inner dimension is cut.
    pub(super) fn factors<'a>(&'a self, dy: MatRef<'a, T, B>) -> Factors<'a, T, B> {
        Factors { a: dy, b: self.weight.value().mat(), leaves: self.columns.leaves() }
    }
}

impl<T: Element, B: Backend> Linear<T, B> for ColumnLinear<T, B> {
    const OPS: [&'static str; 2] = [OP, OP_BACKWARD];

    fn group(&self) -> &Group<B> {
        self.sums.group()
    }

    fn site(&self) -> Site {
        self.weight.site()
    }

    fn features(&self) -> [usize; 2] {
        [self.weight.value().shape().cols(), self.columns.partition().total()]
    }

    fn splits(&self) -> [bool; 2] {
        let device = self.sums.group().device();
        [
            overlap::splits(device, [self.features()[0]]),
            overlap::splits(device, self.columns.leaves().depths()),
        ]
    }

    fn merged(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let cut = self.columns.row_cut();
        let merged = self.columns.merge(&self.sums, dy.local())?;
        Ok(dy.derive(merged, cut.total(), Some(cut.clone())))
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let (columns, shape) = (dy.local().shape().cols(), self.weight.value().shape());
        same_size("linear backward", "columns of dy", columns, "rows of w", shape.rows())?;
        self.sums.product(dy, shape.cols(), &[self.factors(dy.local().mat())])
    }

    fn param_grads(&mut self, x: &Tensor<T, B>, dy: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let dy = dy.local();
        same_size(OP_BACKWARD, "rows of dy", dy.shape().rows(), "rows of x", x.shape().rows())?;
        let sums = self.sums.clone();
        sums.row_grads(self.trained(), dy.mat(), x)
    }
}

impl<T: Element, B: Backend> Layer<T, B> for ColumnLinear<T, B> {
    type In = Copied;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<Copied, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        x.check(OP, self.group())?;
        Ok((self.output(x, None)?.0, x.local().clone()))
    }

    #[track_caller]
    fn backward(&mut self, x: Self::Saved, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let _site = self.weight.site().enter();
        dy.check(OP_BACKWARD, self.group())?;
        let dy = self.merged(dy)?;
        let dx = self.input_grad(&dy)?;
        self.param_grads(&x, &dy)?;
        Ok(dx)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        let traffic = self.columns.merge_traffic::<T, B>(group, x.rows());
        (traffic, x.with(x.rank() - 1, self.columns.partition().total()))
    }
}

impl<S: Stream, T: Element, B: Backend> ColumnParallelLinear<S, T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// As [`ColumnLinear::load`].
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: usize,
        columns: &Columns,
        bias: Bias,
    ) -> Result<Self> {
        Ok(Self::to(ColumnLinear::load(group, weights, inputs, columns, bias)?))
    }

    /// See [`ColumnLinear::bias_mut`].
    pub fn bias_mut(&mut self) -> Option<&mut Param<T, B>> {
        self.layer.bias_mut()
    }

    /// How the output features are cut.
    pub fn cut(&self) -> &Partition {
        self.layer.columns.partition()
    }

    /// The ranks that share the layer.
    pub fn group(&self) -> &Group<B> {
        self.layer.sums.group()
    }

    /// This rank's rows of the weight.
    pub fn weight(&self) -> &Param<T, B> {
        &self.layer.weight
    }

    /// This rank's rows of the weight, to be trained.
    pub fn weight_mut(&mut self) -> &mut Param<T, B> {
        &mut self.layer.weight
    }

    /// f(Yᵣ), Yᵣ, and what the backward needs.
    #[track_caller]
    pub(super) fn activated(
        &self,
        f: Activation,
        x: &DTensor<S, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>, Tensor<T, B>)> {
        let _site = self.layer.site().enter();
        x.check(OP, self.group())?;
        if overlap::entering(x).is_some() {
            let (pre, x) = self.forward(x)?;
            return Ok((pre.with_local(ops::activate(f, pre.local())?), pre.into_local(), x));
        }
        let x = x.enter()?;
        let (y, pre) = self.layer.output(&x, Some(f))?;
        Ok((y, pre, x.into_local()))
    }
}
