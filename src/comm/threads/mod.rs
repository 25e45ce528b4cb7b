//! Ranks that are threads of one process and read one another's memory. The protocol, and why it is safe: `README.md`.

mod barrier;
mod event;
#[cfg(test)]
mod faults;
mod flight;
mod mail;
#[cfg(all(test, shuttle))]
mod model;
mod shared;
mod slot;
mod sync;

pub(crate) use shared::{Presence, Seat};

use super::{
    Call, Collective, Communicator, ExternalStep, InFlight, Incoming, Outgoing, ReduceOp, Shards, Watchdog,
    combine::{self, BLOCK},
    each_pair, host,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, Element, each_dtype},
    error::{Error, Result},
    shard::Partition,
};
use shared::Shared;
use slot::EAGER;
use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

/// One rank's end of a group of threads. Made by [`crate::launch::Threads`].
pub struct ThreadComm {
    seat: Seat,
    /// The operations that this rank has started on the barrier, and in flight.
    operations: Cell<u64>,
    flights: Cell<u64>,
    presence: Rc<Presence>,
}

impl ThreadComm {
    /// The seats of a new group of `size` threads, in rank order, each to be given to its thread.
    pub(crate) fn group(size: usize, deadline: Duration) -> Vec<Seat> {
        let shared = Arc::new(Shared::world(size, deadline));
        (0..size).map(|rank| Seat { shared: Arc::clone(&shared), rank }).collect()
    }

    /// The end of the rank that has this seat.
    pub(crate) fn join(seat: Seat, presence: Rc<Presence>) -> Self {
        presence.add(&seat);
        Self { seat, operations: Cell::new(0), flights: Cell::new(0), presence }
    }

    /// The groups that this rank's thread takes part in.
    fn presence(&self) -> Rc<Presence> {
        Rc::clone(&self.presence)
    }

    /// Publishes, meets the others and compares the calls. Returns the operation's number, to read the slots with.
    fn meet(&self, call: &Call, publish: impl FnOnce(u64)) -> Result<u64> {
        let at = self.operations.get();
        if self.seat.shared.barrier.is_broken() {
            return Err(self.seat.shared.failure(call));
        }
        self.operations.set(at + 1);
        publish(at);
        self.seat.shared.meet(call, at, self.seat.rank)?;
        Ok(at)
    }

    /// Publishes `data`, meets the others and lets `combine` make this rank's result from all ranks' data.
    ///
    /// `longest` is the most bytes that any rank publishes: the same number on every rank, so that all agree on whether
    /// there is a second meeting. An error if `data` are more.
    fn collect<T: Element>(
        &self,
        call: &Call,
        longest: usize,
        data: &[T],
        combine: impl for<'s> FnOnce(&dyn Fn(usize) -> &'s [T]),
    ) -> Result<()> {
        let slots = &self.seat.shared.slots;
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
        // SAFETY: this rank owns its slot and has passed the first meeting of the operation before: its number was counted
        // there. `data` is borrowed until this function returns, which is after the second meeting if it is not copied:
        // `longest` is at least its size, as was just checked, and the same number on every rank.
        #[allow(unsafe_code)]
        let at = self.meet(call, |at| unsafe { slots[self.seat.rank].publish_ref(at, call, data) })?;
        let second = (longest > EAGER).then(|| Second::of(&self.seat));
        #[cfg(test)]
        faults::strike();
        // SAFETY: the first meeting is complete, and this rank arrives at no other operation before
        // `combine` returns, which cannot keep a slice: it takes slices of any lifetime. No rank
        // writes data that was published by `publish_ref`.
        #[allow(unsafe_code)]
        combine(&|rank| unsafe { slots[rank].data::<T>(at) });
        second.map_or(Ok(()), |second| second.attend(call))
    }

    fn all_reduce_in_place<T: Element>(&self, call: &Call, op: ReduceOp, x: &mut [T]) -> Result<()> {
        let (slots, size, len) = (&self.seat.shared.slots, self.seat.shared.size(), x.len());
        // SAFETY: this rank owns its slot and has passed the first meeting of the operation before. `x` is borrowed until
        // this function returns, which is after the second meeting or a broken first one, and is not used in between.
        #[allow(unsafe_code)]
        let at = self.meet(call, |at| unsafe { slots[self.seat.rank].publish_mut(at, call, x) })?;
        let second = Second::of(&self.seat);
        // Chunks begin on cache lines of the reduced tensor, so that no two ranks write to one.
        let mine = Partition::even(len.div_ceil(32), size).scaled(32).range(self.seat.rank);
        let (mut start, end) = (mine.start.min(len), mine.end.min(len));
        let mut sums = [T::Acc::default(); BLOCK];
        while start < end {
            #[cfg(test)]
            faults::strike();
            let count = BLOCK.min(end - start);
            // SAFETY: between the meetings, and only this rank touches its chunk of any rank's buffer: R5. The shared
            // references end with `reduce_block`, before the exclusive ones are made, one at a time.
            #[allow(unsafe_code)]
            let part = |rank: usize| unsafe { slots[rank].part::<T>(at, start, count) };
            combine::reduce_block(op, size, &part, 0..count, &mut sums);
            for slot in slots.iter() {
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let to = unsafe { slot.part_mut::<T>(at, start, count) };
                combine::store(&sums, to);
            }
            start += count;
        }
        second.attend(call)
    }
}

/// A second meeting: attended when dropped, whatever happens between the two: R3.
struct Second<'a> {
    seat: &'a Seat,
    /// Whether this rank has done its part.
    done: bool,
}

impl<'a> Second<'a> {
    fn of(seat: &'a Seat) -> Self {
        Self { seat, done: false }
    }

    /// Attends the meeting. An error if a rank came to it without having done its part.
    fn attend(mut self, call: &Call) -> Result<()> {
        let shared = &self.seat.shared;
        self.done = true;
        drop(self);
        shared.is_whole(call)
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.seat.shared.tear(self.seat.rank);
        }
        self.seat.shared.barrier.finish();
    }
}

/// What is known of a group to who has no seat in it, on behalf of a rank.
struct Outlook {
    shared: Arc<Shared>,
    rank: usize,
}

impl Outlook {
    fn of(seat: &Seat) -> Self {
        Self { shared: Arc::clone(&seat.shared), rank: seat.rank }
    }
}

impl Watchdog for Outlook {
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
        self.seat.rank
    }

    fn size(&self) -> usize {
        self.seat.shared.size()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        let size = self.seat.shared.size();
        each_dtype!(AnyMut, x, x => {
            let bytes = size_of_val(x);
            if bytes > EAGER {
                return self.all_reduce_in_place(call, op, x);
            }
            // The payload is copied to the slot before `x` is written: two borrows in turn, not at a time.
            let slots = &self.seat.shared.slots;
            // SAFETY: as in `collect`; a payload of at most EAGER bytes is copied.
            #[allow(unsafe_code)]
            let at = self.meet(call, |at| unsafe { slots[self.seat.rank].publish_ref(at, call, x) })?;
            #[cfg(test)]
            faults::strike();
            // SAFETY: as in `collect`.
            #[allow(unsafe_code)]
            combine::reduce(op, size, |rank| unsafe { slots[rank].data(at) }, x);
            Ok(())
        })
    }

    fn all_gather(
        &self,
        call: &Call,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let longest = parts.longest().saturating_mul(send.dtype().size());
        each_pair!(send, recv, (send, recv) => {
            self.collect(call, longest, send, |part| combine::gather(parts, part, recv))
        })
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let longest = parts.total().saturating_mul(send.dtype().size());
        each_pair!(send, recv, (send, recv) => {
            self.collect(call, longest, send, |whole| combine::reduce_part(op, parts, self.seat.rank, whole, recv))
        })
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyMut, x, x => {
            let bytes = size_of_val(x);
            if self.seat.rank == root {
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
            self.seat.shared.send(call, self.seat.rank, send)?;
        }
        recv.map_or(Ok(()), |recv| self.seat.shared.receive(call, self.seat.rank, recv))
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        let slots = &self.seat.shared.slots;
        // SAFETY: this rank owns its slot and has passed the first meeting of the operation before.
        #[allow(unsafe_code)]
        self.meet(call, |at| unsafe { slots[self.seat.rank].publish(at, call) })?;
        Ok(())
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.seat.shared.obstacle(call, Vec::new)
    }

    fn reached_step(&self, step: ExternalStep) {
        self.seat.shared.came(self.seat.rank, step);
    }

    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        Outlook::of(&self.seat).lost_at_step(call, step)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        Outlook::of(&self.seat).give_up(call, steps, after)
    }

    fn watchdog(&self) -> Option<Box<dyn Watchdog>> {
        Some(Box::new(Outlook::of(&self.seat)))
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
        // Every rank tells its color and key; whoever is first of its color makes the group, and the others find it.
        let wish = (color, key, self.seat.rank);
        let part = self.seat.shared.part_of(call, wish, name, || self.barrier(call))?;
        Ok(part.map(|(shared, rank)| {
            Box::new(Self::join(Seat { shared, rank }, self.presence())) as Box<dyn Communicator<Cpu>>
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
        let flight = self.seat.shared.post(call, number, self.seat.rank, send.into())?;
        let shared = Arc::clone(&self.seat.shared);
        Ok(Box::new(flight::Started { shared, flight, call: *call, collective, rank: self.seat.rank, recv }))
    }
}
