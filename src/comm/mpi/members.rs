//! A group of processes: its ranks, their departures, and the failure that broke the group.

use super::{
    engine::{CALL, Close, Engine, TAGS},
    message::{Message, code_of, field, head, loss_of, pack},
};
use crate::{
    comm::{Call, cause::Cause},
    error::{Error, LostReason, Mismatch, Result},
};
use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

/// The first number of a message with tag [`CALL`] is the message's kind.
const KIND_CALL: u64 = 0;
const KIND_LEAVE: u64 = 1;
const KIND_DISAGREEMENT: u64 = 2;
const NO_RANK: u64 = u64::MAX;

pub(super) struct Members {
    pub(super) name: String,
    /// The world rank of each rank of the group.
    pub(super) ranks: Vec<usize>,
    pub(super) rank: usize,
    pub(super) block: u64,
    /// The number of collectives that this rank has started in the group.
    pub(super) flights: Cell<u64>,
    /// Whether the ranks' calls differ and the texts of the calls are still in transit.
    pub(super) disputed: Cell<bool>,
    failed: RefCell<Option<Cause>>,
    left: Cell<bool>,
    engine: Weak<Engine>,
}

/// Informs the other ranks that this rank leaves. Runs after this rank has dropped the group's
/// communicator and all its collectives.
impl Drop for Members {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.upgrade() {
            self.leave(
                &engine,
                if std::thread::panicking() { LostReason::Panicked } else { LostReason::Left },
            );
            engine.forget(self.block, self.failed.borrow().is_some());
        }
    }
}

impl Members {
    pub(super) fn new(
        engine: &Rc<Engine>,
        name: String,
        ranks: Vec<usize>,
        rank: usize,
        block: u64,
    ) -> Rc<Self> {
        let (flights, disputed, failed, left) = Default::default();
        let here = Rc::downgrade(engine);
        let members =
            Rc::new(Self { name, ranks, rank, block, flights, disputed, failed, left, engine: here });
        let group: Weak<Self> = Rc::downgrade(&members);
        engine.join(group, block, &members.ranks);
        members
    }

    pub(super) fn size(&self) -> usize {
        self.ranks.len()
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.size()).filter(|&rank| rank != self.rank)
    }

    /// Returns a tag of this group's tag block.
    pub(super) fn tag(&self, kind: i32) -> i32 {
        self.block as i32 * TAGS + kind
    }

    pub(super) fn send(&self, engine: &Engine, to: usize, kind: i32, message: &Rc<Vec<u64>>) {
        engine.send(self.ranks[to], self.tag(kind), message);
    }

    pub(super) fn take(&self, engine: &Engine, from: usize, kind: i32) -> Option<Message> {
        engine.take(self.ranks[from], self.tag(kind))
    }

    /// Sends all other ranks a call with its payload.
    pub(super) fn call(&self, engine: &Engine, call: &Call, payload: &[u8]) {
        let message = pack(&[
            bytemuck::cast_slice(&[KIND_CALL, call.fingerprint(), call.messages[0], call.messages[1]]),
            payload,
        ]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
    }

    /// Removes the next call of a rank from the queue, if it has arrived. Returns the call's
    /// fingerprint, the numbers of messages that the rank sent and received before the call, and
    /// the message that carries the call.
    pub(super) fn take_call(&self, engine: &Engine, peer: usize) -> Option<(u64, [u64; 2], Message)> {
        // A departure or a disagreement is a rank's last message, and stays in the queue.
        let calls = |message: &[u64]| Some(head::<4>(message)?[0] == KIND_CALL);
        if !engine.first(self.ranks[peer], self.tag(CALL), calls)? {
            return None;
        }
        let message = self.take(engine, peer, CALL)?;
        let [_, fingerprint, sent, received] = head(&message.0)?;
        Some((fingerprint, [sent, received], message))
    }

    /// Informs all other ranks that this rank leaves, but only once. If this rank knows that
    /// another rank was lost, the message also names the first such rank and the reason.
    pub(super) fn leave(&self, engine: &Engine, loss: LostReason) {
        if self.left.replace(true) {
            return;
        }
        let (root, how) =
            engine.first_loss().map_or((NO_RANK, 0), |(rank, loss)| (rank as u64, code_of(loss)));
        let message = pack(&[bytemuck::cast_slice(&[KIND_LEAVE, code_of(loss), root, how])]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
    }

    /// Whether a rank has left the group.
    pub(super) fn has_left(&self, engine: &Engine, rank: usize) -> bool {
        rank == self.rank || self.loss(engine, rank).is_some()
    }

    /// Returns the reason for which a rank left. If its last message names a lost rank, also
    /// returns that lost rank and the reason of the loss.
    fn loss(&self, engine: &Engine, rank: usize) -> Option<(LostReason, Option<(usize, LostReason)>)> {
        engine.last(self.ranks[rank], self.tag(CALL), |message| {
            let [kind, loss, root, how] = head(message)?;
            let root = (root != NO_RANK).then(|| (root as usize, loss_of(how)));
            (kind == KIND_LEAVE).then(|| (loss_of(loss), root))
        })
    }

    /// Sends all other ranks a disagreement that only this rank has found.
    pub(super) fn send_disagreement(&self, engine: &Engine, mismatch: &Mismatch) {
        let ranks = [KIND_DISAGREEMENT, mismatch.left_rank as u64, mismatch.right_rank as u64];
        let message =
            pack(&[bytemuck::cast_slice(&ranks), mismatch.left.as_bytes(), mismatch.right.as_bytes()]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
        self.left.set(true);
    }

    /// Returns the failure that ends this rank's wait for the `missing` ranks, if there is one. The
    /// wait ends if the group is broken, a missing rank has left, or any rank was lost for a reason
    /// other than `LostReason::Left`.
    pub(super) fn obstacle(&self, engine: &Engine, missing: &[usize]) -> Option<Cause> {
        match &*self.failed.borrow() {
            Some(Cause::Lost { rank, reason: LostReason::Left }) if !missing.contains(rank) => {}
            Some(cause) => return Some(cause.clone()),
            None => {}
        }
        self.peers().find_map(|peer| {
            let breach = engine.last(self.ranks[peer], self.tag(CALL), |message| {
                let [kind, left_rank, right_rank] = head(message)?;
                let text = |number| Some(String::from_utf8_lossy(field(message, number)?).into_owned());
                (kind == KIND_DISAGREEMENT).then_some(())?;
                let (left_rank, right_rank) = (left_rank as usize, right_rank as usize);
                Some(Mismatch { left_rank, left: text(1)?, right_rank, right: text(2)? })
            });
            if let Some(mismatch) = breach {
                return Some(Cause::Disagreement(Box::new(mismatch)));
            }
            let (reason, root) = self.loss(engine, peer)?;
            if reason == LostReason::Left && !missing.contains(&peer) {
                return None;
            }
            // A rank that knows of a lost rank usually leaves too, so report the first lost rank.
            let root = root.and_then(|(root, how)| Some((self.ranks.iter().position(|r| *r == root)?, how)));
            let (rank, reason) = root.unwrap_or((peer, reason));
            Some(Cause::Lost { rank, reason })
        })
    }

    /// Records the failure that broke the group, unless one is recorded. Returns the call's error.
    pub(super) fn fail(&self, engine: &Engine, call: &Call, cause: Cause) -> Error {
        if let Cause::Lost { rank, reason } = cause {
            engine.record_loss(self.ranks[rank], reason);
        }
        let error = cause.error(call, &self.name);
        self.failed.borrow_mut().get_or_insert(cause);
        error
    }

    /// Returns an error if a failure has broken the group.
    pub(super) fn check(&self, call: &Call) -> Result<()> {
        self.failed.borrow().as_ref().map_or(Ok(()), |cause| Err(cause.error(call, &self.name)))
    }
}

impl Close for Members {
    fn close(&self, engine: &Engine, loss: LostReason) {
        self.leave(engine, loss);
        // Later calls on the group fail, because MPI may be finalized by then.
        let gone = Cause::Lost { rank: self.rank, reason: LostReason::Disconnected };
        self.failed.borrow_mut().get_or_insert(gone);
    }
}
