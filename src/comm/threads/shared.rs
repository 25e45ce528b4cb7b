//! What the ranks of a group share, and how it fails.

use super::{
    barrier::{Barrier, Outcome},
    event::Event,
    flight::Flight,
    mail::Letter,
    slot::Slot,
};
use crate::{
    comm::Call,
    error::{Error, Loss, Mismatch, Result},
};
use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

/// A group of threads.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    deadline: Duration,
    pub(super) barrier: Barrier,
    pub(super) slots: Box<[Slot]>,
    /// Something was posted, sent or broken.
    pub(super) news: Event,
    /// What was sent, for each sender and receiver.
    pub(super) mail: Box<[Mutex<VecDeque<Letter>>]>,
    /// What was started and not yet posted by all, by number.
    pub(super) flights: Mutex<HashMap<u64, Arc<Flight>>>,
    /// What the ranks want of a split, and the groups that it made.
    wishes: Mutex<Vec<Option<Wish>>>,
    parts: Mutex<HashMap<u64, Arc<Shared>>>,
    cause: Mutex<Option<Cause>>,
}

/// A rank's color and key, and the rank itself.
pub(super) type Wish = (Option<u64>, u64, usize);

/// Why a group is broken.
#[derive(Clone, Debug)]
enum Cause {
    Lost { rank: usize, reason: Loss },
    Disagreement(Box<Mismatch>),
    Deadline { missing: Vec<usize> },
}

impl Shared {
    pub(super) fn new(name: String, size: usize, deadline: Duration) -> Self {
        // Spinning pays where every rank has a processor; elsewhere it keeps one from a rank that has to arrive.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let spins = if size <= processors { 20_000 } else { 0 };
        Self {
            name,
            deadline,
            barrier: Barrier::new(size, spins),
            slots: (0..size).map(|_| Slot::new()).collect(),
            news: Event::new(spins),
            mail: (0..size * size).map(|_| Mutex::default()).collect(),
            flights: Mutex::default(),
            wishes: Mutex::new(vec![None; size]),
            parts: Mutex::default(),
            cause: Mutex::default(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.slots.len()
    }

    /// Arrives at the first meeting of operation `at`, for which this rank has published, and compares the calls.
    pub(super) fn meet(&self, call: &Call, at: u64) -> Result<()> {
        let Some(meeting) = self.barrier.arrive() else { return Err(self.failure(call)) };
        match self.barrier.wait(meeting, Some(self.deadline)) {
            Outcome::Complete => {}
            Outcome::Broken => return Err(self.failure(call)),
            Outcome::Late => {
                let late = |slot: &Slot| slot.published() <= at;
                let missing = (0..self.size()).filter(|&rank| late(&self.slots[rank])).collect();
                let mut cause = self.lock(&self.cause);
                if self.barrier.give_up(meeting) {
                    cause.get_or_insert(Cause::Deadline { missing });
                    drop(cause);
                    self.news.notify();
                    return Err(self.failure(call));
                }
            }
        }
        // SAFETY: the first meeting of operation `at` is complete, and this rank arrives at no other before it returns.
        #[allow(unsafe_code)]
        let calls = self.slots.iter().map(|slot| unsafe { slot.call(at) });
        self.agree(calls)
    }

    /// Breaks the group if the ranks' calls differ.
    pub(super) fn agree<'a>(&self, calls: impl Iterator<Item = &'a Call> + Clone) -> Result<()> {
        match Call::disagreement(calls) {
            None => Ok(()),
            Some(mismatch) => Err(self.disagree(mismatch)),
        }
    }

    /// Breaks the group because of a disagreement.
    pub(super) fn disagree(&self, mismatch: Mismatch) -> Error {
        let mismatch = Box::new(mismatch);
        self.break_for(Cause::Disagreement(mismatch.clone()));
        Error::Mismatch(mismatch)
    }

    /// Waits for news until `done`; breaks the group if that takes longer than the deadline. `missing` names the ranks
    /// that are waited for.
    pub(super) fn wait_for<R>(
        &self,
        call: &Call,
        mut done: impl FnMut() -> Option<R>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<R> {
        let found = self.news.wait_until(Some(self.deadline), || match done() {
            Some(result) => Some(Some(result)),
            None => self.barrier.is_broken().then_some(None),
        });
        match found {
            // What came before the group broke counts.
            Some(found) => found.or_else(done).ok_or_else(|| self.failure(call)),
            None => {
                self.break_for(Cause::Deadline { missing: missing() });
                Err(self.failure(call))
            }
        }
    }

    fn break_for(&self, first: Cause) {
        let mut cause = self.lock(&self.cause);
        cause.get_or_insert(first);
        self.barrier.break_now();
        drop(cause);
        self.news.notify();
    }

    /// A rank has dropped its end.
    pub(super) fn leave(&self, rank: usize) {
        let reason = if std::thread::panicking() { Loss::Panicked } else { Loss::Left };
        self.break_for(Cause::Lost { rank, reason });
    }

    /// The error of a call on a broken group: what broke it first.
    pub(super) fn failure(&self, call: &Call) -> Error {
        let (op, seq, group, site) = (call.op.name(), call.seq, self.name.clone(), call.site);
        match self.lock(&self.cause).clone() {
            Some(Cause::Disagreement(mismatch)) => Error::Mismatch(mismatch),
            Some(Cause::Lost { rank, reason }) => Error::PeerLost { rank, reason, op, seq, group, site },
            Some(Cause::Deadline { missing }) => {
                Error::Deadline { missing, op, seq, group, site, after: self.deadline }
            }
            None => Error::invalid(op, "the group is broken, but nobody said why: please report this"),
        }
    }

    /// The group of this rank's color, and its number there. `barrier` meets the other ranks.
    pub(super) fn part_of(
        &self,
        call: &Call,
        wish: Wish,
        barrier: impl Fn() -> Result<()>,
    ) -> Result<Option<(Arc<Shared>, usize)>> {
        let (color, _, rank) = wish;
        self.lock(&self.wishes)[rank] = Some(wish);
        barrier()?;
        let Some(color) = color else {
            barrier()?;
            return Ok(None);
        };
        let mut members: Vec<Wish> = self.lock(&self.wishes).iter().flatten().copied().collect();
        members.retain(|(other, ..)| *other == Some(color));
        members.sort_by_key(|&(_, key, rank)| (key, rank));
        let place = members.iter().position(|&(.., member)| member == rank);
        let place = place
            .ok_or_else(|| Error::invalid(call.op.name(), "this rank's color is not among the ranks'"))?;
        let part = Arc::clone(self.lock(&self.parts).entry(color).or_insert_with(|| {
            Arc::new(Self::new(format!("{}/{color}", self.name), members.len(), self.deadline))
        }));
        barrier()?;
        // All have taken their part: the next split starts with none. Several ranks may say so.
        self.lock(&self.parts).remove(&color);
        Ok(Some((part, place)))
    }

    /// A lock whose holder panicked is used all the same: no critical section leaves its data half changed.
    pub(super) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The groups that one thread takes part in. When the thread ends they all hear of it, even of an end that was leaked.
#[derive(Debug, Default)]
pub(crate) struct Presence(RefCell<Vec<(Weak<Shared>, usize)>>);

impl Presence {
    pub(super) fn add(&self, shared: &Arc<Shared>, rank: usize) {
        let mut groups = self.0.borrow_mut();
        groups.retain(|(group, _)| group.strong_count() > 0);
        groups.push((Arc::downgrade(shared), rank));
    }

    /// Leaves every group.
    pub(crate) fn end(&self) {
        for (group, rank) in self.0.take() {
            if let Some(group) = group.upgrade() {
                group.leave(rank);
            }
        }
    }
}
