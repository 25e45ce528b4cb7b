//! Moves the tensors of a model to the rank that writes them.

use super::owners::{Owned, is_own};
use crate::{
    comm::Group,
    device::{Element, zeroed},
    error::{Error, Result},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, Region, Tensor},
};
use std::{mem::take, ops::Range};

/// The maximal number of bytes in messages that the writer has not received, unless one row of a
/// tensor is larger.
pub(super) const CHUNK: usize = 1 << 24;

/// Gathers tensors on one rank.
pub(super) struct Gather<'a, T: Element, B: Backend> {
    group: &'a Group<B>,
    params: &'a [Param<T, B>],
    writer: usize,
    /// The maximal number of elements in transit, unless one row of a tensor is larger.
    chunk: usize,
    /// The number of elements that may be in transit.
    in_transit: usize,
}

/// Elements of a tensor that this rank owns.
struct Own<T: Element, B: Backend> {
    region: Region,
    /// The value of the parameter that has the region, and the first element of the region in it.
    value: Tensor<T, B>,
    start: usize,
}

impl<'a, T: Element, B: Backend> Gather<'a, T, B> {
    /// Gathers tensors of `params` on rank `writer`, at most `bytes` at a time.
    pub(super) fn new(group: &'a Group<B>, params: &'a [Param<T, B>], writer: usize, bytes: usize) -> Self {
        Self { group, params, writer, chunk: bytes / size_of::<T>(), in_transit: 0 }
    }

    /// Gathers one tensor in `host` on the writer, and nothing on the other ranks. Moves a few rows
    /// at a time. For each of these chunks, each owner sends its elements as one message, in the
    /// order of `owned`.
    ///
    /// Collectives: a barrier before a chunk that would exceed the elements in transit. It also
    /// keeps the wait of a rank that sends nothing below the group's deadline.
    pub(super) fn tensor(
        &mut self,
        name: &str,
        shape: Shape,
        owned: &[Owned],
        mut host: Option<&mut [T]>,
    ) -> Result<()> {
        let own = self.own(name)?;
        let rows = shape.dims().first().copied().unwrap_or(1);
        let width = shape.len().checked_div(rows).unwrap_or(0);
        let at_a_time = (self.chunk / width.max(1)).max(1);
        for first in (0..rows).step_by(at_a_time) {
            let chunk = first..rows.min(first + at_a_time);
            // Copies the elements before the barrier, while the writer still stores earlier ones.
            let message = if host.is_none() { self.message(&own, &chunk)? } else { None };
            self.make_room(chunk.len() * width)?;
            if let Some(host) = host.as_deref_mut() {
                self.receive(&own, owned, &chunk, host)?;
            } else if let Some(message) = &message {
                self.group.exchange(Some((self.writer, message)), None)?;
            }
        }
        Ok(())
    }

    /// Waits until the writer has received all messages if the next chunk would exceed the elements
    /// in transit. An exchange does not wait for the receiver.
    fn make_room(&mut self, len: usize) -> Result<()> {
        if self.in_transit > 0 && self.in_transit.saturating_add(len) > self.chunk {
            self.group.barrier()?;
            self.in_transit = 0;
        }
        self.in_transit += len;
        Ok(())
    }

    /// Returns this rank's elements of a tensor, in the order of `owners::all_tensors`.
    fn own(&self, name: &str) -> Result<Vec<Own<T, B>>> {
        let mut all = Vec::new();
        for param in self.params {
            let regions = param.regions();
            let regions: Vec<_> = regions.iter().filter(|of| of.tensor == name && is_own(of)).collect();
            if regions.is_empty() {
                continue;
            }
            let (value, width) = (param.value()?, param.shape().split_at(0).1);
            all.extend(regions.into_iter().map(|of| Own {
                region: of.region.clone(),
                value: value.clone(),
                start: of.row * width,
            }));
        }
        Ok(all)
    }

    /// Returns this rank's elements of some rows of the tensor, if it has any.
    fn message(&self, own: &[Own<T, B>], rows: &Range<usize>) -> Result<Option<Tensor<T, B>>> {
        let parts: Vec<_> = own.iter().filter_map(|own| Some((own, part(&own.region, rows)?.0))).collect();
        let len = parts.iter().map(|(_, elements)| elements.len()).sum();
        if len == 0 {
            return Ok(None);
        }
        let mut all = zeroed(len)?;
        let mut rest = all.as_mut_slice();
        for (own, elements) in parts {
            let (now, later) = take(&mut rest).split_at_mut(elements.len());
            own.value.device().download::<T>(own.slice(elements), now)?;
            rest = later;
        }
        Tensor::from_vec(self.group.device(), [len], all).map(Some)
    }

    /// Receives some rows of the tensor from all ranks that own elements of them, in rank order.
    fn receive(&self, own: &[Own<T, B>], owned: &[Owned], rows: &Range<usize>, host: &mut [T]) -> Result<()> {
        for owned in owned.chunk_by(|a, b| a.rank == b.rank) {
            let rank = owned[0].rank;
            if rank == self.writer {
                for own in own {
                    if let Some((elements, region)) = part(&own.region, rows) {
                        place(own.value.device(), own.slice(elements), &region, host)?;
                    }
                }
                continue;
            }
            let parts: Vec<_> = owned.iter().filter_map(|owned| part(&owned.region, rows)).collect();
            let len = parts.iter().map(|(elements, _)| elements.len()).sum();
            if len == 0 {
                continue;
            }
            let message = self.group.exchange(None, Some((rank, [len].into())))?;
            let message = message.ok_or_else(|| Error::internal("save", "a receive returned no tensor"))?;
            let mut start = 0;
            for (elements, region) in parts {
                let end = start + elements.len();
                place(message.device(), B::narrow::<T>(message.slice(), start..end), &region, host)?;
                start = end;
            }
        }
        Ok(())
    }
}

impl<T: Element, B: Backend> Own<T, B> {
    /// Returns some elements of the region. [`Param::load`] has checked that the parameter has
    /// them.
    fn slice(&self, elements: Range<usize>) -> B::Slice<'_, T> {
        B::narrow::<T>(self.value.slice(), self.start + elements.start..self.start + elements.end)
    }
}

/// Returns the part of a region within some rows of its tensor, or `None` if it is empty: its
/// elements, as a range of the region's elements, and the part as a region of the tensor.
fn part(region: &Region, rows: &Range<usize>) -> Option<(Range<usize>, Region)> {
    let Some(own) = region.ranges().first() else {
        // A tensor without dimensions has one element.
        return Some((0..1, region.clone()));
    };
    let both = own.start.max(rows.start)..own.end.min(rows.end);
    if both.is_empty() {
        return None;
    }
    let width = region.extent().split_at(0).1;
    let elements = (both.start - own.start) * width..(both.end - own.start) * width;
    Some((elements, region.clone().narrow(0, both)))
}

/// Writes the elements of a region to their places in the tensor.
fn place<T: Element, B: Backend>(
    device: &B,
    from: B::Slice<'_, T>,
    region: &Region,
    host: &mut [T],
) -> Result<()> {
    let runs = region.runs();
    if let [run] = &*runs {
        return device.download::<T>(from, &mut host[run.clone()]);
    }
    // One download and not one for each run, because a download waits for the device.
    let mut elements = zeroed(B::len::<T>(from))?;
    device.download::<T>(from, &mut elements)?;
    let mut rest = elements.as_slice();
    for run in runs {
        let (now, later) = rest.split_at(run.len());
        host[run].copy_from_slice(now);
        rest = later;
    }
    Ok(())
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{
        comm::{Op, Transfer},
        device::{AnyMut, Cpu, DType},
        launch,
        shard::Partition,
        tensor::{ParamRegion, Random, Role, WeightSource, Weights},
        trace,
        weights::save::owners::{Whole, all_tensors},
    };

    /// The numbers of bytes in transit: less than an element, a few elements, everything.
    const BYTES: [usize; 3] = [1, 40, CHUNK];

    fn source() -> Random {
        Random::normal(7, 1.0)
    }

    /// Parameters with uneven shards: of rows, of columns, of an inner dimension, two regions of
    /// one tensor, and a vector that every rank holds and the last rank owns.
    fn params(group: &Group<Cpu>) -> Result<Vec<Param<f32, Cpu>>> {
        let (rank, size, source) = (group.rank(), group.size(), source());
        let load = |regions: &[(&str, Region)], owned: bool| {
            let (rows, inner) = regions.iter().fold((0, Vec::new()), |(rows, _), (_, region)| {
                (rows + region.extent().dims()[0], region.extent().dims()[1..].to_vec())
            });
            let mut row = 0;
            let regions = regions.iter().map(|(tensor, region)| {
                let of = ParamRegion { tensor: (*tensor).into(), region: region.clone(), row, owned };
                row += region.extent().dims()[0];
                of
            });
            let shape = Shape::new(&[vec![rows], inner].concat());
            let weights = Weights::new(&source);
            Param::load(group.device(), &weights, "param", Role::Weight, shape, regions.collect())
        };
        let even = |len| Partition::even(len, size).range(rank);
        let uneven = Partition::from_sizes((0..size).map(|rank| 2 * rank).collect::<Vec<_>>());
        let pairs = Region::whole([2 * size, 3]);
        let both = [rank, size + rank].map(|row| ("pairs", pairs.clone().narrow(0, row..row + 1)));
        Ok(vec![
            load(&[("rows", Region::whole([uneven.total(), 5]).narrow(0, uneven.range(rank)))], true)?,
            load(&[("cols", Region::whole([6, 7]).narrow(1, even(7)))], true)?,
            load(&[("inner", Region::whole([3, 4, 5]).narrow(1, even(4)))], true)?,
            load(&both, true)?,
            load(&[("bias", Region::whole([9]))], rank + 1 == size)?,
        ])
    }

    /// Gathers all tensors in memory of NaN. Returns them on the writer.
    fn gathered(
        group: &Group<Cpu>,
        params: &[Param<f32, Cpu>],
        tensors: &[Whole],
        (writer, bytes): (usize, usize),
    ) -> Result<Vec<Vec<f32>>> {
        let mut gather = Gather::new(group, params, writer, bytes);
        let mut all = Vec::new();
        for Whole { name, shape, owned } in tensors {
            let mut host = vec![f32::NAN; shape.len()];
            let host_of = (group.rank() == writer).then_some(host.as_mut_slice());
            gather.tensor(name, *shape, owned, host_of)?;
            all.push(host);
        }
        group.barrier()?;
        Ok(all)
    }

    fn expected(tensor: &Whole) -> Vec<f32> {
        let mut all = vec![f32::NAN; tensor.shape.len()];
        let out: AnyMut<'_, Cpu> = AnyMut::F32(all.as_mut_slice());
        source().read(&tensor.name, Role::Weight, &Region::whole(tensor.shape), out).unwrap();
        all
    }

    fn elements(transfers: &[Transfer]) -> usize {
        transfers.iter().map(|transfer| transfer.elements).sum()
    }

    /// The ranks send as many elements as the other ranks own, and the writer has the right value
    /// of each. So each element is sent once, and to the writer.
    #[test]
    fn each_element_of_another_rank_is_sent_once_to_the_writer() {
        for (world, bytes) in (1..=5).flat_map(|world| BYTES.map(|bytes| (world, bytes))) {
            for writer in 0..world {
                let at = format!("{world} ranks, writer {writer}, {bytes} bytes");
                launch::threads(world, |group| {
                    let params = params(&group)?;
                    let tensors = all_tensors(&group, &params)?;
                    let (group, log) = group.recorded();
                    let all = gathered(&group, &params, &tensors, (writer, bytes))?;
                    let moved = log.take();
                    assert!(moved.iter().all(|of| (of.op, of.dtype) == (Op::Exchange, DType::F32)), "{at}");
                    let owned = tensors.iter().flat_map(|tensor| &tensor.owned);
                    let owned = owned.filter(|of| of.rank == group.rank());
                    let owned: usize = owned.map(|of| of.region.extent().len()).sum();
                    assert_eq!(elements(&moved), if group.rank() == writer { 0 } else { owned }, "{at}");
                    if bytes == CHUNK {
                        assert!(moved.len() <= tensors.len(), "{at}: {moved:?}");
                    }
                    for (tensor, found) in tensors.iter().zip(&all).filter(|_| group.rank() == writer) {
                        assert_eq!(*found, expected(tensor), "{at}: `{}`", tensor.name);
                    }
                    Ok(())
                })
                .unwrap();
            }
        }
    }

    /// The memory of the test before keeps its NaN where no rank sends an element.
    #[test]
    fn elements_that_no_rank_sends_are_seen() {
        let all = launch::threads(3, |group| {
            let params = params(&group)?;
            let mut tensors = all_tensors(&group, &params)?;
            tensors.iter_mut().for_each(|tensor| tensor.owned.retain(|of| of.rank != 2));
            if group.rank() == 2 {
                params.iter().for_each(Param::disown);
            }
            let all = gathered(&group, &params, &tensors, (1, 40))?;
            let nan = |all: &Vec<f32>| all.iter().filter(|value| value.is_nan()).count();
            Ok(all.iter().map(nan).collect::<Vec<_>>())
        });
        // Rank 2 owns 4 of 6 rows of 5, 2 of 7 columns of 6, 1 of 4 columns of 3 x 5, 2 rows of 3,
        // and the bias.
        assert_eq!(all.unwrap()[1], [20, 12, 15, 6, 9]);
    }

    /// Between two barriers, all ranks together send at most a chunk, or one row of a tensor.
    #[test]
    fn senders_do_not_run_ahead() {
        for (bytes, most) in [(1, 20), (40, 20), (200, 50), (400, 100), (CHUNK, 1000)] {
            let sent = launch::threads(4, |group| {
                let params = params(&group)?;
                let tensors = all_tensors(&group, &params)?;
                let (group, log) = group.recorded();
                let before = trace::snapshot().entries.len();
                gathered(&group, &params, &tensors, (2, bytes))?;
                let mut moved = log.take().into_iter();
                let mut rounds = vec![0];
                for entry in trace::snapshot().entries.iter().skip(before) {
                    match &*entry.op {
                        "barrier" => rounds.push(0),
                        "exchange" if group.rank() == 2 => {}
                        "exchange" => *rounds.last_mut().unwrap() += moved.next().unwrap().elements,
                        other => panic!("{other}"),
                    }
                }
                assert_eq!(moved.next(), None);
                Ok(rounds)
            });
            let sent = sent.unwrap();
            let rounds: Vec<usize> =
                (0..sent[0].len()).map(|round| sent.iter().map(|sent| sent[round]).sum()).collect();
            assert!(rounds.iter().all(|sent| *sent <= most), "{bytes} bytes: {rounds:?}");
            assert!(rounds.iter().any(|sent| *sent > 0), "{bytes} bytes: {rounds:?}");
        }
    }
}
