//! What has arrived at a rank, and not been asked for yet.

use super::frame::{Body, Frame, Kind, Words, to_loss, to_mismatch};
use crate::error::{LostReason, Mismatch};
use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

/// What has arrived.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Complete rounds, by group and number.
    pub(super) rounds: HashMap<(u64, u64), Body>,
    /// Letters, by group and sender.
    letters: HashMap<(u64, usize), VecDeque<Body>>,
    /// How many letters were taken out, by group and sender.
    received: HashMap<(u64, usize), u64>,
    /// What has gone wrong, in the order in which rank 0 tells it: the first that concerns a call
    /// is its cause.
    pub(super) news: Vec<News>,
    /// By work and rank.
    pub(super) answers: HashMap<(u64, usize), u64>,
    /// The connections have ended: nothing arrives any more.
    pub(super) gone: bool,
    pub(super) closed: bool,
}

/// What has gone wrong.
#[derive(Debug)]
pub(super) enum News {
    /// A rank was lost, after it had been told of the loss of `root`; in how many rounds of a group
    /// it took part, and to how many steps of what it came beside them.
    Lost { rank: usize, reason: LostReason, root: Option<(usize, LostReason)>, taken: HashMap<u64, u64> },
    /// The ranks of a group disagree.
    Broken { group: u64, mismatch: Mismatch },
    /// Ranks were waited for for too long in a group. Nobody waits for them when it leaves.
    Late { group: u64, missing: Vec<usize>, after: Duration },
}

impl Inbox {
    /// Takes in what was sent to this rank.
    pub(super) fn take(&mut self, frame: Frame) {
        match frame.kind {
            Kind::Parts => drop(self.rounds.insert((frame.group, frame.round), frame.body)),
            Kind::Letter => {
                self.letters.entry((frame.group, frame.from)).or_default().push_back(frame.body);
            }
            Kind::Lost => {
                if !self.has_lost(frame.from) {
                    let words: Vec<_> = Words(&frame.body).collect();
                    let taken = words.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                    let root = frame.round.checked_sub(1);
                    let root = root.map(|rank| (rank as usize, to_loss(frame.group as usize)));
                    let (rank, reason) = (frame.from, to_loss(frame.to));
                    self.news.push(News::Lost { rank, reason, root, taken });
                }
            }
            Kind::Broken => {
                let mismatch = to_mismatch(&frame.body);
                let news = mismatch.map(|mismatch| News::Broken { group: frame.group, mismatch });
                self.news.extend(news);
            }
            Kind::Late => {
                let missing = Words(&frame.body).map(|rank| rank as usize).collect();
                let after = Duration::from_nanos(frame.round);
                self.news.push(News::Late { group: frame.group, missing, after });
            }
            Kind::Answer => drop(self.answers.insert((frame.group, frame.from), frame.round)),
            Kind::Bye => self.gone = true,
            Kind::Part | Kind::GiveUp | Kind::Ask | Kind::Stand => {}
        }
    }

    /// The next letter of a rank.
    pub(super) fn letter(&mut self, group: u64, from: usize) -> Option<Body> {
        let letter = self.letters.get_mut(&(group, from))?.pop_front()?;
        *self.received.entry((group, from)).or_default() += 1;
        Some(letter)
    }

    /// How many letters of a rank were taken out.
    pub(super) fn received(&self, group: u64, from: usize) -> u64 {
        self.received.get(&(group, from)).copied().unwrap_or(0)
    }

    /// A letter that was never taken out, and who sent it, where all ranks have left in order.
    pub(super) fn unread(&self) -> Option<(usize, &Body)> {
        let in_order = |news: &News| matches!(news, News::Lost { reason: LostReason::Left, root: None, .. });
        let mut letters = self.letters.iter().filter(|_| self.news.iter().all(in_order));
        letters.find_map(|((_, from), letters)| Some((*from, letters.front()?)))
    }

    /// How rank 0 was lost, if its connection is closed.
    pub(super) fn way_lost(&self) -> Option<LostReason> {
        self.lost(0).map(|(reason, _)| reason).filter(|_| self.gone)
    }

    /// How a rank was lost, and to what it had come, if it is lost.
    fn lost(&self, lost: usize) -> Option<(LostReason, &HashMap<u64, u64>)> {
        self.news.iter().find_map(|news| match news {
            News::Lost { rank, reason, taken, .. } if *rank == lost => Some((*reason, taken)),
            _ => None,
        })
    }

    /// Whether a rank has missed a deadline.
    pub(super) fn is_late(&self, late: usize) -> bool {
        self.news.iter().any(|news| matches!(news, News::Late { missing, .. } if missing.contains(&late)))
    }

    /// To how many steps of a work a rank has come, as far as it has said: in an answer, or when it
    /// left.
    pub(super) fn steps(&self, work: u64, rank: usize) -> Option<u64> {
        let last_words = || Some(self.lost(rank)?.1.get(&work).copied().unwrap_or(0));
        self.answers.get(&(work, rank)).copied().or_else(last_words)
    }

    /// Whether a rank is lost.
    pub(super) fn has_lost(&self, lost: usize) -> bool {
        self.lost(lost).is_some()
    }
}
