//! A group of processes: its ranks, their departures, and why it is broken.

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

/// The first number of a message with tag [`CALL`]: its kind.
const KIND_CALL: u64 = 0;
const KIND_LEAVE: u64 = 1;
const KIND_DISAGREEMENT: u64 = 2;
const NO_RANK: u64 = u64::MAX;

pub(super) struct Members {
    pub(super) name: String,
    /// The world ranks of the group.
    pub(super) ranks: Vec<usize>,
    pub(super) rank: usize,
    pub(super) block: u64,
    /// The number of the group's collectives.
    pub(super) flights: Cell<u64>,
    /// Whether a disagreement was found and its texts are still in transit.
    pub(super) disputed: Cell<bool>,
    failed: RefCell<Option<Cause>>,
    left: Cell<bool>,
    engine: Weak<Engine>,
}

/// Dropped with the last of this rank's communicator and collectives: informs the others that this
/// rank leaves.
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

    /// A tag of this group.
    pub(super) fn tag(&self, kind: i32) -> i32 {
        self.block as i32 * TAGS + kind
    }

    pub(super) fn send(&self, engine: &Engine, to: usize, kind: i32, message: &Rc<Vec<u64>>) {
        engine.send(self.ranks[to], self.tag(kind), message);
    }

    pub(super) fn take(&self, engine: &Engine, from: usize, kind: i32) -> Option<Message> {
        engine.take(self.ranks[from], self.tag(kind))
    }

    /// Sends all others a call with its payload.
    pub(super) fn call(&self, engine: &Engine, call: &Call, payload: &[u8]) {
        let message = pack(&[
            bytemuck::cast_slice(&[KIND_CALL, call.fingerprint(), call.messages[0], call.messages[1]]),
            payload,
        ]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
    }

    /// Takes the next call of a rank: its fingerprint, and the numbers of messages sent and
    /// received before it.
    pub(super) fn take_call(&self, engine: &Engine, peer: usize) -> Option<(u64, [u64; 2], Message)> {
        // The last message is a departure or a disagreement. It is read in place and stays.
        let calls = |message: &[u64]| Some(head::<4>(message)?[0] == KIND_CALL);
        if !engine.first(self.ranks[peer], self.tag(CALL), calls)? {
            return None;
        }
        let message = self.take(engine, peer, CALL)?;
        let [_, fingerprint, sent, received] = head(&message.0)?;
        Some((fingerprint, [sent, received], message))
    }

    /// Informs all others, once, that this rank leaves, and of the first loss that it received.
    pub(super) fn leave(&self, engine: &Engine, loss: LostReason) {
        if self.left.replace(true) {
            return;
        }
        let (root, how) =
            engine.first_loss().map_or((NO_RANK, 0), |(rank, loss)| (rank as u64, code_of(loss)));
        let message = pack(&[bytemuck::cast_slice(&[KIND_LEAVE, code_of(loss), root, how])]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
    }

    /// Whether a rank has left.
    pub(super) fn has_left(&self, engine: &Engine, rank: usize) -> bool {
        rank == self.rank || self.loss(engine, rank).is_some()
    }

    /// Returns the reason that a rank left, and the first loss that it had received.
    fn loss(&self, engine: &Engine, rank: usize) -> Option<(LostReason, Option<(usize, LostReason)>)> {
        engine.last(self.ranks[rank], self.tag(CALL), |message| {
            let [kind, loss, root, how] = head(message)?;
            let root = (root != NO_RANK).then(|| (root as usize, loss_of(how)));
            (kind == KIND_LEAVE).then(|| (loss_of(loss), root))
        })
    }

    /// Sends all others a disagreement that only this rank knows of.
    pub(super) fn send_disagreement(&self, engine: &Engine, mismatch: &Mismatch) {
        let ranks = [KIND_DISAGREEMENT, mismatch.left_rank as u64, mismatch.right_rank as u64];
        let message =
            pack(&[bytemuck::cast_slice(&ranks), mismatch.left.as_bytes(), mismatch.right.as_bytes()]);
        self.peers().for_each(|peer| self.send(engine, peer, CALL, &message));
        self.left.set(true);
    }

    /// Returns why this rank need not wait for the `missing` ranks: the group is broken, one of
    /// them was lost, or another rank was lost other than by leaving.
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
            // A rank that has received a loss usually leaves as well: report the first loss.
            let root = root.and_then(|(root, how)| Some((self.ranks.iter().position(|r| *r == root)?, how)));
            let (rank, reason) = root.unwrap_or((peer, reason));
            Some(Cause::Lost { rank, reason })
        })
    }

    /// Records why the group is broken, unless it is already, and returns the error of a call.
    pub(super) fn fail(&self, engine: &Engine, call: &Call, cause: Cause) -> Error {
        if let Cause::Lost { rank, reason } = cause {
            engine.record_loss(self.ranks[rank], reason);
        }
        let error = cause.error(call, &self.name);
        self.failed.borrow_mut().get_or_insert(cause);
        error
    }

    /// Checks that the group can still run collectives.
    pub(super) fn check(&self, call: &Call) -> Result<()> {
        self.failed.borrow().as_ref().map_or(Ok(()), |cause| Err(cause.error(call, &self.name)))
    }
}

impl Close for Members {
    fn close(&self, engine: &Engine, loss: LostReason) {
        self.leave(engine, loss);
        // MPI may end.
        let gone = Cause::Lost { rank: self.rank, reason: LostReason::Disconnected };
        self.failed.borrow_mut().get_or_insert(gone);
    }
}
