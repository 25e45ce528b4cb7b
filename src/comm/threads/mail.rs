//! Messages from one rank to another: copied into a queue, so that a sender never waits.

use super::{host::HostVec, shared::Shared};
use crate::{
    comm::{Call, Incoming, Outgoing, call::never_received},
    device::{Cpu, each_dtype},
    error::{Error, Mismatch, Result},
    shard::Shape,
};

/// A tensor under way.
#[derive(Debug)]
pub(super) struct Letter {
    call: Call,
    shape: Shape,
    data: HostVec,
}

impl Drop for Shared {
    /// Notes what was sent and never received, unless the group was broken, which explains it.
    fn drop(&mut self) {
        if !self.ended_well() {
            return;
        }
        for (to, mail) in self.mail.iter_mut().enumerate() {
            let mail = std::mem::take(mail.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()));
            let letters =
                mail.into_iter().flat_map(|(from, queue)| queue.into_iter().map(move |it| (from, it)));
            for (from, Letter { call, shape, data }) in letters {
                let [from, to] = [from, to].map(|rank| self.members[rank]);
                let what = format!("{} {shape}, sent at {}", data.as_ref().dtype(), call.site);
                let mut unread = self.unread.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                unread.push((to, never_received(from, to, &what)));
            }
        }
    }
}

impl Shared {
    pub(super) fn send(&self, call: &Call, from: usize, send: Outgoing<'_, Cpu>) -> Result<()> {
        if let Some(error) = self.obstacle(call, || vec![send.to]) {
            return Err(error);
        }
        let letter = Letter { call: *call, shape: send.shape, data: send.data.into() };
        self.lock(&self.mail[send.to]).entry(from).or_default().push_back(letter);
        self.news.notify();
        Ok(())
    }

    pub(super) fn receive(&self, call: &Call, to: usize, recv: Incoming<'_, Cpu>) -> Result<()> {
        let take = || self.lock(&self.mail[to]).get_mut(&recv.from)?.pop_front();
        let letter = self.wait_for(call, to, take, || vec![recv.from])?;
        let (sent, expected) = (letter.data.as_ref().dtype(), recv.data.dtype());
        if sent != expected || letter.shape != recv.shape {
            let words = |verb, dtype, shape, site| format!("exchange, {verb} {dtype} {shape} at {site}");
            return Err(self.disagree(Mismatch {
                left_rank: recv.from,
                left: words("sending", sent, letter.shape, letter.call.site),
                right_rank: to,
                right: words("expecting", expected, recv.shape, call.site),
            }));
        }
        each_dtype!(AnyRef, letter.data.as_ref(), data => match recv.data.of() {
            Some(to) => {
                to.copy_from_slice(data);
                Ok(())
            }
            None => Err(Error::invalid("exchange", "the message changed its element")),
        })
    }
}
