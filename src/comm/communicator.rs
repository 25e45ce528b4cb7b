//! The transport of a group.

use super::{Call, ReduceOp, Shards, cause::Cause};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Device},
    error::{Error, Result},
    shard::Shape,
};
use std::time::Duration;

/// What the ranks of one group can do together.
///
/// Object safe: operators do not know what carries their data. A communicator belongs to one rank. It compares the ranks'
/// `call`s before it moves data, and reports disagreement and lost ranks as errors on every rank. The caller has checked
/// lengths and ranks; every length follows from `parts`, or is the same on all ranks.
pub trait Communicator<B: Device> {
    /// This rank's number in the group.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// x ← the reduction of all ranks' x, the same bits on every rank.
    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()>;

    /// recv ← all ranks' parts. `send` is this rank's `[rows, size(rank)]`, `recv` is `[rows, total]`.
    fn all_gather(&self, call: &Call, parts: &Shards, send: AnyRef<'_, B>, recv: AnyMut<'_, B>)
    -> Result<()>;

    /// recv ← this rank's part of the reduction of all ranks' `send`. `send` is `[rows, total]`, `recv` is
    /// `[rows, size(rank)]`.
    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()>;

    /// x ← the root's x.
    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()>;

    /// Sends to one rank and receives from another as one step: neither waits for the other, so that neighbours which
    /// exchange cannot wait for each other forever. Messages between two ranks arrive in order.
    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()>;

    /// Returns when every rank has called it.
    fn barrier(&self, call: &Call) -> Result<()>;

    /// What broke the group, if something did, without waiting for anybody. A rank that left after it had done its part is
    /// no obstacle to a call in which it took part.
    fn obstacle(&self, call: &Call) -> Option<Error> {
        let _ = call;
        None
    }

    /// Notes that this rank has come to a step of what the ranks do beside this communicator.
    fn came(&self, step: Step) {
        let _ = step;
    }

    /// As [`Communicator::obstacle`], of a step beside this communicator: a rank that left before it came to it is one.
    fn obstacle_beside(&self, call: &Call, step: Step) -> Option<Error> {
        let _ = step;
        self.obstacle(call)
    }

    /// This rank has waited for the others at these steps for so long: breaks the group for that. The error, which every rank
    /// gets, names those that have not come, as far as they can be asked.
    fn give_up(&self, call: &Call, steps: &[Step], after: Duration) -> Error {
        let missing = Step::missing(steps, Vec::new(), self.rank(), self.size());
        Cause::Deadline { missing, after }.error(call, &format!("{:08x}", call.group as u32))
    }

    /// What another thread than the rank's can ask, if there is such a thing.
    fn lookout(&self) -> Option<Box<dyn Lookout>> {
        None
    }

    /// Whether a meeting of the ranks takes microseconds, so that each call may well have one.
    fn is_near(&self) -> bool {
        false
    }

    /// Divides the group: the ranks of one `color` form a new one, in order of `key` and then of rank; those without a
    /// color belong to none. Errors call the new group `name`.
    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>>;

    /// Starts a collective whose result is asked for later. `send` is what it reads; `recv`, of the result's length, is
    /// memory that it may use for the result.
    ///
    /// Where a transport cannot work beside its rank, it does the work here.
    fn start(
        &self,
        call: &Call,
        collective: Collective,
        mut send: AnyBuffer<B>,
        mut recv: AnyBuffer<B>,
    ) -> Result<Box<dyn InFlight<B>>> {
        let result = match collective {
            Collective::AllReduce(op) => {
                self.all_reduce(call, op, send.as_mut())?;
                send
            }
            Collective::AllGather(parts) => {
                self.all_gather(call, &parts, send.as_ref(), recv.as_mut())?;
                recv
            }
            Collective::ReduceScatter(op, parts) => {
                self.reduce_scatter(call, op, &parts, send.as_ref(), recv.as_mut())?;
                recv
            }
        };
        Ok(Box::new(Landed(result)))
    }
}

/// What a thread that watches over a rank asks its communicator about steps beside it.
pub trait Lookout: Send {
    /// As [`Communicator::obstacle_beside`].
    fn obstacle_beside(&self, call: &Call, step: Step) -> Option<Error>;

    /// The ranks that are needed for a step and are known not to have come to it.
    fn absent(&self, step: Step) -> Vec<usize>;

    /// As [`Communicator::give_up`].
    fn give_up(&self, call: &Call, steps: &[Step], after: Duration) -> Error;
}

/// A step of what the ranks do beside a communicator: a collective of NCCL's, of a group whose ranks compare their calls on it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What it is a step of: the same number on all ranks.
    pub work: u64,
    /// How many steps of it came before.
    pub number: u64,
    /// The one rank that it needs, if not all.
    pub with: Option<usize>,
}

impl Step {
    /// Whether it needs a rank.
    pub(super) fn needs(&self, rank: usize) -> bool {
        self.with.is_none_or(|with| with == rank)
    }

    /// Whom rank `here` of `ranks` has waited for: those who are absent, or, where nobody is known to be, all that it needs.
    pub(super) fn missing(steps: &[Self], absent: Vec<usize>, here: usize, ranks: usize) -> Vec<usize> {
        if !absent.is_empty() {
            return absent;
        }
        let needed = |rank: &usize| *rank != here && steps.iter().any(|step| step.needs(*rank));
        (0..ranks).filter(needed).collect()
    }
}

/// A tensor on its way to another rank.
pub struct Outgoing<'a, B: Device> {
    /// The receiver.
    pub to: usize,
    /// The tensor's shape.
    pub shape: Shape,
    /// Its elements.
    pub data: AnyRef<'a, B>,
}

/// Room for a tensor from another rank.
pub struct Incoming<'a, B: Device> {
    /// The sender.
    pub from: usize,
    /// The shape that is expected.
    pub shape: Shape,
    /// Where the elements go.
    pub data: AnyMut<'a, B>,
}

/// A collective that can be started.
#[derive(Clone, Debug)]
pub enum Collective {
    /// See [`Communicator::all_reduce`].
    AllReduce(ReduceOp),
    /// See [`Communicator::all_gather`].
    AllGather(Shards),
    /// See [`Communicator::reduce_scatter`].
    ReduceScatter(ReduceOp, Shards),
}

/// A collective that was started.
pub trait InFlight<B: Device> {
    /// Waits for the result.
    fn wait(self: Box<Self>) -> Result<AnyBuffer<B>>;
}

/// A collective that was finished at once.
struct Landed<B: Device>(AnyBuffer<B>);

impl<B: Device> InFlight<B> for Landed<B> {
    fn wait(self: Box<Self>) -> Result<AnyBuffer<B>> {
        Ok(self.0)
    }
}
