//! A bias on the residual stream.

use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    parallel::{DTensor, Layer, ResidualStream, sums::Sums},
    tensor::{Param, Region, Role, Weights},
};
use std::marker::PhantomData;

/// y = x + b: S → S.
///
/// b: `[features]`, equal on every rank. Backward: db = Σ over tokens of dy. Collectives: the
/// forward makes none. With `Shard<0>`, the backward makes an all-reduce of db, because each rank
/// has only its own tokens.
#[derive(Debug)]
pub struct AddBias<S: ResidualStream, T: Element, B: Device> {
    bias: Param<T, B>,
    sums: Sums<B>,
    stream: PhantomData<S>,
}

impl<S: ResidualStream, T: Element, B: Backend> AddBias<S, T, B> {
    /// Reads `bias`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, features: usize) -> Result<Self> {
        let (region, owned) = (Region::whole([features]), group.rank() == 0);
        let bias = Param::load_region(group.device(), weights, "bias", Role::Bias, region, owned)?;
        let sums = Sums::of(group)?;
        Ok(Self { bias: sums.replicated(bias), sums, stream: PhantomData })
    }

    /// Computes x + b in x's memory, unless another tensor shares this memory.
    pub(super) fn add_to(&self, x: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        x.map_local(|mut local| {
            let device = local.device().clone();
            device.add_bias::<T>(self.bias.value()?.slice(), local.mat_mut()?)?;
            Ok(local)
        })
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for AddBias<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = ();

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, ())> {
        x.check("bias", self.sums.group())?;
        Ok((self.add_to(x)?, ()))
    }

    #[track_caller]
    fn backward(&self, (): (), dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let _site = self.bias.site().enter();
        dy.check("bias backward", self.sums.group())?;
        let (dy_mat, device, features) = (dy.local().mat(), dy.local().device(), dy.shape().cols());
        same_size(
            "bias backward",
            "features of dy",
            features,
            "those of the bias",
            self.bias.shape().cols(),
        )?;
        self.sums.add_over_tokens(&self.bias, &dy, |rows, db| {
            device.sum_rows(dy_mat.block(rows, 0..features), db.slice_mut()?)
        })?;
        Ok(dy)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        vec![self.bias.clone()]
    }
}
