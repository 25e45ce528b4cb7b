//! Rank 0's state of all ranks. For each frame that arrives, the hub returns the frames that rank 0
//! sends in reply. It does no input or output itself.
//!
//! In a round, every rank of a group sends an input to rank 0 and receives the inputs of all ranks
//! of the group. A round is complete when rank 0 has all inputs, unless the group breaks first.
//! Rank 0 decides whether the last input or the failure came first, so all ranks get the same
//! outcome. If a rank is lost after it sent its input, the round can still complete. So the report
//! of a loss says how many rounds of each group the lost rank has joined, and only ranks that wait
//! for a later round fail.

use super::frame::{Body, Frame, Kind, Numbers, Strings, from_mismatch, from_numbers};
use crate::error::Mismatch;
use std::collections::{HashMap, HashSet};

/// Rank 0's state of all ranks: see the module's documentation.
#[derive(Debug)]
pub(super) struct Hub {
    world: usize,
    /// The incomplete rounds, by group and sequence number.
    rounds: HashMap<(u64, u64), Round>,
    /// By rank and group, the number of rounds to which the rank has sent its input.
    rounds_joined: HashMap<usize, HashMap<u64, u64>>,
    /// The number of messages forwarded, by group, sender and receiver.
    messages: HashMap<(u64, usize, usize), u64>,
    /// The reported waits for a message, by group and waiting rank.
    waiting: HashMap<(u64, usize), Waiting>,
    broken: HashSet<u64>,
    lost: HashSet<usize>,
}

/// The inputs to a round, by group rank, each with the world rank that sent it.
type Round = Vec<Option<(usize, Body)>>;

/// The message that a rank waits for.
#[derive(Debug)]
struct Waiting {
    /// The sender of that message.
    sender: usize,
    /// The number of messages that the receiver's program has received from this sender so far.
    received: u64,
    /// The group ranks of the receiver and the sender, then the receiver's call as text.
    ranks_and_call: Body,
}

/// The id of the group of all ranks.
pub(super) const WORLD: u64 = 0;

/// Frames, each with its destination rank.
pub(super) type Deliveries = Vec<(usize, Frame)>;

impl Hub {
    pub(super) fn new(world: usize) -> Self {
        let (rounds, rounds_joined, messages, waiting, broken, lost) = Default::default();
        Self { world, rounds, rounds_joined, messages, waiting, broken, lost }
    }

    /// Returns the frames to send in reply to a frame from rank `from`; none if the frame is
    /// invalid, because no rank of this world sends such a frame.
    pub(super) fn take(&mut self, from: usize, frame: Frame) -> Option<Deliveries> {
        match frame.kind {
            Kind::Input => self.input(from, frame),
            Kind::GiveUp => self.give_up(frame),
            Kind::Waiting => self.wait_for_message(from, frame),
            Kind::Message | Kind::Ask | Kind::Answer if frame.to < self.world => {
                if frame.kind == Kind::Message {
                    *self.messages.entry((frame.group, from, frame.to)).or_default() += 1;
                }
                Some(vec![(frame.to, Frame { from, ..frame })])
            }
            Kind::Broken => Some(self.break_for(frame)),
            Kind::Late => {
                let missing = Numbers(&frame.body)
                    .map(|rank| self.end_of_wait_chain(frame.group, rank as usize) as u64);
                let body = from_numbers(missing).into();
                Some(self.break_for(Frame { body, ..frame }))
            }
            _ => None,
        }
    }

    fn input(&mut self, from: usize, frame: Frame) -> Option<Deliveries> {
        let (group, group_rank, size) = (frame.group, frame.from, frame.to);
        if size > self.world || group_rank >= size {
            return None;
        }
        // In the world, group ranks are the ranks. Of other groups, rank 0 does not know the
        // members.
        if group == WORLD && (group_rank, size) != (from, self.world) {
            return None;
        }
        if self.broken.contains(&group) {
            return Some(Vec::new());
        }
        let key = (group, frame.round);
        let round = self.rounds.entry(key).or_insert_with(|| vec![None; size]);
        // A rank sends its input once. Another rank must not replace it.
        if round.len() != size || round[group_rank].is_some() {
            return None;
        }
        round[group_rank] = Some((from, frame.body));
        self.waiting.remove(&(group, from));
        self.rounds_joined.entry(from).or_default().insert(group, frame.round.checked_add(1)?);
        if round.iter().any(Option::is_none) {
            return Some(self.break_wait_cycle(group));
        }
        let inputs: Vec<_> = self.rounds.remove(&key).into_iter().flatten().flatten().collect();
        let mut all = Strings::default();
        inputs.iter().for_each(|(_, input)| all.push(input));
        let reply = Frame::new(Kind::Inputs, group, frame.round, (0, 0), all.0);
        Some(inputs.iter().map(|(rank, _)| (*rank, reply.clone())).collect())
    }

    /// Handles the frame by which a rank reports that it no longer waits for a round. Breaks the
    /// group, unless the round is complete or the group is already broken.
    fn give_up(&mut self, frame: Frame) -> Option<Deliveries> {
        let Some(round) = self.rounds.get(&(frame.group, frame.round)) else { return Some(Vec::new()) };
        let mut numbers = Numbers(&frame.body);
        let (after, members) = (numbers.next()?, numbers.collect::<Vec<_>>());
        if members.len() != round.len() {
            return None;
        }
        let missing = members.iter().zip(round).filter(|(_, input)| input.is_none());
        let body = from_numbers(missing.map(|(rank, _)| *rank));
        Some(self.break_for(Frame::new(Kind::Late, frame.group, after, (0, 0), body)))
    }

    /// Records that rank `from` waits for a message, and breaks the group if this wait closes a
    /// wait cycle.
    fn wait_for_message(&mut self, from: usize, frame: Frame) -> Option<Deliveries> {
        let waiting = Waiting { sender: frame.to, received: frame.round, ranks_and_call: frame.body };
        waiting.ranks_and_call()?;
        if !self.broken.contains(&frame.group) {
            self.waiting.insert((frame.group, from), waiting);
        }
        Some(self.break_wait_cycle(frame.group))
    }

    /// Returns the wait that a rank has reported; none if rank 0 has meanwhile forwarded the
    /// message.
    fn pending_wait(&self, group: u64, rank: usize) -> Option<&Waiting> {
        let waiting = self.waiting.get(&(group, rank))?;
        let sent = self.messages.get(&(group, waiting.sender, rank)).copied().unwrap_or(0);
        (sent == waiting.received).then_some(waiting)
    }

    /// If `rank` waits for a message, goes on to the sender of that message, and so on. Returns the
    /// first rank that does not wait; `rank` itself if all these ranks wait.
    fn end_of_wait_chain(&self, group: u64, rank: usize) -> usize {
        let mut last = rank;
        for _ in 0..self.world {
            match self.pending_wait(group, last) {
                Some(waiting) => last = waiting.sender,
                None => return last,
            }
        }
        // The chain is a cycle: all its ranks wait.
        rank
    }

    /// Breaks the group if there is a wait cycle: rank A waits for a message from rank B, while B
    /// waits in a round that needs A's input.
    fn break_wait_cycle(&mut self, group: u64) -> Deliveries {
        let found = self.waiting.keys().filter(|(of, _)| *of == group).find_map(|(_, rank)| {
            let waiting =
                self.pending_wait(group, *rank).filter(|waiting| !self.lost.contains(&waiting.sender))?;
            let mut inputs =
                self.rounds.iter().filter(|((of, _), _)| *of == group).flat_map(|(_, round)| round);
            let (_, input) =
                inputs.find_map(|input| input.as_ref().filter(|(rank, _)| *rank == waiting.sender))?;
            let text =
                |bytes: Option<&&[u8]>| String::from_utf8_lossy(bytes.unwrap_or(&&[][..])).into_owned();
            let ([receiver, sender], call) = waiting.ranks_and_call()?;
            let their_call = text(Strings::all(input)?.get(2));
            Some(Mismatch::between((receiver, text(Some(&call))), (sender, their_call)))
        });
        let news = |mismatch| Frame::new(Kind::Broken, group, 0, (0, 0), from_mismatch(&mismatch));
        found.map_or_else(Vec::new, |mismatch| self.break_for(news(mismatch)))
    }

    /// Sends the frame `news`, with the reason why a group broke, to all ranks. Only the first
    /// reason of a group is sent.
    fn break_for(&mut self, news: Frame) -> Deliveries {
        if !self.broken.insert(news.group) {
            return Vec::new();
        }
        self.rounds.retain(|(group, _), _| *group != news.group);
        self.waiting.retain(|(group, _), _| *group != news.group);
        (0..self.world).map(|rank| (rank, news.clone())).collect()
    }

    /// Reports the loss of a rank to all other ranks, unless it has been reported before. `last` is
    /// the last frame of the lost rank. This method adds to it how many rounds of each group the
    /// rank has joined.
    pub(super) fn report_loss(&mut self, rank: usize, last: Frame) -> Deliveries {
        if !self.lost.insert(rank) {
            return Vec::new();
        }
        self.waiting.retain(|(_, receiver), _| *receiver != rank);
        let mut body = last.body.to_vec();
        body.extend(from_counts(self.rounds_joined.get(&rank).into_iter().flatten()));
        let news = Frame { from: rank, body: body.into(), ..last };
        (0..self.world).filter(|&other| other != rank).map(|other| (other, news.clone())).collect()
    }
}

impl Waiting {
    /// Returns the group ranks and the call.
    fn ranks_and_call(&self) -> Option<([usize; 2], &[u8])> {
        let (ranks, call) = self.ranks_and_call.split_at_checked(16)?;
        let ranks: Vec<_> = Numbers(ranks).map(|rank| rank as usize).collect();
        Some((ranks.try_into().ok()?, call))
    }
}

/// Encodes each count as two u64: the id of its group or work, then the count.
pub(super) fn from_counts<'a>(counts: impl Iterator<Item = (&'a u64, &'a u64)>) -> Vec<u8> {
    from_numbers(counts.flat_map(|(of, count)| [*of, *count]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(round: u64, group_rank: usize, size: usize) -> Frame {
        let mut body = Strings::default();
        [&b"hash"[..], b"counts", b"barrier", b""].into_iter().for_each(|bytes| body.push(bytes));
        Frame::new(Kind::Input, 7, round, (group_rank, size), body.0)
    }

    fn give_up(round: u64, members: &[u64]) -> Frame {
        let body = from_numbers([1_000].iter().chain(members).copied());
        Frame::new(Kind::GiveUp, 7, round, (0, 0), body)
    }

    fn message(to: usize) -> Frame {
        Frame::new(Kind::Message, 7, 0, (0, to), Vec::new())
    }

    /// The frame of group rank `group_rank`, which waits for a message from world rank `sender`. In
    /// these tests, the sender has the same number in the group as in the world.
    fn waiting(group_rank: u64, sender: usize, received: u64) -> Frame {
        let mut body = from_numbers([group_rank, sender as u64]);
        body.extend(b"exchange");
        Frame::new(Kind::Waiting, 7, received, (0, sender), body)
    }

    fn kinds(deliveries: &Deliveries) -> Vec<(usize, Kind)> {
        deliveries.iter().map(|(rank, frame)| (*rank, frame.kind)).collect()
    }

    #[test]
    fn frames_that_no_rank_sends_are_known() {
        let mut hub = Hub::new(3);
        assert!(hub.take(1, input(0, 0, 2)).is_some_and(|deliveries| deliveries.is_empty()));
        let bad = [
            input(1, 0, 1 << 40),
            input(1, 0, usize::MAX),
            input(1, 2, 2),
            // The round's first input has announced that the group has two ranks.
            input(0, 1, 3),
            input(u64::MAX, 0, 2),
            message(3),
            Frame::new(Kind::Ask, 7, 0, (1, usize::MAX), Vec::new()),
            Frame::new(Kind::Waiting, 7, 0, (1, 0), vec![0; 15]),
            give_up(0, &[0, 1, 2]),
            Frame::new(Kind::GiveUp, 7, 0, (0, 0), vec![0; 7]),
            Frame::new(Kind::Inputs, 7, 0, (0, 0), Vec::new()),
            Frame::new(Kind::Bye, 7, 0, (0, 0), Vec::new()),
        ];
        for frame in bad {
            let text = format!("{frame:?}");
            assert!(hub.take(2, frame).is_none(), "{text}");
        }
    }

    /// A rank cannot replace another rank's input.
    #[test]
    fn inputs_of_other_ranks_are_known() {
        let mut hub = Hub::new(3);
        assert!(hub.take(1, input(0, 1, 3)).is_some());
        for from in [1, 2] {
            assert!(hub.take(from, input(0, 1, 3)).is_none(), "again, from rank {from}");
        }
        // In the world, group ranks are the ranks.
        assert!(hub.take(2, Frame { group: WORLD, ..input(0, 1, 3) }).is_none());
        assert!(hub.take(2, Frame { group: WORLD, ..input(0, 1, 2) }).is_none());
        assert!(hub.take(2, Frame { group: WORLD, ..input(0, 2, 3) }).is_some());
    }

    /// The frame that reaches rank 0 first decides, so all ranks get the same outcome.
    #[test]
    fn a_round_is_complete_or_given_up() {
        let mut hub = Hub::new(2);
        assert!(hub.take(1, input(0, 1, 2)).unwrap().is_empty());
        let complete = hub.take(0, input(0, 0, 2)).unwrap();
        assert_eq!(kinds(&complete), [(0, Kind::Inputs), (1, Kind::Inputs)]);
        assert!(hub.take(1, give_up(0, &[0, 1])).unwrap().is_empty());

        assert!(hub.take(1, input(1, 1, 2)).unwrap().is_empty());
        let late = hub.take(1, give_up(1, &[0, 1])).unwrap();
        assert_eq!(kinds(&late), [(0, Kind::Late), (1, Kind::Late)]);
        assert_eq!(Numbers(&late[0].1.body).collect::<Vec<_>>(), [0]);
        assert!(hub.take(0, input(1, 0, 2)).unwrap().is_empty());
        assert!(hub.take(0, give_up(1, &[0, 1])).unwrap().is_empty());
    }

    #[test]
    fn a_wait_cycle_is_a_disagreement() {
        for input_first in [true, false] {
            let mut hub = Hub::new(3);
            let frames = [(0, input(4, 0, 3)), (2, waiting(2, 0, 0))];
            let [first, second] = if input_first {
                frames
            } else {
                let [a, b] = frames;
                [b, a]
            };
            assert!(hub.take(first.0, first.1).unwrap().is_empty());
            let news = hub.take(second.0, second.1).unwrap();
            assert_eq!(kinds(&news), [(0, Kind::Broken), (1, Kind::Broken), (2, Kind::Broken)]);
            let mismatch = super::super::frame::to_mismatch(&news[0].1.body).unwrap();
            assert_eq!((mismatch.left_rank, &*mismatch.left), (0, "barrier"));
            assert_eq!((mismatch.right_rank, &*mismatch.right), (2, "exchange"));
        }
    }

    /// The sender sent the message before it entered the round.
    #[test]
    fn a_message_on_its_way_makes_no_wait_cycle() {
        let mut hub = Hub::new(2);
        assert_eq!(kinds(&hub.take(0, message(1)).unwrap()), [(1, Kind::Message)]);
        assert!(hub.take(1, waiting(1, 0, 0)).unwrap().is_empty());
        assert!(hub.take(0, input(0, 0, 2)).unwrap().is_empty());
        assert_eq!(kinds(&hub.take(1, input(0, 1, 2)).unwrap()), [(0, Kind::Inputs), (1, Kind::Inputs)]);
        // The receiver waits for a second message, which nobody has sent.
        assert!(hub.take(0, input(1, 0, 2)).unwrap().is_empty());
        assert_eq!(kinds(&hub.take(1, waiting(1, 0, 1)).unwrap()), [(0, Kind::Broken), (1, Kind::Broken)]);
    }
}
