//! Messages from one rank to another. The sender copies a message into a queue, so that it never
//! waits.

use super::host::HostVec;
use crate::{
    comm::{Call, Incoming, Outgoing, call::never_received},
    device::{Cpu, each_dtype},
    error::{Error, Mismatch, Result},
    shard::Shape,
};
use std::collections::{BTreeMap, VecDeque};

/// A receiver's messages, by sender.
pub(super) type Mailbox = BTreeMap<usize, VecDeque<Message>>;

/// A tensor in transit.
#[derive(Debug)]
pub(super) struct Message {
    call: Call,
    shape: Shape,
    data: HostVec,
}

impl Message {
    pub(super) fn new(call: &Call, send: Outgoing<'_, Cpu>) -> Self {
        Self { call: *call, shape: send.shape, data: send.data.into() }
    }

    /// The error of a message that world rank `to` never received from world rank `from`.
    pub(super) fn never_received(&self, from: usize, to: usize) -> Error {
        let what = format!("{} {}, sent at {}", self.data.as_ref().dtype(), self.shape, self.call.site);
        never_received(from, to, &what)
    }

    /// Returns a mismatch if the element type or the shape differs from what rank `to` expects.
    pub(super) fn mismatch(&self, call: &Call, to: usize, recv: &Incoming<'_, Cpu>) -> Option<Mismatch> {
        let (sent, expected) = (self.data.as_ref().dtype(), recv.data.dtype());
        if sent == expected && self.shape == recv.shape {
            return None;
        }
        let text = |verb, dtype, shape, site| format!("exchange, {verb} {dtype} {shape} at {site}");
        Some(Mismatch {
            left_rank: recv.from,
            left: text("sending", sent, self.shape, self.call.site),
            right_rank: to,
            right: text("expecting", expected, recv.shape, call.site),
        })
    }

    /// Copies the elements to the receiver.
    pub(super) fn copy_to(&self, recv: Incoming<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyRef, self.data.as_ref(), data => match recv.data.of() {
            Some(to) => {
                to.copy_from_slice(data);
                Ok(())
            }
            None => Err(Error::invalid("exchange", "the message has another element type than the buffer")),
        })
    }
}
