//! Messages from one rank of a group to another.

use super::{
    Cause, Link, MAX_PAYLOAD, REPORT_AFTER, copy_to, damaged,
    frame::{Body, Frame, Kind, Strings, from_mismatch, from_numbers},
    inbox::Inbox,
};
use crate::{
    comm::{
        Call, Incoming, Outgoing,
        host::{HostVec, to_bytes},
    },
    device::Cpu,
    error::{LostReason, Mismatch, Result},
};

impl Link {
    /// Sends a tensor to another rank, without waiting for the receiver.
    pub(super) fn send(&self, call: &Call, send: Outgoing<'_, Cpu>) -> Result<()> {
        let obstacle = self.transport.with_inbox(|inbox| self.cause(inbox, |rank, _, _| rank == send.to));
        if let Some(cause) = obstacle {
            return Err(self.error(call, &cause));
        }
        let (what, site) = (format!("{} {}", send.data.dtype(), send.shape), call.site.to_string());
        let route = (self.members[self.rank], self.members[send.to]);
        let bytes = to_bytes(send.data);
        for begin in (0..bytes.len().max(1)).step_by(MAX_PAYLOAD) {
            let mut message = Strings::default();
            message.push(what.as_bytes());
            message.push(site.as_bytes());
            message.push(&bytes[begin..bytes.len().min(begin + MAX_PAYLOAD)]);
            self.transport.send(Frame::new(Kind::Message, self.group, 0, route, message.0));
        }
        Ok(())
    }

    /// Waits for a tensor from another rank.
    pub(super) fn receive(&self, call: &Call, recv: Incoming<'_, Cpu>) -> Result<()> {
        let expected = format!("{} {}", recv.data.dtype(), recv.shape);
        let len = recv.data.len().saturating_mul(recv.data.dtype().size());
        let mut bytes = Vec::new();
        for _ in (0..len.max(1)).step_by(MAX_PAYLOAD) {
            let message = self.next_message(call, recv.from)?;
            let message =
                Strings::all(&message).filter(|message| message.len() == 3).ok_or_else(|| damaged(call))?;
            if message[0] != expected.as_bytes() {
                let text = |bytes| String::from_utf8_lossy(bytes);
                let mismatch = Mismatch {
                    left_rank: recv.from,
                    left: format!("exchange, sending {} at {}", text(message[0]), text(message[1])),
                    right_rank: self.rank,
                    right: format!("exchange, expecting {expected} at {}", call.site),
                };
                let news = Frame::new(Kind::Broken, self.group, 0, (0, 0), from_mismatch(&mismatch));
                return Err(self.break_for(call, news, Cause::Disagreement(Box::new(mismatch))));
            }
            bytes.extend(message[2]);
        }
        let data = HostVec::from_bytes(recv.data.dtype(), &bytes).ok_or_else(|| damaged(call))?;
        copy_to(call, &data, recv.data)
    }

    /// Waits for the next message from a rank of the group.
    fn next_message(&self, call: &Call, from: usize) -> Result<Body> {
        let sender = self.members[from];
        let mut found = |inbox: &mut Inbox| {
            inbox.take_message(self.group, sender).map(Ok).or_else(|| {
                let stops = |rank, reason, _: &dyn Fn(u64) -> u64| rank == from || reason != LostReason::Left;
                self.cause(inbox, stops).map(Err)
            })
        };
        let deadline = self.transport.deadline;
        let message = self.transport.wait(deadline.min(REPORT_AFTER), &mut found).or_else(|| {
            self.transport.send(self.waiting_frame(call, from));
            self.transport.wait(deadline.saturating_sub(REPORT_AFTER), found)
        });
        match message {
            Some(Ok(message)) => Ok(message),
            Some(Err(cause)) => Err(self.error(call, &cause)),
            None => Err(self.deadline_error(call, vec![from], deadline)),
        }
    }

    /// The frame that informs rank 0 that this rank waits for a message from rank `from`.
    fn waiting_frame(&self, call: &Call, from: usize) -> Frame {
        let sender = self.members[from];
        let received = self.transport.with_inbox(|inbox| inbox.received(self.group, sender));
        let mut body = from_numbers([self.rank, from].map(|rank| rank as u64));
        body.extend(call.to_string().as_bytes());
        Frame::new(Kind::Waiting, self.group, received, (self.transport.rank, sender), body)
    }
}
