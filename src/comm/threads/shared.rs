//! The state that the ranks of a group share, and the handling of the group's failures.

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
    security::Roles,
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// How many times a waiter spins before it yields, if every rank has a processor.
const SPINS: u32 = if cfg!(shuttle) { 0 } else { 20_000 };

/// How long a rank waits at the barrier before it reports its wait: R9.
const REPORT_AFTER: Duration = Duration::from_millis(1);

/// How long the other ranks wait for the reason why a rank ended, counted from the time when that
/// rank dropped the group: R7.
const REASON_TIMEOUT: Duration = Duration::from_millis(100);

/// A group of threads.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    deadline: Duration,
    pub(super) barrier: Barrier,
    pub(super) slots: Box<[Slot]>,
    /// Notified when a rank has posted an input, sent a message, left, or reported a wait. Also
    /// notified when the group breaks.
    news: Event,
    /// For each receiver, its messages by sender.
    mail: Box<[Mutex<Mailbox>]>,
    /// Started collectives to which some ranks have not posted yet, by their number among the
    /// group's started collectives.
    flights: Mutex<HashMap<u64, Arc<Flight>>>,
    /// The ranks' requests to a split. `subgroups` holds the groups that the split created, by
    /// color.
    requests: Mutex<Vec<Option<SplitRequest>>>,
    subgroups: Mutex<HashMap<u64, Arc<Shared>>>,
    /// For each rank, the number of external steps that it has reached, by `ExternalStep::work`.
    steps: Mutex<Vec<HashMap<u64, u64>>>,
    /// The world ranks of the group.
    members: Vec<usize>,
    /// The roles of the world's ranks.
    roles: Roles,
    /// How many times waiters spin. Groups that are split from the world use the world's number.
    spins: u32,
    /// The group's failures, in order. The first failure broke the group.
    failures: Mutex<Vec<Failure>>,
    /// By rank, the call and round of each rank that has waited at the barrier for [`REPORT_AFTER`]
    /// or longer: R9. `waiting_count` is the number of such ranks.
    waiting: Mutex<Vec<Option<(Call, Round)>>>,
    waiting_count: AtomicUsize,
    /// Whether a rank has panicked between the rounds of an operation, so that results are
    /// incomplete.
    panicked: AtomicBool,
    /// The list of messages that were never received. All groups of the world share it.
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
    pub(super) fn world(size: usize, deadline: Duration, roles: Roles) -> Self {
        // With fewer processors than ranks, spinning takes processor time from ranks that have yet
        // to arrive.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let spins = if size <= processors { SPINS } else { 0 };
        Self::new("world".into(), ((0..size).collect(), roles), deadline, spins, Unread::default())
    }

    fn new(
        name: String,
        (members, roles): (Vec<usize>, Roles),
        deadline: Duration,
        spins: u32,
        unread: Unread,
    ) -> Self {
        let size = members.len();
        Self {
            name,
            members,
            roles,
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

    /// The roles of the group's ranks.
    pub(super) fn roles(&self) -> Roles {
        self.roles.of_members(&self.members)
    }

    /// Arrives at the first round of operation `at`, waits for the other ranks, and compares the
    /// calls. This rank has already published its call.
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
        // operation before this function returns.
        #[allow(unsafe_code)]
        let calls = self.slots.iter().map(|slot| unsafe { slot.call(at) });
        self.agree(calls)
    }

    /// Posts a rank's input to the group's started collective with this number.
    pub(super) fn post(&self, call: &Call, number: u64, rank: usize, input: HostVec) -> Result<Arc<Flight>> {
        // A rank that left without a failure is no obstacle here, because it may have posted its
        // input before it left. `wait` checks whether it has.
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

    /// Rank `rank` waits until `done` returns a value. It breaks the group if the wait takes longer
    /// than the deadline. `missing` returns the ranks that `rank` still waits for.
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
            // Checks again: messages that the other rank sent before it arrived at the barrier are
            // visible now.
            Some(done().ok_or(Err(cycle)))
        });
        // Checks once more after a failure, because data that arrived before a rank was lost still
        // counts.
        let error = match found {
            Some(Ok(result)) => return Ok(result),
            Some(Err(Ok(failure))) => return done().ok_or_else(|| self.error(call, failure)),
            Some(Err(Err(cycle))) => return Err(self.disagree(cycle)),
            None => self.give_up(call, missing(), self.deadline),
        };
        done().ok_or(error)
    }

    /// Breaks the group because the `missing` ranks have not joined the call within `after`.
    pub(super) fn give_up(&self, call: &Call, missing: Vec<usize>, after: Duration) -> Error {
        let failure = Failure::Deadline { missing, after };
        self.break_for(failure.clone());
        self.error(call, failure)
    }

    /// Records that rank `rank` reached an external step.
    pub(super) fn came(&self, rank: usize, step: ExternalStep) {
        self.lock(&self.steps)[rank].insert(step.work, step.number + 1);
    }

    /// Returns the ranks that an external step needs and that have not reached it.
    pub(super) fn absent(&self, step: ExternalStep) -> Vec<usize> {
        let steps = self.lock(&self.steps);
        let absent = |rank: &usize| steps[*rank].get(&step.work).is_none_or(|steps| *steps <= step.number);
        (0..steps.len()).filter(|&rank| step.needs(rank)).filter(absent).collect()
    }

    /// Finds a wait cycle: rank `rank` waits for a rank that waits at the barrier for all ranks,
    /// `rank` included. Returns the mismatch of their calls: R9.
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

    /// Records that a rank has left or was lost. A rank may call this twice, the second time with
    /// the reason.
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

    /// Records that rank `rank` panics between the rounds of an operation.
    pub(super) fn record_panic(&self, rank: usize) {
        self.leave(rank, Some(LostReason::Panicked));
        self.panicked.store(true, Ordering::Release);
    }

    /// Whether the group ended without a failure: no rank failed, and no rank left because another
    /// rank was lost.
    fn ended_well(&mut self) -> bool {
        let failures = self.failures.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let in_order = |failure: &Failure| match failure {
            Failure::Lost(departure) => departure.in_order() && departure.root.is_none(),
            _ => false,
        };
        failures.iter().all(in_order)
    }

    /// Returns an error, after a second round, if a rank panicked in the operation. The panic
    /// happened in this operation, because no rank passes the first round of a later operation
    /// before this rank arrives at it.
    pub(super) fn check_complete(&self, call: &Call) -> Result<()> {
        if self.panicked.load(Ordering::Acquire) { Err(self.first_failure(call)) } else { Ok(()) }
    }

    /// The error of a call that needs all ranks of a broken group: the group's first failure.
    pub(super) fn first_failure(&self, call: &Call) -> Error {
        let failure = self.lock(&self.failures).first().cloned();
        failure.map_or_else(
            || Error::internal(call.op.name(), "the group is broken, but no failure was recorded"),
            |failure| self.error(call, failure),
        )
    }

    /// The error of a call that needs only the `missing` ranks, if a failure keeps them from
    /// joining it: R7.
    pub(super) fn obstacle(&self, call: &Call, missing: impl Fn() -> Vec<usize>) -> Option<Error> {
        self.stop_reason(missing).map(|failure| self.error(call, failure))
    }

    /// Returns the first failure that keeps the `missing` ranks from joining.
    fn stop_reason(&self, missing: impl Fn() -> Vec<usize>) -> Option<Failure> {
        if !self.barrier.is_broken() {
            return None;
        }
        let missing = missing();
        self.lock(&self.failures).iter().find(|failure| failure.stops(&missing)).cloned()
    }

    /// Returns the reason why a rank was lost. A rank that returns an error drops its groups before
    /// its launcher sees the error, so this waits up to [`REASON_TIMEOUT`] for the reason. If no
    /// reason arrives, the rank has only left the group.
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

    /// Returns the new group of this rank's color, and this rank's number in it. `barrier` waits
    /// for the other ranks.
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
            .ok_or_else(|| Error::invalid(call.op.name(), "no rank of the split has this rank's color"))?;
        let subgroup = Arc::clone(self.lock(&self.subgroups).entry(color).or_insert_with(|| {
            let ranks = members.iter().map(|member| self.members[member.rank]).collect();
            let members = (ranks, self.roles.clone());
            Arc::new(Self::new(name.into(), members, self.deadline, self.spins, Arc::clone(&self.unread)))
        }));
        // Clears a recorded loss of a rank of the new group, because that rank has only left
        // another group.
        set_first_loss(first_loss().filter(|(root, _)| !subgroup.members.contains(root)));
        barrier()?;
        // All ranks have taken their group. Removes it, so that the next split creates new groups.
        // Other ranks may have removed it already.
        self.lock(&self.subgroups).remove(&color);
        Ok(Some((subgroup, new_rank)))
    }

    /// Locks a mutex. Ignores poison, because no critical section leaves its data half changed.
    pub(super) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Shared {
    /// Records messages that were never received. Records none if the group failed, because the
    /// failure explains them.
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

/// While this value exists, the other ranks can see that a rank waits at the barrier: R9.
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
        let world = Shared::world(100, Duration::MAX, Roles::UNRESTRICTED);
        assert_eq!(world.mail.len(), 100);
        assert!(world.mail.iter().all(|mail| world.lock(mail).is_empty()));
    }
}
