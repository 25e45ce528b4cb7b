//! The residual stream: how activations are held between tensor-parallel regions.

use super::{
    DTensor, PendingDTensor, RowMap, Traffic,
    invariant::{self, Tokens},
    mappings::sum_rows,
    overlap,
};
use crate::{
    comm::{Group, Op, ReduceOp},
    device::{Accumulator, Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    shard::{Copied, Elementwise, Partial, Partition, Placement, Replicated, Shape, Shard, deal},
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
    #[track_caller]
    fn enter<T: Element, B: Backend>(x: &DTensor<Self, T, B>) -> Result<DTensor<Copied, T, B>>;

    /// Partial → S.
    ///
    /// # Errors
    /// When a collective fails.
    #[track_caller]
    fn leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<DTensor<Self, T, B>>;

    /// Starts [`Stream::leave`].
    ///
    /// # Errors
    /// When a collective fails.
    #[track_caller]
    fn start_leave<T: Element, B: Backend>(y: DTensor<Partial, T, B>) -> Result<PendingDTensor<Self, T, B>>;

    /// [`Stream::enter`], and a map of the tensor's rows: as they arrive, where the group's [`crate::comm::Overlap`] says so.
    ///
    /// # Errors
    /// When a collective fails, and those of the map.
    #[track_caller]
    fn enter_to<T: Element, B: Backend>(
        x: &DTensor<Self, T, B>,
        map: RowMap<'_, Copied, Shard<1>, T, B>,
    ) -> Result<(DTensor<Copied, T, B>, DTensor<Shard<1>, T, B>)> {
        let x = Self::enter(x)?;
        let y = (map.map)(&x)?;
        Ok((x, y))
    }

    /// [`Stream::leave`] with a map of x: chunk by chunk, where the group's [`crate::comm::Overlap`] says so.
    ///
    /// # Errors
    /// When a collective fails, and those of the map.
    #[track_caller]
    fn leave_of<T: Element, B: Backend>(
        x: &DTensor<Shard<1>, T, B>,
        map: RowMap<'_, Shard<1>, Partial, T, B>,
    ) -> Result<DTensor<Self, T, B>> {
        match reducing(x, map.features)? {
            Some(_) => Self::start_leave_of(x, map)?.wait(),
            None => Self::leave((map.map)(x)?),
        }
    }

    /// Starts [`Stream::leave_of`].
    ///
    /// # Errors
    /// When a collective fails, and those of the map.
    #[track_caller]
    fn start_leave_of<T: Element, B: Backend>(
        x: &DTensor<Shard<1>, T, B>,
        map: RowMap<'_, Shard<1>, Partial, T, B>,
    ) -> Result<PendingDTensor<Self, T, B>>;

    /// The sum over all tokens of a tensor, such as the gradient of a replicated parameter: `term` writes that over some of the
    /// rows which this rank has, once for all of them, or with [`crate::shard::Reduction::Invariant`] once for each of its
    /// canonical blocks. No collective where every rank has all tokens, an all-reduce where each has its own.
    ///
    /// # Errors
    /// Those of `term`, and when a collective fails.
    #[track_caller]
    fn sum_tokens<T: Element, B: Backend>(
        group: &Group<B>,
        of: &DTensor<Self, T, B>,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>>;

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

    /// The traffic of a layer that enters, for an input of this shape: of [`Stream::enter_to`], and of
    /// [`Stream::start_leave_of`] in the backward.
    fn enter_traffic<T: Element, B: Backend>(group: &Group<B>, x: Shape) -> Traffic;

    /// The traffic of a layer that leaves, for an output of this shape: the other way round.
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

    fn start_leave_of<T: Element, B: Backend>(
        x: &DTensor<Shard<1>, T, B>,
        map: RowMap<'_, Shard<1>, Partial, T, B>,
    ) -> Result<PendingDTensor<Self, T, B>> {
        let Some(chunks) = reducing(x, map.features)? else { return Self::start_leave((map.map)(x)?) };
        let dealt: Vec<_> = (0..chunks.parts()).map(|chunk| vec![chunks.range(chunk)]).collect();
        overlap::start_sum(x, &dealt, map, |part, _| part.start_all_reduce())
    }

    fn sum_tokens<T: Element, B: Backend>(
        group: &Group<B>,
        of: &DTensor<Self, T, B>,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>> {
        match group.tree()? {
            None => whole(group, of.local().shape().rows(), shape, term),
            Some(tree) => {
                let tokens = of.shape().rows();
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
        Self::leave_traffic::<T, B>(group, x).in_backward()
    }

    fn leave_traffic<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic {
        let chunks = overlap::reducing::<T, B>(group, y).unwrap_or_default();
        overlap::traffic(chunks, y, |y| Traffic::sum::<T, B>(group, y))
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

    fn enter_to<T: Element, B: Backend>(
        x: &DTensor<Self, T, B>,
        map: RowMap<'_, Copied, Shard<1>, T, B>,
    ) -> Result<(DTensor<Copied, T, B>, DTensor<Shard<1>, T, B>)> {
        if let Some(chunks) = overlap::gathering::<T, B>(x.group(), x.shape()) {
            return overlap::gather(x, &chunks, map);
        }
        let x = Self::enter(x)?;
        let y = (map.map)(&x)?;
        Ok((x, y))
    }

    fn start_leave_of<T: Element, B: Backend>(
        x: &DTensor<Shard<1>, T, B>,
        map: RowMap<'_, Shard<1>, Partial, T, B>,
    ) -> Result<PendingDTensor<Self, T, B>> {
        let Some(chunks) = reducing(x, map.features)? else { return Self::start_leave((map.map)(x)?) };
        overlap::start_sum(x, &deal(&x.token_cut()?, &chunks), map, |part, runs| {
            part.start_scatter(&Partition::from_sizes(runs.iter().map(|run| run.len())))
        })
    }

    fn sum_tokens<T: Element, B: Backend>(
        group: &Group<B>,
        of: &DTensor<Self, T, B>,
        shape: Shape,
        term: &mut dyn FnMut(Range<usize>, &mut Tensor<T::Acc, B>) -> Result<()>,
    ) -> Result<Tensor<T::Acc, B>> {
        match group.tree()? {
            None => {
                let mut sum = whole(group, of.local().shape().rows(), shape, term)?;
                group.all_reduce(ReduceOp::Sum, &mut sum)?;
                Ok(sum)
            }
            Some(tree) => {
                let tokens = of.shape().rows();
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
        gathered::<T, B>(group, x).then(summed::<T, B>(group, x).in_backward())
    }

    fn leave_traffic<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic {
        summed::<T, B>(group, y).then(gathered::<T, B>(group, y).in_backward())
    }

    fn sum_tokens_traffic<A: Element, B: Backend>(group: &Group<B>, shape: Shape) -> Traffic {
        Traffic::sum::<A, B>(group, shape).in_backward()
    }
}

/// The traffic of gathering a tensor's tokens, in the forward.
fn gathered<T: Element, B: Backend>(group: &Group<B>, x: Shape) -> Traffic {
    let chunks = overlap::gathering::<T, B>(group, x);
    overlap::traffic(chunks, x, |x| Traffic::forward::<T>(Op::AllGather, x.len()))
}

/// The traffic of a sum of which each rank gets its tokens, in the forward.
fn summed<T: Element, B: Backend>(group: &Group<B>, y: Shape) -> Traffic {
    let chunks = overlap::reducing::<T, B>(group, y).unwrap_or_default();
    overlap::traffic(chunks, y, |y| sum_rows::<T, B>(group, y))
}

/// The chunks of the reduction of a map of x; none if it is made at once.
fn reducing<T: Element, B: Backend>(
    x: &DTensor<Shard<1>, T, B>,
    features: usize,
) -> Result<Option<Partition>> {
    overlap::reducing::<T, B>(x.group(), x.shape().with(x.shape().rank() - 1, features))
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
