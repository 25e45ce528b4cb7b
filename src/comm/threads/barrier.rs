//! The barrier of a group: a counter of arrivals with a bit for a broken group. See `README.md`,
//! R2.

use super::{
    event::Event,
    sync::{AtomicU64, Ordering},
};
use std::time::Duration;

/// The bit of the counter that is set when the group is broken.
const BROKEN: u64 = 1 << 63;

/// A barrier. Each of its rounds is complete or broken, never both.
#[derive(Debug)]
pub(super) struct Barrier {
    size: u64,
    arrivals: AtomicU64,
    event: Event,
}

/// A barrier round, represented by the count of arrivals at which the round is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round(u64);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All ranks have arrived.
    Complete,
    /// The group broke before all ranks had arrived.
    Broken,
    /// Some ranks have not arrived in time. The group is not broken.
    Late,
}

impl Barrier {
    /// Creates a barrier for `size` ranks, which spin `spins` times before they yield.
    pub(super) fn new(size: usize, spins: u32) -> Self {
        Self { size: size as u64, arrivals: AtomicU64::new(0), event: Event::new(spins) }
    }

    /// Whether the group is broken.
    pub(super) fn is_broken(&self) -> bool {
        self.arrivals.load(Ordering::Acquire) & BROKEN != 0
    }

    /// Arrives at the next round and returns it. Returns none if the group is broken.
    ///
    /// Every rank that finds the round complete sees this rank's earlier writes, because the
    /// successive arrivals form one release sequence.
    pub(super) fn arrive(&self) -> Option<Round> {
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

    /// Arrives at the next round and waits until it is complete, even if the group is broken. Call
    /// this only for a second round: R4.
    pub(super) fn finish(&self) {
        let count = self.arrivals.fetch_add(1, Ordering::AcqRel);
        let round = self.arrived(count & !BROKEN);
        self.event.wait_until(None, || self.is_complete(round).then_some(()));
    }

    /// Waits until a round is complete or the group is broken, for at most `patience`.
    pub(super) fn wait(&self, round: Round, patience: Option<Duration>) -> Outcome {
        let outcome = self.event.wait_until(patience, || {
            let count = self.arrivals.load(Ordering::Acquire);
            // Checks completion first, because a round that completed before the group broke has
            // taken place.
            if count & !BROKEN >= round.0 {
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

    /// Breaks the group, unless `round` is complete. Returns false if the round is complete.
    pub(super) fn give_up(&self, round: Round) -> bool {
        let mut count = self.arrivals.load(Ordering::Acquire);
        loop {
            if count & !BROKEN >= round.0 {
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

    fn arrived(&self, before: u64) -> Round {
        let round = Round((before / self.size + 1) * self.size);
        if before + 1 == round.0 {
            self.event.notify();
        }
        round
    }

    /// Whether all ranks have arrived at a round.
    pub(super) fn is_complete(&self, round: Round) -> bool {
        self.arrivals.load(Ordering::Acquire) & !BROKEN >= round.0
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_a_million_times() {
        for (size, turns) in [(1, 1000), (2, 200_000), (5, 20_000)] {
            let barrier = Barrier::new(size, 100);
            let count = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..size {
                    scope.spawn(|| {
                        for turn in 0..turns {
                            count.fetch_add(1, Ordering::Relaxed);
                            let round = barrier.arrive().unwrap();
                            assert_eq!(barrier.wait(round, None), Outcome::Complete);
                            assert!(count.load(Ordering::Relaxed) >= (turn + 1) * size as u64);
                            barrier.finish();
                            assert!(count.load(Ordering::Relaxed) <= (turn + 2) * size as u64);
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
    fn lateness_is_noticed_and_a_completed_round_stays_complete() {
        let barrier = Barrier::new(2, 0);
        let round = barrier.arrive().unwrap();
        assert_eq!(barrier.wait(round, Some(Duration::from_millis(1))), Outcome::Late);
        barrier.arrive().unwrap();
        assert!(!barrier.give_up(round), "the round is complete");
        assert_eq!(barrier.wait(round, None), Outcome::Complete);
        let next = barrier.arrive().expect("giving up on a complete round does not break the group");
        assert!(barrier.give_up(next));
        assert_eq!(barrier.arrive(), None);
    }
}

/// Loom runs every interleaving of two or three ranks.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    struct Cells(Vec<UnsafeCell<u32>>);

    /// Runs `rank(r)` on `size` threads, in every interleaving with at most `bound` preemptions.
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

    /// Each rank writes its cell before the first round. After the first round every rank reads all
    /// cells. After the second round each rank may write its cell again. Loom's cells report a
    /// write that could overlap a read.
    fn zero_copy(barrier: &Barrier, cells: &Cells, rank: usize, turns: u32) {
        for turn in 1..=turns {
            #[allow(unsafe_code)]
            // SAFETY: loom checks that this access overlaps no other.
            cells.0[rank].with_mut(|cell| unsafe { *cell = turn });
            let round = barrier.arrive().unwrap();
            assert_eq!(barrier.wait(round, None), Outcome::Complete);
            for cell in &cells.0 {
                #[allow(unsafe_code)]
                // SAFETY: as above.
                cell.with(|cell| assert_eq!(unsafe { *cell }, turn));
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

    /// Rank 2 breaks the group while the others wait. Each waiting rank finds its round broken, and
    /// none keeps sleeping.
    #[test]
    fn loom_breaking_wakes_everybody() {
        explore(3, 2, |barrier, _, rank| {
            if rank == 2 {
                barrier.break_now();
            } else if let Some(round) = barrier.arrive() {
                assert_eq!(barrier.wait(round, None), Outcome::Broken);
            }
        });
    }

    /// Rank 0 gives up on a round at which rank 1 may arrive. Both ranks agree on whether the round
    /// took place.
    #[test]
    fn loom_complete_or_broken_never_both() {
        explore(2, 3, |barrier, cells, rank| {
            let round = barrier.arrive();
            let complete = match (rank, round) {
                (_, None) => false,
                (0, Some(round)) => !barrier.give_up(round),
                (_, Some(round)) => barrier.wait(round, None) == Outcome::Complete,
            };
            if complete {
                #[allow(unsafe_code)]
                // SAFETY: loom checks this access; each rank writes its own cell.
                cells.0[rank].with_mut(|cell| unsafe { *cell = 1 });
                barrier.finish();
                #[allow(unsafe_code)]
                // SAFETY: both ranks found the round complete. Otherwise this rank would still wait
                // in `finish`.
                cells.0[1 - rank].with(|cell| assert_eq!(unsafe { *cell }, 1));
            }
        });
    }
}
