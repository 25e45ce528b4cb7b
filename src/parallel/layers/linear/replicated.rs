//! A linear layer that every rank computes in full.

use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, Site, same_size},
    kernels::Backend,
    ops,
    parallel::{
        DTensor, Layer,
        sums::{Leaves, Sums},
    },
    shard::Replicated,
    tensor::{Param, Region, Role, Tensor, Weights},
};

const OP: &str = "replicated linear";
const OP_BACKWARD: &str = "replicated linear backward";

/// Y = X Wᵀ + b: Replicated → Replicated. No collectives.
///
/// W: `[outputs, inputs]`, b: `[outputs]`. W, b and their gradients are equal on every rank. Use
/// this layer where a collective costs more than the whole product, such as in routers. It
/// corresponds to vLLM's `ReplicatedLinear`.
#[derive(Debug)]
pub struct ReplicatedLinear<T: Element, B: Device> {
    weight: Param<T, B>,
    bias: Option<Param<T, B>>,
    sums: Sums<B>,
}

impl<T: Element, B: Backend> ReplicatedLinear<T, B> {
    /// Reads `weight`, and `bias` if the layer adds one.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        (inputs, outputs): (usize, usize),
        bias: bool,
    ) -> Result<Self> {
        let sums = Sums::of(group)?;
        let load = |name, role, region| {
            let param = Param::load_region(group.device(), weights, name, role, region, group.rank() == 0)?;
            Ok(sums.replicated(param))
        };
        let weight: Param<T, B> = load("weight", Role::Weight, Region::whole([outputs, inputs]))?;
        let bias = if bias { Some(load("bias", Role::Bias, Region::whole([outputs]))?) } else { None };
        Ok(Self { weight, bias, sums })
    }

    fn site(&self) -> Site {
        self.weight.site()
    }

    /// Every rank computes all outputs.
    fn whole(&self) -> Leaves {
        let whole = std::iter::once(0..self.weight.shape().rows()).collect();
        Leaves::new(vec![whole], Vec::new(), false)
    }
}

impl<T: Element, B: Backend> Layer<T, B> for ReplicatedLinear<T, B> {
    type In = Replicated;
    type Out = Replicated;
    type Saved = Tensor<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Replicated, T, B>) -> Result<(DTensor<Replicated, T, B>, Self::Saved)> {
        let _site = self.site().enter();
        x.check(OP, self.sums.group())?;
        let params = (&self.weight, self.bias.as_ref());
        let (y, _) = self.sums.outputs(x.local(), params, None, &self.whole())?;
        let features = y.shape().cols();
        Ok((x.with_features(y, features, None), x.into_local()))
    }

    #[track_caller]
    fn backward(&self, x: Self::Saved, dy: DTensor<Replicated, T, B>) -> Result<DTensor<Replicated, T, B>> {
        let _site = self.site().enter();
        dy.check(OP_BACKWARD, self.sums.group())?;
        let (rows, outputs, inputs) = (dy.shape().rows(), dy.shape().cols(), x.shape().cols());
        same_size(OP_BACKWARD, "rows of dy", rows, "rows of x", x.shape().rows())?;
        let dx = ops::linear_dx(dy.local(), &self.weight.value()?, None)?;
        let device = self.sums.group().device();
        if self.weight.keeps_terms() {
            // Every rank has all tokens, and computes the same product.
            self.sums.keep_product(&self.weight, (&dy, 0..outputs), &x, (0, &self.whole()));
        } else {
            self.sums.add_over_tokens(&self.weight, &dy, |tokens, dw| {
                let dy = dy.local().mat().block(tokens.clone(), 0..outputs);
                ops::linear_dw(device, (dy, x.mat().block(tokens, 0..inputs)), 0.0, dw.mat_mut()?, None)
            })?;
        }
        if let Some(bias) = &self.bias {
            self.sums.add_over_tokens(bias, &dy, |tokens, db| {
                device.sum_rows(dy.local().mat().block(tokens, 0..outputs), db.slice_mut()?)
            })?;
        }
        Ok(dy.with_features(dx, inputs, None))
    }

    fn params(&self) -> Vec<Param<T, B>> {
        [&self.weight].into_iter().chain(&self.bias).cloned().collect()
    }
}
