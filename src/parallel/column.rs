//! Linear layers whose output features are cut over the ranks.

use super::{
    Bias, Columns, DTensor, Layer, RowMap, Stream, Traffic,
    columns::SharedRows,
    copies::Copies,
    invariant::{self, Blocks, Factors, by_columns, by_rows},
};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::{Activation, Backend},
    ops,
    shard::{Copied, Partial, Partition, Placement, Shape, Shard},
    tensor::{Param, Role, Tensor, Weights},
};
use std::ops::Range;

const OP: &str = "column linear";
const OP_BACKWARD: &str = "column linear backward";

/// Yᵣ = X Wᵣᵀ + bᵣ: each rank computes its own output features. Copied → Shard<1>.
///
/// * X: `[tokens, inputs]`; W: `[outputs, inputs]`, of which rank r holds the rows Wᵣ; Y: `[tokens, outputs]`.
/// * Backward: dX is the [`Partial`] sum of dYᵣ Wᵣ; dWᵣ = dYᵣᵀ X; dbᵣ = Σ over tokens of dYᵣ.
/// * Collectives: none; with key/value heads that several ranks hold, an all-reduce of the gradients of their rows. With
///   [`Reduction::Invariant`](crate::shard::Reduction::Invariant) it is canonical blocks that hold such heads: before
///   anything else, the columns of dY that belong to them are summed over their holders. W and b have such a head once, Y
///   once for each of the rank's blocks that holds it.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3. As a layer with its collectives: [`ColumnParallelLinear`].
#[derive(Debug)]
pub struct ColumnLinear<T: Element, B: Device> {
    group: Group<B>,
    weight: Param<T, B>,
    bias: Option<Param<T, B>>,
    bias_mode: Bias,
    cut: Partition,
    blocks: Option<Blocks>,
    shared: Option<SharedRows>,
    copies: Option<Copies>,
}

impl<T: Element, B: Backend> ColumnLinear<T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or canonical blocks share key/value heads whose bias is to be skipped.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: usize,
        columns: &Columns,
        bias: Bias,
    ) -> Result<Self> {
        let (device, cut, rows) = (group.device(), columns.partition().clone(), columns.rows());
        let copies = columns.copies().cloned();
        if copies.is_some() && bias == Bias::Skip {
            let reason = "a bias that is skipped, of key/value heads that several canonical blocks hold: it has fewer \
                          elements than the output has columns";
            return Err(Error::Unsupported { op: OP, reason: reason.into() });
        }
        let pieces = columns.pieces(weights, "weight", Some(inputs));
        let mut weight = Param::load(device, weights, "weight", Role::Weight, [rows, inputs], pieces)?;
        let blocks = columns.blocks().cloned();
        invariant::cut_rows(&mut weight, group, blocks.as_ref());
        let vector = match bias {
            Bias::None => None,
            Bias::Add | Bias::Skip => {
                let pieces = columns.pieces(weights, "bias", None);
                let mut bias = Param::load(device, weights, "bias", Role::Bias, [rows], pieces)?;
                invariant::cut_rows(&mut bias, group, blocks.as_ref());
                Some(bias)
            }
        };
        let shared = columns.shared().cloned();
        Ok(Self { group: group.clone(), weight, bias: vector, bias_mode: bias, cut, blocks, shared, copies })
    }

    /// The ranks that share the layer.
    pub(super) fn group(&self) -> &Group<B> {
        &self.group
    }

    /// This rank's rows of the weight.
    pub(super) fn weight(&self) -> &Tensor<T, B> {
        self.weight.value()
    }

    /// Where the calls of the layer are made.
    #[track_caller]
    pub(super) fn site(&self) -> Site {
        self.weight.site()
    }

    /// The bias to be added.
    pub(super) fn added_bias(&self) -> Option<&Tensor<T, B>> {
        self.bias.as_ref().filter(|_| self.bias_mode == Bias::Add).map(Param::value)
    }

    /// Where this rank's canonical blocks are among the rows of the weight, if there are any.
    pub(super) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    /// The runs of the weight's rows that are multiplied by themselves, if not all at once.
    pub(super) fn runs(&self) -> Option<Vec<Range<usize>>> {
        let mut runs = invariant::runs(self.blocks.as_ref())?;
        runs.extend(self.copies.iter().flat_map(|copies| copies.foreign.iter().cloned()));
        Some(runs)
    }

    /// The key/value heads that canonical blocks share, if there are any.
    pub(super) fn copies(&self) -> Option<&Copies> {
        self.copies.as_ref()
    }

    /// How the output features are cut.
    pub(super) fn cut(&self) -> &Partition {
        &self.cut
    }

    /// How the weight's rows are cut.
    pub(super) fn rows_cut(&self) -> &Partition {
        self.copies.as_ref().map_or(&self.cut, |copies| &copies.rows)
    }

    /// The bias of this rank's rows, if there is one. With [`Bias::Skip`] adding it is up to the caller, and so is
    /// adding to its gradient.
    pub fn bias_mut(&mut self) -> Option<&mut Param<T, B>> {
        self.bias.as_mut()
    }

    pub(super) fn output(&self, x: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let (x_local, w, device) = (x.local(), self.weight.value(), self.group.device());
        if self.blocks.is_none() {
            return Ok(self.held(x, ops::linear(x_local, w, self.added_bias())?));
        }
        same_size("linear", "columns of x", x_local.shape().cols(), "columns of w", w.shape().cols())?;
        let shape = x_local.shape().with(x_local.shape().rank() - 1, w.shape().rows());
        let mut y = Tensor::empty(device, shape)?;
        by_columns(device, self.runs(), (x_local.mat(), w.mat().t()), 0.0, y.mat_mut()?)?;
        if let Some(bias) = self.added_bias() {
            device.add_bias::<T>(bias.slice(), y.mat_mut()?)?;
        }
        if let Some(copies) = &self.copies {
            y = copies.spread(&y)?;
        }
        Ok(self.held(x, y))
    }

    /// A result of `x` that is cut as the output features are.
    fn held(&self, x: &DTensor<Copied, T, B>, y: Tensor<T, B>) -> DTensor<Shard<1>, T, B> {
        x.derive(y, self.cut.total(), Some(self.cut.clone()))
    }

    /// f(Yᵣ), and Yᵣ.
    fn activated(
        &self,
        f: Activation,
        x: &DTensor<Copied, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>)> {
        if let (None, Some(bias)) = (&self.blocks, self.added_bias()) {
            let (y, pre) = ops::linear_activate(x.local(), self.weight.value(), bias, f)?;
            return Ok((self.held(x, y), pre));
        }
        let y = self.output(x)?;
        Ok((y.with_local(ops::activate(f, y.local())?), y.local().clone()))
    }

    /// dY with one column for each row of the weight.
    fn merged(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let (Some(copies), local) = (&self.copies, dy.local()) else { return Ok(dy.clone()) };
        let rows = self.weight.value().shape().rows();
        let mut merged = Tensor::empty(local.device(), local.shape().with(local.shape().rank() - 1, rows))?;
        copies.merge(&self.group, local.mat(), merged.mat_mut()?)?;
        Ok(dy.derive(merged, copies.rows.total(), Some(copies.rows.clone())))
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let (w, inputs) = (self.weight.value(), self.weight.value().shape().cols());
        let Some(blocks) = &self.blocks else {
            return Ok(dy.derive(ops::linear_input_grad(dy.local(), w)?, inputs, None));
        };
        let (columns, rows) = (dy.local().shape().cols(), w.shape().rows());
        same_size("linear backward", "columns of dy", columns, "rows of w", rows)?;
        invariant::product(dy, inputs, &[Factors { a: dy.local().mat(), b: w.mat(), blocks }])
    }

    fn param_grads(&mut self, x: &Tensor<T, B>, dy: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let dy = dy.local();
        same_size(OP_BACKWARD, "rows of dy", dy.shape().rows(), "rows of x", x.shape().rows())?;
        match self.shared {
            None if self.blocks.is_none() && self.added_bias().is_some() => {
                let mut db = Tensor::empty(x.device(), [dy.shape().cols()])?;
                self.weight.accumulate_grad(|beta, dw| ops::linear_param_grads(dy, x, beta, dw, &mut db))?;
                return self.bias.as_mut().map_or(Ok(()), |bias| bias.add_grad(db));
            }
            None => {
                let (device, runs, product) = (x.device(), self.runs(), (dy.mat().t(), x.mat()));
                self.weight.accumulate_grad(|beta, dw| by_rows(device, runs, product, beta, dw))?;
            }
            Some(_) => self.add_weight_grad(ops::linear_weight_grad(dy, x)?)?,
        }
        self.bias_grad(dy)
    }

    /// Adds a weight gradient that was computed elsewhere.
    pub(super) fn add_weight_grad(&mut self, mut dw: Tensor<T::Acc, B>) -> Result<()> {
        if let Some(shared) = &self.shared {
            sum_shared(&self.group, shared, &mut dw)?;
        }
        self.weight.add_grad(dw)
    }

    pub(super) fn bias_grad(&mut self, dy: &Tensor<T, B>) -> Result<()> {
        let Some(bias) = self.bias.as_mut().filter(|_| self.bias_mode == Bias::Add) else { return Ok(()) };
        let mut db = ops::bias_grad(dy)?;
        if let Some(shared) = &self.shared {
            let rows = db.len();
            db = db.reshape([rows, 1])?;
            sum_shared(&self.group, shared, &mut db)?;
            db = db.reshape([rows])?;
        }
        bias.add_grad(db)
    }

    /// What the backward moves before it does anything else.
    pub(super) fn merge_traffic(&self, x: Shape) -> Traffic {
        let copies = self.copies.as_ref();
        copies.map_or(Traffic::default(), |copies| copies.traffic::<T, B>(&self.group, x.rows()))
    }

    /// What the backward moves of the parameters' gradients.
    pub(super) fn grads_traffic(&self, x: Shape) -> Traffic {
        let Some(shared) = &self.shared else { return Traffic::default() };
        let sum = |width| Traffic::sum::<T::Acc, B>(&self.group, [shared.total, width].into()).in_backward();
        match self.bias_mode {
            Bias::Add => sum(1).then(sum(x.cols())),
            Bias::None | Bias::Skip => sum(x.cols()),
        }
    }

    pub(super) fn visit_params(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        f(&mut self.weight)?;
        self.bias.as_mut().map_or(Ok(()), f)
    }
}

/// The gradient of rows that several ranks hold becomes the sum over the holders, on each of them.
///
/// One sum of all shared rows of the layer; a holder has zeros where it holds none.
fn sum_shared<A: Element<Acc = A>, B: Backend>(
    group: &Group<B>,
    shared: &SharedRows,
    grad: &mut Tensor<A, B>,
) -> Result<()> {
    let (device, width) = (grad.device().clone(), grad.shape().cols());
    let mut packed = Tensor::<A, B>::zeros(&device, [shared.total, width])?;
    for (rows, at) in &shared.mine {
        let from = grad.mat().block(rows.clone(), 0..width);
        device.copy(from, packed.mat_mut()?.block(*at..at + rows.len(), 0..width))?;
    }
    group.all_reduce(ReduceOp::Sum, &mut packed)?;
    for (rows, at) in &shared.mine {
        let from = packed.mat().block(*at..at + rows.len(), 0..width);
        device.copy(from, grad.mat_mut()?.block(rows.clone(), 0..width))?;
    }
    Ok(())
}

impl<T: Element, B: Backend> Layer<T, B> for ColumnLinear<T, B> {
    type In = Copied;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<Copied, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        x.check(OP, &self.group)?;
        Ok((self.output(x)?, x.local().clone()))
    }

    #[track_caller]
    fn backward(&mut self, x: Self::Saved, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let _site = self.weight.site().enter();
        dy.check(OP_BACKWARD, &self.group)?;
        let dy = self.merged(dy)?;
        let dx = self.input_grad(&dy)?;
        self.param_grads(&x, &dy)?;
        Ok(dx)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.visit_params(f)
    }

    fn traffic(&self, _: &Group<B>, x: Shape) -> (Traffic, Shape) {
        let traffic = self.grads_traffic(x).then(self.merge_traffic(x));
        (traffic, x.with(x.rank() - 1, self.cut.total()))
    }
}

/// Yᵣ = X Wᵣᵀ + bᵣ with its collectives: S → Shard<1>.
///
/// The same as `S`'s entering mapping, then [`ColumnLinear`], bit for bit; but in the backward the reduction of dX runs
/// beside the product that gives dW, and with the group's [`Overlap`](crate::comm::Overlap) collectives run in chunks beside
/// the products that need or make what they carry.
///
/// * Forward: entering the stream: nothing for `Replicated`, an all-gather of X for `Shard<0>`.
/// * Backward: leaving it: an all-reduce of dX, or a reduce-scatter; and what [`ColumnLinear`] sums of shared key/value heads.
///
/// Loaded with [`Columns::merged`] this is the field's `MergedColumnParallelLinear` (gate and up of a gated MLP), with
/// [`Columns::qkv`] its `QKVParallelLinear`. For `gather_output`, chain [`crate::parallel::GatherFrom`]`::<1>`.
#[derive(Debug)]
pub struct ColumnParallelLinear<S: Stream, T: Element, B: Device> {
    linear: ColumnLinear<T, B>,
    stream: std::marker::PhantomData<S>,
}

impl<S: Stream, T: Element, B: Backend> ColumnParallelLinear<S, T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: usize,
        columns: &Columns,
        bias: Bias,
    ) -> Result<Self> {
        let linear = ColumnLinear::load(group, weights, inputs, columns, bias)?;
        Ok(Self { linear, stream: std::marker::PhantomData })
    }

    /// See [`ColumnLinear::bias_mut`].
    pub fn bias_mut(&mut self) -> Option<&mut Param<T, B>> {
        self.linear.bias_mut()
    }

    /// How the output features are cut.
    pub fn cut(&self) -> &Partition {
        &self.linear.cut
    }

    /// f(Yᵣ), Yᵣ, and what the backward needs.
    #[track_caller]
    pub(super) fn activated(
        &self,
        f: Activation,
        x: &DTensor<S, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>, Tensor<T, B>)> {
        let (linear, inputs) = (&self.linear, self.linear.weight().shape().cols());
        let _site = linear.weight.site().enter();
        x.check(OP, &linear.group)?;
        let splits = invariant::splits(linear.group.device(), None, inputs);
        // A product of some rows has no function behind it: what that was given is wanted as a whole.
        let (mut pre, tokens) = (None, x.shape().rows());
        let mut map = |x: &DTensor<Copied, T, B>| {
            if x.local().shape().rows() < tokens {
                return linear.output(x);
            }
            let (y, before) = linear.activated(f, x)?;
            pre = Some(before);
            Ok(y)
        };
        let (x, y) = S::enter_to(x, RowMap { features: linear.cut.total(), splits, map: &mut map })?;
        Ok(match pre {
            Some(pre) => (y, pre, x.into_local()),
            None => (y.with_local(ops::activate(f, y.local())?), y.into_local(), x.into_local()),
        })
    }

    /// The ranks that share the layer.
    pub fn group(&self) -> &Group<B> {
        &self.linear.group
    }

    /// This rank's rows of the weight.
    pub fn weight(&self) -> &Param<T, B> {
        &self.linear.weight
    }

    /// This rank's rows of the weight, to be trained.
    pub fn weight_mut(&mut self) -> &mut Param<T, B> {
        &mut self.linear.weight
    }
}

impl<S: Stream, T: Element, B: Backend> Layer<T, B> for ColumnParallelLinear<S, T, B> {
    type In = S;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<S, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        let (linear, inputs) = (&self.linear, self.linear.weight().shape().cols());
        let _site = linear.weight.site().enter();
        x.check(OP, &linear.group)?;
        let splits = invariant::splits(linear.group.device(), None, inputs);
        let features = linear.cut.total();
        let (x, y) = S::enter_to(x, RowMap { features, splits, map: &mut |x| linear.output(x) })?;
        Ok((y, x.into_local()))
    }

    #[track_caller]
    fn backward(
        &mut self,
        x: Self::Saved,
        dy: &DTensor<Shard<1>, T, B>,
    ) -> Result<DTensor<<S as Placement>::Dual, T, B>> {
        let _site = self.linear.weight.site().enter();
        dy.check(OP_BACKWARD, &self.linear.group)?;
        let dy = &self.linear.merged(dy)?;
        let (linear, [outputs, features]) =
            (&self.linear, [0, 1].map(|dim| self.linear.weight().shape().dims()[dim]));
        let splits = invariant::splits(linear.group.device(), linear.blocks(), outputs);
        let dx = S::start_leave_of(dy, RowMap { features, splits, map: &mut |dy| linear.input_grad(dy) })?;
        self.linear.param_grads(&x, dy)?;
        dx.wait()
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.linear.visit_params(f)
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        // Backward, from the last: dX depends on what is merged, and its reduction starts before the gradients are computed.
        let traffic = self.linear.grads_traffic(x).then(S::enter_traffic::<T, B>(group, x));
        (traffic.then(self.linear.merge_traffic(x)), x.with(x.rank() - 1, self.linear.cut.total()))
    }
}
