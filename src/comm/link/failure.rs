//! Why a group breaks: the failures that rank 0 reports to a rank, and those that a rank
//! reports to rank 0.

use super::{
    Cause, Link,
    frame::{Frame, Kind, from_numbers},
    inbox::{Inbox, News},
    nanoseconds,
};
use crate::{
    comm::{Call, ExternalStep},
    error::{Error, LostReason},
};
use std::time::Duration;

impl Link {
    /// Records `cause` as the group's failure, unless the group has one already. Returns the error
    /// that `call` gets because of `cause`.
    pub(super) fn fail(&self, call: &Call, cause: Cause) -> Error {
        let error = self.error(call, &cause);
        self.failed.borrow_mut().get_or_insert(cause);
        error
    }

    /// Breaks the group because the `missing` ranks did not join the call within `after`.
    pub(super) fn deadline_error(&self, call: &Call, missing: Vec<usize>, after: Duration) -> Error {
        let ranks: Vec<_> = missing.iter().map(|&rank| self.members[rank]).collect();
        self.break_for(call, self.late_frame(&ranks, after), Cause::Deadline { missing, after })
    }

    /// The frame that reports that the world ranks `ranks` missed the deadline `after`.
    pub(super) fn late_frame(&self, ranks: &[usize], after: Duration) -> Frame {
        let body = from_numbers(ranks.iter().map(|&rank| rank as u64));
        Frame::new(Kind::Late, self.group, nanoseconds(after), (0, 0), body)
    }

    /// Breaks the group: reports a failure to rank 0 in the frame `news`, and returns the error of
    /// `call`. If several ranks report failures, rank 0 sends only the first report that reaches it
    /// to all ranks. The returned error describes the failure that rank 0 sent or, if rank 0 does
    /// not answer, `cause`.
    pub(super) fn break_for(&self, call: &Call, news: Frame, cause: Cause) -> Error {
        self.transport.send(news.clone());
        let first = self
            .transport
            .wait(self.transport.decision_timeout(), |inbox| self.cause(inbox, |_, _, _| false));
        let cause = first.unwrap_or_else(|| {
            self.transport.accept(news);
            cause
        });
        self.fail(call, cause)
    }

    /// Of the ranks that a step needs, returns those that have not reached it or do not answer.
    pub(super) fn behind(&self, step: ExternalStep) -> Vec<usize> {
        let needed = (0..self.members.len()).filter(|&rank| rank != self.rank && step.needs(rank));
        let needed: Vec<usize> = needed.map(|rank| self.members[rank]).collect();
        let behind = self.transport.behind(step.work, step.number + 1, &needed);
        (0..self.members.len()).filter(|&rank| behind.contains(&self.members[rank])).collect()
    }

    pub(super) fn error(&self, call: &Call, cause: &Cause) -> Error {
        match cause {
            Cause::Lost { rank, reason } => self.transport.record_loss(self.members[*rank], *reason),
            Cause::Relay { reason } => self.transport.record_loss(0, *reason),
            Cause::Disagreement(_) | Cause::Deadline { .. } => {}
        }
        cause.error(call, &self.name)
    }

    /// Returns the first failure in the inbox that breaks this group. For a lost rank of the group,
    /// `stops` decides whether its loss is such a failure. The arguments of `stops` are the lost
    /// rank's number in the group, the reason of the loss, and a function that returns how many
    /// rounds of a group, or steps of a work, the lost rank has reached. The function's argument is
    /// the id of the group or work.
    pub(super) fn cause(
        &self,
        inbox: &Inbox,
        stops: impl Fn(usize, LostReason, &dyn Fn(u64) -> u64) -> bool,
    ) -> Option<Cause> {
        let group_rank = |rank| self.group_rank(rank);
        let first = inbox.news.iter().find_map(|news| match news {
            News::Broken { group, mismatch } if *group == self.group => {
                Some(Cause::Disagreement(Box::new(mismatch.clone())))
            }
            News::Late { group, missing, after } if *group == self.group => {
                let missing = missing.iter().filter_map(|&rank| group_rank(rank)).collect();
                Some(Cause::Deadline { missing, after: *after })
            }
            News::Broken { .. } | News::Late { .. } => None,
            News::Lost { rank, reason, root, progress } => {
                let rank = group_rank(*rank)?;
                let count = |of| progress.get(&of).copied().unwrap_or(0);
                // If the lost rank left because another rank had been lost before, the error names
                // that other rank.
                let first = root.and_then(|(root, reason)| Some((group_rank(root)?, reason)));
                let (root, how) = first.unwrap_or((rank, *reason));
                stops(rank, *reason, &count).then_some(Cause::Lost { rank: root, reason: how })
            }
        });
        // Without rank 0, no rank's frames arrive any more.
        first.or_else(|| {
            let reason = inbox.rank0_lost()?;
            Some(group_rank(0).map_or(Cause::Relay { reason }, |rank| Cause::Lost { rank, reason }))
        })
    }

    /// Returns the error of a call if the group is broken. If a rank left without an error
    /// (`LostReason::Left`), the group is broken only if `needs` returns true. The arguments of
    /// `needs` are the rank and the function that [`Link::cause`] passes to `stops`.
    pub(super) fn obstacle_if(
        &self,
        call: &Call,
        needs: impl Fn(usize, &dyn Fn(u64) -> u64) -> bool,
    ) -> Option<Error> {
        if let Some(cause) = &*self.failed.borrow() {
            return Some(self.error(call, cause));
        }
        let stops =
            |rank, reason, count: &dyn Fn(u64) -> u64| reason != LostReason::Left || needs(rank, count);
        let cause = self.transport.with_inbox(|inbox| self.cause(inbox, stops));
        cause.map(|cause| self.error(call, &cause))
    }
}
