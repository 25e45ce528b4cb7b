//! What rank 0 knows of all ranks, and what it sends to whom because of a frame. It sends nothing
//! itself.
//!
//! A round of a group is complete when the parts of all its ranks are there, or the group is broken
//! before: rank 0 decides which came first, so that all ranks are told the same. What a lost rank
//! had given still counts: its last words say in how many rounds of each group it took part, and
//! only who waits for a later one gives up.

use super::frame::{Body, Frame, Kind, Strings, Words, from_mismatch, from_words};
use crate::error::Mismatch;
use std::collections::{HashMap, HashSet};

/// See the module's words.
#[derive(Debug)]
pub(super) struct Hub {
    world: usize,
    /// The rounds that are not complete, by group and number.
    rounds: HashMap<(u64, u64), Round>,
    /// In how many rounds a rank took part, by group.
    taken: HashMap<usize, HashMap<u64, u64>>,
    /// How many messages were handed on, by group, sender and receiver.
    letters: HashMap<(u64, usize, usize), u64>,
    /// Who waits for a message, by group and rank.
    stands: HashMap<(u64, usize), Stand>,
    broken: HashSet<u64>,
    lost: HashSet<usize>,
}

/// The parts of a round, by place in the group, with the rank that gave each.
type Round = Vec<Option<(usize, Body)>>;

/// What a rank waits for.
#[derive(Debug)]
struct Stand {
    /// The rank whose message it is.
    sender: usize,
    /// How many of its messages have been received before.
    received: u64,
    /// The places of the rank that waits and of the sender in the group, and the call.
    words: Body,
}

/// Frames, and to which rank each goes.
pub(super) type Post = Vec<(usize, Frame)>;

impl Hub {
    pub(super) fn new(world: usize) -> Self {
        let (rounds, taken, letters, stands, broken, lost) = Default::default();
        Self { world, rounds, taken, letters, stands, broken, lost }
    }

    /// What has to be sent because of a frame from rank `from`; none if no rank of this world sends
    /// such a frame.
    pub(super) fn take(&mut self, from: usize, frame: Frame) -> Option<Post> {
        match frame.kind {
            Kind::Part => self.part(from, frame),
            Kind::GiveUp => self.give_up(frame),
            Kind::Stand => self.stand(from, frame),
            Kind::Letter | Kind::Ask | Kind::Answer if frame.to < self.world => {
                if frame.kind == Kind::Letter {
                    *self.letters.entry((frame.group, from, frame.to)).or_default() += 1;
                }
                Some(vec![(frame.to, Frame { from, ..frame })])
            }
            Kind::Broken => Some(self.break_for(frame)),
            Kind::Late => {
                let missing = Words(&frame.body).map(|rank| self.first_of(frame.group, rank as usize) as u64);
                let body = from_words(missing).into();
                Some(self.break_for(Frame { body, ..frame }))
            }
            _ => None,
        }
    }

    fn part(&mut self, from: usize, frame: Frame) -> Option<Post> {
        let (group, place, size) = (frame.group, frame.from, frame.to);
        if size > self.world || place >= size {
            return None;
        }
        if self.broken.contains(&group) {
            return Some(Vec::new());
        }
        let key = (group, frame.round);
        let round = self.rounds.entry(key).or_insert_with(|| vec![None; size]);
        if round.len() != size {
            return None;
        }
        round[place] = Some((from, frame.body));
        self.stands.remove(&(group, from));
        self.taken.entry(from).or_default().insert(group, frame.round.checked_add(1)?);
        if round.iter().any(Option::is_none) {
            return Some(self.circle(group));
        }
        let parts: Vec<_> = self.rounds.remove(&key).into_iter().flatten().flatten().collect();
        let mut all = Strings::default();
        parts.iter().for_each(|(_, part)| all.push(part));
        let reply = Frame::new(Kind::Parts, group, frame.round, (0, 0), all.0);
        Some(parts.iter().map(|(rank, _)| (*rank, reply.clone())).collect())
    }

    /// A rank waits no longer for a round: that breaks the group, unless the round is complete or
    /// something else was quicker.
    fn give_up(&mut self, frame: Frame) -> Option<Post> {
        let Some(round) = self.rounds.get(&(frame.group, frame.round)) else { return Some(Vec::new()) };
        let mut words = Words(&frame.body);
        let (after, members) = (words.next()?, words.collect::<Vec<_>>());
        if members.len() != round.len() {
            return None;
        }
        let missing = members.iter().zip(round).filter(|(_, part)| part.is_none());
        let body = from_words(missing.map(|(rank, _)| *rank));
        Some(self.break_for(Frame::new(Kind::Late, frame.group, after, (0, 0), body)))
    }

    /// A rank waits for a message.
    fn stand(&mut self, from: usize, frame: Frame) -> Option<Post> {
        let stand = Stand { sender: frame.to, received: frame.round, words: frame.body };
        stand.places()?;
        if !self.broken.contains(&frame.group) {
            self.stands.insert((frame.group, from), stand);
        }
        Some(self.circle(frame.group))
    }

    /// Whether a rank still waits for a message that was not sent.
    fn waits(&self, group: u64, rank: usize) -> Option<&Stand> {
        let stand = self.stands.get(&(group, rank))?;
        let sent = self.letters.get(&(group, stand.sender, rank)).copied().unwrap_or(0);
        (sent == stand.received).then_some(stand)
    }

    /// The rank that a rank waits for, or the one that this one waits for, and so on to the last.
    fn first_of(&self, group: u64, rank: usize) -> usize {
        let mut last = rank;
        for _ in 0..self.world {
            match self.waits(group, last) {
                Some(stand) => last = stand.sender,
                None => return last,
            }
        }
        // All of them wait.
        rank
    }

    /// A waits for a message of B, while B waits in a round that needs A: they disagree.
    fn circle(&mut self, group: u64) -> Post {
        let found = self.stands.keys().filter(|(of, _)| *of == group).find_map(|(_, rank)| {
            let stand = self.waits(group, *rank).filter(|stand| !self.lost.contains(&stand.sender))?;
            let mut parts =
                self.rounds.iter().filter(|((of, _), _)| *of == group).flat_map(|(_, round)| round);
            let (_, part) = parts.find_map(|part| part.as_ref().filter(|(rank, _)| *rank == stand.sender))?;
            let words =
                |bytes: Option<&&[u8]>| String::from_utf8_lossy(bytes.unwrap_or(&&[][..])).into_owned();
            let ([waits, sender], call) = stand.places()?;
            let their_call = words(Strings::all(part)?.get(2));
            Some(Mismatch::between((waits, words(Some(&call))), (sender, their_call)))
        });
        let news = |mismatch| Frame::new(Kind::Broken, group, 0, (0, 0), from_mismatch(&mismatch));
        found.map_or_else(Vec::new, |mismatch| self.break_for(news(mismatch)))
    }

    /// Tells all ranks what broke a group. The first news of a group counts.
    fn break_for(&mut self, news: Frame) -> Post {
        if !self.broken.insert(news.group) {
            return Vec::new();
        }
        self.rounds.retain(|(group, _), _| *group != news.group);
        self.stands.retain(|(group, _), _| *group != news.group);
        (0..self.world).map(|rank| (rank, news.clone())).collect()
    }

    /// The news of a lost rank, whose last words are given, once.
    pub(super) fn lose(&mut self, rank: usize, last: Frame) -> Post {
        if !self.lost.insert(rank) {
            return Vec::new();
        }
        self.stands.retain(|(_, waits), _| *waits != rank);
        let mut body = last.body.to_vec();
        body.extend(pairs(self.taken.get(&rank).into_iter().flatten()));
        let news = Frame { from: rank, body: body.into(), ..last };
        (0..self.world).filter(|&other| other != rank).map(|other| (other, news.clone())).collect()
    }
}

impl Stand {
    /// The places, and the call.
    fn places(&self) -> Option<([usize; 2], &[u8])> {
        let (places, call) = self.words.split_at_checked(16)?;
        let places: Vec<_> = Words(places).map(|place| place as usize).collect();
        Some((places.try_into().ok()?, call))
    }
}

pub(super) fn pairs<'a>(counts: impl Iterator<Item = (&'a u64, &'a u64)>) -> Vec<u8> {
    from_words(counts.flat_map(|(of, count)| [*of, *count]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(round: u64, place: usize, size: usize) -> Frame {
        let mut body = Strings::default();
        [&b"hash"[..], b"counts", b"barrier", b""].into_iter().for_each(|words| body.push(words));
        Frame::new(Kind::Part, 7, round, (place, size), body.0)
    }

    fn give_up(round: u64, members: &[u64]) -> Frame {
        let body = from_words([1_000].iter().chain(members).copied());
        Frame::new(Kind::GiveUp, 7, round, (0, 0), body)
    }

    fn letter(to: usize) -> Frame {
        Frame::new(Kind::Letter, 7, 0, (0, to), Vec::new())
    }

    /// The rank at `place` waits for a message of rank `sender`, whose place is its number.
    fn stand(place: u64, sender: usize, received: u64) -> Frame {
        let mut body = from_words([place, sender as u64]);
        body.extend(b"exchange");
        Frame::new(Kind::Stand, 7, received, (0, sender), body)
    }

    fn kinds(post: &Post) -> Vec<(usize, Kind)> {
        post.iter().map(|(rank, frame)| (*rank, frame.kind)).collect()
    }

    #[test]
    fn frames_that_no_rank_sends_are_known() {
        let mut hub = Hub::new(3);
        assert!(hub.take(1, part(0, 0, 2)).is_some_and(|post| post.is_empty()));
        let bad = [
            part(1, 0, 1 << 40),
            part(1, 0, usize::MAX),
            part(1, 2, 2),
            // A round of two, by what was said of it first.
            part(0, 1, 3),
            part(u64::MAX, 0, 2),
            letter(3),
            Frame::new(Kind::Ask, 7, 0, (1, usize::MAX), Vec::new()),
            Frame::new(Kind::Stand, 7, 0, (1, 0), vec![0; 15]),
            give_up(0, &[0, 1, 2]),
            Frame::new(Kind::GiveUp, 7, 0, (0, 0), vec![0; 7]),
            Frame::new(Kind::Parts, 7, 0, (0, 0), Vec::new()),
            Frame::new(Kind::Bye, 7, 0, (0, 0), Vec::new()),
        ];
        for frame in bad {
            let words = format!("{frame:?}");
            assert!(hub.take(2, frame).is_none(), "{words}");
        }
    }

    /// Whoever is first: all ranks get the same.
    #[test]
    fn a_round_is_complete_or_given_up() {
        let mut hub = Hub::new(2);
        assert!(hub.take(1, part(0, 1, 2)).unwrap().is_empty());
        let complete = hub.take(0, part(0, 0, 2)).unwrap();
        assert_eq!(kinds(&complete), [(0, Kind::Parts), (1, Kind::Parts)]);
        assert!(hub.take(1, give_up(0, &[0, 1])).unwrap().is_empty());

        assert!(hub.take(1, part(1, 1, 2)).unwrap().is_empty());
        let late = hub.take(1, give_up(1, &[0, 1])).unwrap();
        assert_eq!(kinds(&late), [(0, Kind::Late), (1, Kind::Late)]);
        assert_eq!(Words(&late[0].1.body).collect::<Vec<_>>(), [0]);
        assert!(hub.take(0, part(1, 0, 2)).unwrap().is_empty());
        assert!(hub.take(0, give_up(1, &[0, 1])).unwrap().is_empty());
    }

    #[test]
    fn who_waits_in_a_circle_disagrees() {
        for part_first in [true, false] {
            let mut hub = Hub::new(3);
            let frames = [(0, part(4, 0, 3)), (2, stand(2, 0, 0))];
            let [first, second] = if part_first {
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

    /// The message was sent before its sender came to the round.
    #[test]
    fn a_message_on_its_way_makes_no_circle() {
        let mut hub = Hub::new(2);
        assert_eq!(kinds(&hub.take(0, letter(1)).unwrap()), [(1, Kind::Letter)]);
        assert!(hub.take(1, stand(1, 0, 0)).unwrap().is_empty());
        assert!(hub.take(0, part(0, 0, 2)).unwrap().is_empty());
        assert_eq!(kinds(&hub.take(1, part(0, 1, 2)).unwrap()), [(0, Kind::Parts), (1, Kind::Parts)]);
        // It waits for another one, which does not come.
        assert!(hub.take(0, part(1, 0, 2)).unwrap().is_empty());
        assert_eq!(kinds(&hub.take(1, stand(1, 0, 1)).unwrap()), [(0, Kind::Broken), (1, Kind::Broken)]);
    }
}
