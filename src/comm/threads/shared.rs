//! What the ranks of a group share, and how it fails.

use super::{
    barrier::{Barrier, Meeting, Outcome},
    event::Event,
    flight::Flight,
    mail::Letter,
    slot::Slot,
    sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering},
};
use crate::{
    comm::{Call, ExternalStep},
    error::{Error, LostReason, Mismatch, Result},
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

/// Waiters spin this often before they yield, if every rank has a processor.
const SPINS: u32 = if cfg!(shuttle) { 0 } else { 20_000 };

/// A rank that has waited for this long at a meeting says so.
const SOON: Duration = Duration::from_millis(1);

/// A rank that has dropped a group says within this time why, if that is because it ends.
const GRACE: Duration = Duration::from_millis(100);

/// The first loss that this rank was told of: a rank of the world, and how it was lost. It is why this rank may leave, too; who
/// waits for this rank then is told of that loss.
type Told = Cell<Option<(usize, LostReason)>>;

#[cfg(not(shuttle))]
thread_local! {
    static TOLD: Told = const { Cell::new(None) };
}
// Its threads share one of the system's.
#[cfg(shuttle)]
shuttle::thread_local! {
    static TOLD: Told = Cell::new(None);
}

/// What this rank was told of.
fn told() -> Option<(usize, LostReason)> {
    TOLD.with(Cell::get)
}

fn tell(loss: Option<(usize, LostReason)>) {
    TOLD.with(|told| told.set(loss));
}

/// A group of threads.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    deadline: Duration,
    pub(super) barrier: Barrier,
    pub(super) slots: Box<[Slot]>,
    /// Something was posted, sent or broken.
    pub(super) news: Event,
    /// What was sent, for each receiver by sender.
    pub(super) mail: Box<[Mutex<BTreeMap<usize, VecDeque<Letter>>>]>,
    /// What was started and not yet posted by all, by number.
    pub(super) flights: Mutex<HashMap<u64, Arc<Flight>>>,
    /// What the ranks want of a split, and the groups that it made.
    wishes: Mutex<Vec<Option<Wish>>>,
    parts: Mutex<HashMap<u64, Arc<Shared>>>,
    /// How many steps each rank has come to of what the ranks do beside the group.
    beside: Mutex<Vec<HashMap<u64, u64>>>,
    /// The ranks of the world that are the group's.
    pub(super) members: Vec<usize>,
    /// How often waiters spin: the world's number, also in the groups that were split from it.
    spins: u32,
    /// What happened to the group, in order: the first broke it.
    causes: Mutex<Vec<Cause>>,
    /// The ranks that have waited for some time at a meeting, and their number: see R9.
    standing: Mutex<Vec<Option<(Call, Meeting)>>>,
    stood: AtomicUsize,
    /// Whether a rank has panicked between two meetings: what they were for is not complete.
    torn: AtomicBool,
    /// The world's list of messages that were never received, by receiver.
    pub(super) unread: Unread,
}

/// Messages that were never received, by the receiver's rank in the world.
pub(crate) type Unread = Arc<std::sync::Mutex<Vec<(usize, Error)>>>;

/// A rank's color and key, and the rank itself.
pub(super) type Wish = (Option<u64>, u64, usize);

/// Why a group is broken.
#[derive(Clone, Debug)]
enum Cause {
    Lost(Departure),
    Disagreement(Box<Mismatch>),
    Deadline { missing: Vec<usize>, after: Duration },
}

/// A rank has left.
#[derive(Clone, Debug)]
struct Departure {
    rank: usize,
    since: Instant,
    /// Without one it has dropped the group, and either ends or goes on.
    reason: Option<LostReason>,
    /// The loss of a rank of the world that it had been told of before.
    root: Option<(usize, LostReason)>,
}

impl Departure {
    fn in_order(&self) -> bool {
        matches!(self.reason, None | Some(LostReason::Left))
    }
}

impl Cause {
    /// Whether nothing more can be expected of the `missing` ranks: see R7.
    fn stops(&self, missing: &[usize]) -> bool {
        match self {
            Self::Lost(departure) if departure.in_order() => missing.contains(&departure.rank),
            _ => true,
        }
    }
}

/// That a rank has left, if it has.
fn departure(causes: &mut [Cause], rank: usize) -> Option<&mut Departure> {
    causes.iter_mut().find_map(|cause| match cause {
        Cause::Lost(departure) if departure.rank == rank => Some(departure),
        _ => None,
    })
}

impl Shared {
    /// The group of all of a program's ranks.
    pub(super) fn world(size: usize, deadline: Duration) -> Self {
        // Spinning pays where every rank has a processor; elsewhere it keeps one from a rank that has to arrive.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let spins = if size <= processors { SPINS } else { 0 };
        Self::new("world".into(), (0..size).collect(), deadline, spins, Unread::default())
    }

    fn new(name: String, members: Vec<usize>, deadline: Duration, spins: u32, unread: Unread) -> Self {
        let size = members.len();
        Self {
            name,
            members,
            deadline,
            spins,
            barrier: Barrier::new(size, spins),
            slots: (0..size).map(|_| Slot::new()).collect(),
            news: Event::new(spins),
            mail: (0..size).map(|_| Mutex::default()).collect(),
            flights: Mutex::default(),
            wishes: Mutex::new(vec![None; size]),
            parts: Mutex::default(),
            beside: Mutex::new(vec![HashMap::new(); size]),
            causes: Mutex::default(),
            standing: Mutex::new(vec![None; size]),
            stood: AtomicUsize::new(0),
            torn: AtomicBool::new(false),
            unread,
        }
    }

    pub(super) fn size(&self) -> usize {
        self.slots.len()
    }

    /// Arrives at the first meeting of operation `at`, for which this rank has published, and compares the calls.
    pub(super) fn meet(&self, call: &Call, at: u64, rank: usize) -> Result<()> {
        let Some(meeting) = self.barrier.arrive() else { return Err(self.failure(call)) };
        let mut outcome = self.barrier.wait(meeting, Some(SOON.min(self.deadline)));
        if outcome == Outcome::Late && self.deadline > SOON {
            let _standing = Standing::new(self, rank, (*call, meeting));
            outcome = self.barrier.wait(meeting, Some(self.deadline - SOON));
        }
        match outcome {
            Outcome::Complete => {}
            Outcome::Broken => return Err(self.failure(call)),
            Outcome::Late => {
                let late = |slot: &Slot| slot.published() <= at;
                let missing = (0..self.size()).filter(|&rank| late(&self.slots[rank])).collect();
                let mut causes = self.lock(&self.causes);
                if self.barrier.give_up(meeting) {
                    causes.push(Cause::Deadline { missing, after: self.deadline });
                    drop(causes);
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

    /// Rank `rank` waits for news until `done`; breaks the group if that takes longer than the deadline. `missing` names the
    /// ranks that are waited for.
    pub(super) fn wait_for<R>(
        &self,
        call: &Call,
        rank: usize,
        mut done: impl FnMut() -> Option<R>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<R> {
        let found = self.news.wait_until(Some(self.deadline), || {
            if let Some(result) = done() {
                return Some(Ok(result));
            }
            if let Some(cause) = self.stop(&missing) {
                return Some(Err(Ok(cause)));
            }
            let circle = self.circle(call, rank, &missing)?;
            // What its rank did before it came to the meeting is visible now.
            Some(done().ok_or(Err(circle)))
        });
        // What came before a rank was lost counts.
        let error = match found {
            Some(Ok(result)) => return Ok(result),
            Some(Err(Ok(cause))) => return done().ok_or_else(|| self.error(call, cause)),
            Some(Err(Err(circle))) => return Err(self.disagree(circle)),
            None => self.give_up(call, missing(), self.deadline),
        };
        done().ok_or(error)
    }

    /// Breaks the group because the `missing` ranks have not come.
    pub(super) fn give_up(&self, call: &Call, missing: Vec<usize>, after: Duration) -> Error {
        let cause = Cause::Deadline { missing, after };
        self.break_for(cause.clone());
        self.error(call, cause)
    }

    /// Rank `rank` has come to a step beside the group.
    pub(super) fn came(&self, rank: usize, step: ExternalStep) {
        self.lock(&self.beside)[rank].insert(step.work, step.number + 1);
    }

    /// The ranks that a step beside the group needs, and that have not come to it.
    pub(super) fn absent(&self, step: ExternalStep) -> Vec<usize> {
        let beside = self.lock(&self.beside);
        let absent = |rank: &usize| beside[*rank].get(&step.work).is_none_or(|steps| *steps <= step.number);
        (0..beside.len()).filter(|&rank| step.needs(rank)).filter(absent).collect()
    }

    /// Rank `rank` waits for ranks of which one waits at a meeting, for this one among others: R9.
    fn circle(&self, call: &Call, rank: usize, missing: impl Fn() -> Vec<usize>) -> Option<Mismatch> {
        if self.stood.load(Ordering::Acquire) == 0 {
            return None;
        }
        let standing = self.lock(&self.standing);
        let waits = |other: usize| standing[other].filter(|(_, meeting)| !self.barrier.is_complete(*meeting));
        let (other, theirs) = missing().into_iter().find_map(|other| Some((other, waits(other)?.0)))?;
        Some(Mismatch::between((rank, call.to_string()), (other, theirs.to_string())))
    }

    fn break_for(&self, cause: Cause) {
        let mut causes = self.lock(&self.causes);
        causes.push(cause);
        self.barrier.break_now();
        drop(causes);
        self.news.notify();
    }

    /// A rank has left or was lost. It may say so twice, and the second time know why.
    pub(super) fn leave(&self, rank: usize, reason: Option<LostReason>) {
        let mut causes = self.lock(&self.causes);
        let root = told().filter(|(root, _)| *root != self.members[rank]);
        match departure(&mut causes, rank) {
            Some(Departure { reason: Some(LostReason::Panicked), .. }) => {}
            Some(departure) => {
                departure.reason = reason.or(departure.reason);
                departure.root = departure.root.or(root);
            }
            None => causes.push(Cause::Lost(Departure { rank, since: Instant::now(), reason, root })),
        }
        self.barrier.break_now();
        drop(causes);
        self.news.notify();
    }

    /// Rank `rank` panics between two meetings.
    pub(super) fn tear(&self, rank: usize) {
        self.leave(rank, Some(LostReason::Panicked));
        self.torn.store(true, Ordering::Release);
    }

    /// Whether nothing has happened to the group but that ranks have left it.
    pub(super) fn ended_well(&mut self) -> bool {
        let causes = self.causes.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let in_order = |cause: &Cause| match cause {
            Cause::Lost(departure) => departure.in_order() && departure.root.is_none(),
            _ => false,
        };
        causes.iter().all(in_order)
    }

    /// After a second meeting: whether all ranks have done their parts. No later operation begins before this rank has looked.
    pub(super) fn is_whole(&self, call: &Call) -> Result<()> {
        if self.torn.load(Ordering::Acquire) { Err(self.failure(call)) } else { Ok(()) }
    }

    /// The error of a call that needs all ranks, on a broken group: what broke it first.
    pub(super) fn failure(&self, call: &Call) -> Error {
        let cause = self.lock(&self.causes).first().cloned();
        cause.map_or_else(
            || Error::internal(call.op.name(), "the group is broken, but nobody said why"),
            |cause| self.error(call, cause),
        )
    }

    /// The error of a call that needs the `missing` ranks only, if they cannot be expected any more: R7.
    pub(super) fn obstacle(&self, call: &Call, missing: impl Fn() -> Vec<usize>) -> Option<Error> {
        self.stop(missing).map(|cause| self.error(call, cause))
    }

    /// Why the `missing` ranks cannot be expected any more.
    fn stop(&self, missing: impl Fn() -> Vec<usize>) -> Option<Cause> {
        if !self.barrier.is_broken() {
            return None;
        }
        let missing = missing();
        self.lock(&self.causes).iter().find(|cause| cause.stops(&missing)).cloned()
    }

    /// How a rank was lost. One that returns an error drops its groups before that is known: it has
    /// a moment, from then on, to say so. After that it has left and goes on.
    fn reason(&self, lost: &Departure) -> LostReason {
        let said = || departure(&mut self.lock(&self.causes), lost.rank)?.reason;
        let moment = GRACE.min(self.deadline).saturating_sub(lost.since.elapsed());
        self.news.wait_until(Some(moment), said).unwrap_or(LostReason::Left)
    }

    fn error(&self, call: &Call, cause: Cause) -> Error {
        let (op, seq, group, site) = (call.op.name(), call.seq, self.name.clone(), call.site);
        match cause {
            Cause::Disagreement(mismatch) => Error::Mismatch(mismatch),
            Cause::Lost(lost) => {
                let known = lost.root.and_then(|(root, reason)| {
                    Some((self.members.iter().position(|member| *member == root)?, reason))
                });
                let (rank, reason) =
                    known.unwrap_or_else(|| (lost.rank, lost.reason.unwrap_or_else(|| self.reason(&lost))));
                tell(told().or(Some((self.members[rank], reason))));
                Error::PeerLost { rank, reason, op, seq, group, site }
            }
            Cause::Deadline { missing, after } => Error::Deadline { missing, op, seq, group, site, after },
        }
    }

    /// The group of this rank's color, and its number there. `barrier` meets the other ranks.
    pub(super) fn part_of(
        &self,
        call: &Call,
        wish: Wish,
        name: &str,
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
            let ranks = members.iter().map(|&(.., member)| self.members[member]).collect();
            Arc::new(Self::new(name.into(), ranks, self.deadline, self.spins, Arc::clone(&self.unread)))
        }));
        // Who forms a new group with this rank has left another group only.
        tell(told().filter(|(root, _)| !part.members.contains(root)));
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

/// A rank that has waited for some time at a meeting.
struct Standing<'a>(&'a Shared, usize);

impl<'a> Standing<'a> {
    fn new(shared: &'a Shared, rank: usize, what: (Call, Meeting)) -> Self {
        shared.lock(&shared.standing)[rank] = Some(what);
        shared.stood.fetch_add(1, Ordering::AcqRel);
        shared.news.notify();
        Self(shared, rank)
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.lock(&self.0.standing)[self.1] = None;
        self.0.stood.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A rank's place in a group. Dropped, by whatever way, it tells the others that the rank has left.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(super) shared: Arc<Shared>,
    pub(super) rank: usize,
}

impl Seat {
    /// The messages that were never received in any group of the world, when all ranks have left.
    pub(crate) fn unread(&self) -> Unread {
        Arc::clone(&self.shared.unread)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.leave(self.rank, std::thread::panicking().then_some(LostReason::Panicked));
    }
}

/// The groups that one thread takes part in, or has left. When the thread ends, all of them are
/// told so and why, also where its end of a group was leaked.
#[derive(Debug, Default)]
pub(crate) struct Presence(RefCell<Vec<(Weak<Shared>, usize)>>);

impl Presence {
    pub(super) fn add(&self, seat: &Seat) {
        let mut groups = self.0.borrow_mut();
        groups.retain(|(group, _)| group.strong_count() > 0);
        groups.push((Arc::downgrade(&seat.shared), seat.rank));
    }

    /// Leaves every group.
    pub(crate) fn end(&self, reason: LostReason) {
        for (group, rank) in self.0.take() {
            if let Some(group) = group.upgrade() {
                group.leave(rank, Some(reason));
            }
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.end(LostReason::Left);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_with_the_ranks_not_with_their_pairs() {
        let world = Shared::world(100, Duration::MAX);
        assert_eq!(world.mail.len(), 100);
        assert!(world.mail.iter().all(|mail| world.lock(mail).is_empty()));
    }
}
