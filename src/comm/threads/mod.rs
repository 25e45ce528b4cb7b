//! Ranks as threads of one process that read one another's memory. `README.md` describes the
//! protocol and why it is safe.

mod barrier;
mod endpoint;
mod event;
mod failure;
#[cfg(test)]
mod faults;
mod flight;
mod mail;
#[cfg(all(test, shuttle))]
mod model;
mod shared;
mod slot;
mod started;
mod sync;

pub(crate) use endpoint::{Endpoint, JoinedGroups};

use super::{
    Call, Collective, Communicator, ExternalStep, InFlight, Incoming, Liveness, Outgoing, ReduceOp, Shards,
    combine::{self, BLOCK},
    each_pair, host,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, Element, each_dtype},
    error::{Error, Result},
    security::{Channel, Roles},
    shard::Partition,
};
use shared::{Shared, SplitRequest};
use slot::EAGER;
use started::Started;
use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

/// One rank's communicator in a group of threads. [`crate::launch::Threads`] creates it.
///
/// ```
/// use shardwise::prelude::*;
/// let ranks = launch::threads(2, |world| {
///     // `world` is a [`Group`] over a `ThreadComm`; so is each group split from it.
///     let pair = world.split(Some(0), 1 - world.rank() as u64)?;
///     Ok(pair.map(|pair| pair.rank()))
/// })?;
/// assert_eq!(ranks, [Some(1), Some(0)]);
/// # Ok::<(), Error>(())
/// ```
pub struct ThreadComm {
    endpoint: Endpoint,
    /// The number of this rank's operations on the barrier so far. `flights` is the number of
    /// collectives that this rank has started.
    operations: Cell<u64>,
    flights: Cell<u64>,
    groups: Rc<JoinedGroups>,
}

impl ThreadComm {
    /// Creates a group of `size` threads. Returns one endpoint per thread, in rank order.
    pub(crate) fn group(size: usize, deadline: Duration, roles: Roles) -> Vec<Endpoint> {
        let shared = Arc::new(Shared::world(size, deadline, roles));
        (0..size).map(|rank| Endpoint { shared: Arc::clone(&shared), rank }).collect()
    }

    /// Creates the communicator of the rank with this endpoint.
    pub(crate) fn join(endpoint: Endpoint, groups: Rc<JoinedGroups>) -> Self {
        groups.add(&endpoint);
        Self { endpoint, operations: Cell::new(0), flights: Cell::new(0), groups }
    }

    /// The groups that this rank's thread has joined.
    fn joined_groups(&self) -> Rc<JoinedGroups> {
        Rc::clone(&self.groups)
    }

    /// Calls `publish` with the operation's number, waits for the other ranks, and compares the
    /// calls. Returns the number, which selects the publications in the slots.
    fn synchronize(&self, call: &Call, publish: impl FnOnce(u64)) -> Result<u64> {
        let at = self.operations.get();
        if self.endpoint.shared.barrier.is_broken() {
            return Err(self.endpoint.shared.first_failure(call));
        }
        self.operations.set(at + 1);
        publish(at);
        self.endpoint.shared.synchronize(call, at, self.endpoint.rank)?;
        Ok(at)
    }

    /// Publishes `data`, waits for the other ranks and lets `combine` compute this rank's result
    /// from all ranks' data.
    ///
    /// `longest` is the largest number of bytes that a rank publishes. It is the same on every
    /// rank, so that all ranks agree on whether there is a second round. Longer data is an error.
    fn collect<T: Element>(
        &self,
        call: &Call,
        longest: usize,
        data: &[T],
        combine: impl for<'s> FnOnce(&dyn Fn(usize) -> &'s [T]),
    ) -> Result<()> {
        let slots = &self.endpoint.shared.slots;
        let bytes = size_of_val(data);
        if bytes > longest {
            return Err(Error::sizes(
                call.op.name(),
                "bytes of the data",
                bytes,
                "the most of any rank",
                longest,
            ));
        }
        // SAFETY: this rank owns its slot and has passed the first round of the previous operation.
        // `data` is borrowed until this function returns. If `data` is not copied, this function
        // returns only after the second round or a broken first round: `longest` is at least the
        // size of `data`, as checked above, and is the same on every rank.
        #[allow(unsafe_code)]
        let at =
            self.synchronize(call, |at| unsafe { slots[self.endpoint.rank].publish_ref(at, call, data) })?;
        let second = (longest > EAGER).then(|| SecondRound::of(&self.endpoint));
        #[cfg(test)]
        faults::panic_if_injected();
        // SAFETY: the first round is complete, and this rank arrives at no other operation before
        // `combine` returns. `combine` cannot keep a slice, because it accepts slices of any
        // lifetime. No rank writes data that was published by `publish_ref`.
        #[allow(unsafe_code)]
        combine(&|rank| unsafe { slots[rank].data::<T>(at) });
        second.map_or(Ok(()), |second| second.attend(call))
    }

    fn all_reduce_in_place<T: Element>(&self, call: &Call, op: ReduceOp, x: &mut [T]) -> Result<()> {
        let (slots, size, len) = (&self.endpoint.shared.slots, self.endpoint.shared.size(), x.len());
        // SAFETY: this rank owns its slot and has passed the first round of the previous operation.
        // `x` is borrowed until this function returns, which is after the second round or a broken
        // first round. This function does not use `x` in between.
        #[allow(unsafe_code)]
        let at =
            self.synchronize(call, |at| unsafe { slots[self.endpoint.rank].publish_mut(at, call, x) })?;
        let second = SecondRound::of(&self.endpoint);
        // Chunks are multiples of 32 elements (64 bytes or more), so that two ranks share at most
        // the cache line at a boundary between chunks.
        let mine = Partition::even(len.div_ceil(32), size).scaled(32).range(self.endpoint.rank);
        let (mut start, end) = (mine.start.min(len), mine.end.min(len));
        let mut sums = [T::Acc::default(); BLOCK];
        while start < end {
            #[cfg(test)]
            faults::panic_if_injected();
            let count = BLOCK.min(end - start);
            // SAFETY: this is between the rounds, and only this rank touches its chunk of any
            // rank's buffer: R5. The shared references end with `reduce_block`. The exclusive
            // references are created later, one at a time.
            #[allow(unsafe_code)]
            let range = |rank: usize| unsafe { slots[rank].range::<T>(at, start, count) };
            combine::reduce_block(op, size, &range, 0..count, &mut sums);
            for slot in slots.iter() {
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let to = unsafe { slot.range_mut::<T>(at, start, count) };
                combine::store(&sums, to);
            }
            start += count;
        }
        second.attend(call)
    }
}

/// The second round of an operation. Its drop attends the round, so that this rank attends even
/// after a panic: R3.
struct SecondRound<'a> {
    endpoint: &'a Endpoint,
    /// Whether this rank has finished its work.
    done: bool,
}

impl<'a> SecondRound<'a> {
    fn of(endpoint: &'a Endpoint) -> Self {
        Self { endpoint, done: false }
    }

    /// Attends the round. Returns an error if a rank panicked before it had finished its work.
    fn attend(mut self, call: &Call) -> Result<()> {
        let shared = &self.endpoint.shared;
        self.done = true;
        drop(self);
        shared.check_complete(call)
    }
}

impl Drop for SecondRound<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.endpoint.shared.record_panic(self.endpoint.rank);
        }
        self.endpoint.shared.barrier.finish();
    }
}

/// A rank's view of its group, for use on another thread.
struct ThreadLiveness {
    shared: Arc<Shared>,
    rank: usize,
}

impl ThreadLiveness {
    fn of(endpoint: &Endpoint) -> Self {
        Self { shared: Arc::clone(&endpoint.shared), rank: endpoint.rank }
    }
}

impl Liveness for ThreadLiveness {
    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        self.shared.obstacle(call, || self.shared.absent(step))
    }

    fn absent(&self, step: ExternalStep) -> Vec<usize> {
        self.shared.absent(step)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        let absent = steps.iter().flat_map(|step| self.shared.absent(*step)).collect();
        let missing = ExternalStep::missing(steps, absent, self.rank, self.shared.size());
        self.shared.give_up(call, missing, after)
    }
}

impl Communicator<Cpu> for ThreadComm {
    fn rank(&self) -> usize {
        self.endpoint.rank
    }

    fn size(&self) -> usize {
        self.endpoint.shared.size()
    }

    fn channel(&self) -> Channel {
        Channel::MEMORY
    }

    fn roles(&self) -> Roles {
        self.endpoint.shared.roles()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        let size = self.endpoint.shared.size();
        each_dtype!(AnyMut, x, x => {
            let bytes = size_of_val(x);
            if bytes > EAGER {
                return self.all_reduce_in_place(call, op, x);
            }
            // `synchronize` copies the payload to the slot. Only then does `reduce` write `x`, so
            // the two borrows of `x` do not overlap.
            let slots = &self.endpoint.shared.slots;
            // SAFETY: as in `collect`; a payload of at most EAGER bytes is copied.
            #[allow(unsafe_code)]
            let at = self.synchronize(call, |at| unsafe { slots[self.endpoint.rank].publish_ref(at, call, x) })?;
            #[cfg(test)]
            faults::panic_if_injected();
            // SAFETY: as in `collect`.
            #[allow(unsafe_code)]
            combine::reduce(op, size, |rank| unsafe { slots[rank].data(at) }, x);
            Ok(())
        })
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let longest = shards.longest().saturating_mul(send.dtype().size());
        each_pair!(send, recv, (send, recv) => {
            self.collect(call, longest, send, |shard| combine::gather(shards, shard, recv))
        })
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let longest = shards.total().saturating_mul(send.dtype().size());
        each_pair!(send, recv, (send, recv) => {
            self.collect(call, longest, send, |whole| combine::reduce_shard(op, shards, self.endpoint.rank, whole, recv))
        })
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyMut, x, x => {
            let bytes = size_of_val(x);
            if self.endpoint.rank == root {
                return self.collect(call, bytes, x, |_| ());
            }
            self.collect(call, bytes, &[], |data| x.copy_from_slice(data(root)))
        })
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, Cpu>>,
        recv: Option<Incoming<'_, Cpu>>,
    ) -> Result<()> {
        if let Some(send) = send {
            self.endpoint.shared.send(call, self.endpoint.rank, send)?;
        }
        recv.map_or(Ok(()), |recv| self.endpoint.shared.receive(call, self.endpoint.rank, recv))
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        let slots = &self.endpoint.shared.slots;
        // SAFETY: this rank owns its slot and has passed the first round of the previous operation.
        #[allow(unsafe_code)]
        self.synchronize(call, |at| unsafe { slots[self.endpoint.rank].publish(at, call) })?;
        Ok(())
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.endpoint.shared.obstacle(call, Vec::new)
    }

    fn reached_step(&self, step: ExternalStep) {
        self.endpoint.shared.came(self.endpoint.rank, step);
    }

    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        ThreadLiveness::of(&self.endpoint).lost_at_step(call, step)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        ThreadLiveness::of(&self.endpoint).give_up(call, steps, after)
    }

    fn liveness(&self) -> Option<Box<dyn Liveness>> {
        Some(Box::new(ThreadLiveness::of(&self.endpoint)))
    }

    fn is_near(&self) -> bool {
        true
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<Cpu>>>> {
        // Each rank publishes its color and key. The first rank of a color creates the group, and
        // the others find it.
        let request = SplitRequest { color, key, rank: self.endpoint.rank };
        let subgroup = self.endpoint.shared.split(call, request, name, || self.barrier(call))?;
        Ok(subgroup.map(|(shared, rank)| {
            Box::new(Self::join(Endpoint { shared, rank }, self.joined_groups()))
                as Box<dyn Communicator<Cpu>>
        }))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        send: AnyBuffer<Cpu>,
        recv: AnyBuffer<Cpu>,
    ) -> Result<Box<dyn InFlight<Cpu>>> {
        let number = self.flights.get();
        self.flights.set(number + 1);
        let flight = self.endpoint.shared.post(call, number, self.endpoint.rank, send.into())?;
        let shared = Arc::clone(&self.endpoint.shared);
        Ok(Box::new(Started { shared, flight, call: *call, collective, rank: self.endpoint.rank, recv }))
    }
}
