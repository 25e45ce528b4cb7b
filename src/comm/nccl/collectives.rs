//! Collectives on shards of any partition. Shards of equal length use NCCL's own collective. Shards
//! of unequal length use one broadcast or one reduction for each rank. Max, min and sums in rank
//! order use point-to-point messages.

use super::{Nccl, NcclDevice, Order, arrival::Arrival};
use crate::{
    comm::{Collective, ReduceOp, Shards, each_pair},
    device::{AnyBuffer, Element, each_dtype},
    error::Result,
    kernels::{MatMut, MatRef},
    shard::Partition,
};

impl<B: NcclDevice> Nccl<B> {
    /// recv ← all ranks' shards, one after another. `send` is this rank's shard.
    fn gather_flat<T: Element>(
        &self,
        at: &Arrival,
        lens: &Partition,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        let raw = &self.state.raw;
        if is_even(lens) {
            return self.single(at, || raw.all_gather::<T, B>(self.stream(), lens.shards(), send, &mut recv));
        }
        self.grouped(at, || {
            for root in (0..lens.shards()).filter(|&root| lens.size(root) > 0) {
                let own = (root == self.own_rank()).then_some(send);
                let mut shard = B::narrow_mut::<T>(B::reborrow::<T>(&mut recv), lens.range(root));
                raw.broadcast::<T, B>(self.stream(), root, own, &mut shard)?;
            }
            Ok(())
        })
    }

    /// recv ← this rank's shard of the reduction. `send` is this rank's term, stored shard by
    /// shard.
    fn scatter_flat<T: Element>(
        &self,
        at: &Arrival,
        op: ReduceOp,
        lens: &Partition,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (raw, own_rank, ranks) = (&self.state.raw, self.own_rank(), lens.shards());
        if op == ReduceOp::Sum && self.options.order == Order::Any {
            if is_even(lens) {
                return self.single(at, || raw.reduce_scatter::<T, B>(self.stream(), ranks, send, &mut recv));
            }
            return self.grouped(at, || {
                for root in (0..ranks).filter(|&root| lens.size(root) > 0) {
                    let own = (root == own_rank).then_some(&mut recv);
                    raw.reduce::<T, B>(self.stream(), root, B::narrow::<T>(send, lens.range(root)), own)?;
                }
                Ok(())
            });
        }
        // `terms` holds every rank's term of this rank's shard, in rank order.
        let len = lens.size(own_rank);
        let mut terms = self.stream().empty::<T>(len * ranks)?;
        let mut terms_mut = B::slice_mut::<T>(&mut terms);
        self.grouped(at, || {
            for peer in 0..ranks {
                if lens.size(peer) > 0 {
                    raw.send::<T, B>(self.stream(), peer, B::narrow::<T>(send, lens.range(peer)))?;
                }
                if len > 0 {
                    let range = peer * len..(peer + 1) * len;
                    let mut term = B::narrow_mut::<T>(B::reborrow::<T>(&mut terms_mut), range);
                    raw.recv::<T, B>(self.stream(), peer, &mut term)?;
                }
            }
            Ok(())
        })?;
        drop(terms_mut);
        if len == 0 {
            return Ok(());
        }
        // Max and min are combined here too, because NCCL's max and min would lose a NaN.
        self.stream().combine::<T>(op, ranks, B::slice::<T>(&terms), recv)
    }

    pub(super) fn reduce<T: Element>(
        &self,
        at: &Arrival,
        op: ReduceOp,
        mut x: B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len_mut::<T>(&x);
        if len == 0 {
            return Ok(());
        }
        if op == ReduceOp::Sum && self.options.order == Order::Any {
            return self.single(at, || self.state.raw.all_reduce::<T, B>(self.stream(), &mut x));
        }
        let lens = Partition::even(len, self.control.size());
        let mut shard = self.stream().empty::<T>(lens.size(self.own_rank()))?;
        self.scatter_flat::<T>(at, op, &lens, B::shared::<T>(&x), B::slice_mut::<T>(&mut shard))?;
        self.gather_flat::<T>(at, &lens, B::slice::<T>(&shard), x)
    }

    pub(super) fn gather<T: Element>(
        &self,
        at: &Arrival,
        shards: &Shards,
        send: B::Slice<'_, T>,
        mut recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        if shards.total() == 0 {
            return Ok(());
        }
        let (lens, cols) = (lens(shards), shards.partition.total());
        if shards.rows == 1 {
            return self.gather_flat::<T>(at, &lens, send, recv);
        }
        let mut flat = self.stream().empty::<T>(shards.total())?;
        self.gather_flat::<T>(at, &lens, send, B::slice_mut::<T>(&mut flat))?;
        for rank in (0..lens.shards()).filter(|&rank| lens.size(rank) > 0) {
            let shard = B::narrow::<T>(B::slice::<T>(&flat), lens.range(rank));
            let whole = MatMut::<T, B>::new(B::reborrow::<T>(&mut recv), shards.rows, cols)?;
            let shard = MatRef::new(shard, shards.rows, shards.partition.size(rank))?;
            self.stream().copy::<T, T>(shard, whole.columns(shards.partition.range(rank)))?;
        }
        Ok(())
    }

    pub(super) fn scatter<T: Element>(
        &self,
        at: &Arrival,
        op: ReduceOp,
        shards: &Shards,
        send: B::Slice<'_, T>,
        recv: B::SliceMut<'_, T>,
    ) -> Result<()> {
        if shards.total() == 0 {
            return Ok(());
        }
        let (lens, cols) = (lens(shards), shards.partition.total());
        if shards.rows == 1 {
            return self.scatter_flat::<T>(at, op, &lens, send, recv);
        }
        let mut flat = self.stream().empty::<T>(shards.total())?;
        let whole = MatRef::<T, B>::new(send, shards.rows, cols)?;
        for rank in (0..lens.shards()).filter(|&rank| lens.size(rank) > 0) {
            let shard = B::narrow_mut::<T>(B::slice_mut::<T>(&mut flat), lens.range(rank));
            let shard = MatMut::new(shard, shards.rows, shards.partition.size(rank))?;
            self.stream().copy::<T, T>(whole.columns(shards.partition.range(rank)), shard)?;
        }
        self.scatter_flat::<T>(at, op, &lens, B::slice::<T>(&flat), recv)
    }

    pub(super) fn broadcast_from<T: Element>(
        &self,
        at: &Arrival,
        root: usize,
        mut x: B::SliceMut<'_, T>,
    ) -> Result<()> {
        if B::len_mut::<T>(&x) == 0 {
            return Ok(());
        }
        self.single(at, || self.state.raw.broadcast::<T, B>(self.stream(), root, None, &mut x))
    }

    /// Runs the collective of `Communicator::start` on its buffers.
    pub(super) fn collective(
        &self,
        at: &Arrival,
        collective: &Collective,
        send: &mut AnyBuffer<B>,
        recv: &mut AnyBuffer<B>,
    ) -> Result<()> {
        match collective {
            Collective::AllReduce(op) => {
                each_dtype!(AnyMut, send.as_mut(), x => self.reduce(at, *op, x))
            }
            Collective::AllGather(shards) => each_pair!(send.as_ref(), recv.as_mut(), (send, recv) => {
                self.gather(at, shards, send, recv)
            }),
            Collective::ReduceScatter(op, shards) => {
                each_pair!(send.as_ref(), recv.as_mut(), (send, recv) => {
                    self.scatter(at, *op, shards, send, recv)
                })
            }
        }
    }
}

/// The partition of the concatenated shards: each rank's number of elements.
fn lens(shards: &Shards) -> Partition {
    Partition::from_sizes((0..shards.partition.shards()).map(|rank| shards.len(rank)))
}

fn is_even(lens: &Partition) -> bool {
    lens.sizes().all(|size| size == lens.size(0))
}
