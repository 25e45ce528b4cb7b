//! A group of processes: who is in it, what became of them, and why it is broken.

use super::{
    message::{Message, pack},
    post::{CALL, Post, TAGS, code_of, head, loss_of},
};
use crate::{
    comm::{Call, cause::Cause},
    error::{Error, LostReason, Mismatch, Result},
};
use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

/// What the first number of a message with tag [`CALL`] says.
const A_CALL: u64 = 0;
const A_LEAVE: u64 = 1;
const A_BREACH: u64 = 2;
const NOBODY: u64 = u64::MAX;

pub(super) struct Members {
    pub(super) name: String,
    /// The ranks, counted in the world.
    pub(super) ranks: Vec<usize>,
    pub(super) rank: usize,
    pub(super) block: u64,
    /// The number of the group's collectives.
    pub(super) flights: Cell<u64>,
    /// Whether a disagreement was found, and its words are under way.
    pub(super) disputed: Cell<bool>,
    failed: RefCell<Option<Cause>>,
    left: Cell<bool>,
    post: Weak<Post>,
}

/// The last of this rank's end of a group and its collectives: it tells the others that this rank leaves.
impl Drop for Members {
    fn drop(&mut self) {
        if let Some(post) = self.post.upgrade() {
            self.leave(&post, if std::thread::panicking() { LostReason::Panicked } else { LostReason::Left });
            post.forget(self.block, self.failed.borrow().is_some());
        }
    }
}

impl Members {
    pub(super) fn new(post: &Rc<Post>, name: String, ranks: Vec<usize>, rank: usize, block: u64) -> Rc<Self> {
        let (flights, disputed, failed, left) = Default::default();
        let here = Rc::downgrade(post);
        let members = Rc::new(Self { name, ranks, rank, block, flights, disputed, failed, left, post: here });
        post.join(&members);
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

    pub(super) fn send(&self, post: &Post, to: usize, kind: i32, words: &Rc<Vec<u64>>) {
        post.send(self.ranks[to], self.tag(kind), words);
    }

    pub(super) fn take(&self, post: &Post, from: usize, kind: i32) -> Option<Message> {
        post.take(self.ranks[from], self.tag(kind))
    }

    /// Tells all others of a call, with what it carries.
    pub(super) fn call(&self, post: &Post, call: &Call, payload: &[u8]) {
        let words = pack(&[
            bytemuck::cast_slice(&[A_CALL, call.fingerprint(), call.messages[0], call.messages[1]]),
            payload,
        ]);
        self.peers().for_each(|peer| self.send(post, peer, CALL, &words));
    }

    /// The next call of a rank: its fingerprint, and the numbers of messages sent and received before it.
    pub(super) fn hear(&self, post: &Post, peer: usize) -> Option<(u64, [u64; 2], Message)> {
        // A fate is the last message: it is looked at, and stays.
        let calls = |words: &[u64]| Some(head::<4>(words)?[0] == A_CALL);
        if !post.first(self.ranks[peer], self.tag(CALL), calls)? {
            return None;
        }
        let message = self.take(post, peer, CALL)?;
        let [_, fingerprint, sent, received] = head(&message.0)?;
        Some((fingerprint, [sent, received], message))
    }

    /// Tells all others that this rank leaves, once, and of the first loss that it was told of.
    pub(super) fn leave(&self, post: &Post, loss: LostReason) {
        if self.left.replace(true) {
            return;
        }
        let (root, how) = post.told().map_or((NOBODY, 0), |(rank, loss)| (rank as u64, code_of(loss)));
        let words = pack(&[bytemuck::cast_slice(&[A_LEAVE, code_of(loss), root, how])]);
        self.peers().for_each(|peer| self.send(post, peer, CALL, &words));
    }

    /// Whether a rank has left.
    pub(super) fn has_left(&self, post: &Post, rank: usize) -> bool {
        rank == self.rank || self.loss(post, rank).is_some()
    }

    /// How a rank has left, and the first loss that it was told of.
    fn loss(&self, post: &Post, rank: usize) -> Option<(LostReason, Option<(usize, LostReason)>)> {
        post.last(self.ranks[rank], self.tag(CALL), |words| {
            let [kind, loss, root, how] = head(words)?;
            let root = (root != NOBODY).then(|| (root as usize, loss_of(how)));
            (kind == A_LEAVE).then(|| (loss_of(loss), root))
        })
    }

    /// Tells all others of a disagreement that only this rank knows of.
    pub(super) fn breach(&self, post: &Post, mismatch: &Mismatch) {
        let ranks = [A_BREACH, mismatch.left_rank as u64, mismatch.right_rank as u64];
        let words =
            pack(&[bytemuck::cast_slice(&ranks), mismatch.left.as_bytes(), mismatch.right.as_bytes()]);
        self.peers().for_each(|peer| self.send(post, peer, CALL, &words));
        self.left.set(true);
    }

    /// What ends this rank's waiting for some ranks, if something does: the group is broken; a rank was lost that is waited
    /// for; or one was lost otherwise than by leaving.
    pub(super) fn obstacle(&self, post: &Post, missing: &[usize]) -> Option<Cause> {
        match &*self.failed.borrow() {
            Some(Cause::Lost { rank, reason: LostReason::Left }) if !missing.contains(rank) => {}
            Some(cause) => return Some(cause.clone()),
            None => {}
        }
        self.peers().find_map(|peer| {
            let breach = post.last(self.ranks[peer], self.tag(CALL), |words| {
                let [kind, left_rank, right_rank] = head(words)?;
                let text =
                    |number| Some(String::from_utf8_lossy(super::message::part(words, number)?).into_owned());
                (kind == A_BREACH).then_some(())?;
                let (left_rank, right_rank) = (left_rank as usize, right_rank as usize);
                Some(Mismatch { left_rank, left: text(1)?, right_rank, right: text(2)? })
            });
            if let Some(mismatch) = breach {
                return Some(Cause::Disagreement(Box::new(mismatch)));
            }
            let (reason, root) = self.loss(post, peer)?;
            if reason == LostReason::Left && !missing.contains(&peer) {
                return None;
            }
            // Who was told of a loss usually leaves as well: the first loss is told.
            let root = root.and_then(|(root, how)| Some((self.ranks.iter().position(|r| *r == root)?, how)));
            let (rank, reason) = root.unwrap_or((peer, reason));
            Some(Cause::Lost { rank, reason })
        })
    }

    /// Notes why the group is broken, if it was not, and returns the error of a call.
    pub(super) fn fail(&self, post: &Post, call: &Call, cause: Cause) -> Error {
        if let Cause::Lost { rank, reason } = cause {
            post.tell(self.ranks[rank], reason);
        }
        let error = cause.error(call, &self.name);
        self.failed.borrow_mut().get_or_insert(cause);
        error
    }

    /// PipelineEnds the group for this rank: MPI may be over.
    pub(super) fn close(&self) {
        let gone = Cause::Lost { rank: self.rank, reason: LostReason::Disconnected };
        self.failed.borrow_mut().get_or_insert(gone);
    }

    /// Whether the group can still make calls of all ranks.
    pub(super) fn check(&self, call: &Call) -> Result<()> {
        self.failed.borrow().as_ref().map_or(Ok(()), |cause| Err(cause.error(call, &self.name)))
    }
}
