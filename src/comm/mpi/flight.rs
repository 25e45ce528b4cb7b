//! One collective, from the meeting of the calls to its result.
//!
//! 1. **Meeting**: every rank tells every other its call, and with it a payload of at most [`EAGER`] bytes. Nobody's data has
//!    moved but these copies. If the calls differ, the first rank and the one that differs send theirs in words, and all get
//!    the same error.
//! 2. **Shards**: if the payload was longer, every rank sends each other what that needs of its data.
//! 3. **Sums**: in an all-reduce every rank has reduced a part of the tensor, and sends it to the others.
//!
//! Sums are made in rank order, as thread ranks make them: the same bits.

use super::{
    members::Members,
    message::{Message, pack},
    post::{Advance, DATA, Post, TAGS, WORDS},
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

/// Payloads of at most this many bytes travel with the call.
const EAGER: usize = 4096;

/// What is to be made of the ranks' data.
pub(super) enum Task {
    AllReduce(ReduceOp),
    AllGather(Shards),
    ReduceScatter(ReduceOp, Shards),
    Broadcast(usize),
    Barrier,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Meeting,
    /// The calls of the first rank and of this one differ.
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
    /// This rank's data: empty if nobody reads it.
    own: Arc<Vec<T>>,
    state: RefCell<State<T>>,
    moved: Cell<Instant>,
}

struct State<T> {
    stage: Stage,
    /// What the other ranks have said in the meeting.
    calls: Vec<Option<(u64, [u64; 2], Message)>>,
    /// What they have sent in this stage.
    parts: Vec<Option<Message>>,
    result: Vec<T>,
    error: Option<Error>,
}

impl<T: Element + bytemuck::Pod> Flight<T> {
    /// Starts a collective whose result has `len` elements.
    pub(super) fn start(
        post: &Post,
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
            stage: Stage::Meeting,
            calls: none(),
            parts: (0..members.size()).map(|_| None).collect(),
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
        members.call(post, call, bytemuck::cast_slice(payload));
        post.add(flight.clone());
        Ok(flight)
    }

    /// Waits for the result and copies it to `to`.
    pub(super) fn wait(&self, post: &Post, to: &mut [T]) -> Result<()> {
        let done = post.wait(|| Some(self.moved.get()), || self.is_done().then_some(()));
        if done.is_none() {
            let stage = self.state.borrow().stage;
            let cause = Cause::Deadline { missing: self.missing(), after: post.deadline };
            let error = self.members.fail(post, &self.call, cause);
            if stage == Stage::Shards || stage == Stage::Sums {
                // Data is under way that no one can call back.
                post.abort(&error);
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
                "the room for it",
                to.len(),
            )),
        }
    }

    fn is_done(&self) -> bool {
        self.state.borrow().stage == Stage::Done
    }

    /// The ranks that this one waits for.
    fn missing(&self) -> Vec<usize> {
        let state = self.state.borrow();
        let missing = |peer: &usize| match state.stage {
            Stage::Meeting => state.calls[*peer].is_none(),
            Stage::Dispute(right) => [0, right].contains(peer) && state.parts[*peer].is_none(),
            _ => self.is_sender(*peer) && state.parts[*peer].is_none(),
        };
        self.members.peers().filter(missing).collect()
    }

    fn size(&self) -> usize {
        self.members.size()
    }

    /// Whether all ranks' payloads are small: the same answer on every rank.
    fn is_eager(&self) -> bool {
        let longest = match &self.task {
            Task::AllReduce(_) => self.own.len(),
            Task::AllGather(parts) => parts.longest(),
            Task::ReduceScatter(_, parts) => parts.total(),
            Task::Broadcast(_) => self.call.shape.len(),
            Task::Barrier => 0,
        };
        longest * size_of::<T>() <= EAGER
    }

    /// Whether a rank sends this one something in the stage of parts or of sums.
    fn is_sender(&self, peer: usize) -> bool {
        match self.task {
            Task::Broadcast(root) => peer == root,
            _ => true,
        }
    }

    /// The cut of an all-reduce: which part of the tensor each rank reduces.
    fn chunks(&self) -> Partition {
        Partition::even(self.own.len(), self.size())
    }

    fn tag(&self, stage: u64) -> i32 {
        let tags = (TAGS - DATA) as u64 / 2;
        DATA + (self.number % tags * 2 + stage) as i32
    }

    /// The columns of a rank, of this rank's `[rows, total]`.
    fn columns(&self, parts: &Shards, rank: usize) -> Vec<T> {
        let columns = parts.partition.range(rank);
        let rows = self.own.chunks_exact(parts.partition.total().max(1));
        rows.flat_map(|row| &row[columns.clone()]).copied().collect()
    }

    /// Sends every rank what it needs of this rank's data.
    fn send_parts(&self, post: &Post) {
        let tag = self.tag(0);
        let send =
            |peer, part: &[T]| self.members.send(post, peer, tag, &pack(&[bytemuck::cast_slice(part)]));
        match &self.task {
            Task::AllReduce(_) => {
                let chunks = self.chunks();
                self.members.peers().for_each(|peer| send(peer, &self.own[chunks.range(peer)]));
            }
            Task::ReduceScatter(_, parts) => {
                self.members.peers().for_each(|peer| send(peer, &self.columns(parts, peer)));
            }
            Task::Broadcast(root) if *root != self.members.rank => {}
            _ => self.send_to_all(post, tag, &self.own),
        }
    }

    fn send_to_all(&self, post: &Post, tag: i32, data: &[T]) {
        let words = pack(&[bytemuck::cast_slice(data)]);
        self.members.peers().for_each(|peer| self.members.send(post, peer, tag, &words));
    }

    /// Takes what has arrived of a stage. Returns whether nothing is missing.
    fn collect(
        &self,
        post: &Post,
        parts: &mut [Option<Message>],
        tag: i32,
        from: impl Fn(usize) -> bool,
    ) -> bool {
        let mut complete = true;
        for peer in self.members.peers().filter(|&peer| from(peer)) {
            if parts[peer].is_none() {
                parts[peer] = self.members.take(post, peer, tag);
                if parts[peer].is_some() {
                    self.moved.set(Instant::now());
                }
            }
            complete &= parts[peer].is_some();
        }
        complete
    }

    /// The result of data that came with the calls, or an error if some of it has another length than it should.
    fn finish_eager(&self, calls: &[Option<(u64, [u64; 2], Message)>], result: &mut [T]) -> Result<()> {
        let mut inputs: Vec<&[T]> = Vec::with_capacity(self.size());
        for (rank, call) in calls.iter().enumerate() {
            let input = match call {
                Some((.., message)) => message.data(1).ok_or_else(|| self.damaged())?,
                None => &self.own,
            };
            let len = match &self.task {
                Task::AllReduce(_) => self.own.len(),
                Task::AllGather(parts) => parts.len(rank),
                Task::ReduceScatter(_, parts) => parts.total(),
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
            Task::AllGather(parts) => combine::gather(parts, input, result),
            Task::ReduceScatter(op, parts) => {
                combine::reduce_part(*op, parts, self.members.rank, input, result);
            }
            Task::Broadcast(root) => result.copy_from_slice(inputs[*root]),
            Task::Barrier => {}
        }
        Ok(())
    }

    /// What the ranks have sent; `own` in this rank's place.
    fn inputs<'a>(
        &self,
        parts: &'a [Option<Message>],
        own: &'a [T],
        len: impl Fn(usize) -> usize,
    ) -> Result<Vec<&'a [T]>> {
        let input = |(rank, part): (usize, &'a Option<Message>)| {
            let input = match part {
                Some(message) => message.data(0),
                None => Some(own),
            };
            input.filter(|input| input.len() == len(rank)).ok_or_else(|| self.damaged())
        };
        parts.iter().enumerate().map(input).collect()
    }

    /// Makes the result, or an all-reduce's part of it, of all ranks' parts. Returns whether it is all.
    fn finish_parts(&self, post: &Post, parts: &[Option<Message>], result: &mut [T]) -> Result<bool> {
        let rank = self.members.rank;
        match &self.task {
            Task::AllReduce(op) => {
                let mine = self.chunks().range(rank);
                let inputs = self.inputs(parts, &self.own[mine.clone()], |_| mine.len())?;
                let sums = &mut result[mine];
                combine::reduce(*op, self.size(), |rank| inputs[rank], sums);
                self.send_to_all(post, self.tag(1), sums);
                return Ok(false);
            }
            Task::AllGather(cut) => {
                let inputs = self.inputs(parts, &self.own, |rank| cut.len(rank))?;
                combine::gather(cut, |rank| inputs[rank], result);
            }
            Task::ReduceScatter(op, cut) => {
                let own = self.columns(cut, rank);
                let inputs = self.inputs(parts, &own, |_| cut.len(rank))?;
                combine::reduce(*op, self.size(), |rank| inputs[rank], result);
            }
            Task::Broadcast(root) => {
                let data = match &parts[*root] {
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

    fn finish_sums(&self, parts: &[Option<Message>], result: &mut [T]) -> Result<()> {
        let chunks = self.chunks();
        for (rank, part) in parts.iter().enumerate().filter_map(|(rank, part)| Some((rank, part.as_ref()?))) {
            let sums = part.data::<T>(0).filter(|sums| sums.len() == chunks.size(rank));
            result[chunks.range(rank)].copy_from_slice(sums.ok_or_else(|| self.damaged())?);
        }
        Ok(())
    }

    fn damaged(&self) -> Error {
        let op = self.call.op.name();
        Error::invalid(op, "a message of another rank is damaged: do all run the same program?")
    }

    /// What ends the flight before it is complete, if something does.
    fn obstacle(&self, post: &Post) -> Option<Error> {
        let missing = self.missing();
        let cause = self.members.obstacle(post, &missing)?;
        // What came before a rank was lost counts.
        (!missing.is_empty()).then(|| self.members.fail(post, &self.call, cause))
    }

    /// The stage after the meeting.
    fn compare(&self, post: &Post, state: &mut State<T>) -> Result<Stage> {
        let own = self.call.fingerprint();
        let prints: Vec<u64> =
            state.calls.iter().map(|call| call.as_ref().map_or(own, |(print, ..)| *print)).collect();
        if let Some(right) = prints.iter().position(|print| *print != prints[0]) {
            self.members.disputed.set(true);
            if [0, right].contains(&self.members.rank) {
                let words = pack(&[self.call.to_string().as_bytes()]);
                self.members.peers().for_each(|peer| self.members.send(post, peer, WORDS, &words));
            }
            return Ok(Stage::Dispute(right));
        }
        let own = self.call.messages;
        let counts = state.calls.iter().map(|call| call.as_ref().map_or(own, |(_, counts, _)| *counts));
        if let Some(mismatch) = self.call.unreceived(counts) {
            let cause = Cause::Disagreement(Box::new(mismatch));
            return Err(self.members.fail(post, &self.call, cause));
        }
        if self.is_eager() {
            self.finish_eager(&state.calls, &mut state.result)?;
            return Ok(Stage::Done);
        }
        self.send_parts(post);
        Ok(Stage::Shards)
    }

    /// The stage that follows, if this one is over.
    fn step(&self, post: &Post, state: &mut State<T>) -> Result<Option<Stage>> {
        match state.stage {
            // A disagreement before this one is being put into words.
            Stage::Meeting if self.members.disputed.get() => Ok(None),
            Stage::Meeting => {
                let mut complete = true;
                for peer in self.members.peers() {
                    if state.calls[peer].is_none() {
                        state.calls[peer] = self.members.hear(post, peer);
                    }
                    complete &= state.calls[peer].is_some();
                }
                if complete { self.compare(post, state).map(Some) } else { Ok(None) }
            }
            Stage::Dispute(right) => {
                let rank = self.members.rank;
                if !self.collect(post, &mut state.parts, WORDS, |peer| [0, right].contains(&peer)) {
                    return Ok(None);
                }
                let words = |of: usize| match &state.parts[of] {
                    Some(message) if of != rank => message.text(0).unwrap_or_default(),
                    _ => self.call.to_string(),
                };
                let mismatch =
                    Mismatch { left_rank: 0, left: words(0), right_rank: right, right: words(right) };
                let cause = Cause::Disagreement(Box::new(mismatch));
                self.members.disputed.set(false);
                Err(self.members.fail(post, &self.call, cause))
            }
            Stage::Shards => {
                if !self.collect(post, &mut state.parts, self.tag(0), |peer| self.is_sender(peer)) {
                    return Ok(None);
                }
                if self.finish_parts(post, &state.parts, &mut state.result)? {
                    return Ok(Some(Stage::Done));
                }
                state.parts.iter_mut().for_each(|part| *part = None);
                Ok(Some(Stage::Sums))
            }
            Stage::Sums => {
                if !self.collect(post, &mut state.parts, self.tag(1), |_| true) {
                    return Ok(None);
                }
                self.finish_sums(&state.parts, &mut state.result)?;
                Ok(Some(Stage::Done))
            }
            Stage::Done => Ok(None),
        }
    }
}

impl<T: Element + bytemuck::Pod> Advance for Flight<T> {
    fn advance(&self, post: &Post) -> bool {
        loop {
            let mut state = self.state.borrow_mut();
            let next = self.step(post, &mut state);
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
        let Some(error) = self.obstacle(post) else { return false };
        let mut state = self.state.borrow_mut();
        state.stage = Stage::Done;
        state.error = Some(error);
        true
    }
}
