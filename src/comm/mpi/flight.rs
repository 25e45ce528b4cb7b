//! One collective, from the comparison of the calls to its result.
//!
//! 1. **Calls**: every rank sends its call to every other rank. If no payload exceeds [`EAGER`]
//!    bytes, payloads travel with the calls. No other data moves before the comparison. If the
//!    calls differ, rank 0 and the first rank that differs send their calls as text, and all ranks
//!    get the same error.
//! 2. **Shards**: if a payload is longer, every rank sends to each other rank the data that the
//!    receiver needs.
//! 3. **Sums**: in an all-reduce every rank has reduced one chunk of the tensor in stage 2. It
//!    sends this chunk to the other ranks.
//!
//! The ranks' terms are added in rank order, so sums have the bits of thread ranks.

use super::{
    engine::{Advance, CALL_TEXT, DATA, Engine, TAGS},
    members::Members,
    message::{Message, pack},
};
use crate::{
    comm::{Call, ReduceOp, Shards, cause::Cause, combine},
    device::Element,
    error::{Error, Mismatch, Result},
    shard::Partition,
};
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Instant,
};

/// Payloads travel with the call if no rank's payload has more than this many bytes.
const EAGER: usize = 4096;

/// The operation on the ranks' data.
pub(super) enum Task {
    AllReduce(ReduceOp),
    AllGather(Shards),
    ReduceScatter(ReduceOp, Shards),
    Broadcast(usize),
    Barrier,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Calls,
    /// The call of rank 0 differs from the call of the rank with this number.
    Dispute(usize),
    Shards,
    Sums,
    Done,
}

pub(super) struct Flight<T> {
    pub(super) members: Rc<Members>,
    pub(super) call: Call,
    task: Task,
    number: u64,
    /// This rank's data. Empty if no rank reads it.
    own: Arc<Vec<T>>,
    state: RefCell<State<T>>,
    moved: Cell<Instant>,
}

struct State<T> {
    stage: Stage,
    /// The calls received from the other ranks.
    calls: Vec<Option<(u64, [u64; 2], Message)>>,
    /// The data received from the other ranks in this stage.
    received: Vec<Option<Message>>,
    result: Vec<T>,
    error: Option<Error>,
}

impl<T: Element + bytemuck::Pod> Flight<T> {
    /// Starts a collective whose result has `len` elements.
    pub(super) fn start(
        engine: &Engine,
        members: &Rc<Members>,
        call: &Call,
        task: Task,
        own: Arc<Vec<T>>,
        len: usize,
    ) -> Result<Rc<Self>> {
        members.check(call)?;
        let number = members.flights.get();
        members.flights.set(number + 1);
        let none = || (0..members.size()).map(|_| None).collect();
        let state = State {
            stage: Stage::Calls,
            calls: none(),
            received: (0..members.size()).map(|_| None).collect(),
            result: vec![T::default(); len],
            error: None,
        };
        let flight = Rc::new(Self {
            members: Rc::clone(members),
            call: *call,
            task,
            number,
            own,
            state: RefCell::new(state),
            moved: Cell::new(Instant::now()),
        });
        let payload: &[T] = if flight.is_eager() { &flight.own } else { &[] };
        members.call(engine, call, bytemuck::cast_slice(payload));
        engine.add(flight.clone());
        Ok(flight)
    }

    /// Waits for the result and copies it to `to`.
    pub(super) fn wait(&self, engine: &Engine, to: &mut [T]) -> Result<()> {
        let done = engine.wait(|| Some(self.moved.get()), || self.is_done().then_some(()));
        if done.is_none() {
            let stage = self.state.borrow().stage;
            let cause = Cause::Deadline { missing: self.missing(), after: engine.deadline };
            let error = self.members.fail(engine, &self.call, cause);
            if stage == Stage::Shards || stage == Stage::Sums {
                // Data is in transit and cannot be recalled, so the job ends.
                engine.abort(&error);
            }
            let mut state = self.state.borrow_mut();
            state.stage = Stage::Done;
            state.error = Some(error);
        }
        let state = self.state.borrow();
        match &state.error {
            Some(error) => Err(error.clone()),
            None if state.result.len() == to.len() => {
                to.copy_from_slice(&state.result);
                Ok(())
            }
            None => Err(Error::sizes(
                self.call.op.name(),
                "the result",
                state.result.len(),
                "the receive buffer",
                to.len(),
            )),
        }
    }

    fn is_done(&self) -> bool {
        self.state.borrow().stage == Stage::Done
    }

    /// The ranks for which this rank waits.
    fn missing(&self) -> Vec<usize> {
        let state = self.state.borrow();
        let missing = |peer: &usize| match state.stage {
            Stage::Calls => state.calls[*peer].is_none(),
            Stage::Dispute(right) => [0, right].contains(peer) && state.received[*peer].is_none(),
            _ => self.is_sender(*peer) && state.received[*peer].is_none(),
        };
        self.members.peers().filter(missing).collect()
    }

    fn size(&self) -> usize {
        self.members.size()
    }

    /// Whether no payload exceeds [`EAGER`] bytes. The answer is the same on every rank.
    fn is_eager(&self) -> bool {
        let longest = match &self.task {
            Task::AllReduce(_) => self.own.len(),
            Task::AllGather(shards) => shards.longest(),
            Task::ReduceScatter(_, shards) => shards.total(),
            Task::Broadcast(_) => self.call.shape.len(),
            Task::Barrier => 0,
        };
        longest * size_of::<T>() <= EAGER
    }

    /// Whether rank `peer` sends data to this rank in the stages `Shards` and `Sums`.
    fn is_sender(&self, peer: usize) -> bool {
        match self.task {
            Task::Broadcast(root) => peer == root,
            _ => true,
        }
    }

    /// The partition of an all-reduce's tensor into chunks. Each rank reduces one chunk.
    fn chunks(&self) -> Partition {
        Partition::even(self.own.len(), self.size())
    }

    fn tag(&self, stage: u64) -> i32 {
        let tags = (TAGS - DATA) as u64 / 2;
        DATA + (self.number % tags * 2 + stage) as i32
    }

    /// Copies the columns of rank `rank` out of this rank's `[rows, total]` tensor.
    fn columns(&self, shards: &Shards, rank: usize) -> Vec<T> {
        let columns = shards.partition.range(rank);
        let rows = self.own.chunks_exact(shards.partition.total().max(1));
        rows.flat_map(|row| &row[columns.clone()]).copied().collect()
    }

    /// Sends to every other rank the part of this rank's data that the receiver needs.
    fn send_shards(&self, engine: &Engine) {
        let tag = self.tag(0);
        let send =
            |peer, data: &[T]| self.members.send(engine, peer, tag, &pack(&[bytemuck::cast_slice(data)]));
        match &self.task {
            Task::AllReduce(_) => {
                let chunks = self.chunks();
                self.members.peers().for_each(|peer| send(peer, &self.own[chunks.range(peer)]));
            }
            Task::ReduceScatter(_, shards) => {
                self.members.peers().for_each(|peer| send(peer, &self.columns(shards, peer)));
            }
            Task::Broadcast(root) if *root != self.members.rank => {}
            _ => self.send_to_all(engine, tag, &self.own),
        }
    }

    fn send_to_all(&self, engine: &Engine, tag: i32, data: &[T]) {
        let message = pack(&[bytemuck::cast_slice(data)]);
        self.members.peers().for_each(|peer| self.members.send(engine, peer, tag, &message));
    }

    /// Moves the messages of a stage that have arrived from the queue to `received`. Returns
    /// whether all messages of the stage have arrived.
    fn collect(
        &self,
        engine: &Engine,
        received: &mut [Option<Message>],
        tag: i32,
        from: impl Fn(usize) -> bool,
    ) -> bool {
        let mut complete = true;
        for peer in self.members.peers().filter(|&peer| from(peer)) {
            if received[peer].is_none() {
                received[peer] = self.members.take(engine, peer, tag);
                if received[peer].is_some() {
                    self.moved.set(Instant::now());
                }
            }
            complete &= received[peer].is_some();
        }
        complete
    }

    /// Computes the result from the data that came with the calls. Returns an error if some data
    /// has the wrong length.
    fn finish_eager(&self, calls: &[Option<(u64, [u64; 2], Message)>], result: &mut [T]) -> Result<()> {
        let mut inputs: Vec<&[T]> = Vec::with_capacity(self.size());
        for (rank, call) in calls.iter().enumerate() {
            let input = match call {
                Some((.., message)) => message.data(1).ok_or_else(|| self.damaged())?,
                None => &self.own,
            };
            let len = match &self.task {
                Task::AllReduce(_) => self.own.len(),
                Task::AllGather(shards) => shards.len(rank),
                Task::ReduceScatter(_, shards) => shards.total(),
                Task::Broadcast(root) if *root == rank => result.len(),
                _ => input.len(),
            };
            if input.len() != len {
                return Err(self.damaged());
            }
            inputs.push(input);
        }
        let input = |rank: usize| inputs[rank];
        match &self.task {
            Task::AllReduce(op) => combine::reduce(*op, self.size(), input, result),
            Task::AllGather(shards) => combine::gather(shards, input, result),
            Task::ReduceScatter(op, shards) => {
                combine::reduce_shard(*op, shards, self.members.rank, input, result);
            }
            Task::Broadcast(root) => result.copy_from_slice(inputs[*root]),
            Task::Barrier => {}
        }
        Ok(())
    }

    /// Returns the data of all ranks, with `own` for this rank. Checks that rank `r` has `len(r)`
    /// elements.
    fn inputs<'a>(
        &self,
        received: &'a [Option<Message>],
        own: &'a [T],
        len: impl Fn(usize) -> usize,
    ) -> Result<Vec<&'a [T]>> {
        let input = |(rank, message): (usize, &'a Option<Message>)| {
            let input = match message {
                Some(message) => message.data(0),
                None => Some(own),
            };
            input.filter(|input| input.len() == len(rank)).ok_or_else(|| self.damaged())
        };
        received.iter().enumerate().map(input).collect()
    }

    /// Computes the result from the data of all ranks. In an all-reduce, computes only this rank's
    /// chunk. Returns whether the result is complete.
    fn finish_shards(&self, engine: &Engine, received: &[Option<Message>], result: &mut [T]) -> Result<bool> {
        let rank = self.members.rank;
        match &self.task {
            Task::AllReduce(op) => {
                let mine = self.chunks().range(rank);
                let inputs = self.inputs(received, &self.own[mine.clone()], |_| mine.len())?;
                let sums = &mut result[mine];
                combine::reduce(*op, self.size(), |rank| inputs[rank], sums);
                self.send_to_all(engine, self.tag(1), sums);
                return Ok(false);
            }
            Task::AllGather(shards) => {
                let inputs = self.inputs(received, &self.own, |rank| shards.len(rank))?;
                combine::gather(shards, |rank| inputs[rank], result);
            }
            Task::ReduceScatter(op, shards) => {
                let own = self.columns(shards, rank);
                let inputs = self.inputs(received, &own, |_| shards.len(rank))?;
                combine::reduce(*op, self.size(), |rank| inputs[rank], result);
            }
            Task::Broadcast(root) => {
                let data = match &received[*root] {
                    Some(message) => message.data(0).ok_or_else(|| self.damaged())?,
                    None => &self.own[..],
                };
                if data.len() != result.len() {
                    return Err(self.damaged());
                }
                result.copy_from_slice(data);
            }
            Task::Barrier => {}
        }
        Ok(true)
    }

    fn finish_sums(&self, received: &[Option<Message>], result: &mut [T]) -> Result<()> {
        let chunks = self.chunks();
        for (rank, message) in
            received.iter().enumerate().filter_map(|(rank, message)| Some((rank, message.as_ref()?)))
        {
            let sums = message.data::<T>(0).filter(|sums| sums.len() == chunks.size(rank));
            result[chunks.range(rank)].copy_from_slice(sums.ok_or_else(|| self.damaged())?);
        }
        Ok(())
    }

    fn damaged(&self) -> Error {
        let op = self.call.op.name();
        Error::invalid(op, "a message of another rank is damaged: do all run the same program?")
    }

    /// Returns the error that ends the collective early, if there is one.
    fn obstacle(&self, engine: &Engine) -> Option<Error> {
        let missing = self.missing();
        let cause = self.members.obstacle(engine, &missing)?;
        // If no rank is missing, all data arrived before the loss, and the collective can finish.
        (!missing.is_empty()).then(|| self.members.fail(engine, &self.call, cause))
    }

    /// Compares the calls and returns the next stage.
    fn compare(&self, engine: &Engine, state: &mut State<T>) -> Result<Stage> {
        let own = self.call.fingerprint();
        let prints: Vec<u64> =
            state.calls.iter().map(|call| call.as_ref().map_or(own, |(print, ..)| *print)).collect();
        if let Some(right) = prints.iter().position(|print| *print != prints[0]) {
            self.members.disputed.set(true);
            if [0, right].contains(&self.members.rank) {
                let text = pack(&[self.call.to_string().as_bytes()]);
                self.members.peers().for_each(|peer| self.members.send(engine, peer, CALL_TEXT, &text));
            }
            return Ok(Stage::Dispute(right));
        }
        let own = self.call.messages;
        let counts = state.calls.iter().map(|call| call.as_ref().map_or(own, |(_, counts, _)| *counts));
        if let Some(mismatch) = self.call.unreceived(counts) {
            let cause = Cause::Disagreement(Box::new(mismatch));
            return Err(self.members.fail(engine, &self.call, cause));
        }
        if self.is_eager() {
            self.finish_eager(&state.calls, &mut state.result)?;
            return Ok(Stage::Done);
        }
        self.send_shards(engine);
        Ok(Stage::Shards)
    }

    /// Returns the next stage if this stage is done.
    fn step(&self, engine: &Engine, state: &mut State<T>) -> Result<Option<Stage>> {
        match state.stage {
            // Waits, because the texts of an earlier disagreement are still in transit.
            Stage::Calls if self.members.disputed.get() => Ok(None),
            Stage::Calls => {
                let mut complete = true;
                for peer in self.members.peers() {
                    if state.calls[peer].is_none() {
                        state.calls[peer] = self.members.take_call(engine, peer);
                    }
                    complete &= state.calls[peer].is_some();
                }
                if complete { self.compare(engine, state).map(Some) } else { Ok(None) }
            }
            Stage::Dispute(right) => {
                let rank = self.members.rank;
                if !self.collect(engine, &mut state.received, CALL_TEXT, |peer| [0, right].contains(&peer)) {
                    return Ok(None);
                }
                let text = |of: usize| match &state.received[of] {
                    Some(message) if of != rank => message.text(0).unwrap_or_default(),
                    _ => self.call.to_string(),
                };
                let mismatch =
                    Mismatch { left_rank: 0, left: text(0), right_rank: right, right: text(right) };
                let cause = Cause::Disagreement(Box::new(mismatch));
                self.members.disputed.set(false);
                Err(self.members.fail(engine, &self.call, cause))
            }
            Stage::Shards => {
                if !self.collect(engine, &mut state.received, self.tag(0), |peer| self.is_sender(peer)) {
                    return Ok(None);
                }
                if self.finish_shards(engine, &state.received, &mut state.result)? {
                    return Ok(Some(Stage::Done));
                }
                state.received.iter_mut().for_each(|message| *message = None);
                Ok(Some(Stage::Sums))
            }
            Stage::Sums => {
                if !self.collect(engine, &mut state.received, self.tag(1), |_| true) {
                    return Ok(None);
                }
                self.finish_sums(&state.received, &mut state.result)?;
                Ok(Some(Stage::Done))
            }
            Stage::Done => Ok(None),
        }
    }
}

impl<T: Element + bytemuck::Pod> Advance for Flight<T> {
    fn advance(&self, engine: &Engine) -> bool {
        loop {
            let mut state = self.state.borrow_mut();
            let next = self.step(engine, &mut state);
            match next {
                Ok(Some(stage)) => state.stage = stage,
                Ok(None) => break,
                Err(error) => {
                    state.stage = Stage::Done;
                    state.error = Some(error);
                }
            }
        }
        if self.is_done() {
            return true;
        }
        let Some(error) = self.obstacle(engine) else { return false };
        let mut state = self.state.borrow_mut();
        state.stage = Stage::Done;
        state.error = Some(error);
        true
    }
}
