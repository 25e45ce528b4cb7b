//! Linear layers of one input that are computed at the same time.

use super::{ColumnLinear, DTensor, Enter, Layer, Linear, Stream, Traffic, overlap, sums::Sums};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::Backend,
    shard::{Copied, Partial, Partition, Shape, Shard},
    tensor::{Param, Tensor},
};
use std::ops::Range;

/// `[X W₁ᵀ | X W₂ᵀ | …]`: Copied → Shard<1>. The layers of a [`ForkedColumnLinear`].
#[derive(Debug)]
pub struct Fork<T: Element, B: Device> {
    sums: Sums<B>,
    layers: Vec<ColumnLinear<T, B>>,
    cut: Partition,
}

/// `[X W₁ᵀ | X W₂ᵀ | …]`: S → Shard<1>. Several column-sharded layers of one input that are not merged into one weight.
///
/// Operator parallelism inside a device: the products run at the same time, on the threads that a rank's
/// [`Cpu`](crate::device::Cpu) may use. Rank r holds its features of the first layer, then of the second, and so on, as a
/// merged layer does ([`super::Columns::merged`], [`super::Columns::qkv`]); the bits of the output are the same.
///
/// * Forward: entering the stream, once for all. Errors of its collectives name the first layer.
/// * Backward: dX = Σᵢ dYᵢ Wᵢ; its leaving collective runs beside the products that give the dWᵢ.
pub type ForkedColumnLinear<S, T, B> = Enter<S, Fork<T, B>>;

impl<S: Stream, T: Element, B: Backend> ForkedColumnLinear<S, T, B> {
    /// These layers, of as many inputs each.
    ///
    /// # Errors
    /// When there is none, their inputs differ in number, or they belong to different groups.
    pub fn new(layers: Vec<ColumnLinear<T, B>>) -> Result<Self> {
        const OP: &str = "forked linear";
        let Some(first) = layers.first() else { return Err(Error::invalid(OP, "there is no layer")) };
        let [inputs, _] = first.features();
        for layer in &layers {
            same_size(OP, "the inputs of a layer", layer.features()[0], "those of the first", inputs)?;
            if !layer.group().is_same(first.group()) {
                let reason =
                    format!("a layer is spread over {:?}, the first over {:?}", layer.group(), first.group());
                return Err(Error::invalid(OP, reason));
            }
        }
        let sums = Sums::of(first.group())?;
        let cut = beside(layers.iter().map(|layer| layer.columns().partition()));
        Ok(Self::to(Fork { sums, layers, cut }))
    }
}

impl<T: Element, B: Backend> Fork<T, B> {
    /// Each layer's columns of the products with this rank's weights.
    fn columns(&self) -> Vec<Range<usize>> {
        side_by_side(self.layers.iter().map(|layer| layer.columns().rows()))
    }
}

/// Runs of these lengths, one behind the other.
fn side_by_side(lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let cut = Partition::from_sizes(lens);
    (0..cut.parts()).map(|part| cut.range(part)).collect()
}

/// The cut of features of several cuts that every rank holds side by side.
fn beside<'a>(cuts: impl Iterator<Item = &'a Partition> + Clone) -> Partition {
    let ranks = cuts.clone().next().map_or(0, Partition::parts);
    Partition::from_sizes((0..ranks).map(|rank| cuts.clone().map(|cut| cut.size(rank)).sum()))
}

impl<T: Element, B: Backend> Linear<T, B> for Fork<T, B> {
    const OPS: [&'static str; 2] = ["forked linear", "forked linear backward"];

    fn group(&self) -> &Group<B> {
        self.sums.group()
    }

    fn site(&self) -> Site {
        self.layers[0].site()
    }

    fn features(&self) -> [usize; 2] {
        [self.layers[0].features()[0], self.cut.total()]
    }

    fn splits(&self) -> [bool; 2] {
        let depths = self.layers.iter().flat_map(|layer| layer.columns().leaves().depths());
        let device = self.sums.group().device();
        [overlap::splits(device, [self.features()[0]]), overlap::splits(device, depths)]
    }

    fn merged(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let (grad, rank) = (dy.local(), self.sums.group().rank());
        let width = self.cut.size(rank);
        same_size(Self::OPS[1], "columns of dy", grad.shape().cols(), "outputs of this rank", width)?;
        let cut = beside(self.layers.iter().map(|layer| layer.columns().row_cut()));
        if !self.layers.iter().any(|layer| layer.columns().are_shared()) {
            return Ok(dy.clone());
        }
        let from = side_by_side(self.layers.iter().map(|layer| layer.columns().partition().size(rank)));
        let mut merged = Tensor::empty(grad.device(), [grad.shape().rows(), cut.size(rank)])?;
        for ((layer, from), to) in self.layers.iter().zip(from).zip(self.columns()) {
            let (from, to) = (grad.mat().columns(from), merged.mat_mut()?.columns(to));
            layer.columns().merge_to(&self.sums, from, to)?;
        }
        Ok(dy.derive(merged, cut.total(), Some(cut)))
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let layers = self.layers.iter().zip(self.columns());
        let factors = layers.map(|(layer, own)| layer.factors(dy.local().mat().columns(own)));
        self.sums.product(dy, self.features()[0], &factors.collect::<Vec<_>>())
    }

    fn param_grads(&mut self, x: &Tensor<T, B>, dy: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let (grad, columns) = (dy.local(), self.columns());
        same_size(Self::OPS[1], "rows of dy", grad.shape().rows(), "rows of x", x.shape().rows())?;
        let layers = self.layers.iter_mut().zip(columns);
        let all = layers.map(|(layer, own)| (layer.trained(), grad.mat().columns(own))).collect();
        self.sums.all_row_grads(all, x)
    }
}

impl<T: Element, B: Backend> Layer<T, B> for Fork<T, B> {
    type In = Copied;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<Copied, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        x.check(Self::OPS[0], self.group())?;
        let (local, [inputs, features]) = (x.local(), self.features());
        same_size(Self::OPS[0], "columns of x", local.shape().cols(), "columns of w", inputs)?;
        let parts = self.sums.all_outputs(local, self.layers.iter().map(ColumnLinear::params).collect())?;
        let spread = |(layer, part): (&ColumnLinear<T, B>, Tensor<T, B>)| layer.columns().spread(part);
        let parts = self.layers.iter().zip(parts).map(spread).collect::<Result<Vec<_>>>()?;
        let columns = side_by_side(parts.iter().map(|part| part.shape().cols()));
        let width = self.cut.size(self.group().rank());
        let mut y = Tensor::empty(local.device(), [local.shape().rows(), width])?;
        for (part, columns) in parts.iter().zip(columns) {
            local.device().copy(part.mat(), y.mat_mut()?.columns(columns))?;
        }
        Ok((x.derive(y, features, Some(self.cut.clone())), local.clone()))
    }

    #[track_caller]
    fn backward(&mut self, x: Self::Saved, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let _site = self.site().enter();
        dy.check(Self::OPS[1], self.group())?;
        let dy = self.merged(dy)?;
        let dx = self.input_grad(&dy)?;
        self.param_grads(&x, &dy)?;
        Ok(dx)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.visit(f))
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        // What is merged comes first in the backward, layer by layer.
        let merges = self.layers.iter().flat_map(|layer| layer.traffic(group, x).0.backward).collect();
        (Traffic { forward: Vec::new(), backward: merges }, x.with(x.rank() - 1, self.cut.total()))
    }
}
