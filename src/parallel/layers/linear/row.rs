//! Row-parallel linear layers: each rank multiplies its shard of the input features.

use super::{Leave, Linear};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, Site, same_size},
    kernels::Backend,
    ops,
    parallel::{
        AddBias, DTensor, Layer, ResidualStream,
        dtensor::{overlap, partition_mismatch},
        sums::{Factors, Leaves, PrecedingActivation, Sums},
    },
    shard::{Copied, Partial, Partition, Shard},
    tensor::{Param, Region, Role, Tensor, Weights},
};

const OP: &str = "row linear";
const OP_BACKWARD: &str = "row linear backward";

/// Y = Σᵣ Xᵣ Wᵣᵀ: Shard<1> → Partial. Each rank multiplies its own input features.
///
/// * X: `[tokens, inputs]`, of which rank r holds the columns Xᵣ. W: `[outputs, inputs]`, of which
///   rank r holds the columns Wᵣ. Y: `[tokens, outputs]`.
/// * Backward: dXᵣ = dY Wᵣ; dWᵣ = dYᵀ Xᵣ.
/// * Collectives: none.
///
/// [`RowParallelLinear`] is this layer with its collectives and a bias. Source: Shoeybi et al.,
/// 2019: Megatron-LM, section 3.
#[derive(Debug)]
pub struct RowLinear<T: Element, B: Device> {
    sums: Sums<B>,
    weight: Param<T, B>,
    partition: Partition,
    leaves: Leaves,
}

impl<T: Element, B: Backend> RowLinear<T, B> {
    /// Reads this rank's columns of `weight`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape, or the partition does not have one shard
    /// per rank. With an invariant reduction, also when the partition does not consist of canonical
    /// blocks.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, inputs: &Partition, outputs: usize) -> Result<Self> {
        let (shards, ranks) = (inputs.shards(), group.size());
        same_size(OP, "the number of shards", shards, "the number of ranks", ranks)?;
        let region = Region::whole([outputs, inputs.total()]).narrow(1, inputs.range(group.rank()));
        let sums = Sums::of(group)?;
        let leaves = sums.leaves(OP, inputs)?;
        let weight = Param::load_region(group.device(), weights, "weight", Role::Weight, region, true)?;
        let weight = sums.sharded(weight, 1, &leaves);
        Ok(Self { sums, weight, partition: inputs.clone(), leaves })
    }

    /// Computes dX, multiplied by f′ if there is a preceding activation.
    fn input_grad_with_activation(
        &self,
        dy: &DTensor<Copied, T, B>,
        preceding: PrecedingActivation<'_, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let (columns, rows) = (dy.local().shape().cols(), self.weight.shape().rows());
        same_size(OP_BACKWARD, "columns of dy", columns, "rows of w", rows)?;
        let dx = self.sums.inputs(dy.local(), &self.weight, preceding, &self.leaves)?;
        Ok(dy.with_features(dx, self.partition.total(), Some(self.partition.clone())))
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
        [self.partition.total(), self.weight.shape().rows()]
    }

    fn splits(&self) -> [bool; 2] {
        let device = self.sums.group().device();
        [overlap::splits(device, self.leaves.depths()), overlap::splits(device, [self.features()[1]])]
    }

    fn input_grad(&self, dy: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        self.input_grad_with_activation(dy, None)
    }

    fn param_grads(&self, x: &Tensor<T, B>, dy: &DTensor<Copied, T, B>) -> Result<()> {
        let rows = dy.local().shape().rows();
        same_size(OP_BACKWARD, "rows of dy", rows, "rows of x", x.shape().rows())?;
        self.sums.grads(&self.weight, dy, x, (1, &self.leaves))
    }
}

impl<T: Element, B: Backend> Layer<T, B> for RowLinear<T, B> {
    type In = Shard<1>;
    type Out = Partial;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<Partial, T, B>, Self::Saved)> {
        x.check(OP, self.group())?;
        if x.partition() != Some(&self.partition) {
            let (x, w) = (("input's features", x.partition()), ("weight's columns", &self.partition));
            return Err(partition_mismatch(OP, x, w));
        }
        if let Some(weight) = self.weight.quantized() {
            let y = self.sums.quantized_product(&x, (&weight, self.features()[1]), &self.leaves)?;
            return Ok((y, x.into_local()));
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

/// Y = Σᵣ Xᵣ Wᵣᵀ + b, with the collectives that leave the region: Shard<1> → S.
///
/// The result has the bits of [`RowLinear`] followed by [`DTensor::leave`] and [`AddBias`]. The
/// collectives run in chunks if the group's [`Overlap`](crate::comm::Overlap) asks for chunks. The
/// layer adds the bias to the sum, not to the term of each rank.
///
/// * Forward: an all-reduce of Y for `Replicated`, a reduce-scatter for `Shard<0>`.
/// * Backward: no collective for `Replicated`. For `Shard<0>`, an all-gather of dY, and an
///   all-reduce of db if there is a bias.
///
/// If the input is not sharded, chain [`ScatterTo`](crate::parallel::ScatterTo)`::<1>` before this
/// layer.
///
/// ```
/// use ndarray::{arr1, arr2};
/// use shardwise::prelude::*;
///
/// let (w, b) = (arr2(&[[1.0, 2.0, 3.0]]).into_dyn(), arr1(&[10.0]).into_dyn());
/// let source = Arrays([("weight".into(), w), ("bias".into(), b)].into());
/// launch::threads(2, |world| {
///     let (inputs, weights) = (world.even_partition(3)?, Weights::new(&source));
///     let row = RowParallelLinear::load(&world, &weights, &inputs, 1, true)?;
///     let x = DTensor::replicated(&world, Tensor::<f32>::full(world.device(), [1, 3], 1.0)?)?;
///     let y: DTensor<Replicated> = row.forward(x.scatter(&inputs)?)?.0;
///     assert_eq!(y.local().to_vec()?, [16.0]); // the bias counts once
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct RowParallelLinear<S: ResidualStream, T: Element, B: Device> {
    linear: Leave<S, RowLinear<T, B>>,
    bias: Option<AddBias<S, T, B>>,
}

impl<S: ResidualStream, T: Element, B: Backend> RowParallelLinear<S, T, B> {
    /// Reads this rank's columns of `weight`, and `bias` if there is one.
    ///
    /// # Errors
    /// As [`RowLinear::load`], also for the bias.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        inputs: &Partition,
        outputs: usize,
        bias: bool,
    ) -> Result<Self> {
        let linear = Leave::new(RowLinear::load(group, weights, inputs, outputs)?);
        let bias = if bias { Some(AddBias::load(group, weights, outputs)?) } else { None };
        Ok(Self { linear, bias })
    }

    /// Computes the backward of this layer, and of the preceding activation if there is one.
    #[track_caller]
    pub(crate) fn backward_with_activation(
        &self,
        preceding: PrecedingActivation<'_, T, B>,
        x: Tensor<T, B>,
        dy: DTensor<S, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let _site = self.linear.layer.site().enter();
        dy.check(OP_BACKWARD, self.linear.layer.group())?;
        let dy = match &self.bias {
            Some(bias) => bias.backward((), dy)?,
            None => dy,
        };
        if preceding.is_none() {
            return self.linear.backward(x, dy);
        }
        let layer = &self.linear.layer;
        let (dy, chunked) = match overlap::entering(&dy) {
            Some(chunks) => overlap::gather(&dy, &chunks, layer.splits()[1], &|dy| layer.input_grad(&dy))?,
            None => (dy.enter()?, None),
        };
        let dx = match (chunked, preceding) {
            (Some(dx), Some((f, pre))) => dx.map_local(|dx| ops::activate_backward(f, pre, &dx))?,
            _ => layer.input_grad_with_activation(&dy, preceding)?,
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
        self.backward_with_activation(None, x, dy)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.linear.params().into_iter().chain(self.bias.iter().flat_map(Layer::params)).collect()
    }
}
