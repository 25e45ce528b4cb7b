//! Linear layers with collectives in chunks of tokens ([`Overlap`](crate::comm::Overlap)), beside
//! the products that need or make what they carry.
//!
//! * Entering a region ([`gather`]): the chunks of the all-gather are started; the rank's own rows are multiplied first, then
//!   those of the others as they arrive.
//! * Leaving it ([`start_sum`]): the rows of one chunk are multiplied and their reduction is started; then the next.
//!
//! Only tokens are cut, over which neither product nor sum adds anything up: the bits are those of
//! the whole. A rank whose device or rows do not allow that ([`splits`]) multiplies all rows at
//! once, between collectives that are cut alike on every rank.

use super::{
    DTensor, ResidualStream,
    dtensor::canonical,
    partial::{PendingDTensor, is_one_collective},
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::{Backend, MatMut, MatRef},
    shard::{Copied, Partial, Partition, Shape, Shard, deal},
    tensor::Tensor,
};
use std::ops::Range;

/// The fewest rows that are multiplied by themselves. Devices may treat products of few rows in a way of their own, with other
/// bits; and each product reads the whole weight.
const ROWS: usize = 64;

/// A map of the rows of a tensor, each by itself.
type RowMap<'a, P, Q, T, B> = &'a dyn Fn(DTensor<P, T, B>) -> Result<DTensor<Q, T, B>>;

/// The chunks in which a tensor enters a region; none if at once, or without a collective.
pub(super) fn entering<S: ResidualStream, T: Element, B: Device>(x: &DTensor<S, T, B>) -> Option<Partition> {
    S::SHARD_DIM.and_then(|_| gathering::<T, B>(x.group(), x.shape()))
}

/// The chunks in which a map of x to `features` features leaves a region; none if at once.
pub(super) fn leaving<T: Element, B: Device>(
    x: &DTensor<Shard<1>, T, B>,
    features: usize,
) -> Result<Option<Partition>> {
    reducing::<T, B>(x.group(), x.shape().with(x.shape().rank() - 1, features))
}

/// The chunks of a tensor of this shape that is gathered; none if it is gathered at once.
fn gathering<T: Element, B: Device>(group: &Group<B>, shape: Shape) -> Option<Partition> {
    let (_, features) = shape.split_at(0);
    group.chunks(shape.dims()[0], features * T::DTYPE.size())
}

/// The chunks of a sum of this shape; none if it is reduced at once.
fn reducing<T: Element, B: Device>(group: &Group<B>, shape: Shape) -> Result<Option<Partition>> {
    // The exchanges of a sum along a tree cannot be started.
    Ok(if is_one_collective::<T, B>(group)? { gathering::<T, B>(group, shape) } else { None })
}

/// Whether products of these depths have the same bits row by row. A depth of 1 leaves room for
/// another sign of a zero.
pub(super) fn splits<B: Backend>(device: &B, depths: impl IntoIterator<Item = usize>) -> bool {
    device.splits_exactly() && depths.into_iter().all(|depth| depth != 1)
}

/// x on every rank, and a map of it if that could be made in chunks.
#[track_caller]
pub(super) fn gather<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<S, T, B>,
    chunks: &Partition,
    splits: bool,
    map: RowMap<'_, Copied, Shard<1>, T, B>,
) -> Result<(DTensor<Copied, T, B>, Option<DTensor<Shard<1>, T, B>>)> {
    let (group, local, own) = (x.group(), x.local(), x.local_range(0));
    let dealt = deal(x.shard_cut()?, chunks);
    let start = |runs: &Vec<Range<usize>>| {
        let mine = runs[group.rank()].start - own.start..runs[group.rank()].end - own.start;
        let part = take_rows(local, &[mine])?;
        group.start_all_gather(part, 0, &Partition::from_sizes(runs.iter().map(|run| run.len())))
    };
    let flights = dealt.iter().map(start).collect::<Result<Vec<_>>>()?;
    let others = |runs: &[Range<usize>]| -> Vec<Range<usize>> {
        runs.iter()
            .enumerate()
            .filter(|(rank, _)| *rank != group.rank())
            .map(|(_, run)| run.clone())
            .collect()
    };
    let by_chunks = splits && are_many(dealt.iter().map(|runs| rows_of(&others(runs))).chain([own.len()]));
    let mut whole = Tensor::empty(group.device(), local.shape().with(0, chunks.total()))?;
    let mut y: Option<DTensor<Shard<1>, T, B>> = None;
    let mut compute = |rows: Tensor<T, B>, runs: &[Range<usize>]| -> Result<()> {
        if !by_chunks || rows_of(runs) == 0 {
            return Ok(());
        }
        let part = map(DTensor::copied(group, rows)?)?;
        let mut all = match y.take() {
            Some(y) => y.into_local(),
            None => Tensor::empty(group.device(), part.local().shape().with(0, chunks.total()))?,
        };
        place_rows(part.local(), &mut all, runs)?;
        y = Some(x.derive(all, part.shape().cols(), part.partition().cloned()));
        Ok(())
    };
    compute(local.clone(), &[own])?;
    for (flight, runs) in flights.into_iter().zip(&dealt) {
        place_rows(&flight.wait()?, &mut whole, runs)?;
        let runs = others(runs);
        compute(take_rows(&whole, &runs)?, &runs)?;
    }
    Ok((x.derive(whole, x.shape().cols(), None), y))
}

/// Starts the reduction of a map of x, chunk by chunk.
#[track_caller]
pub(super) fn start_sum<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<Shard<1>, T, B>,
    chunks: &Partition,
    splits: bool,
    map: RowMap<'_, Shard<1>, Partial, T, B>,
) -> Result<Vec<PendingDTensor<S, T, B>>> {
    let dealt = match S::SHARD_DIM {
        None => (0..chunks.shards()).map(|chunk| vec![chunks.range(chunk)]).collect(),
        Some(_) => deal(&x.token_cut()?, chunks),
    };
    let by_chunks = splits && are_many(dealt.iter().map(|runs| rows_of(runs)));
    let whole = if by_chunks { None } else { Some(map(x.clone())?) };
    let mut flights = Vec::with_capacity(dealt.len());
    for runs in &dealt {
        let part = match &whole {
            Some(whole) => whole.rows(runs)?,
            None => map(x.rows(runs)?)?,
        };
        let cut = |dim| (dim, Partition::from_sizes(runs.iter().map(|run| run.len())));
        flights.push(part.start(S::SHARD_DIM.map(cut))?);
    }
    Ok(flights)
}

/// The chunks of this rank's rows of a tensor with the rows of `x` and other features, as one.
pub(super) fn stacked<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<Shard<1>, T, B>,
    features: usize,
    chunks: Vec<PendingDTensor<S, T, B>>,
) -> Result<DTensor<S, T, B>> {
    let cut = |dim| canonical("reduce_scatter", x.group(), dim, &x.token_cut()?);
    let cut = S::SHARD_DIM.map(cut).transpose()?;
    let rows = cut.as_ref().map_or(x.shape().rows(), |cut| cut.size(x.group().rank()));
    let (mut local, mut at) = (Tensor::empty(x.group().device(), [rows, features])?, 0);
    for chunk in chunks {
        let chunk = chunk.wait()?.into_local();
        let end = at + chunk.shape().rows();
        place_rows(&chunk, &mut local, std::slice::from_ref(&(at..end)))?;
        at = end;
    }
    Ok(x.derive(local, features, cut))
}

/// Whether products of so many rows each are worth being made by themselves, and are treated as that of all rows.
fn are_many(mut products: impl Iterator<Item = usize>) -> bool {
    products.all(|rows| rows == 0 || rows >= ROWS)
}

fn rows_of(runs: &[Range<usize>]) -> usize {
    runs.iter().map(|run| run.len()).sum()
}

/// Some runs of a tensor's dimension 0, one after another.
pub(super) fn take_rows<T: Element, B: Backend>(
    from: &Tensor<T, B>,
    runs: &[Range<usize>],
) -> Result<Tensor<T, B>> {
    let mut taken = Tensor::empty(from.device(), from.shape().with(0, rows_of(runs)))?;
    let (rows, width) = (taken.shape().dims()[0], taken.shape().split_at(0).1);
    let from = MatRef::<T, B>::new(from.slice(), from.shape().dims()[0], width)?;
    let device = taken.device().clone();
    let mut at = 0;
    for run in runs {
        let to = MatMut::<T, B>::new(taken.slice_mut()?, rows, width)?;
        device.copy(from.block(run.clone(), 0..width), to.block(at..at + run.len(), 0..width))?;
        at += run.len();
    }
    Ok(taken)
}

/// The other way round: rows that lie one after another, to their runs of a tensor's dimension 0.
pub(super) fn place_rows<T: Element, B: Backend>(
    from: &Tensor<T, B>,
    to: &mut Tensor<T, B>,
    runs: &[Range<usize>],
) -> Result<()> {
    let (rows, width) = (to.shape().dims()[0], to.shape().split_at(0).1);
    let from = MatRef::<T, B>::new(from.slice(), from.shape().dims()[0], width)?;
    let device = to.device().clone();
    let mut at = 0;
    for run in runs {
        let to = MatMut::<T, B>::new(to.slice_mut()?, rows, width)?;
        device.copy(from.block(at..at + run.len(), 0..width), to.block(run.clone(), 0..width))?;
        at += run.len();
    }
    Ok(())
}
