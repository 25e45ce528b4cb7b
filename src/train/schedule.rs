//! Pipeline schedules: the order of passes as data.

use crate::error::{Error, Result};

/// The direction of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// From the input to the loss.
    Forward,
    /// From the loss to the input.
    Backward,
}

/// The pass of one microbatch through one chunk of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compute {
    /// The direction.
    pub pass: Pass,
    /// The index among the rank's chunks of the model.
    pub chunk: usize,
    /// The index of the microbatch.
    pub microbatch: usize,
}

/// An activation (forward) or a gradient (backward) that one rank sends to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// The other rank: the receiver of a send, the sender of a receive.
    pub peer: usize,
    /// The pass: an activation is sent forward, a gradient backward.
    pub pass: Pass,
    /// The stage that receives the tensor.
    pub stage: usize,
    /// The index of the microbatch.
    pub microbatch: usize,
}

/// One action of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Runs a pass.
    Compute(Compute),
    /// Sends and receives concurrently.
    Exchange {
        /// The message to send.
        send: Option<Message>,
        /// The message to receive.
        receive: Option<Message>,
    },
}

/// The order of the passes on each rank of a pipeline.
///
/// The model has `ranks · chunks` stages: stage s is chunk s / ranks of rank s mod ranks.
/// [`Schedule::actions`] adds the messages and checks that the order can be run.
///
/// | schedule | activations in flight on rank r | source |
/// |---|---|---|
/// | [`Schedule::gpipe`] | microbatches | Huang et al., 2019 |
/// | [`Schedule::one_forward_one_backward`] | ranks − r | Narayanan et al., 2019: 1F1B |
/// | [`Schedule::interleaved`] | more than with 1F1B | Narayanan et al., 2021: 2.2 |
///
/// The bubble (idle time) of the interleaved schedule is that of 1F1B divided by `chunks`, if no
/// rank waits to send. [`Pipeline`](super::Pipeline) waits until both ranks have reached an
/// exchange, which may make the interleaved schedule slower than 1F1B: `plan::Timeline` shows it.
/// All three schedules sum gradients in the order of the microbatches, so all give the same bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    ranks: usize,
    chunks: usize,
    microbatches: usize,
    orders: Vec<Vec<Compute>>,
}

impl Schedule {
    /// GPipe: all forwards, then all backwards.
    pub fn gpipe(ranks: usize, microbatches: usize) -> Self {
        let pass = |pass| (0..microbatches).map(move |microbatch| Compute { pass, chunk: 0, microbatch });
        let order: Vec<_> = pass(Pass::Forward).chain(pass(Pass::Backward)).collect();
        Self { ranks, chunks: 1, microbatches, orders: vec![order; ranks] }
    }

    /// 1F1B: forwards until the first gradient arrives, then a forward and a backward alternately,
    /// then the remaining backwards.
    ///
    /// ```
    /// use shardwise::train::Schedule;
    /// let schedule = Schedule::one_forward_one_backward(4, 8);
    /// assert_eq!([0, 1, 2, 3].map(|rank| schedule.in_flight(rank)), [4, 3, 2, 1]);
    /// assert_eq!(Schedule::gpipe(4, 8).in_flight(3), 8);
    /// // Rank 3 receives before each of 8 forwards, and sends after each of 8 backwards.
    /// assert_eq!(schedule.actions()?[3].len(), 32);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn one_forward_one_backward(ranks: usize, microbatches: usize) -> Self {
        let each = |pass, microbatch| Compute { pass, chunk: 0, microbatch };
        let order = |rank| alternate(microbatches, ranks - rank - 1, each);
        Self { ranks, chunks: 1, microbatches, orders: (0..ranks).map(order).collect() }
    }

    /// Interleaved 1F1B: each rank has several chunks of the model that are not adjacent.
    ///
    /// # Errors
    /// When the number of microbatches is not a multiple of the number of ranks, `ranks` or
    /// `chunks` is 0, or the number of passes overflows.
    pub fn interleaved(ranks: usize, chunks: usize, microbatches: usize) -> Result<Self> {
        let passes = ranks.checked_mul(chunks).and_then(|stages| stages.checked_mul(microbatches.max(2)));
        if ranks == 0 || chunks == 0 || passes.is_none() || !microbatches.is_multiple_of(ranks) {
            let reason = format!(
                "{microbatches} microbatches on {ranks} ranks with {chunks} chunks: the number of microbatches has \
                 to be a multiple of the number of ranks, and ranks and chunks may not be 0"
            );
            return Err(Error::invalid("interleaved schedule", reason));
        }
        let each = |pass, number: usize| {
            let (group, inside) = (number / (ranks * chunks), number % (ranks * chunks));
            let chunk = match pass {
                Pass::Forward => inside / ranks,
                Pass::Backward => chunks - 1 - inside / ranks,
            };
            Compute { pass, chunk, microbatch: group * ranks + inside % ranks }
        };
        let ahead = |rank: usize| match chunks {
            1 => ranks - rank - 1,
            _ => 2 * (ranks - rank - 1) + (chunks - 1) * ranks,
        };
        let orders = (0..ranks).map(|rank| alternate(microbatches * chunks, ahead(rank), each)).collect();
        Ok(Self { ranks, chunks, microbatches, orders })
    }

    /// Makes a schedule from the order of the passes of each rank.
    pub fn custom(chunks: usize, microbatches: usize, orders: Vec<Vec<Compute>>) -> Self {
        Self { ranks: orders.len(), chunks, microbatches, orders }
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Returns the number of chunks of each rank.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Returns the number of stages of all ranks.
    pub fn stages(&self) -> usize {
        self.ranks.saturating_mul(self.chunks)
    }

    /// Returns the number of microbatches.
    pub fn microbatches(&self) -> usize {
        self.microbatches
    }

    /// Returns the maximal number of passes in flight on a rank: forwards whose backwards have not
    /// run. It bounds the rank's memory for activations.
    pub fn in_flight(&self, rank: usize) -> usize {
        let mut now = 0_usize;
        let counts = self.orders[rank].iter().map(|compute| {
            match compute.pass {
                Pass::Forward => now += 1,
                Pass::Backward => now = now.saturating_sub(1),
            }
            now
        });
        counts.max().unwrap_or(0)
    }

    /// Returns the actions of each rank, with the messages between ranks. The actions do not
    /// deadlock, even if each send blocks until the peer receives.
    ///
    /// The order comes from a simulation, in which a forward takes one unit of time and a backward
    /// two. A message has the time at which its tensor is ready. Every rank executes its actions in
    /// the order of these times, so all ranks follow one global order of events.
    ///
    /// # Errors
    /// When a pass is out of range, is missing or occurs twice, or when two passes wait for each
    /// other, directly or through other passes (a deadlock).
    pub fn actions(&self) -> Result<Vec<Vec<Action>>> {
        let starts = self.starts()?;
        // Of each pass, a rank has at most the compute, a send and a receive.
        let mut events: Vec<Vec<(u64, u8, Action)>> =
            self.orders.iter().map(|order| Vec::with_capacity(3 * order.len())).collect();
        for (rank, order) in self.orders.iter().enumerate() {
            for compute in order {
                let start =
                    starts[self.index(rank, *compute)].expect("`starts` sets the start of every pass");
                events[rank].push((start, 2, Action::Compute(*compute)));
                let Some((peer, stage)) = self.receiver(rank, *compute) else { continue };
                let (pass, microbatch) = (compute.pass, compute.microbatch);
                let message = |peer| Message { peer, pass, stage, microbatch };
                // Activations and gradients travel in opposite directions, so each direction has
                // its own phase.
                let (ready, phase) = (start + duration(pass), pass as u8);
                let (send, receive) = (Some(message(peer)), Some(message(rank)));
                events[rank].push((ready, phase, Action::Exchange { send, receive: None }));
                events[peer].push((ready, phase, Action::Exchange { send: None, receive }));
            }
        }
        Ok(events.into_iter().map(join).collect())
    }

    /// Returns the rank and stage that receive the result of a pass. Returns `None` at the ends of
    /// the model, or if the result stays on its rank.
    fn receiver(&self, rank: usize, compute: Compute) -> Option<(usize, usize)> {
        let stage = self.stage(rank, compute.chunk);
        let next = match compute.pass {
            Pass::Forward => Some(stage + 1).filter(|&stage| stage < self.stages()),
            Pass::Backward => stage.checked_sub(1),
        }?;
        Some((next % self.ranks, next)).filter(|&(peer, _)| peer != rank)
    }

    /// Returns the stage of a chunk of a rank: chunk · ranks + rank.
    pub fn stage(&self, rank: usize, chunk: usize) -> usize {
        chunk * self.ranks + rank
    }

    fn index(&self, rank: usize, compute: Compute) -> usize {
        let stage = self.stage(rank, compute.chunk);
        (compute.pass as usize * self.stages() + stage) * self.microbatches + compute.microbatch
    }

    /// Returns the simulated start of each pass, indexed by [`Schedule::index`].
    fn starts(&self) -> Result<Vec<Option<u64>>> {
        const OP: &str = "pipeline schedule";
        let count = 2 * self.stages() * self.microbatches;
        let mut seen = vec![false; count];
        for (rank, order) in self.orders.iter().enumerate() {
            for compute in order {
                if compute.chunk >= self.chunks || compute.microbatch >= self.microbatches {
                    return Err(Error::invalid(OP, format!("rank {rank} has no such pass: {compute:?}")));
                }
                if std::mem::replace(&mut seen[self.index(rank, *compute)], true) {
                    return Err(Error::invalid(OP, format!("rank {rank} makes a pass twice: {compute:?}")));
                }
            }
        }
        let passes = seen.iter().filter(|seen| **seen).count();
        crate::error::same_size(OP, "the number of passes", passes, "2 · stages · microbatches", count)?;

        let mut starts = vec![None; count];
        let mut next = vec![0; self.ranks];
        let mut free = vec![0; self.ranks];
        loop {
            let (mut moved, mut waiting) = (false, None);
            for rank in 0..self.ranks {
                while let Some(&compute) = self.orders[rank].get(next[rank]) {
                    let Some(ready) = self.ready(rank, compute, &starts) else {
                        waiting = waiting.or(Some((rank, compute)));
                        break;
                    };
                    let start = ready.max(free[rank]);
                    starts[self.index(rank, compute)] = Some(start);
                    free[rank] = start + duration(compute.pass);
                    next[rank] += 1;
                    moved = true;
                }
            }
            match (waiting, moved) {
                (None, _) => return Ok(starts),
                (Some((rank, compute)), false) => {
                    let reason = format!("a deadlock: rank {rank} waits forever before {compute:?}");
                    return Err(Error::invalid(OP, reason));
                }
                _ => {}
            }
        }
    }

    /// Returns the time at which the inputs of a pass are ready, or `None` if the simulation has
    /// not reached that time.
    fn ready(&self, rank: usize, compute: Compute, starts: &[Option<u64>]) -> Option<u64> {
        let stage = self.stage(rank, compute.chunk);
        let at = |pass, stage: usize| {
            let compute = Compute { pass, chunk: stage / self.ranks, microbatch: compute.microbatch };
            starts[self.index(stage % self.ranks, compute)].map(|start| start + duration(pass))
        };
        match compute.pass {
            Pass::Forward if stage == 0 => Some(0),
            Pass::Forward => at(Pass::Forward, stage - 1),
            Pass::Backward if stage + 1 == self.stages() => at(Pass::Forward, stage),
            Pass::Backward => Some(at(Pass::Forward, stage)?.max(at(Pass::Backward, stage + 1)?)),
        }
    }
}

/// Returns the simulated duration of a pass, in units of a forward.
fn duration(pass: Pass) -> u64 {
    match pass {
        Pass::Forward => 1,
        Pass::Backward => 2,
    }
}

/// Returns `ahead` forwards, then a forward and a backward alternately, then the remaining
/// backwards.
fn alternate(passes: usize, ahead: usize, each: impl Fn(Pass, usize) -> Compute) -> Vec<Compute> {
    let ahead = ahead.min(passes);
    let mut order: Vec<_> = (0..ahead).map(|number| each(Pass::Forward, number)).collect();
    for number in ahead..passes {
        order.extend([each(Pass::Forward, number), each(Pass::Backward, number - ahead)]);
    }
    order.extend((passes - ahead..passes).map(|number| each(Pass::Backward, number)));
    order
}

/// Sorts a rank's events, and joins a send and a receive of the same time and phase to one
/// exchange.
fn join(mut events: Vec<(u64, u8, Action)>) -> Vec<Action> {
    events.sort_by_key(|&(time, phase, _)| (time, phase));
    events.dedup_by(|event, last| match (&mut last.2, event.2) {
        (Action::Exchange { send: s, receive: r }, Action::Exchange { send, receive })
            if (last.0, last.1) == (event.0, event.1)
                && (s.is_none() || send.is_none())
                && (r.is_none() || receive.is_none()) =>
        {
            (*s, *r) = (s.or(send), r.or(receive));
            true
        }
        _ => false,
    });
    events.into_iter().map(|(_, _, action)| action).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Runs the actions with sends that block until the peer receives. The send and the receive of
    /// an exchange finish independently.
    fn rendezvous(schedule: &Schedule) {
        let actions = schedule.actions().unwrap();
        let ranks = schedule.ranks();
        let mut next = vec![0; ranks];
        let mut halves: Vec<(Option<Message>, Option<Message>)> = vec![(None, None); ranks];
        let mut done = HashSet::new();
        let open = |next: &[usize], halves: &mut [(Option<Message>, Option<Message>)], rank: usize| {
            if let Some(Action::Exchange { send, receive }) = actions[rank].get(next[rank]) {
                halves[rank] = (*send, *receive);
            }
        };
        (0..ranks).for_each(|rank| open(&next, &mut halves, rank));
        loop {
            let mut moved = false;
            for rank in 0..ranks {
                if let Some(Action::Compute(compute)) = actions[rank].get(next[rank]) {
                    let stage = schedule.stage(rank, compute.chunk);
                    if compute.pass == Pass::Backward {
                        assert!(done.contains(&(Pass::Forward, stage, compute.microbatch)));
                    }
                    let needs = match compute.pass {
                        Pass::Forward => stage.checked_sub(1),
                        Pass::Backward => Some(stage + 1).filter(|&next| next < schedule.stages()),
                    };
                    if let Some(from) = needs {
                        // The input was received, or was computed on this rank.
                        let key = (compute.pass, from, compute.microbatch);
                        let local = from % ranks == rank && done.contains(&key);
                        assert!(local || done.contains(&(compute.pass, 1000 + stage, compute.microbatch)));
                    }
                    assert!(done.insert((compute.pass, stage, compute.microbatch)));
                    next[rank] += 1;
                    open(&next, &mut halves, rank);
                    moved = true;
                } else if let (Some(message), _) = halves[rank] {
                    let other = halves[message.peer].1;
                    if other.is_some_and(|other| {
                        Message { peer: message.peer, ..other } == message && other.peer == rank
                    }) {
                        assert!(done.insert((message.pass, 1000 + message.stage, message.microbatch)));
                        (halves[rank].0, halves[message.peer].1) = (None, None);
                        moved = true;
                    }
                }
                let exchanging = matches!(actions[rank].get(next[rank]), Some(Action::Exchange { .. }));
                if exchanging && halves[rank] == (None, None) {
                    next[rank] += 1;
                    open(&next, &mut halves, rank);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for rank in 0..ranks {
            assert_eq!(
                next[rank],
                actions[rank].len(),
                "rank {rank} is stuck before {:?}",
                actions[rank].get(next[rank])
            );
        }
    }

    #[test]
    fn schedules_run_without_buffers_and_within_their_memory() {
        for ranks in 1..7 {
            for microbatches in 0..12 {
                let gpipe = Schedule::gpipe(ranks, microbatches);
                rendezvous(&gpipe);
                let alternating = Schedule::one_forward_one_backward(ranks, microbatches);
                rendezvous(&alternating);
                for rank in 0..ranks {
                    assert_eq!(gpipe.in_flight(rank), microbatches);
                    assert_eq!(alternating.in_flight(rank), microbatches.min(ranks - rank));
                }
                for chunks in 1..4 {
                    let interleaved = Schedule::interleaved(ranks, chunks, microbatches);
                    assert_eq!(interleaved.is_ok(), microbatches % ranks == 0);
                    if let Ok(interleaved) = interleaved {
                        rendezvous(&interleaved);
                        assert!(chunks > 1 || interleaved == alternating);
                        let most = (0..ranks).map(|rank| interleaved.in_flight(rank)).max().unwrap();
                        assert!(most <= (microbatches * chunks).min(2 * ranks + (chunks - 1) * ranks));
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_schedules_are_refused() {
        let each = |pass, microbatch| Compute { pass, chunk: 0, microbatch };
        let (f, b) = (Pass::Forward, Pass::Backward);
        let reason = |orders| Schedule::custom(1, 1, orders).actions().unwrap_err().to_string();
        assert_eq!(
            reason(vec![vec![each(f, 0), each(b, 0)], vec![each(f, 0)]]),
            "pipeline schedule: the number of passes is 3, but 2 · stages · microbatches is 4"
        );
        assert!(reason(vec![vec![each(f, 0), each(f, 0)]]).contains("makes a pass twice"));
        assert!(reason(vec![vec![each(f, 1), each(b, 0)]]).contains("no such pass"));
        let backward_first = vec![vec![each(b, 0), each(f, 0)], vec![each(f, 0), each(b, 0)]];
        assert!(reason(backward_first).contains("a deadlock: rank 0 waits forever"));
    }
}
