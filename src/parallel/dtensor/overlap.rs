//! Collectives in chunks of tokens ([`Overlap`](crate::comm::Overlap)), overlapped with the
//! products that consume or produce the chunks.
//!
//! * Entering a region ([`gather`]): a rank starts the all-gathers of all chunks and multiplies its
//!   own rows. Then it waits for each chunk in turn, and multiplies the rows of the chunk that
//!   other ranks sent.
//! * Leaving a region ([`start_sum`]): a rank multiplies the rows of one chunk, starts the
//!   reduction of the product, and goes on with the next chunk.
//!
//! Chunks are ranges of tokens. The bits are those of a single collective, because neither the
//! products nor the reductions add over tokens. Products by chunks require a device whose products
//! split exactly ([`splits`]), and enough rows in each chunk ([`MIN_ROWS`]). Otherwise a rank
//! multiplies all rows at once. The collectives have the same chunks on every rank, also if only
//! some of the ranks multiply by chunks.

use super::{
    DTensor, ResidualStream,
    partial::{PendingDTensor, is_one_collective},
    partition::canonical,
    rows,
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::Backend,
    shard::{Copied, Partial, Partition, Shape, Shard, deal},
    tensor::Tensor,
};
use std::ops::Range;

/// The minimal number of rows in the product of one chunk. A device may compute a product of fewer
/// rows by another algorithm, with other bits. Products of so few rows would also be slow, because
/// each product reads the whole weight.
const MIN_ROWS: usize = 64;

/// A function that maps each row of a tensor independently of the other rows.
type RowMap<'a, P, Q, T, B> = &'a dyn Fn(DTensor<P, T, B>) -> Result<DTensor<Q, T, B>>;

/// Returns the chunks in which a tensor enters a region; `None` if the tensor enters by a single
/// collective or without one.
pub(in crate::parallel) fn entering<S: ResidualStream, T: Element, B: Device>(
    x: &DTensor<S, T, B>,
) -> Option<Partition> {
    S::SHARD_DIM.and_then(|_| gathering::<T, B>(x.group(), x.shape()))
}

/// Returns the chunks in which the product of `x` with `features` output features leaves a region;
/// `None` for a single collective.
pub(in crate::parallel) fn leaving<T: Element, B: Device>(
    x: &DTensor<Shard<1>, T, B>,
    features: usize,
) -> Result<Option<Partition>> {
    reducing::<T, B>(x.group(), x.shape().with(x.shape().rank() - 1, features))
}

/// Returns the chunks of an all-gather whose result has this shape; `None` for a single collective.
fn gathering<T: Element, B: Device>(group: &Group<B>, shape: Shape) -> Option<Partition> {
    let (_, features) = shape.split_at(0);
    group.chunks(shape.dims()[0], features * T::DTYPE.size())
}

/// Returns the chunks of a reduction of this shape; `None` for a reduction without chunks.
fn reducing<T: Element, B: Device>(group: &Group<B>, shape: Shape) -> Result<Option<Partition>> {
    // A sum along a tree may take several collectives, which cannot run in the background.
    Ok(if is_one_collective::<T, B>(group)? { gathering::<T, B>(group, shape) } else { None })
}

/// Whether splitting products of these depths by rows leaves all bits unchanged. A product of depth
/// 1 does not split exactly: a zero in a part may have another sign than in the whole product.
pub(in crate::parallel) fn splits<B: Backend>(device: &B, depths: impl IntoIterator<Item = usize>) -> bool {
    device.splits_exactly() && depths.into_iter().all(|depth| depth != 1)
}

/// Gathers `x` on every rank in chunks, and applies `map` to the rows of each chunk after they
/// arrive. Returns the gathered `x` and the result of `map`. The result is `None` if the products
/// cannot be computed chunk by chunk.
#[track_caller]
pub(in crate::parallel) fn gather<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<S, T, B>,
    chunks: &Partition,
    splits: bool,
    map: RowMap<'_, Copied, Shard<1>, T, B>,
) -> Result<(DTensor<Copied, T, B>, Option<DTensor<Shard<1>, T, B>>)> {
    let (group, local, own) = (x.group(), x.local(), x.local_range(0));
    // For each chunk, the range of tokens that each rank sends.
    let dealt = deal(x.shard_partition()?, chunks);
    let start = |ranges: &Vec<Range<usize>>| {
        let mine = ranges[group.rank()].start - own.start..ranges[group.rank()].end - own.start;
        let rows = rows::take(local, &[mine])?;
        group.start_all_gather(rows, 0, &Partition::from_sizes(ranges.iter().map(|range| range.len())))
    };
    let pending = dealt.iter().map(start).collect::<Result<Vec<_>>>()?;
    let others = |ranges: &[Range<usize>]| -> Vec<Range<usize>> {
        ranges
            .iter()
            .enumerate()
            .filter(|(rank, _)| *rank != group.rank())
            .map(|(_, range)| range.clone())
            .collect()
    };
    let received = dealt.iter().map(|ranges| rows::count(&others(ranges)));
    let by_chunks = splits && are_many(received.chain([own.len()]));
    let mut whole = Tensor::empty(group.device(), local.shape().with(0, chunks.total()))?;
    let mut y: Option<DTensor<Shard<1>, T, B>> = None;
    let mut compute = |rows: Tensor<T, B>, ranges: &[Range<usize>]| -> Result<()> {
        if !by_chunks || rows::count(ranges) == 0 {
            return Ok(());
        }
        let chunk = map(DTensor::copied(group, rows)?)?;
        let mut all = match y.take() {
            Some(y) => y.into_local(),
            None => Tensor::empty(group.device(), chunk.local().shape().with(0, chunks.total()))?,
        };
        rows::place(chunk.local(), &mut all, ranges)?;
        y = Some(x.with_features(all, chunk.shape().cols(), chunk.partition().cloned()));
        Ok(())
    };
    compute(local.clone(), &[own])?;
    for (pending, ranges) in pending.into_iter().zip(&dealt) {
        rows::place(&pending.wait()?, &mut whole, ranges)?;
        let ranges = others(ranges);
        compute(rows::take(&whole, &ranges)?, &ranges)?;
    }
    Ok((x.with_features(whole, x.shape().cols(), None), y))
}

/// Applies `map` to `x`, and starts the reduction of the result chunk by chunk.
#[track_caller]
pub(in crate::parallel) fn start_sum<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<Shard<1>, T, B>,
    chunks: &Partition,
    splits: bool,
    map: RowMap<'_, Shard<1>, Partial, T, B>,
) -> Result<Vec<PendingDTensor<S, T, B>>> {
    let dealt = match S::SHARD_DIM {
        None => (0..chunks.shards()).map(|chunk| vec![chunks.range(chunk)]).collect(),
        Some(_) => deal(&x.token_partition()?, chunks),
    };
    let by_chunks = splits && are_many(dealt.iter().map(|ranges| rows::count(ranges)));
    let whole = if by_chunks { None } else { Some(map(x.clone())?) };
    let mut pending = Vec::with_capacity(dealt.len());
    for ranges in &dealt {
        let chunk = match &whole {
            Some(whole) => whole.rows(ranges)?,
            None => map(x.rows(ranges)?)?,
        };
        let scatter = |dim| (dim, Partition::from_sizes(ranges.iter().map(|range| range.len())));
        pending.push(chunk.start(S::SHARD_DIM.map(scatter))?);
    }
    Ok(pending)
}

/// Waits for the chunks, and concatenates this rank's rows of them. The result has the rows of `x`
/// and `features` features.
pub(in crate::parallel) fn stacked<S: ResidualStream, T: Element, B: Backend>(
    x: &DTensor<Shard<1>, T, B>,
    features: usize,
    chunks: Vec<PendingDTensor<S, T, B>>,
) -> Result<DTensor<S, T, B>> {
    let partition = |dim| canonical("reduce_scatter", x.group(), dim, &x.token_partition()?);
    let partition = S::SHARD_DIM.map(partition).transpose()?;
    let rows = partition.as_ref().map_or(x.shape().rows(), |tokens| tokens.size(x.group().rank()));
    let (mut local, mut at) = (Tensor::empty(x.group().device(), [rows, features])?, 0);
    for chunk in chunks {
        let chunk = chunk.wait()?.into_local();
        let end = at + chunk.shape().rows();
        rows::place(&chunk, &mut local, std::slice::from_ref(&(at..end)))?;
        at = end;
    }
    Ok(x.with_features(local, features, partition))
}

/// Whether each of these products has no rows, or enough rows to be computed separately.
fn are_many(mut products: impl Iterator<Item = usize>) -> bool {
    products.all(|rows| rows == 0 || rows >= MIN_ROWS)
}
