//! A process's post office: sends without waiting, sorts what arrives, and moves its collectives on whenever it is asked for
//! anything.
//!
//! All waiting is a loop of tests with a deadline, never a call of MPI that may block.

use super::{
    members::Members,
    message::{self, Message},
    raw::{Moving, Wire},
};
use crate::{
    comm::call::never_received,
    error::{Error, LostReason},
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    hint,
    rc::{Rc, Weak},
    thread,
    time::{Duration, Instant},
};

/// The tags of one group. Groups that share a pair of ranks have different blocks of tags.
pub(super) const TAGS: i32 = 4096;
/// A rank's calls, one after another; and last of all, its fate: that it has left, or that the group is broken.
pub(super) const CALL: i32 = 0;
/// A call in words, for a disagreement.
pub(super) const WORDS: i32 = 1;
/// A message of one rank to another.
pub(super) const LETTER: i32 = 2;
/// The data of collectives, by their number.
pub(super) const DATA: i32 = 3;

/// Something that moves on when messages arrive.
pub(super) trait Advance {
    /// Does what can be done now. Returns whether nothing is left to do.
    fn advance(&self, post: &Post) -> bool;
}

pub(super) struct Post {
    wire: Wire,
    pub(super) deadline: Duration,
    /// Longer messages go in pieces of so many words.
    piece: usize,
    last_tag: i32,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    leaving: Vec<Moving>,
    /// By sender and tag.
    inbox: HashMap<(usize, i32), VecDeque<Mail>>,
    /// In the order in which they were started.
    flights: Vec<Rc<dyn Advance>>,
    groups: Vec<Weak<Members>>,
    /// The blocks of tags of groups that are in use.
    live: HashSet<u64>,
    /// How many blocks of tags are in use.
    blocks: u64,
    /// The first loss that this rank was told of, a rank of the world. It is why this rank may leave, too; who waits for it
    /// then is told of that loss.
    told: Option<(usize, LostReason)>,
    /// The senders of messages that nobody will read any more.
    unread: Vec<usize>,
    /// The blocks of tags of groups that were broken.
    broken: HashSet<u64>,
}

/// A message in its pieces: the last one is shorter than a piece.
struct Mail {
    pieces: Vec<Moving>,
    whole: bool,
}

impl Post {
    /// Every process calls it, with the same `piece`.
    pub(super) fn new(deadline: Duration, piece: usize) -> Self {
        let wire = Wire::duplicate_world();
        let last_tag = wire.last_tag();
        let state = RefCell::new(State { blocks: 1, ..State::default() });
        // The fate of a rank fits into one piece.
        Self { wire, deadline, piece: piece.clamp(512, i32::MAX as usize), last_tag, state }
    }

    pub(super) fn rank(&self) -> usize {
        self.wire.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.wire.size()
    }

    /// Sends a message without waiting for anything.
    pub(super) fn send(&self, to: usize, tag: i32, words: &Rc<Vec<u64>>) {
        let mut at = 0;
        loop {
            let end = (at + self.piece).min(words.len());
            let moving = self.wire.send(to, tag, words, at..end);
            self.state.borrow_mut().leaving.push(moving);
            if end - at < self.piece {
                return;
            }
            at = end;
        }
    }

    /// The next message of a sender and tag.
    pub(super) fn take(&self, from: usize, tag: i32) -> Option<Message> {
        let mut state = self.state.borrow_mut();
        let queue = state.inbox.get_mut(&(from, tag))?;
        let first = queue.front_mut()?;
        if !(first.whole && first.pieces.iter_mut().all(Moving::is_done)) {
            return None;
        }
        let mut pieces = queue.pop_front()?.pieces.into_iter().map(Moving::into_words);
        if queue.is_empty() {
            state.inbox.remove(&(from, tag));
        }
        let mut words = pieces.next()?;
        pieces.for_each(|piece| words.extend(piece));
        Some(Message(words))
    }

    /// A look at the next message of a sender and tag.
    pub(super) fn first<R>(
        &self,
        from: usize,
        tag: i32,
        look: impl FnOnce(&[u64]) -> Option<R>,
    ) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let first = state.inbox.get_mut(&(from, tag))?.front_mut()?;
        look(first.pieces.first_mut()?.words()?)
    }

    /// A look at the last message of a sender and tag.
    pub(super) fn last<R>(&self, from: usize, tag: i32, look: impl FnOnce(&[u64]) -> Option<R>) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let last = state.inbox.get_mut(&(from, tag))?.back_mut()?;
        look(last.pieces.first_mut()?.words()?)
    }

    /// Takes in what has arrived, and moves the collectives on.
    pub(super) fn progress(&self) {
        let mut state = self.state.borrow_mut();
        state.leaving.retain_mut(|moving| !moving.is_done());
        while let Some((from, tag, moving)) = self.wire.arriving() {
            let block = (tag / TAGS) as u64;
            if block < state.blocks && !state.live.contains(&block) {
                // For a group that is no more, here: nobody will read it.
                if tag % TAGS == LETTER && !state.broken.contains(&block) {
                    state.unread.push(from);
                }
                state.leaving.push(moving);
                continue;
            }
            let whole = moving.len() < self.piece;
            let queue = state.inbox.entry((from, tag)).or_default();
            match queue.back_mut().filter(|mail| !mail.whole) {
                Some(mail) => {
                    mail.pieces.push(moving);
                    mail.whole = whole;
                }
                None => queue.push_back(Mail { pieces: vec![moving], whole }),
            }
        }
        let flights = state.flights.clone();
        drop(state);
        let mut done = flights.iter().map(|flight| flight.advance(self)).collect::<Vec<_>>().into_iter();
        self.state.borrow_mut().flights.retain(|_| !done.next().unwrap_or(false));
    }

    /// Starts to move something on, whenever anything is asked for.
    pub(super) fn add(&self, flight: Rc<dyn Advance>) {
        if !flight.advance(self) {
            self.state.borrow_mut().flights.push(flight);
        }
        self.progress();
    }

    /// Moves on until `done` gives something; none if nothing has moved for the deadline since `moved`.
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

    /// The first block of tags that this rank has not used, and the number of those that there are.
    pub(super) fn blocks(&self) -> (u64, u64) {
        (self.state.borrow().blocks, (self.last_tag / TAGS) as u64)
    }

    pub(super) fn join(&self, members: &Rc<Members>) {
        let mut state = self.state.borrow_mut();
        state.blocks = state.blocks.max(members.block + 1);
        // Who forms a new group with this rank has left another group only.
        state.told.take_if(|(rank, _)| members.ranks.contains(rank));
        state.groups.retain(|group| group.strong_count() > 0);
        state.groups.push(Rc::downgrade(members));
        state.live.insert(members.block);
    }

    /// Forgets what has arrived for a group that is no more. Of one that was broken, messages are
    /// left as a matter of course.
    pub(super) fn forget(&self, block: u64, broken: bool) {
        let mut state = self.state.borrow_mut();
        state.live.remove(&block);
        if broken {
            state.broken.insert(block);
        }
        let old: Vec<_> = state.inbox.extract_if(|(_, tag), _| (*tag / TAGS) as u64 == block).collect();
        for ((from, tag), queue) in old {
            if tag % TAGS == LETTER && !broken {
                state.unread.extend(vec![from; queue.len()]);
            }
            state.leaving.extend(queue.into_iter().flat_map(|mail| mail.pieces));
        }
    }

    /// The error of a message that this rank has never received, when all have left.
    pub(super) fn unread(&self) -> Option<Error> {
        let state = self.state.borrow();
        let waiting = |((from, tag), queue): (&(usize, i32), &VecDeque<Mail>)| {
            (tag % TAGS == LETTER && !queue.is_empty()).then_some(*from)
        };
        let from = state.unread.first().copied().or_else(|| state.inbox.iter().find_map(waiting))?;
        Some(never_received(from, self.rank(), "it arrived, and no `exchange` asked for it"))
    }

    /// Notes that this rank is told of a loss; returns what it was told of first.
    pub(super) fn tell(&self, rank: usize, loss: LostReason) {
        self.state.borrow_mut().told.get_or_insert((rank, loss));
    }

    /// The first loss of another rank that this one was told of.
    pub(super) fn told(&self) -> Option<(usize, LostReason)> {
        self.state.borrow().told
    }

    /// Whether nothing is under way.
    fn is_idle(&self) -> bool {
        let state = self.state.borrow();
        state.flights.is_empty() && state.leaving.is_empty()
    }

    /// Tells all ranks that this one leaves, and waits until they leave too, for the deadline, or for `patience` if that is
    /// shorter. Then nothing is under way any more; otherwise the ranks that stay are returned.
    pub(super) fn leave(
        &self,
        world: &Members,
        loss: LostReason,
        patience: Option<Duration>,
    ) -> Result<(), Vec<usize>> {
        if loss == LostReason::Left {
            // What this rank has started, the others count on.
            self.wait(|| None, || self.state.borrow().flights.is_empty().then_some(()));
        }
        let groups: Vec<_> = self.state.borrow().groups.iter().filter_map(Weak::upgrade).collect();
        // The world's last: who has heard that has everything that was sent before.
        for group in groups.iter().rev() {
            group.leave(self, loss);
            group.close();
        }
        let staying = || (0..self.size()).filter(|&rank| !world.has_left(self, rank)).collect::<Vec<_>>();
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

    /// PipelineEnds all processes of the job, after it was said why.
    pub(super) fn abort(&self, error: &Error) -> ! {
        eprintln!("shardwise: rank {} ends the job: {error}", self.rank());
        self.wire.abort(1)
    }
}

pub(super) fn code_of(loss: LostReason) -> u64 {
    match loss {
        LostReason::Left => 0,
        LostReason::Failed => 1,
        LostReason::Panicked => 2,
        LostReason::Disconnected => 3,
    }
}

pub(super) fn loss_of(code: u64) -> LostReason {
    [LostReason::Left, LostReason::Failed, LostReason::Panicked]
        .get(code as usize)
        .copied()
        .unwrap_or(LostReason::Disconnected)
}

/// The numbers at the head of a message.
pub(super) fn head<const N: usize>(words: &[u64]) -> Option<[u64; N]> {
    message::numbers(message::part(words, 0)?)
}
