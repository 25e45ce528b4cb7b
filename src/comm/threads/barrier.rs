//! Where the ranks meet: a counter of arrivals that can be broken. See `README.md`, R2.

use super::{
    event::Event,
    sync::{AtomicU64, Ordering},
};
use std::time::Duration;

/// Set in the counter when the group is broken.
const BROKEN: u64 = 1 << 63;

/// A barrier whose meetings are complete or broken, never both.
#[derive(Debug)]
pub(super) struct Barrier {
    size: u64,
    arrivals: AtomicU64,
    event: Event,
}

/// A rank's arrival at a meeting: the count of arrivals at which the meeting is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meeting(u64);

/// How waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All ranks have arrived.
    Complete,
    /// The group was broken before all had arrived.
    Broken,
    /// Some ranks have not arrived in time; nothing was broken.
    Late,
}

impl Barrier {
    /// A barrier for `size` ranks that spin `spins` times before they yield.
    pub(super) fn new(size: usize, spins: u32) -> Self {
        Self { size: size as u64, arrivals: AtomicU64::new(0), event: Event::new(spins) }
    }

    /// Whether the group is broken.
    pub(super) fn is_broken(&self) -> bool {
        self.arrivals.load(Ordering::Acquire) & BROKEN != 0
    }

    /// Arrives at the next meeting; none if the group is broken.
    ///
    /// What this rank wrote before is visible to every rank that finds the meeting complete: the successive arrivals are
    /// one release sequence.
    pub(super) fn arrive(&self) -> Option<Meeting> {
        let mut count = self.arrivals.load(Ordering::Relaxed);
        loop {
            if count & BROKEN != 0 {
                return None;
            }
            match self.arrivals.compare_exchange_weak(count, count + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => count = now,
            }
        }
        Some(self.arrived(count))
    }

    /// Arrives at the next meeting and waits for it with no way out. Only for a second meeting: R4.
    pub(super) fn finish(&self) {
        let count = self.arrivals.fetch_add(1, Ordering::AcqRel);
        let meeting = self.arrived(count & !BROKEN);
        self.event.wait_until(None, || self.is_complete(meeting).then_some(()));
    }

    /// Waits until a meeting is complete, or the group is broken, or for at most `patience`.
    pub(super) fn wait(&self, meeting: Meeting, patience: Option<Duration>) -> Outcome {
        let outcome = self.event.wait_until(patience, || {
            let count = self.arrivals.load(Ordering::Acquire);
            // Complete first: a meeting that was completed before the group broke has taken place.
            if count & !BROKEN >= meeting.0 {
                Some(Outcome::Complete)
            } else {
                (count & BROKEN != 0).then_some(Outcome::Broken)
            }
        });
        outcome.unwrap_or(Outcome::Late)
    }

    /// Breaks the group.
    pub(super) fn break_now(&self) {
        self.arrivals.fetch_or(BROKEN, Ordering::AcqRel);
        self.event.notify();
    }

    /// Breaks the group, unless `meeting` is complete. Returns whether the meeting did not take place.
    pub(super) fn give_up(&self, meeting: Meeting) -> bool {
        let mut count = self.arrivals.load(Ordering::Acquire);
        loop {
            if count & !BROKEN >= meeting.0 {
                return false;
            }
            match self.arrivals.compare_exchange_weak(
                count,
                count | BROKEN,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => break,
                Err(now) => count = now,
            }
        }
        self.event.notify();
        true
    }

    fn arrived(&self, before: u64) -> Meeting {
        let meeting = Meeting((before / self.size + 1) * self.size);
        if before + 1 == meeting.0 {
            self.event.notify();
        }
        meeting
    }

    /// Whether all ranks have come to a meeting.
    pub(super) fn is_complete(&self, meeting: Meeting) -> bool {
        self.arrivals.load(Ordering::Acquire) & !BROKEN >= meeting.0
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_a_million_times() {
        for (size, rounds) in [(1, 1000), (2, 200_000), (5, 20_000)] {
            let barrier = Barrier::new(size, 100);
            let count = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..size {
                    scope.spawn(|| {
                        for round in 0..rounds {
                            count.fetch_add(1, Ordering::Relaxed);
                            let meeting = barrier.arrive().unwrap();
                            assert_eq!(barrier.wait(meeting, None), Outcome::Complete);
                            assert!(count.load(Ordering::Relaxed) >= (round + 1) * size as u64);
                            barrier.finish();
                            assert!(count.load(Ordering::Relaxed) <= (round + 2) * size as u64);
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_broken_barrier_releases_and_refuses() {
        let barrier = Barrier::new(3, 0);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| barrier.wait(barrier.arrive().unwrap(), None));
            std::thread::sleep(Duration::from_millis(20));
            barrier.break_now();
            assert_eq!(waiting.join().unwrap(), Outcome::Broken);
        });
        assert_eq!(barrier.arrive(), None);
    }

    #[test]
    fn lateness_is_noticed_and_a_completed_meeting_stays_complete() {
        let barrier = Barrier::new(2, 0);
        let meeting = barrier.arrive().unwrap();
        assert_eq!(barrier.wait(meeting, Some(Duration::from_millis(1))), Outcome::Late);
        barrier.arrive().unwrap();
        assert!(!barrier.give_up(meeting), "the meeting had been completed");
        assert_eq!(barrier.wait(meeting, None), Outcome::Complete);
        let next = barrier.arrive().expect("giving up on a completed meeting breaks nothing");
        assert!(barrier.give_up(next));
        assert_eq!(barrier.arrive(), None);
    }
}

/// Every interleaving of a few ranks, by loom.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    struct Cells(Vec<UnsafeCell<u32>>);

    /// Runs `rank(r)` on `size` threads in every order that `bound` preemptions allow.
    fn explore(size: usize, bound: usize, rank: impl Fn(&Barrier, &Cells, usize) + Send + Sync + 'static) {
        let rank = std::sync::Arc::new(rank);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(bound);
        builder.check(move || {
            let cells = (0..size).map(|_| UnsafeCell::new(0)).collect();
            let shared = Arc::new((Barrier::new(size, 0), Cells(cells)));
            let others: Vec<_> = (1..size)
                .map(|at| {
                    let (shared, rank) = (shared.clone(), rank.clone());
                    thread::spawn(move || rank(&shared.0, &shared.1, at))
                })
                .collect();
            rank(&shared.0, &shared.1, 0);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    /// A slot is written before the first meeting, read by all after it, and written again after the second: loom's cells
    /// report any write that a read could overlap.
    fn zero_copy(barrier: &Barrier, cells: &Cells, rank: usize, rounds: u32) {
        for round in 1..=rounds {
            #[allow(unsafe_code)]
            // SAFETY: loom checks this access; that it does not overlap another is what the test proves.
            cells.0[rank].with_mut(|cell| unsafe { *cell = round });
            let meeting = barrier.arrive().unwrap();
            assert_eq!(barrier.wait(meeting, None), Outcome::Complete);
            for cell in &cells.0 {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                cell.with(|cell| assert_eq!(unsafe { *cell }, round));
            }
            barrier.finish();
        }
    }

    #[test]
    fn loom_two_ranks_publish_and_read() {
        explore(2, 3, |barrier, cells, rank| zero_copy(barrier, cells, rank, 2));
    }

    #[test]
    fn loom_three_ranks_publish_and_read() {
        explore(3, 2, |barrier, cells, rank| zero_copy(barrier, cells, rank, 1));
    }

    /// One rank breaks the group while the others meet: each finds the meeting complete or broken, and nobody sleeps on.
    #[test]
    fn loom_breaking_wakes_everybody() {
        explore(3, 2, |barrier, _, rank| {
            if rank == 2 {
                barrier.break_now();
            } else if let Some(meeting) = barrier.arrive() {
                assert_eq!(barrier.wait(meeting, None), Outcome::Broken);
            }
        });
    }

    /// A rank that gives up and one that arrives last agree on whether the meeting took place.
    #[test]
    fn loom_complete_or_broken_never_both() {
        explore(2, 3, |barrier, cells, rank| {
            let meeting = barrier.arrive();
            let complete = match (rank, meeting) {
                (_, None) => false,
                (0, Some(meeting)) => !barrier.give_up(meeting),
                (_, Some(meeting)) => barrier.wait(meeting, None) == Outcome::Complete,
            };
            if complete {
                #[allow(unsafe_code)]
                // SAFETY: loom checks this access; each rank writes its own cell.
                cells.0[rank].with_mut(|cell| unsafe { *cell = 1 });
                barrier.finish();
                #[allow(unsafe_code)]
                // SAFETY: both ranks found the meeting complete, or this one would wait here forever.
                cells.0[1 - rank].with(|cell| assert_eq!(unsafe { *cell }, 1));
            }
        });
    }
}
