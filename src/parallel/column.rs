//! Linear layers whose output features are cut over the ranks.

use super::{
    Bias, Columns, DTensor, Enter, Layer, Linear, ResidualStream,
    dtensor::other_cut,
    overlap,
    sums::{Affine, Factors, Leaves, Sums},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::{Activation, Backend},
    ops,
    shard::{Copied, Partial, Partition, Shape, Shard},
    tensor::{Param, Role, Tensor, Weights},
};
use std::ops::Range;

const OP: &str = "column linear";
const OP_BACKWARD: &str = "column linear backward";

/// Yᵣ = X Wᵣᵀ + bᵣ: each rank computes its own output features. Copied → Shard<1>.
///
/// * X: `[tokens, inputs]`; W: `[outputs, inputs]`, of which rank r holds the rows Wᵣ; Y: `[tokens, outputs]`.
/// * Backward: dX is the [`Partial`] sum of dYᵣ Wᵣ; dWᵣ = dYᵣᵀ X; dbᵣ = Σ over tokens of dYᵣ.
/// * Collectives: none, but with key/value heads that several ranks hold. The backward then begins
///   with an all-reduce of their columns of dY: the sum over the holders is the gradient of a head.
///   With [`Reduction::Invariant`](crate::shard::Reduction::Invariant) it is canonical blocks that
///   hold such heads. W and b have a head once, Y once for each of the rank's blocks that holds it.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3. As a layer with its collectives: [`ColumnParallelLinear`].
#[derive(Debug)]
pub struct ColumnLinear<T: Element, B: Device> {
    sums: Sums<B>,
    branches: Vec<Branch<T, B>>,
    /// How the output features are cut over the ranks.
    cut: Partition,
}

/// A weight and a bias: all of a layer, or one of those of a [`ColumnParallelLinear`].
#[derive(Debug)]
struct Branch<T: Element, B: Device> {
    columns: Columns,
    weight: Param<T, B>,
    bias: Option<Param<T, B>>,
    bias_mode: Bias,
}

impl<T: Element, B: Backend> Branch<T, B> {
    /// The weight and the bias to be added, and where their leaves are.
    fn affine(&self) -> (Affine<'_, T, B>, &Leaves) {
        let bias = self.bias.as_ref().filter(|_| self.bias_mode == Bias::Add);
        ((&self.weight, bias), self.columns.leaves())
    }
}

/// Yᵣ = X Wᵣᵀ + bᵣ with its collectives: S → Shard<1>.
///
/// Loaded with [`Columns::merged`] this is the field's `MergedColumnParallelLinear` (gate and up of
/// a gated MLP), with [`Columns::qkv`] its `QKVParallelLinear`. For `gather_output`, chain
/// [`crate::parallel::GatherFrom`]`::<1>`.
pub type ColumnParallelLinear<S, T, B> = Enter<S, ColumnLinear<T, B>>;

impl<T: Element, B: Backend> ColumnLinear<T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or `columns` were made for another group.
    /// When an invariant reduction shares key/value heads whose bias is to be skipped.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: usize,
        columns: &Columns,
        bias_mode: Bias,
    ) -> Result<Self> {
        let (device, sums, rows) = (group.device(), Sums::of(group)?, columns.rows());
        columns.check(OP, bias_mode, group)?;
        let load = |name: &str, role, shape: &[usize], width| {
            let regions = columns.regions(weights, name, width);
            let param = Param::load(device, weights, name, role, Shape::new(shape), regions)?;
            Ok(sums.cut(param, 0, columns.leaves()))
        };
        let weight = load("weight", Role::Weight, &[rows, inputs], Some(inputs))?;
        let bias = match bias_mode {
            Bias::None => None,
            Bias::Add | Bias::Skip => Some(load("bias", Role::Bias, &[rows], None)?),
        };
        let branch = Branch { columns: columns.clone(), weight, bias, bias_mode };
        Ok(Self { sums, branches: vec![branch], cut: columns.partition().clone() })
    }

    /// The bias of this rank's rows, if there is one. With [`Bias::Skip`] adding it is up to the caller, and so is
    /// adding to its gradient.
    pub fn bias(&self) -> Option<&Param<T, B>> {
        self.branches[0].bias.as_ref()
    }

    /// Another layer with the same parameters.
    fn tied(&self) -> Self {
        let tied = |part: &Branch<T, B>| Branch {
            columns: part.columns.clone(),
            weight: part.weight.tie(),
            bias: part.bias.as_ref().map(Param::tie),
            bias_mode: part.bias_mode,
        };
        let branches = self.branches.iter().map(tied).collect();
        Self { sums: self.sums.clone(), branches, cut: self.cut.clone() }
    }

    /// The rank's columns of each branch, which has so many.
    fn runs(&self, size: impl Fn(&Columns) -> usize) -> Vec<Range<usize>> {
        let cut = Partition::from_sizes(self.branches.iter().map(|part| size(&part.columns)));
        (0..cut.shards()).map(|part| cut.range(part)).collect()
    }

    /// f(Yᵣ) and Yᵣ; without f, Yᵣ twice.
    fn output(
        &self,
        x: &DTensor<Copied, T, B>,
        f: Option<Activation>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>)> {
        let local = x.local();
        let (y, pre) = match &self.branches[..] {
            [part] => {
                let (params, leaves) = part.affine();
                let (y, pre) = self.sums.outputs(local, params, f, leaves)?;
                (part.columns.spread(y)?, pre)
            }
            parts => {
                let all = self.sums.all_outputs(local, parts.iter().map(Branch::affine).collect())?;
                let rank = self.sums.group().rank();
                let mut y = Tensor::empty(local.device(), [local.shape().rows(), self.cut.size(rank)])?;
                let runs = self.runs(|columns| columns.partition().size(rank));
                for ((part, one), run) in parts.iter().zip(all).zip(runs) {
                    let one = part.columns.spread(one)?;
                    local.device().copy(one.mat(), y.mat_mut()?.columns(run))?;
                }
                (f.map_or_else(|| Ok(y.clone()), |f| ops::activate(f, &y))?, y)
            }
        };
        Ok((x.derive(y, self.cut.total(), Some(self.cut.clone())), pre))
    }
}

/// The cut of features of several cuts that every rank holds side by side.
fn beside<'a>(cuts: impl Iterator<Item = &'a Partition> + Clone) -> Partition {
    let ranks = cuts.clone().next().map_or(0, Partition::shards);
    Partition::from_sizes((0..ranks).map(|rank| cuts.clone().map(|cut| cut.size(rank)).sum()))
}

impl<T: Element, B: Backend> Linear<T, B> for ColumnLinear<T, B> {
    const OPS: [&'static str; 2] = [OP, OP_BACKWARD];

    fn group(&self) -> &Group<B> {
        self.sums.group()
    }

    fn site(&self) -> Site {
        self.branches[0].weight.site()
    }

    fn features(&self) -> [usize; 2] {
        [self.branches[0].weight.shape().cols(), self.cut.total()]
    }

    fn splits(&self) -> [bool; 2] {
        let device = self.sums.group().device();
        let depths = self.branches.iter().flat_map(|part| part.columns.leaves().depths());
        [overlap::splits(device, [self.features()[0]]), overlap::splits(device, depths)]
    }

    fn merged(&self, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        // On every rank alike: the collective below is not for some of them.
        if !dy.partition().is_some_and(|cut| cut.sizes().eq(self.cut.sizes())) {
            let (dy, y) = (("gradient's features", dy.partition()), ("output's", &self.cut));
            return Err(other_cut(OP_BACKWARD, dy, y));
        }
        if !self.branches.iter().any(|part| part.columns.are_shared()) {
            return Ok(dy);
        }
        let (grad, rank) = (dy.local(), self.sums.group().rank());
        let cut = beside(self.branches.iter().map(|part| part.columns.row_cut()));
        let mut merged = Tensor::empty(grad.device(), [grad.shape().rows(), cut.size(rank)])?;
        let from = self.runs(|columns| columns.partition().size(rank));
        for ((part, from), to) in self.branches.iter().zip(from).zip(self.runs(Columns::rows)) {
            let (from, to) = (grad.mat().columns(from), merged.mat_mut()?.columns(to));
            part.columns.merge(&self.sums, from, to)?;
        }
        Ok(dy.derive(merged, cut.total(), Some(cut)))
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let (columns, runs) = (dy.local().shape().cols(), self.runs(Columns::rows));
        let rows = runs.last().map_or(0, |run| run.end);
        same_size("linear backward", "columns of dy", columns, "rows of w", rows)?;
        let weights = self.branches.iter().map(|part| part.weight.value()).collect::<Result<Vec<_>>>()?;
        let parts = self.branches.iter().zip(&weights).zip(runs);
        let factors = parts.map(|((part, weight), run)| Factors {
            a: dy.local().mat().columns(run),
            b: weight.mat(),
            leaves: part.columns.leaves(),
        });
        self.sums.product(dy, self.features()[0], &factors.collect::<Vec<_>>())
    }

    fn param_grads(&self, x: &Tensor<T, B>, dy: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let (dy, runs) = (dy.local(), self.runs(Columns::rows));
        same_size(OP_BACKWARD, "rows of dy", dy.shape().rows(), "rows of x", x.shape().rows())?;
        let parts = self.branches.iter().zip(runs);
        self.sums.row_grads(parts.map(|(part, run)| (part.affine(), dy.mat().columns(run))).collect(), x)
    }
}

impl<T: Element, B: Backend> Layer<T, B> for ColumnLinear<T, B> {
    type In = Copied;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Copied, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        x.check(OP, self.group())?;
        Ok((self.output(&x, None)?.0, x.into_local()))
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let _site = self.site().enter();
        dy.check(OP_BACKWARD, self.group())?;
        let dy = self.merged(dy)?;
        let dx = self.input_grad(&dy)?;
        self.param_grads(&x, &dy)?;
        Ok(dx)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.branches.iter().flat_map(|part| [&part.weight].into_iter().chain(&part.bias)).cloned().collect()
    }
}

impl<S: ResidualStream, T: Element, B: Backend> ColumnParallelLinear<S, T, B> {
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
        Ok(Self::new(ColumnLinear::load(group, weights, inputs, columns, bias)?))
    }

    /// `[X W₁ᵀ | X W₂ᵀ | …]`: column-sharded layers of one input, without merging their weights.
    ///
    /// Operator parallelism on one device: the products run at the same time, on the threads that
    /// this rank's [`Cpu`](crate::device::Cpu) may use. Rank r holds its features of the first
    /// layer, then of the second, and so on, as a merged layer does ([`Columns::merged`]); the
    /// bits of the output are the same. Errors of its collectives name the first layer.
    ///
    /// Backward: dX = Σᵢ dYᵢ Wᵢ; its leaving collective runs beside the products of the dWᵢ.
    ///
    /// # Errors
    /// When there is none, their inputs differ in number, or they belong to different groups.
    pub fn concat(layers: Vec<ColumnLinear<T, B>>) -> Result<Self> {
        const OP: &str = "concatenated linear";
        let join = |mut all: ColumnLinear<T, B>, layer: ColumnLinear<T, B>| {
            let [[inputs, _], [of, _]] = [layer.features(), all.features()];
            same_size(OP, "the inputs of a layer", inputs, "those of the first", of)?;
            let (this, first) = (layer.group(), all.group());
            if !this.is_same(first) || this.reduction() != first.reduction() {
                let reduction = (this.reduction(), first.reduction());
                let reason =
                    format!("a layer is spread over {this:?}, the first over {first:?}, with {reduction:?}");
                return Err(Error::invalid(OP, reason));
            }
            all.branches.extend(layer.branches);
            Ok(all)
        };
        let mut layers = layers.into_iter();
        let first = layers.next().ok_or_else(|| Error::invalid(OP, "there is no layer"))?;
        let all = layers.try_fold(first, join)?;
        let cut = beside(all.branches.iter().map(|branch| branch.columns.partition()));
        Ok(Self::new(ColumnLinear { cut, ..all }))
    }

    /// Another layer with the same weight, such as an output head: as long as it is there, a
    /// backward adds to the gradient once more ([`Param::tie`]).
    pub fn tied(&self) -> Self {
        Self::new(self.layer.tied())
    }

    /// See [`ColumnLinear::bias`].
    pub fn bias(&self) -> Option<&Param<T, B>> {
        self.layer.bias()
    }

    /// How the output features are cut.
    pub fn partition(&self) -> &Partition {
        &self.layer.cut
    }

    /// The ranks that share the layer.
    pub fn group(&self) -> &Group<B> {
        self.layer.sums.group()
    }

    /// This rank's rows of the weight.
    pub fn weight(&self) -> &Param<T, B> {
        &self.layer.branches[0].weight
    }

    /// f(Yᵣ), Yᵣ, and what the backward needs.
    #[track_caller]
    pub(super) fn activated(
        &self,
        f: Activation,
        x: DTensor<S, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>, Tensor<T, B>)> {
        let _site = self.layer.site().enter();
        x.check(OP, self.group())?;
        let (layer, chunks) = (&self.layer, overlap::entering(&x));
        let (x, chunked) = match &chunks {
            Some(chunks) => {
                overlap::gather(&x, chunks, layer.splits()[0], &|x| Ok(layer.output(&x, None)?.0))?
            }
            None => (x.enter()?, None),
        };
        match chunked {
            Some(y) => Ok((y.with_local(ops::activate(f, y.local())?)?, y.into_local(), x.into_local())),
            None => {
                let (y, pre) = layer.output(&x, Some(f))?;
                Ok((y, pre, x.into_local()))
            }
        }
    }
}
