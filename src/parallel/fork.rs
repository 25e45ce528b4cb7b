//! Linear layers of one input that are computed at the same time.

use super::{
    ColumnLinear, DTensor, Layer, RowMap, Stream, Traffic,
    invariant::{self, Factors, by_rows},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::Backend,
    ops,
    shard::{Copied, Partial, Partition, Placement, Shape, Shard},
    tensor::{Param, Tensor},
};
use std::{marker::PhantomData, ops::Range};

/// `[X W₁ᵀ | X W₂ᵀ | …]`: S → Shard<1>. Several column-sharded layers of one input that are not merged into one weight.
///
/// Operator parallelism inside a device: the products run at the same time, on the threads that a rank's
/// [`Cpu`](crate::device::Cpu) may use. Rank r holds its features of the first layer, then of the second, and so on, as a
/// merged layer does ([`super::Columns::merged`], [`super::Columns::qkv`]); the bits of the output are the same.
///
/// * Forward: entering the stream, once for all.
///   Errors of its collectives name the first layer.
/// * Backward: dX = Σᵢ dYᵢ Wᵢ, summed in the layers' order; its leaving collective runs beside the products that give the
///   dWᵢ.
#[derive(Debug)]
pub struct ForkedColumnLinear<S: Stream, T: Element, B: Device> {
    layers: Vec<ColumnLinear<T, B>>,
    cut: Partition,
    stream: PhantomData<S>,
}

impl<S: Stream, T: Element, B: Backend> ForkedColumnLinear<S, T, B> {
    /// These layers, of as many inputs each.
    ///
    /// # Errors
    /// When there is none, their inputs differ in number, or they belong to different groups.
    pub fn new(layers: Vec<ColumnLinear<T, B>>) -> Result<Self> {
        const OP: &str = "forked linear";
        let Some(first) = layers.first() else { return Err(Error::invalid(OP, "there is no layer")) };
        let inputs = first.weight().shape().cols();
        for layer in &layers {
            same_size(
                OP,
                "the inputs of a layer",
                layer.weight().shape().cols(),
                "those of the first",
                inputs,
            )?;
            if !layer.group().is_same(first.group()) {
                let reason =
                    format!("a layer is spread over {:?}, the first over {:?}", layer.group(), first.group());
                return Err(Error::invalid(OP, reason));
            }
        }
        let cut = beside(&layers.iter().map(ColumnLinear::cut).collect::<Vec<_>>());
        Ok(Self { layers, cut, stream: PhantomData })
    }

    fn input_grad(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Partial, T, B>> {
        let (grad, columns, inputs) = (dy.local(), self.columns(), self.layers[0].weight().shape().cols());
        let layers = self.layers.iter().zip(columns).map(|(layer, own)| (layer, grad.mat().columns(own)));
        if self.layers[0].blocks().is_some() {
            let mut factors = Vec::with_capacity(self.layers.len());
            for (layer, a) in layers {
                if let Some(blocks) = layer.blocks() {
                    factors.push(Factors { a, b: layer.weight().mat(), blocks });
                }
            }
            return invariant::product(dy, inputs, &factors);
        }
        let pairs = layers.map(|(layer, dy)| (dy, layer.weight().mat())).collect();
        let terms = ops::products::<T, T, B>(grad.device(), pairs)?.into_iter();
        let sum = terms.map(Ok).reduce(|sum, term| ops::add(&sum?, &term?));
        let dx = sum.ok_or_else(|| Error::invalid("forked linear backward", "there is no layer"))??;
        Ok(dy.derive(dx, inputs, None))
    }

    fn output(&self, entered: &DTensor<Copied, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        let (x, device) = (entered.local(), entered.local().device());
        let inputs = self.layers[0].weight().shape().cols();
        same_size("forked linear", "columns of x", x.shape().cols(), "columns of w", inputs)?;
        let parts = match self.layers[0].blocks() {
            None => {
                let pairs = self.layers.iter().map(|layer| (x.mat(), layer.weight().mat().t())).collect();
                let mut parts = ops::products::<T, T, B>(device, pairs)?;
                for (layer, part) in self.layers.iter().zip(&mut parts) {
                    if let Some(bias) = layer.added_bias() {
                        device.add_bias::<T>(bias.slice(), part.mat_mut()?)?;
                    }
                }
                parts
            }
            Some(_) => {
                let output = |layer: &ColumnLinear<T, B>| Ok(layer.output(entered)?.into_local());
                self.layers.iter().map(output).collect::<Result<_>>()?
            }
        };
        let columns = side_by_side(parts.iter().map(|part| part.shape().cols()));
        let mut y = Tensor::empty(device, [x.shape().rows(), columns.last().map_or(0, |last| last.end)])?;
        for (part, columns) in parts.iter().zip(columns) {
            device.copy(part.mat(), y.mat_mut()?.columns(columns))?;
        }
        Ok(entered.derive(y, self.cut.total(), Some(self.cut.clone())))
    }

    /// dY with one column for each row of the layers' weights.
    fn merged(&self, dy: &DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        if self.layers.iter().all(|layer| layer.copies().is_none()) {
            return Ok(dy.clone());
        }
        let (grad, group) = (dy.local(), dy.group());
        let cuts: Vec<_> = self.layers.iter().map(ColumnLinear::rows_cut).collect();
        let cut = beside(&cuts);
        let from = side_by_side(self.layers.iter().map(|layer| layer.cut().size(group.rank())));
        let mut merged = Tensor::empty(grad.device(), [grad.shape().rows(), cut.size(group.rank())])?;
        for ((layer, from), to) in self.layers.iter().zip(from).zip(self.columns()) {
            let (from, to) = (grad.mat().columns(from), merged.mat_mut()?.columns(to));
            match layer.copies() {
                None => grad.device().copy(from, to)?,
                Some(copies) => copies.merge(group, from, to)?,
            }
        }
        Ok(dy.derive(merged, cut.total(), Some(cut)))
    }

    /// Each layer's columns of the products with this rank's weights.
    fn columns(&self) -> Vec<Range<usize>> {
        side_by_side(self.layers.iter().map(|layer| layer.weight().shape().rows()))
    }
}

/// Runs of these lengths, one behind the other.
fn side_by_side(lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let cut = Partition::from_sizes(lens);
    (0..cut.parts()).map(|part| cut.range(part)).collect()
}

/// The cut of features of several cuts that every rank holds side by side.
fn beside(cuts: &[&Partition]) -> Partition {
    let ranks = cuts.first().map_or(0, |first| first.parts());
    Partition::from_sizes((0..ranks).map(|rank| cuts.iter().map(|cut| cut.size(rank)).sum()))
}

impl<S: Stream, T: Element, B: Backend> Layer<T, B> for ForkedColumnLinear<S, T, B> {
    type In = S;
    type Out = Shard<1>;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<S, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        let _site = self.layers[0].site().enter();
        x.check("forked linear", self.layers[0].group())?;
        let (device, inputs) = (x.local().device(), self.layers[0].weight().shape().cols());
        let splits = invariant::splits(device, None, inputs);
        let map = RowMap { features: self.cut.total(), splits, map: &mut |x| self.output(x) };
        let (x, y) = S::enter_to(x, map)?;
        Ok((y, x.into_local()))
    }

    #[track_caller]
    fn backward(
        &mut self,
        x: Self::Saved,
        dy: &DTensor<Shard<1>, T, B>,
    ) -> Result<DTensor<<S as Placement>::Dual, T, B>> {
        const OP: &str = "forked linear backward";
        let _site = self.layers[0].site().enter();
        dy.check(OP, self.layers[0].group())?;
        let width = self.cut.size(dy.group().rank());
        same_size(OP, "columns of dy", dy.local().shape().cols(), "outputs of this rank", width)?;
        let dy = &self.merged(dy)?;
        let (device, columns, grad) = (x.device().clone(), self.columns(), dy.local());
        same_size(OP, "rows of dy", grad.shape().rows(), "rows of x", x.shape().rows())?;
        let splits = |layer: &ColumnLinear<T, B>| {
            invariant::splits(&device, layer.blocks(), layer.weight().shape().rows())
        };
        let (features, splits) = (x.shape().cols(), self.layers.iter().all(splits));
        let dx = S::start_leave_of(dy, RowMap { features, splits, map: &mut |dy| self.input_grad(dy) })?;
        let grads = match self.layers[0].blocks() {
            None => {
                let pairs =
                    columns.iter().map(|own| (grad.mat().columns(own.clone()).t(), x.mat())).collect();
                ops::products::<T, T::Acc, B>(&device, pairs)?
            }
            Some(_) => {
                let product = |(layer, own): (&ColumnLinear<T, B>, &Range<usize>)| {
                    let dy = grad.mat().columns(own.clone()).t();
                    let mut dw = Tensor::empty(&device, [dy.rows(), x.shape().cols()])?;
                    by_rows(&device, layer.runs(), (dy, x.mat()), 0.0, dw.mat_mut()?)?;
                    Ok(dw)
                };
                self.layers.iter().zip(&columns).map(product).collect::<Result<_>>()?
            }
        };
        for ((layer, dw), columns) in self.layers.iter_mut().zip(grads).zip(columns) {
            layer.add_weight_grad(dw)?;
            if layer.added_bias().is_some() {
                let mut own = Tensor::empty(&device, [grad.shape().rows(), columns.len()])?;
                device.copy(grad.mat().columns(columns), own.mat_mut()?)?;
                layer.bias_grad(&own)?;
            }
        }
        dx.wait()
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.visit_params(f))
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        // What is merged comes first, then the reduction of dX is started; then each layer's gradients follow in turn.
        let mut traffic = S::enter_traffic::<T, B>(group, x);
        let merges = self.layers.iter().flat_map(|layer| layer.merge_traffic(x).backward);
        traffic.backward.splice(0..0, merges);
        traffic.backward.extend(self.layers.iter().flat_map(|layer| layer.grads_traffic(x).backward));
        (traffic, x.with(x.rank() - 1, self.cut.total()))
    }
}
