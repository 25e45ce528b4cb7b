//! The residual stream: how activations are held between tensor-parallel regions.

use super::{
    CopyTo, DTensor, GatherSequence, PendingDTensor, ReduceFrom, ReduceScatterSequence, Traffic, layer::Layer,
};
use crate::{
    comm::{Group, Op, ReduceOp},
    device::{Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    shard::{Copied, Elementwise, Partial, Partition, Placement, Replicated, Shape, Shard},
    tensor::Tensor,
};
use std::ops::Range;

/// How activations are held between tensor-parallel regions: [`Replicated`], or [`Shard<0>`] with sequence parallelism.
///
/// A region is entered by S → Copied and left by Partial → S. The two are each other's dual: the backward of entering is
/// leaving, and the other way round. So layers that take S as a parameter serve both, and no layer has a flag.
#[diagnostic::on_unimplemented(
    message = "a residual stream cannot be held as `{Self}`",
    note = "it is `Replicated`, or `Shard<0>` for sequence parallelism"
)]
pub trait Stream: Elementwise + Placement<Dual = Self> {
    /// S → Copied.
    ///
    /// # Errors
    /// When a collective fails.
    fn enter<T: Element, B: Backend>(x: &DTensor<Self, T, B>) -> Result<DTensor<Copied, T, B>>;

    /// Partial → S.
    ///
    /// # Errors
    /// When a collective fails.
    fn leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<DTensor<Self, T, B>>;

    /// Starts [`Stream::leave`].
    ///
    /// # Errors
    /// When a collective fails.
    fn start_leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<PendingDTensor<Self, T, B>>;

    /// Makes the gradient of a replicated parameter, from what this rank saw of the stream, that of all of it: nothing
    /// where every rank saw all tokens, an all-reduce where each saw its own.
    ///
    /// # Errors
    /// When a collective fails.
    fn sum_grad<T: Element, B: Backend>(group: &Group<B>, grad: &mut Tensor<T, B>) -> Result<()>;

    /// The rows of a tensor of `tokens` rows that this rank holds.
    fn local_rows<B: Device>(group: &Group<B>, tokens: usize) -> Range<usize>;

    /// The tensor of `tokens` rows of which this rank holds `local`: all of it, or its part of an even cut.
    ///
    /// # Errors
    /// When `local` has another number of rows.
    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>>;

    /// The traffic of a layer that enters, for an input of this shape.
    fn enter_traffic<T: Element, B: Backend>(x: Shape) -> Traffic;

    /// The traffic of a layer that leaves, for an output of this shape.
    fn leave_traffic<T: Element, B: Backend>(y: Shape) -> Traffic;

    /// The traffic of [`Stream::sum_grad`] in a backward.
    fn sum_grad_traffic<T: Element>(elements: usize) -> Traffic;
}

impl Stream for Replicated {
    fn enter<T: Element, B: Backend>(x: &DTensor<Self, T, B>) -> Result<DTensor<Copied, T, B>> {
        Ok(x.clone().copy_to())
    }

    fn leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<DTensor<Self, T, B>> {
        y.all_reduce()
    }

    fn start_leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<PendingDTensor<Self, T, B>> {
        y.start_all_reduce()
    }

    fn sum_grad<T: Element, B: Backend>(_: &Group<B>, _: &mut Tensor<T, B>) -> Result<()> {
        Ok(())
    }

    fn local_rows<B: Device>(_: &Group<B>, tokens: usize) -> Range<usize> {
        0..tokens
    }

    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        same_size("stream", "rows of the tensor", local.shape().rows(), "the number of tokens", tokens)?;
        DTensor::replicated(group, local)
    }

    fn enter_traffic<T: Element, B: Backend>(x: Shape) -> Traffic {
        Layer::<T, B>::traffic(&CopyTo, x).0
    }

    fn leave_traffic<T: Element, B: Backend>(y: Shape) -> Traffic {
        Layer::<T, B>::traffic(&ReduceFrom, y).0
    }

    fn sum_grad_traffic<T: Element>(_: usize) -> Traffic {
        Traffic::default()
    }
}

impl Stream for Shard<0> {
    fn enter<T: Element, B: Backend>(x: &DTensor<Self, T, B>) -> Result<DTensor<Copied, T, B>> {
        Ok(x.clone().all_gather()?.copy_to())
    }

    fn leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<DTensor<Self, T, B>> {
        let cut = y.token_cut();
        y.reduce_scatter(&cut)
    }

    fn start_leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<PendingDTensor<Self, T, B>> {
        let cut = y.token_cut();
        y.start_reduce_scatter(&cut)
    }

    fn sum_grad<T: Element, B: Backend>(group: &Group<B>, grad: &mut Tensor<T, B>) -> Result<()> {
        group.all_reduce(ReduceOp::Sum, grad)
    }

    fn local_rows<B: Device>(group: &Group<B>, tokens: usize) -> Range<usize> {
        Partition::even(tokens, group.size()).range(group.rank())
    }

    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        DTensor::shard(group, local, &Partition::even(tokens, group.size()))
    }

    fn enter_traffic<T: Element, B: Backend>(x: Shape) -> Traffic {
        Layer::<T, B>::traffic(&GatherSequence, x).0
    }

    fn leave_traffic<T: Element, B: Backend>(y: Shape) -> Traffic {
        Layer::<T, B>::traffic(&ReduceScatterSequence, y).0
    }

    fn sum_grad_traffic<T: Element>(elements: usize) -> Traffic {
        Traffic::backward::<T>(Op::AllReduce, elements)
    }
}
