//! The residual stream: how activations are held between tensor-parallel regions.

use super::{
    CopyTo, DTensor, GatherSequence, PendingDTensor, ReduceFrom, ReduceScatterSequence, Traffic,
    invariant::{self, Tokens},
    layer::Layer,
};
use crate::{
    comm::{Group, ReduceOp},
    device::{Accumulator, Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    shard::{Copied, Elementwise, Partial, Placement, Replicated, Shape, Shard},
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

    /// The sum over all `tokens` tokens, such as the gradient of a replicated parameter: `term` writes that over some of the
    /// rows which this rank has, once for all of them, or with [`crate::shard::Reduction::Invariant`] once for each of its
    /// canonical blocks. No collective where every rank has all tokens, an all-reduce where each has its own.
    ///
    /// # Errors
    /// Those of `term`, and when a collective fails.
    fn sum_tokens<A: Accumulator, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<A, B>) -> Result<()>,
    ) -> Result<Tensor<A, B>>;

    /// The rows of a tensor of `tokens` rows that this rank holds.
    ///
    /// # Errors
    /// When there are fewer canonical blocks than ranks.
    fn local_rows<B: Device>(group: &Group<B>, tokens: usize) -> Result<Range<usize>>;

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
    fn enter_traffic<T: Element, B: Backend>(group: &Group<B>, x: Shape) -> Traffic;

    /// The traffic of a layer that leaves, for an output of this shape.
    fn leave_traffic<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic;

    /// The traffic of [`Stream::sum_tokens`] in a backward.
    fn sum_tokens_traffic<A: Element, B: Backend>(group: &Group<B>, shape: Shape) -> Traffic;
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

    fn sum_tokens<A: Accumulator, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<A, B>) -> Result<()>,
    ) -> Result<Tensor<A, B>> {
        match group.tree()? {
            None => whole(group, tokens, shape, term),
            Some(tree) => {
                let mut sums = invariant::token_terms(group, &tree, (Tokens::All, tokens), shape, term)?;
                Ok(sums.swap_remove(0))
            }
        }
    }

    fn local_rows<B: Device>(_: &Group<B>, tokens: usize) -> Result<Range<usize>> {
        Ok(0..tokens)
    }

    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        same_size("stream", "rows of the tensor", local.shape().rows(), "the number of tokens", tokens)?;
        DTensor::replicated(group, local)
    }

    fn enter_traffic<T: Element, B: Backend>(group: &Group<B>, x: Shape) -> Traffic {
        Layer::<T, B>::traffic(&CopyTo, group, x).0
    }

    fn leave_traffic<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic {
        Layer::<T, B>::traffic(&ReduceFrom, group, y).0
    }

    fn sum_tokens_traffic<A: Element, B: Backend>(_: &Group<B>, _: Shape) -> Traffic {
        Traffic::default()
    }
}

impl Stream for Shard<0> {
    fn enter<T: Element, B: Backend>(x: &DTensor<Self, T, B>) -> Result<DTensor<Copied, T, B>> {
        Ok(x.clone().all_gather()?.copy_to())
    }

    fn leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<DTensor<Self, T, B>> {
        let cut = y.token_cut()?;
        y.reduce_scatter(&cut)
    }

    fn start_leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<PendingDTensor<Self, T, B>> {
        let cut = y.token_cut()?;
        y.start_reduce_scatter(&cut)
    }

    fn sum_tokens<A: Accumulator, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<A, B>) -> Result<()>,
    ) -> Result<Tensor<A, B>> {
        match group.tree()? {
            None => {
                let own = Self::local_rows(group, tokens)?.len();
                let mut sum = whole(group, own, shape, term)?;
                group.all_reduce(ReduceOp::Sum, &mut sum)?;
                Ok(sum)
            }
            Some(tree) => {
                let terms = invariant::token_terms(group, &tree, (Tokens::Own, tokens), shape, term)?;
                group.tree_all_reduce(&tree, terms)
            }
        }
    }

    fn local_rows<B: Device>(group: &Group<B>, tokens: usize) -> Result<Range<usize>> {
        Ok(group.even_cut(tokens)?.range(group.rank()))
    }

    fn of_local<T: Element, B: Backend>(
        group: &Group<B>,
        tokens: usize,
        local: Tensor<T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        DTensor::shard(group, local, &group.even_cut(tokens)?)
    }

    fn enter_traffic<T: Element, B: Backend>(group: &Group<B>, x: Shape) -> Traffic {
        Layer::<T, B>::traffic(&GatherSequence, group, x).0
    }

    fn leave_traffic<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic {
        Layer::<T, B>::traffic(&ReduceScatterSequence, group, y).0
    }

    fn sum_tokens_traffic<A: Element, B: Backend>(group: &Group<B>, shape: Shape) -> Traffic {
        Traffic::sum::<A, B>(group, shape).in_backward()
    }
}

/// The sum over a rank's rows, all at once.
fn whole<A: Accumulator, B: Backend>(
    group: &Group<B>,
    rows: usize,
    shape: Shape,
    term: &mut dyn FnMut(Range<usize>, &mut Tensor<A, B>) -> Result<()>,
) -> Result<Tensor<A, B>> {
    let mut sum = Tensor::empty(group.device(), shape)?;
    term(0..rows, &mut sum)?;
    Ok(sum)
}
