//! Column-parallel linear layers: each rank computes its shard of the output features.

use super::{Bias, Columns, Enter, Linear};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::{Activation, Backend},
    ops,
    parallel::{
        DTensor, Layer, ResidualStream,
        dtensor::{overlap, partition_mismatch},
        sums::{Affine, Factors, Leaves, Sums},
    },
    shard::{Copied, Partial, Partition, Shape, Shard},
    tensor::{Param, Role, Tensor, Weights},
};
use std::ops::Range;

const OP: &str = "column linear";
const OP_BACKWARD: &str = "column linear backward";

/// Yᵣ = X Wᵣᵀ + bᵣ: Copied → Shard<1>. Each rank computes its own output features.
///
/// * X: `[tokens, inputs]`. W: `[outputs, inputs]`, of which rank r holds the rows Wᵣ.
///   Y: `[tokens, outputs]`.
/// * Backward: dX is the [`Partial`] sum of dYᵣ Wᵣ; dWᵣ = dYᵣᵀ X; dbᵣ = Σ over tokens of dYᵣ.
/// * Collectives: none, unless several ranks hold a key/value head. Then the backward begins with
///   an all-reduce of the columns of dY that belong to such heads, because the gradient of a head
///   is the sum over its holders. With
///   [`Reduction::Invariant`](crate::shard::Reduction::Invariant), the holders are canonical
///   blocks: W and b have each head once, but Y has one copy of the head for each of the rank's
///   blocks that holds it.
///
/// [`ColumnParallelLinear`] is this layer with its collectives. Source: Shoeybi et al., 2019:
/// Megatron-LM, section 3.
///
/// ```
/// use shardwise::prelude::*;
///
/// let source = Random::normal(1, 1.0);
/// let outputs = launch::threads(2, |world| {
///     let (weights, columns) = (Weights::new(&source), Columns::even(&world, 3)?);
///     let layer = ColumnLinear::<f64, _>::load(&world, &weights, 4, &columns, Bias::Add)?;
///     let x = DTensor::copied(&world, Tensor::full(world.device(), [5, 4], 0.5)?)?;
///     let (y, _) = layer.forward(x)?;
///     assert_eq!(y.local().shape().dims(), [5, [2, 1][world.rank()]]);
///     y.all_gather()?.local().to_vec()
/// })?;
/// assert_eq!(outputs[0].len(), 15);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct ColumnLinear<T: Element, B: Device> {
    sums: Sums<B>,
    branches: Vec<Branch<T, B>>,
    /// The partition of the output features over the ranks.
    partition: Partition,
}

/// The weight and the bias of the layer, or of one of several concatenated layers.
#[derive(Debug)]
struct Branch<T: Element, B: Device> {
    columns: Columns,
    weight: Param<T, B>,
    bias: Option<Param<T, B>>,
    bias_mode: Bias,
}

impl<T: Element, B: Backend> Branch<T, B> {
    /// The weight, the bias that the layer adds, and their leaves.
    fn affine(&self) -> (Affine<'_, T, B>, &Leaves) {
        let bias = self.bias.as_ref().filter(|_| self.bias_mode == Bias::Add);
        ((&self.weight, bias), self.columns.leaves())
    }
}

/// Yᵣ = X Wᵣᵀ + bᵣ, with the collectives that enter the region: S → Shard<1>.
///
/// With [`Columns::merged`], this is vLLM's `MergedColumnParallelLinear` (gate and up of a gated
/// MLP). With [`Columns::qkv`], this is vLLM's `QKVParallelLinear`. For Megatron-LM's
/// `gather_output`, chain this layer with [`GatherFrom`](crate::parallel::GatherFrom)`::<1>`.
pub type ColumnParallelLinear<S, T, B> = Enter<S, ColumnLinear<T, B>>;

impl<T: Element, B: Backend> ColumnLinear<T, B> {
    /// Reads this rank's rows of `weight`, and of `bias` if there is one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or `columns` were made for another group.
    /// Also for [`Bias::Skip`] if several canonical blocks hold a key/value head.
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
            Ok(sums.sharded(param, 0, columns.leaves()))
        };
        let weight = load("weight", Role::Weight, &[rows, inputs], Some(inputs))?;
        let bias = match bias_mode {
            Bias::None => None,
            Bias::Add | Bias::Skip => Some(load("bias", Role::Bias, &[rows], None)?),
        };
        let branch = Branch { columns: columns.clone(), weight, bias, bias_mode };
        Ok(Self { sums, branches: vec![branch], partition: columns.partition().clone() })
    }

    /// Returns this rank's rows of the bias, if there is one. With [`Bias::Skip`], the caller adds
    /// the bias to the output, and adds to the gradient of the bias.
    pub fn bias(&self) -> Option<&Param<T, B>> {
        self.branches[0].bias.as_ref()
    }

    /// Makes another layer with the same parameters.
    fn tied(&self) -> Self {
        let tied = |branch: &Branch<T, B>| Branch {
            columns: branch.columns.clone(),
            weight: branch.weight.tie(),
            bias: branch.bias.as_ref().map(Param::tie),
            bias_mode: branch.bias_mode,
        };
        let branches = self.branches.iter().map(tied).collect();
        Self { sums: self.sums.clone(), branches, partition: self.partition.clone() }
    }

    /// Returns the rank's columns of each branch. `size` returns the number of columns of a branch.
    fn branch_ranges(&self, size: impl Fn(&Columns) -> usize) -> Vec<Range<usize>> {
        let branches = Partition::from_sizes(self.branches.iter().map(|branch| size(&branch.columns)));
        (0..branches.shards()).map(|branch| branches.range(branch)).collect()
    }

    /// Computes f(Yᵣ) and Yᵣ. Without f, returns Yᵣ twice.
    fn output(
        &self,
        x: &DTensor<Copied, T, B>,
        f: Option<Activation>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Tensor<T, B>)> {
        let local = x.local();
        let (y, pre) = match &self.branches[..] {
            [branch] => {
                let (params, leaves) = branch.affine();
                let (y, pre) = self.sums.outputs(local, params, f, leaves)?;
                (branch.columns.spread(y)?, pre)
            }
            branches => {
                let all = self.sums.all_outputs(local, branches.iter().map(Branch::affine).collect())?;
                let rank = self.sums.group().rank();
                let mut y = Tensor::empty(local.device(), [local.shape().rows(), self.partition.size(rank)])?;
                let ranges = self.branch_ranges(|columns| columns.partition().size(rank));
                for ((branch, one), range) in branches.iter().zip(all).zip(ranges) {
                    let one = branch.columns.spread(one)?;
                    local.device().copy(one.mat(), y.mat_mut()?.columns(range))?;
                }
                (f.map_or_else(|| Ok(y.clone()), |f| ops::activate(f, &y))?, y)
            }
        };
        Ok((x.with_features(y, self.partition.total(), Some(self.partition.clone())), pre))
    }
}

/// Returns the partition of concatenated features. A rank holds its shard of each partition.
fn concatenated<'a>(all: impl Iterator<Item = &'a Partition> + Clone) -> Partition {
    let ranks = all.clone().next().map_or(0, Partition::shards);
    Partition::from_sizes((0..ranks).map(|rank| all.clone().map(|partition| partition.size(rank)).sum()))
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
        [self.branches[0].weight.shape().cols(), self.partition.total()]
    }

    fn splits(&self) -> [bool; 2] {
        let device = self.sums.group().device();
        let depths = self.branches.iter().flat_map(|branch| branch.columns.leaves().depths());
        [overlap::splits(device, [self.features()[0]]), overlap::splits(device, depths)]
    }

    fn merged(&self, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        // Compares all ranks' sizes, so that either all ranks join the collective below, or none
        // does.
        if !dy.partition().is_some_and(|partition| partition.sizes().eq(self.partition.sizes())) {
            let (dy, y) = (("gradient's features", dy.partition()), ("output's", &self.partition));
            return Err(partition_mismatch(OP_BACKWARD, dy, y));
        }
        if !self.branches.iter().any(|branch| branch.columns.are_shared()) {
            return Ok(dy);
        }
        let (grad, rank) = (dy.local(), self.sums.group().rank());
        let partition = concatenated(self.branches.iter().map(|branch| branch.columns.row_partition()));
        let mut merged = Tensor::empty(grad.device(), [grad.shape().rows(), partition.size(rank)])?;
        let from = self.branch_ranges(|columns| columns.partition().size(rank));
        for ((branch, from), to) in self.branches.iter().zip(from).zip(self.branch_ranges(Columns::rows)) {
            let (from, to) = (grad.mat().columns(from), merged.mat_mut()?.columns(to));
            branch.columns.merge(&self.sums, from, to)?;
        }
        Ok(dy.with_features(merged, partition.total(), Some(partition)))
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let (columns, ranges) = (dy.local().shape().cols(), self.branch_ranges(Columns::rows));
        let rows = ranges.last().map_or(0, |range| range.end);
        same_size("linear backward", "columns of dy", columns, "rows of w", rows)?;
        let weights = self.branches.iter().map(|branch| branch.weight.value()).collect::<Result<Vec<_>>>()?;
        let branches = self.branches.iter().zip(&weights).zip(ranges);
        let factors = branches.map(|((branch, weight), range)| Factors {
            a: dy.local().mat().columns(range),
            b: weight.mat(),
            leaves: branch.columns.leaves(),
        });
        self.sums.product(dy, self.features()[0], &factors.collect::<Vec<_>>())
    }

    fn param_grads(&self, x: &Tensor<T, B>, dy: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let (rows, ranges) = (dy.local().shape().rows(), self.branch_ranges(Columns::rows));
        same_size(OP_BACKWARD, "rows of dy", rows, "rows of x", x.shape().rows())?;
        let layers = self.branches.iter().map(Branch::affine).zip(ranges);
        self.sums.row_grads(layers.collect(), dy, x)
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
        let params = |branch: &Branch<T, B>| [Some(branch.weight.clone()), branch.bias.clone()];
        self.branches.iter().flat_map(params).flatten().collect()
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

    /// `[X W₁ᵀ | X W₂ᵀ | …]`: concatenates the outputs of column-parallel layers with the same
    /// input, without merging their weights.
    ///
    /// The products run concurrently on the threads of this rank's [`Cpu`](crate::device::Cpu)
    /// (operator parallelism on one device), or one after another if the reduction is invariant.
    /// Rank r holds its features of the first layer, then its features of the second layer, and so
    /// on. The output has the layout and the bits of a merged layer ([`Columns::merged`]). Errors
    /// of the collectives name the first layer.
    ///
    /// Backward: dX = Σᵢ dYᵢ Wᵢ. The collective of dX overlaps the products of the dWᵢ.
    ///
    /// ```
    /// use shardwise::prelude::*;
    ///
    /// let (group, source) = (Group::solo(&Cpu::new()), Random::normal(1, 1.0));
    /// let layer = |name, outputs| {
    ///     let (weights, columns) = (Weights::new(&source), Columns::even(&group, outputs)?);
    ///     ColumnLinear::<f32, _>::load(&group, &weights.at(name), 4, &columns, Bias::None)
    /// };
    /// let layers = vec![layer("a", 2)?, layer("b", 1)?];
    /// let both = ColumnParallelLinear::<Replicated, _, _>::concat(layers)?;
    /// let x = DTensor::replicated(&group, Tensor::full(group.device(), [1, 4], 0.5)?)?;
    /// let y = both.forward(x.clone())?.0.into_local().to_vec()?;
    /// assert_eq!(y[2..], layer("b", 1)?.forward(x.copy_to())?.0.into_local().to_vec()?);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the list is empty, or the layers have different numbers of inputs or different groups.
    pub fn concat(layers: Vec<ColumnLinear<T, B>>) -> Result<Self> {
        const OP: &str = "concatenated linear";
        let join = |mut all: ColumnLinear<T, B>, layer: ColumnLinear<T, B>| {
            let [[inputs, _], [of, _]] = [layer.features(), all.features()];
            same_size(OP, "the inputs of a layer", inputs, "those of the first", of)?;
            let (this, first) = (layer.group(), all.group());
            if !this.is_same(first) || this.reduction() != first.reduction() {
                let reduction = (this.reduction(), first.reduction());
                let reason = format!(
                    "a layer is spread over {this:?}, the first over {first:?}; reductions {reduction:?}"
                );
                return Err(Error::invalid(OP, reason));
            }
            all.branches.extend(layer.branches);
            Ok(all)
        };
        let mut layers = layers.into_iter();
        let first = layers.next().ok_or_else(|| Error::invalid(OP, "there is no layer"))?;
        let all = layers.try_fold(first, join)?;
        let partition = concatenated(all.branches.iter().map(|branch| branch.columns.partition()));
        Ok(Self::new(ColumnLinear { partition, ..all }))
    }

    /// Makes another layer with the same weight, such as an output head. While the new layer
    /// exists, each backward adds one more term to the weight's gradient ([`Param::tie`]).
    pub fn tied(&self) -> Self {
        Self::new(self.layer.tied())
    }

    /// Returns [`ColumnLinear::bias`].
    pub fn bias(&self) -> Option<&Param<T, B>> {
        self.layer.bias()
    }

    /// Returns the partition of the output features over the ranks.
    pub fn partition(&self) -> &Partition {
        &self.layer.partition
    }

    /// Returns the group whose ranks share the layer.
    pub fn group(&self) -> &Group<B> {
        self.layer.sums.group()
    }

    /// Returns this rank's rows of the weight.
    pub fn weight(&self) -> &Param<T, B> {
        &self.layer.branches[0].weight
    }

    /// Computes f(Yᵣ) and Yᵣ. Also returns the local input, which the backward needs.
    #[track_caller]
    pub(crate) fn activated(
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
