//! The transport trait of a group.

use super::{Call, ReduceOp, Shards, cause::Cause};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Device},
    error::{Error, Result},
    security::{Channel, Policy, Reach, Roles},
    shard::Shape,
};
use std::time::Duration;

/// The transport of one group, as used by one of its ranks.
///
/// The trait is object safe, so operators do not depend on the transport. A communicator compares
/// the ranks' `call`s before it moves data. It reports differing calls and lost ranks as errors on
/// every rank. [`Group`](super::Group) checks all lengths and rank numbers before it calls its
/// communicator. So every length follows from `shards` or is the same on all ranks.
pub trait Communicator<B: Device> {
    /// The index of this rank in the group.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// x ← the reduction of x over the ranks, the same bits on every rank.
    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()>;

    /// recv ← the shards of all ranks, concatenated. `send` is this rank's shard,
    /// `[rows, size(rank)]`, and `recv` is `[rows, total]`.
    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()>;

    /// recv ← this rank's shard of the reduction of `send` over the ranks. `send` is `[rows,
    /// total]`, `recv` is `[rows, size(rank)]`.
    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()>;

    /// x ← the x of rank `root`.
    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()>;

    /// Sends a tensor to one rank and receives a tensor from another, as one step. The send does
    /// not wait for the receive, so ranks that exchange tensors cannot deadlock. Messages between
    /// two ranks arrive in order.
    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()>;

    /// Waits until every rank has called `barrier`.
    fn barrier(&self, call: &Call) -> Result<()>;

    /// How the data of this group travels. The default is plaintext on a network.
    fn channel(&self) -> Channel {
        Channel::plaintext(Reach::Network)
    }

    /// Which transports the job may use: NCCL checks it before it connects the ranks of this group.
    /// The default is the policy of this process's environment, and the strictest if that cannot be
    /// read.
    fn policy(&self) -> Policy {
        Policy::read().unwrap_or(Policy::RequireEncrypted)
    }

    /// The roles of the group's ranks. A communicator that wraps another one returns that one's
    /// roles, that of a subgroup [`Roles::of_members`], and one whose ranks have no roles
    /// [`Roles::UNRESTRICTED`].
    fn roles(&self) -> Roles;

    /// Returns the failure that prevents `call`, if there is one, without waiting. A rank that left
    /// without an error does not prevent the call, because it may have joined the call before it
    /// left.
    fn obstacle(&self, call: &Call) -> Option<Error> {
        let _ = call;
        None
    }

    /// Records that this rank has reached an external step, which is a collective or message of
    /// another library (NCCL).
    fn reached_step(&self, step: ExternalStep) {
        let _ = step;
    }

    /// Returns the failure that prevents an external step. If a rank left before it reached the
    /// step, that is a failure here, unlike in [`Communicator::obstacle`]. The default calls
    /// `obstacle`.
    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        let _ = step;
        self.obstacle(call)
    }

    /// Breaks the group, because this rank has waited for `after` at these steps. Every rank then
    /// gets the returned error. The error names the ranks that have not reached the steps. If no
    /// such rank is known, it names all ranks that the steps need. The default only returns the
    /// error.
    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        let missing = ExternalStep::missing(steps, Vec::new(), self.rank(), self.size());
        Cause::Deadline { missing, after }.error(call, &format!("{:08x}", call.group as u32))
    }

    /// Returns a view of this communicator for a monitoring thread, if the transport has one.
    fn liveness(&self) -> Option<Box<dyn Liveness>> {
        None
    }

    /// Whether synchronizing the ranks takes only microseconds, so that NCCL groups can compare
    /// every call over this communicator.
    fn is_near(&self) -> bool {
        false
    }

    /// Splits the group: the ranks of one `color` form a new group, ordered by `key` and then by
    /// rank. Returns none on ranks without a color. The new group's errors call it `name`.
    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>>;

    /// Starts a collective, which reads `send`. [`InFlight::wait`] returns the result. `recv` has
    /// the result's length, and the transport may use it as the result's memory.
    ///
    /// The default is for transports without asynchronous collectives: it runs the whole collective
    /// before it returns.
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
            Collective::AllGather(shards) => {
                self.all_gather(call, &shards, send.as_ref(), recv.as_mut())?;
                recv
            }
            Collective::ReduceScatter(op, shards) => {
                self.reduce_scatter(call, op, &shards, send.as_ref(), recv.as_mut())?;
                recv
            }
        };
        Ok(Box::new(Completed(result)))
    }
}

/// A view of a rank's communicator for a thread that monitors the rank's external steps.
pub trait Liveness: Send {
    /// See [`Communicator::lost_at_step`].
    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error>;

    /// Of the ranks that a step needs, those that have not reached it or do not answer.
    fn absent(&self, step: ExternalStep) -> Vec<usize>;

    /// See [`Communicator::give_up`].
    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error;
}

/// One collective or message of another library (NCCL). The ranks track its progress through this
/// communicator.
#[derive(Clone, Copy, Debug)]
pub struct ExternalStep {
    /// The id of the sequence of steps, the same on all ranks.
    pub work: u64,
    /// The sequence number of this step, from 0.
    pub number: u64,
    /// The only rank, besides this one, that the step needs; none if the step needs all ranks.
    pub with: Option<usize>,
}

impl ExternalStep {
    /// Whether the step needs rank `rank`.
    pub(super) fn needs(&self, rank: usize) -> bool {
        self.with.is_none_or(|with| with == rank)
    }

    /// Returns the ranks that rank `here` of `ranks` ranks has waited for. These are the `absent`
    /// ranks or, if that list is empty, all ranks that the steps need, except `here`.
    pub(super) fn missing(steps: &[Self], absent: Vec<usize>, here: usize, ranks: usize) -> Vec<usize> {
        if !absent.is_empty() {
            return absent;
        }
        let needed = |rank: &usize| *rank != here && steps.iter().any(|step| step.needs(*rank));
        (0..ranks).filter(needed).collect()
    }
}

/// A tensor to send to another rank.
pub struct Outgoing<'a, B: Device> {
    /// The receiver.
    pub to: usize,
    /// The tensor's shape.
    pub shape: Shape,
    /// The elements.
    pub data: AnyRef<'a, B>,
}

/// Memory for a tensor from another rank.
pub struct Incoming<'a, B: Device> {
    /// The sender.
    pub from: usize,
    /// The expected shape.
    pub shape: Shape,
    /// The destination of the elements.
    pub data: AnyMut<'a, B>,
}

/// A collective that can be started. Later versions may add collectives, such as a broadcast; a
/// transport should return [`Error::Unsupported`] for a collective that it does not implement.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Collective {
    /// See [`Communicator::all_reduce`].
    AllReduce(ReduceOp),
    /// See [`Communicator::all_gather`].
    AllGather(Shards),
    /// See [`Communicator::reduce_scatter`].
    ReduceScatter(ReduceOp, Shards),
}

/// A started collective.
pub trait InFlight<B: Device> {
    /// Waits for the collective and returns its result.
    fn wait(self: Box<Self>) -> Result<AnyBuffer<B>>;
}

/// The result of a collective that completed within [`Communicator::start`].
struct Completed<B: Device>(AnyBuffer<B>);

impl<B: Device> InFlight<B> for Completed<B> {
    fn wait(self: Box<Self>) -> Result<AnyBuffer<B>> {
        Ok(self.0)
    }
}
