//! The progress engine of a process. It sends without waiting, sorts arriving messages, and
//! advances the process's collectives during every call.
//!
//! A wait is a loop of tests with a deadline, never an MPI call that may block.

use super::{
    message::Message,
    raw::{PendingMessage, WorldComm},
};
use crate::{
    comm::call::never_received,
    error::{Error, LostReason},
    security::{Channel, Policy, Reach},
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    hint,
    rc::{Rc, Weak},
    thread,
    time::{Duration, Instant},
};

/// The number of tags of one group. Groups that share a pair of ranks have different tag blocks.
pub(super) const TAGS: i32 = 4096;
/// The tag of a rank's calls, in order. The rank's last message with this tag states that the rank
/// has left or that the group is broken.
pub(super) const CALL: i32 = 0;
/// The text of a call, sent only if the ranks' calls differ.
pub(super) const CALL_TEXT: i32 = 1;
/// A message from one rank to another.
pub(super) const MESSAGE: i32 = 2;
/// The first tag for the data of collectives. The number of the collective in its group selects the
/// tag.
pub(super) const DATA: i32 = 3;

/// An operation that advances when messages arrive.
pub(super) trait Advance {
    /// Advances as far as possible without waiting. Returns whether the operation is done.
    fn advance(&self, engine: &Engine) -> bool;
}

/// A group that this process can leave.
pub(super) trait Close {
    /// Informs the other ranks that this rank leaves, and ends the group on this rank.
    fn close(&self, engine: &Engine, loss: LostReason);
}

pub(super) struct Engine {
    comm: WorldComm,
    pub(super) deadline: Duration,
    pub(super) channel: Channel,
    pub(super) policy: Policy,
    /// The number of u64 in a fragment. A message's last fragment is shorter.
    fragment_limit: usize,
    last_tag: i32,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// Messages that this rank is sending, and arriving messages that it will never read.
    pending: Vec<PendingMessage>,
    /// Arriving messages, by sender and tag.
    inbox: HashMap<(usize, i32), VecDeque<Fragments>>,
    /// The unfinished collectives, in the order in which they were started.
    flights: Vec<Rc<dyn Advance>>,
    groups: Vec<Weak<dyn Close>>,
    /// The tag blocks of the groups that have not ended on this rank.
    live: HashSet<u64>,
    /// One more than the highest tag block used so far.
    blocks: u64,
    /// The first lost rank that this rank knows of: its world rank, and the reason of the loss.
    /// This rank may leave because of that loss. So it names the lost rank to the other ranks when
    /// it leaves.
    first_loss: Option<(usize, LostReason)>,
    /// The senders of messages that this rank will never read.
    unread: Vec<usize>,
    /// The tag blocks of broken groups.
    broken: HashSet<u64>,
}

/// A message in fragments. Its last fragment is shorter than the limit.
struct Fragments {
    fragments: Vec<PendingMessage>,
    whole: bool,
}

impl Engine {
    /// Every process passes the same `fragment_limit`.
    pub(super) fn new(deadline: Duration, fragment_limit: usize) -> Self {
        let comm = WorldComm::duplicate_world();
        let last_tag = comm.last_tag();
        let state = RefCell::new(State { blocks: 1, ..State::default() });
        // The lower bound lets the message by which a rank leaves fit into one fragment.
        let fragment_limit = fragment_limit.clamp(512, i32::MAX as usize);
        let (channel, policy) = (Channel::plaintext(Reach::Network), Policy::Any);
        Self { comm, deadline, channel, policy, fragment_limit, last_tag, state }
    }

    pub(super) fn rank(&self) -> usize {
        self.comm.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.comm.size()
    }

    /// Sends a message without waiting.
    pub(super) fn send(&self, to: usize, tag: i32, numbers: &Rc<Vec<u64>>) {
        let mut at = 0;
        loop {
            let end = (at + self.fragment_limit).min(numbers.len());
            let message = self.comm.send(to, tag, numbers, at..end);
            self.state.borrow_mut().pending.push(message);
            if end - at < self.fragment_limit {
                return;
            }
            at = end;
        }
    }

    /// Removes the next message with this sender and tag from the queue and returns it. Returns
    /// none unless all fragments of the message have arrived.
    pub(super) fn take(&self, from: usize, tag: i32) -> Option<Message> {
        let mut state = self.state.borrow_mut();
        let queue = state.inbox.get_mut(&(from, tag))?;
        let first = queue.front_mut()?;
        if !(first.whole && first.fragments.iter_mut().all(PendingMessage::is_done)) {
            return None;
        }
        let mut fragments = queue.pop_front()?.fragments.into_iter().map(PendingMessage::into_numbers);
        if queue.is_empty() {
            state.inbox.remove(&(from, tag));
        }
        let mut numbers = fragments.next()?;
        fragments.for_each(|fragment| numbers.extend(fragment));
        Some(Message(numbers))
    }

    /// Reads the first fragment of the next message with this sender and tag. The message stays in
    /// the queue.
    pub(super) fn first<R>(
        &self,
        from: usize,
        tag: i32,
        read: impl FnOnce(&[u64]) -> Option<R>,
    ) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let first = state.inbox.get_mut(&(from, tag))?.front_mut()?;
        read(first.fragments.first_mut()?.numbers()?)
    }

    /// Reads the first fragment of the last message with this sender and tag. The message stays in
    /// the queue.
    pub(super) fn last<R>(&self, from: usize, tag: i32, read: impl FnOnce(&[u64]) -> Option<R>) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let last = state.inbox.get_mut(&(from, tag))?.back_mut()?;
        read(last.fragments.first_mut()?.numbers()?)
    }

    /// Receives the messages that have arrived, and advances the collectives.
    pub(super) fn progress(&self) {
        let mut state = self.state.borrow_mut();
        state.pending.retain_mut(|message| !message.is_done());
        while let Some((from, tag, message)) = self.comm.arriving() {
            let block = (tag / TAGS) as u64;
            if block < state.blocks && !state.live.contains(&block) {
                // The group has ended on this rank, so no call will read the message.
                if tag % TAGS == MESSAGE && !state.broken.contains(&block) {
                    state.unread.push(from);
                }
                state.pending.push(message);
                continue;
            }
            let whole = message.len() < self.fragment_limit;
            let queue = state.inbox.entry((from, tag)).or_default();
            match queue.back_mut().filter(|last| !last.whole) {
                Some(last) => {
                    last.fragments.push(message);
                    last.whole = whole;
                }
                None => queue.push_back(Fragments { fragments: vec![message], whole }),
            }
        }
        let flights = state.flights.clone();
        drop(state);
        let mut done = flights.iter().map(|flight| flight.advance(self)).collect::<Vec<_>>().into_iter();
        self.state.borrow_mut().flights.retain(|_| !done.next().unwrap_or(false));
    }

    /// Adds an operation. Every later call of this process advances it.
    pub(super) fn add(&self, flight: Rc<dyn Advance>) {
        if !flight.advance(self) {
            self.state.borrow_mut().flights.push(flight);
        }
        self.progress();
    }

    /// Makes progress until `done` returns a value. Returns none if the deadline has passed both
    /// since this call began and since the last progress. `moved` returns the time of the last
    /// progress.
    pub(super) fn wait<R>(
        &self,
        moved: impl Fn() -> Option<Instant>,
        mut done: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        let begin = Instant::now();
        for turn in 0_u64.. {
            self.progress();
            if let Some(result) = done() {
                return Some(result);
            }
            let since = moved().map_or(begin, |moved| moved.max(begin));
            if since.elapsed() > self.deadline {
                break;
            }
            match turn {
                ..100 => hint::spin_loop(),
                100..10_000 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50)),
            }
        }
        None
    }

    /// Returns the first tag block that this rank has not used, and the total number of blocks.
    pub(super) fn blocks(&self) -> (u64, u64) {
        (self.state.borrow().blocks, (self.last_tag / TAGS) as u64)
    }

    /// Adds a group with its tag block and its world ranks.
    pub(super) fn join(&self, group: Weak<dyn Close>, block: u64, ranks: &[usize]) {
        let mut state = self.state.borrow_mut();
        state.blocks = state.blocks.max(block + 1);
        // If the recorded lost rank is in the new group, it has only left an earlier group. So this
        // clears the record.
        state.first_loss.take_if(|(rank, _)| ranks.contains(rank));
        state.groups.retain(|group| group.strong_count() > 0);
        state.groups.push(group);
        state.live.insert(block);
    }

    /// Drops the messages that have arrived for an ended group. Unread messages count as errors
    /// only if the group was not broken.
    pub(super) fn forget(&self, block: u64, broken: bool) {
        let mut state = self.state.borrow_mut();
        state.live.remove(&block);
        if broken {
            state.broken.insert(block);
        }
        let old: Vec<_> = state.inbox.extract_if(|(_, tag), _| (*tag / TAGS) as u64 == block).collect();
        for ((from, tag), queue) in old {
            if tag % TAGS == MESSAGE && !broken {
                state.unread.extend(vec![from; queue.len()]);
            }
            state.pending.extend(queue.into_iter().flat_map(|message| message.fragments));
        }
    }

    /// Returns the error of a message that arrived, but for which this rank did not call
    /// `exchange`. Returns none if there is no such message. Call this after all ranks have left.
    pub(super) fn unread(&self) -> Option<Error> {
        let state = self.state.borrow();
        let waiting = |((from, tag), queue): (&(usize, i32), &VecDeque<Fragments>)| {
            (tag % TAGS == MESSAGE && !queue.is_empty()).then_some(*from)
        };
        let from = state.unread.first().copied().or_else(|| state.inbox.iter().find_map(waiting))?;
        Some(never_received(from, self.rank(), "it arrived, but this rank did not call `exchange` for it"))
    }

    /// Records that this rank knows of a lost rank, unless an earlier loss is recorded.
    pub(super) fn record_loss(&self, rank: usize, loss: LostReason) {
        self.state.borrow_mut().first_loss.get_or_insert((rank, loss));
    }

    /// Returns the first lost rank that this rank knows of, and the reason of the loss.
    pub(super) fn first_loss(&self) -> Option<(usize, LostReason)> {
        self.state.borrow().first_loss
    }

    /// Whether no collective and no message is in progress.
    fn is_idle(&self) -> bool {
        let state = self.state.borrow();
        state.flights.is_empty() && state.pending.is_empty()
    }

    /// Informs all ranks that this rank leaves. Then waits until `staying` is empty and nothing is
    /// in progress. The wait takes at most the deadline, and at most `patience` if it is given. If
    /// the wait ends without success, the error lists the ranks that stay.
    pub(super) fn leave(
        &self,
        staying: impl Fn() -> Vec<usize>,
        loss: LostReason,
        patience: Option<Duration>,
    ) -> Result<(), Vec<usize>> {
        if loss == LostReason::Left {
            // This rank first finishes its started collectives, because the other ranks rely on
            // them.
            self.wait(|| None, || self.state.borrow().flights.is_empty().then_some(()));
        }
        let groups: Vec<_> = self.state.borrow().groups.iter().filter_map(Weak::upgrade).collect();
        // The world closes last. So a rank that receives this rank's last message in the world has
        // received all its earlier messages.
        for group in groups.iter().rev() {
            group.close(self, loss);
        }
        let begin = Instant::now();
        self.wait(
            || None,
            || {
                let gone = staying().is_empty() && self.is_idle();
                let late = patience.is_some_and(|patience| begin.elapsed() > patience);
                (gone || late).then_some(())
            },
        );
        let staying = staying();
        if staying.is_empty() && self.is_idle() { Ok(()) } else { Err(staying) }
    }

    /// Prints the error and ends all processes of the job.
    pub(super) fn abort(&self, error: &Error) -> ! {
        eprintln!("shardwise: rank {} ends the job: {error}", self.rank());
        self.comm.abort(1)
    }
}
