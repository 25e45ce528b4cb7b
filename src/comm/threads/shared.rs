//! The state that the ranks of a group share, and how the group fails.

use super::{
    barrier::{Barrier, Outcome, Round},
    event::Event,
    failure::{Departure, Failure, departure, first_loss, set_first_loss},
    flight::Flight,
    host::HostVec,
    mail::{Mailbox, Message},
    slot::Slot,
    sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering},
};
use crate::{
    comm::{Call, ExternalStep, Incoming, Outgoing},
    device::Cpu,
    error::{Error, LostReason, Mismatch, Result},
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// How often waiters spin before they yield, if every rank has a processor.
const SPINS: u32 = if cfg!(shuttle) { 0 } else { 20_000 };

/// How long a rank waits at the barrier before it reports the wait.
const REPORT_AFTER: Duration = Duration::from_millis(1);

/// How long after it dropped a group a rank may still report that it ended, and why.
const REASON_TIMEOUT: Duration = Duration::from_millis(100);

/// A group of threads.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    deadline: Duration,
    pub(super) barrier: Barrier,
    pub(super) slots: Box<[Slot]>,
    /// Notified when something was posted, sent or broken.
    news: Event,
    /// Messages sent, for each receiver by sender.
    mail: Box<[Mutex<Mailbox>]>,
    /// Collectives started and not yet posted by all, by sequence number.
    flights: Mutex<HashMap<u64, Arc<Flight>>>,
    /// The ranks' requests to a split, and the groups that it created, by color.
    requests: Mutex<Vec<Option<SplitRequest>>>,
    subgroups: Mutex<HashMap<u64, Arc<Shared>>>,
    /// The number of steps each rank has reached outside the group, by work.
    steps: Mutex<Vec<HashMap<u64, u64>>>,
    /// The world ranks of the group.
    members: Vec<usize>,
    /// How often waiters spin. Groups split from the world inherit its number.
    spins: u32,
    /// What broke the group, in order: the first entry broke it.
    failures: Mutex<Vec<Failure>>,
    /// The ranks that have waited for some time at the barrier, and their number: R9.
    waiting: Mutex<Vec<Option<(Call, Round)>>>,
    waiting_count: AtomicUsize,
    /// Whether a rank has panicked between two rounds, so that the operation is incomplete.
    panicked: AtomicBool,
    /// The world's list of messages that were never received, by receiver.
    pub(super) unread: Unread,
}

/// Messages that were never received, by the receiver's world rank.
pub(crate) type Unread = Arc<std::sync::Mutex<Vec<(usize, Error)>>>;

/// A rank's color and key in a split.
#[derive(Clone, Copy, Debug)]
pub(super) struct SplitRequest {
    pub(super) color: Option<u64>,
    pub(super) key: u64,
    pub(super) rank: usize,
}

impl Shared {
    /// The group of all ranks of a program.
    pub(super) fn world(size: usize, deadline: Duration) -> Self {
        // With fewer processors than ranks, spinning takes time from ranks that have to arrive.
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
            requests: Mutex::new(vec![None; size]),
            subgroups: Mutex::default(),
            steps: Mutex::new(vec![HashMap::new(); size]),
            failures: Mutex::default(),
            waiting: Mutex::new(vec![None; size]),
            waiting_count: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            unread,
        }
    }

    pub(super) fn size(&self) -> usize {
        self.slots.len()
    }

    /// Arrives at the first round of operation `at`, for which this rank has published, and
    /// compares the calls.
    pub(super) fn synchronize(&self, call: &Call, at: u64, rank: usize) -> Result<()> {
        let Some(round) = self.barrier.arrive() else { return Err(self.first_failure(call)) };
        let mut outcome = self.barrier.wait(round, Some(REPORT_AFTER.min(self.deadline)));
        if outcome == Outcome::Late && self.deadline > REPORT_AFTER {
            let _wait = BarrierWait::new(self, rank, (*call, round));
            outcome = self.barrier.wait(round, Some(self.deadline - REPORT_AFTER));
        }
        match outcome {
            Outcome::Complete => {}
            Outcome::Broken => return Err(self.first_failure(call)),
            Outcome::Late => {
                let late = |slot: &Slot| slot.published() <= at;
                let missing = (0..self.size()).filter(|&rank| late(&self.slots[rank])).collect();
                let mut failures = self.lock(&self.failures);
                if self.barrier.give_up(round) {
                    failures.push(Failure::Deadline { missing, after: self.deadline });
                    drop(failures);
                    self.news.notify();
                    return Err(self.first_failure(call));
                }
            }
        }
        // SAFETY: the first round of operation `at` is complete, and this rank arrives at no other
        // before it returns.
        #[allow(unsafe_code)]
        let calls = self.slots.iter().map(|slot| unsafe { slot.call(at) });
        self.agree(calls)
    }

    /// Posts a rank's input to the flight with this sequence number.
    pub(super) fn post(&self, call: &Call, number: u64, rank: usize, input: HostVec) -> Result<Arc<Flight>> {
        // A rank that has left may have posted before: `wait` finds out.
        if let Some(error) = self.obstacle(call, Vec::new) {
            return Err(error);
        }
        let mut flights = self.lock(&self.flights);
        let flight = flights.entry(number).or_insert_with(|| Arc::new(Flight::new(self.size())));
        let flight = Arc::clone(flight);
        if flight.post(call, rank, input)? {
            flights.remove(&number);
        }
        drop(flights);
        self.news.notify();
        Ok(flight)
    }

    /// Sends a tensor to another rank.
    pub(super) fn send(&self, call: &Call, from: usize, send: Outgoing<'_, Cpu>) -> Result<()> {
        if let Some(error) = self.obstacle(call, || vec![send.to]) {
            return Err(error);
        }
        let to = send.to;
        let message = Message::new(call, send);
        self.lock(&self.mail[to]).entry(from).or_default().push_back(message);
        self.news.notify();
        Ok(())
    }

    /// Waits for a tensor from another rank.
    pub(super) fn receive(&self, call: &Call, to: usize, recv: Incoming<'_, Cpu>) -> Result<()> {
        let take = || self.lock(&self.mail[to]).get_mut(&recv.from)?.pop_front();
        let message = self.wait_for(call, to, take, || vec![recv.from])?;
        match message.mismatch(call, to, &recv) {
            Some(mismatch) => Err(self.disagree(mismatch)),
            None => message.copy_to(recv),
        }
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
        self.break_for(Failure::Disagreement(mismatch.clone()));
        Error::Mismatch(mismatch)
    }

    /// Makes rank `rank` wait until `done` returns something. Breaks the group if that takes longer
    /// than the deadline. `missing` names the ranks that it waits for.
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
            if let Some(failure) = self.stop_reason(&missing) {
                return Some(Err(Ok(failure)));
            }
            let cycle = self.find_wait_cycle(call, rank, &missing)?;
            // What the other rank did before it arrived at the barrier is visible now.
            Some(done().ok_or(Err(cycle)))
        });
        // What the other ranks did before one was lost still counts.
        let error = match found {
            Some(Ok(result)) => return Ok(result),
            Some(Err(Ok(failure))) => return done().ok_or_else(|| self.error(call, failure)),
            Some(Err(Err(cycle))) => return Err(self.disagree(cycle)),
            None => self.give_up(call, missing(), self.deadline),
        };
        done().ok_or(error)
    }

    /// Breaks the group because the `missing` ranks have not come.
    pub(super) fn give_up(&self, call: &Call, missing: Vec<usize>, after: Duration) -> Error {
        let failure = Failure::Deadline { missing, after };
        self.break_for(failure.clone());
        self.error(call, failure)
    }

    /// Records that rank `rank` reached a step outside the group.
    pub(super) fn came(&self, rank: usize, step: ExternalStep) {
        self.lock(&self.steps)[rank].insert(step.work, step.number + 1);
    }

    /// Returns the ranks that a step outside the group needs and that have not reached it.
    pub(super) fn absent(&self, step: ExternalStep) -> Vec<usize> {
        let steps = self.lock(&self.steps);
        let absent = |rank: &usize| steps[*rank].get(&step.work).is_none_or(|steps| *steps <= step.number);
        (0..steps.len()).filter(|&rank| step.needs(rank)).filter(absent).collect()
    }

    /// Finds a wait cycle: rank `rank` waits for ranks of which one waits at the barrier for all,
    /// this one included: R9.
    fn find_wait_cycle(
        &self,
        call: &Call,
        rank: usize,
        missing: impl Fn() -> Vec<usize>,
    ) -> Option<Mismatch> {
        if self.waiting_count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let waiting = self.lock(&self.waiting);
        let waits = |other: usize| waiting[other].filter(|(_, round)| !self.barrier.is_complete(*round));
        let (other, theirs) = missing().into_iter().find_map(|other| Some((other, waits(other)?.0)))?;
        Some(Mismatch::between((rank, call.to_string()), (other, theirs.to_string())))
    }

    fn break_for(&self, failure: Failure) {
        let mut failures = self.lock(&self.failures);
        failures.push(failure);
        self.barrier.break_now();
        drop(failures);
        self.news.notify();
    }

    /// Records that a rank has left or was lost. It may be called twice, the second time with the
    /// reason.
    pub(super) fn leave(&self, rank: usize, reason: Option<LostReason>) {
        let mut failures = self.lock(&self.failures);
        let root = first_loss().filter(|(root, _)| *root != self.members[rank]);
        match departure(&mut failures, rank) {
            Some(Departure { reason: Some(LostReason::Panicked), .. }) => {}
            Some(departure) => {
                departure.reason = reason.or(departure.reason);
                departure.root = departure.root.or(root);
            }
            None => failures.push(Failure::Lost(Departure { rank, since: Instant::now(), reason, root })),
        }
        self.barrier.break_now();
        drop(failures);
        self.news.notify();
    }

    /// Records that rank `rank` panics between two rounds.
    pub(super) fn record_panic(&self, rank: usize) {
        self.leave(rank, Some(LostReason::Panicked));
        self.panicked.store(true, Ordering::Release);
    }

    /// Whether nothing has happened to the group except that ranks have left it.
    fn ended_well(&mut self) -> bool {
        let failures = self.failures.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let in_order = |failure: &Failure| match failure {
            Failure::Lost(departure) => departure.in_order() && departure.root.is_none(),
            _ => false,
        };
        failures.iter().all(in_order)
    }

    /// Checks after a second round that all ranks have finished their work. No later operation
    /// begins before this rank has checked.
    pub(super) fn check_complete(&self, call: &Call) -> Result<()> {
        if self.panicked.load(Ordering::Acquire) { Err(self.first_failure(call)) } else { Ok(()) }
    }

    /// The error of a call that needs all ranks of a broken group: the first reason.
    pub(super) fn first_failure(&self, call: &Call) -> Error {
        let failure = self.lock(&self.failures).first().cloned();
        failure.map_or_else(
            || Error::internal(call.op.name(), "the group is broken, but nobody said why"),
            |failure| self.error(call, failure),
        )
    }

    /// The error of a call that needs only the `missing` ranks, if they cannot be expected any
    /// more: R7.
    pub(super) fn obstacle(&self, call: &Call, missing: impl Fn() -> Vec<usize>) -> Option<Error> {
        self.stop_reason(missing).map(|failure| self.error(call, failure))
    }

    /// Returns why the `missing` ranks cannot be expected any more.
    fn stop_reason(&self, missing: impl Fn() -> Vec<usize>) -> Option<Failure> {
        if !self.barrier.is_broken() {
            return None;
        }
        let missing = missing();
        self.lock(&self.failures).iter().find(|failure| failure.stops(&missing)).cloned()
    }

    /// Returns the reason a rank was lost. A rank that returns an error drops its groups before the
    /// error is known, so it has a moment to report the reason. Otherwise it has left and goes on.
    fn reason(&self, lost: &Departure) -> LostReason {
        let reported = || departure(&mut self.lock(&self.failures), lost.rank)?.reason;
        let patience = REASON_TIMEOUT.min(self.deadline).saturating_sub(lost.since.elapsed());
        self.news.wait_until(Some(patience), reported).unwrap_or(LostReason::Left)
    }

    fn error(&self, call: &Call, failure: Failure) -> Error {
        let (op, seq, group, site) = (call.op.name(), call.seq, self.name.clone(), call.site);
        match failure {
            Failure::Disagreement(mismatch) => Error::Mismatch(mismatch),
            Failure::Lost(lost) => {
                let known = lost.root.and_then(|(root, reason)| {
                    Some((self.members.iter().position(|member| *member == root)?, reason))
                });
                let (rank, reason) =
                    known.unwrap_or_else(|| (lost.rank, lost.reason.unwrap_or_else(|| self.reason(&lost))));
                set_first_loss(first_loss().or(Some((self.members[rank], reason))));
                Error::PeerLost { rank, reason, op, seq, group, site }
            }
            Failure::Deadline { missing, after } => Error::Deadline { missing, op, seq, group, site, after },
        }
    }

    /// Returns the group of this rank's color, and its rank there. `barrier` waits for the other
    /// ranks.
    pub(super) fn split(
        &self,
        call: &Call,
        request: SplitRequest,
        name: &str,
        barrier: impl Fn() -> Result<()>,
    ) -> Result<Option<(Arc<Shared>, usize)>> {
        let SplitRequest { color, rank, .. } = request;
        self.lock(&self.requests)[rank] = Some(request);
        barrier()?;
        let Some(color) = color else {
            barrier()?;
            return Ok(None);
        };
        let mut members: Vec<SplitRequest> = self.lock(&self.requests).iter().flatten().copied().collect();
        members.retain(|other| other.color == Some(color));
        members.sort_by_key(|member| (member.key, member.rank));
        let new_rank = members.iter().position(|member| member.rank == rank);
        let new_rank = new_rank
            .ok_or_else(|| Error::invalid(call.op.name(), "this rank's color is not among the ranks'"))?;
        let subgroup = Arc::clone(self.lock(&self.subgroups).entry(color).or_insert_with(|| {
            let ranks = members.iter().map(|member| self.members[member.rank]).collect();
            Arc::new(Self::new(name.into(), ranks, self.deadline, self.spins, Arc::clone(&self.unread)))
        }));
        // A rank that forms a new group with this one has left another group only.
        set_first_loss(first_loss().filter(|(root, _)| !subgroup.members.contains(root)));
        barrier()?;
        // All have taken their group, so the next split starts empty. Several ranks may remove it.
        self.lock(&self.subgroups).remove(&color);
        Ok(Some((subgroup, new_rank)))
    }

    /// Ignores poison: no critical section leaves its data half changed.
    pub(super) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Shared {
    /// Records messages that were sent and never received, unless the group broke, which explains
    /// them.
    fn drop(&mut self) {
        if !self.ended_well() {
            return;
        }
        for (to, mailbox) in self.mail.iter_mut().enumerate() {
            let mailbox = std::mem::take(mailbox.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()));
            let messages =
                mailbox.into_iter().flat_map(|(from, queue)| queue.into_iter().map(move |it| (from, it)));
            for (from, message) in messages {
                let [from, to] = [from, to].map(|rank| self.members[rank]);
                let mut unread = self.unread.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                unread.push((to, message.never_received(from, to)));
            }
        }
    }
}

/// A rank that has waited for some time at the barrier.
struct BarrierWait<'a>(&'a Shared, usize);

impl<'a> BarrierWait<'a> {
    fn new(shared: &'a Shared, rank: usize, what: (Call, Round)) -> Self {
        shared.lock(&shared.waiting)[rank] = Some(what);
        shared.waiting_count.fetch_add(1, Ordering::AcqRel);
        shared.news.notify();
        Self(shared, rank)
    }
}

impl Drop for BarrierWait<'_> {
    fn drop(&mut self) {
        self.0.lock(&self.0.waiting)[self.1] = None;
        self.0.waiting_count.fetch_sub(1, Ordering::AcqRel);
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
