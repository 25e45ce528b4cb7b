//! A rank's inbox: the contents of the frames that have arrived, until the rank's thread reads
//! them.

use super::frame::{Body, Frame, Kind, Numbers, to_loss, to_mismatch};
use crate::error::{LostReason, Mismatch};
use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

/// The contents of the frames that have arrived at this rank.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// The inputs of complete rounds, by group and round number.
    pub(super) rounds: HashMap<(u64, u64), Body>,
    /// Messages that this rank's program has not received yet, by group and sender.
    messages: HashMap<(u64, usize), VecDeque<Body>>,
    /// The number of messages that this rank's program has received, by group and sender.
    received: HashMap<(u64, usize), u64>,
    /// Failures, in the order in which rank 0 sends them. The first failure that concerns a call is
    /// the cause of the call's error.
    pub(super) news: Vec<News>,
    /// The number of external steps that a rank has reported in an answer, by work and rank.
    pub(super) answers: HashMap<(u64, usize), u64>,
    /// Whether the connections have ended, so that no frame arrives any more.
    pub(super) gone: bool,
    pub(super) closed: bool,
}

/// A failure that a frame reports.
#[derive(Debug)]
pub(super) enum News {
    /// Rank `rank` was lost. If a call of that rank had failed before because yet another rank was
    /// lost, `root` is the first such rank. `progress` has the number of rounds by group, and of
    /// external steps by work, that rank `rank` has reached.
    Lost { rank: usize, reason: LostReason, root: Option<(usize, LostReason)>, progress: HashMap<u64, u64> },
    /// The ranks of a group made different calls.
    Broken { group: u64, mismatch: Mismatch },
    /// Some ranks of a group missed a deadline. A rank that closes its connections does not wait
    /// for them.
    Late { group: u64, missing: Vec<usize>, after: Duration },
}

impl Inbox {
    /// Accepts a frame sent to this rank.
    pub(super) fn accept(&mut self, frame: Frame) {
        match frame.kind {
            Kind::Inputs => drop(self.rounds.insert((frame.group, frame.round), frame.body)),
            Kind::Message => {
                self.messages.entry((frame.group, frame.from)).or_default().push_back(frame.body);
            }
            Kind::Lost => {
                if !self.has_lost(frame.from) {
                    let numbers: Vec<_> = Numbers(&frame.body).collect();
                    let progress = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                    let root = frame.round.checked_sub(1);
                    let root = root.map(|rank| (rank as usize, to_loss(frame.group as usize)));
                    let (rank, reason) = (frame.from, to_loss(frame.to));
                    self.news.push(News::Lost { rank, reason, root, progress });
                }
            }
            Kind::Broken => {
                let mismatch = to_mismatch(&frame.body);
                let news = mismatch.map(|mismatch| News::Broken { group: frame.group, mismatch });
                self.news.extend(news);
            }
            Kind::Late => {
                let missing = Numbers(&frame.body).map(|rank| rank as usize).collect();
                let after = Duration::from_nanos(frame.round);
                self.news.push(News::Late { group: frame.group, missing, after });
            }
            Kind::Answer => drop(self.answers.insert((frame.group, frame.from), frame.round)),
            Kind::Bye => self.gone = true,
            Kind::Input | Kind::GiveUp | Kind::Ask | Kind::Waiting => {}
        }
    }

    /// Removes and returns the next message from rank `from`, and counts it as received.
    pub(super) fn take_message(&mut self, group: u64, from: usize) -> Option<Body> {
        let message = self.messages.get_mut(&(group, from))?.pop_front()?;
        *self.received.entry((group, from)).or_default() += 1;
        Some(message)
    }

    /// Returns the number of messages from rank `from` that this rank's program has received.
    pub(super) fn received(&self, group: u64, from: usize) -> u64 {
        self.received.get(&(group, from)).copied().unwrap_or(0)
    }

    /// Returns a message that this rank's program never received, and its sender. Returns none if a
    /// rank was lost through a failure, which may be why the message was never received.
    pub(super) fn unread(&self) -> Option<(usize, &Body)> {
        let in_order = |news: &News| matches!(news, News::Lost { reason: LostReason::Left, root: None, .. });
        let mut messages = self.messages.iter().filter(|_| self.news.iter().all(in_order));
        messages.find_map(|((_, from), messages)| Some((*from, messages.front()?)))
    }

    /// Returns the reason why rank 0 was lost, if its connection has ended.
    pub(super) fn rank0_lost(&self) -> Option<LostReason> {
        self.lost(0).map(|(reason, _)| reason).filter(|_| self.gone)
    }

    /// Returns the reason why a rank was lost, and its progress; none if the rank is not lost.
    fn lost(&self, lost: usize) -> Option<(LostReason, &HashMap<u64, u64>)> {
        self.news.iter().find_map(|news| match news {
            News::Lost { rank, reason, progress, .. } if *rank == lost => Some((*reason, progress)),
            _ => None,
        })
    }

    /// Whether a rank has missed a deadline.
    pub(super) fn is_late(&self, late: usize) -> bool {
        self.news.iter().any(|news| matches!(news, News::Late { missing, .. } if missing.contains(&late)))
    }

    /// Returns the number of steps of `work` that a rank has reported, in an answer or when it
    /// left.
    pub(super) fn steps(&self, work: u64, rank: usize) -> Option<u64> {
        let reported = || Some(self.lost(rank)?.1.get(&work).copied().unwrap_or(0));
        self.answers.get(&(work, rank)).copied().or_else(reported)
    }

    /// Whether a rank is lost.
    pub(super) fn has_lost(&self, lost: usize) -> bool {
        self.lost(lost).is_some()
    }
}
