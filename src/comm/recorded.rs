//! A communicator that logs its transfers.

use super::{
    Call, Collective, Communicator, ExternalStep, InFlight, Incoming, Op, Outgoing, ReduceOp, Shards,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, DType, Device},
    error::{Error, Result},
    security::{Channel, Policy, Roles},
};
use std::{cell::RefCell, fmt, rc::Rc, time::Duration};

/// The operation and size of one transfer. Of the two ranks of an exchange, only the sender logs
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Transfer {
    /// The operation.
    pub op: Op,
    /// The element type.
    pub dtype: DType,
    /// The number of elements of the whole tensor. For an all-gather or a reduce-scatter, these are
    /// the elements of all shards together.
    pub elements: usize,
}

impl Transfer {
    /// The size of the whole tensor in bytes.
    pub fn bytes(&self) -> usize {
        self.elements.saturating_mul(self.dtype.size())
    }

    /// The fewest bytes that each of n = `ranks` ranks has to send: 2 (n − 1) / n of the tensor for
    /// an all-reduce, (n − 1) / n for an all-gather or a reduce-scatter (the factors of nccl-tests'
    /// bus bandwidth). For a broadcast or an exchange, the sender has to send the whole tensor.
    pub fn wire_bytes(&self, ranks: usize) -> usize {
        // u128, because a planned group may have any number of ranks and tensors of any size.
        let once = self.bytes() as u128 * ranks.saturating_sub(1) as u128 / ranks.max(1) as u128;
        let once = usize::try_from(once).unwrap_or(usize::MAX);
        match self.op {
            Op::AllReduce => once.saturating_mul(2),
            Op::AllGather | Op::ReduceScatter => once,
            Op::Broadcast | Op::Exchange => self.bytes(),
            Op::Barrier | Op::Split => 0,
        }
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} {}", self.op.name(), self.elements, self.dtype)
    }
}

/// The transfers of a [`Recorded`] communicator and the groups split from it, in order. Clones
/// share the list.
#[derive(Clone, Debug, Default)]
pub struct TransferLog(Rc<RefCell<Vec<Transfer>>>);

impl TransferLog {
    /// Removes and returns the transfers since the last call.
    pub fn take(&self) -> Vec<Transfer> {
        self.0.take()
    }

    fn push(&self, op: Op, dtype: DType, elements: usize) {
        self.0.borrow_mut().push(Transfer { op, dtype, elements });
    }
}

/// Wraps a communicator and logs its transfers.
pub struct Recorded<B: Device> {
    inner: Rc<dyn Communicator<B>>,
    record: TransferLog,
}

impl<B: Device> Recorded<B> {
    /// Wraps a communicator. Returns the wrapper and its log.
    pub fn new(inner: Rc<dyn Communicator<B>>) -> (Self, TransferLog) {
        let record = TransferLog::default();
        (Self { inner, record: record.clone() }, record)
    }
}

impl<B: Device> Communicator<B> for Recorded<B> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn channel(&self) -> Channel {
        self.inner.channel()
    }

    fn policy(&self) -> Policy {
        self.inner.policy()
    }

    fn roles(&self) -> Roles {
        self.inner.roles()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        self.record.push(Op::AllReduce, x.dtype(), x.len());
        self.inner.all_reduce(call, op, x)
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        self.record.push(Op::AllGather, send.dtype(), shards.total());
        self.inner.all_gather(call, shards, send, recv)
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        self.record.push(Op::ReduceScatter, send.dtype(), shards.total());
        self.inner.reduce_scatter(call, op, shards, send, recv)
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()> {
        self.record.push(Op::Broadcast, x.dtype(), x.len());
        self.inner.broadcast(call, root, x)
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        if let Some(send) = &send {
            self.record.push(Op::Exchange, send.data.dtype(), send.data.len());
        }
        self.inner.exchange(call, send, recv)
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.inner.barrier(call)
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.inner.obstacle(call)
    }

    fn reached_step(&self, step: ExternalStep) {
        self.inner.reached_step(step);
    }

    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        self.inner.lost_at_step(call, step)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        self.inner.give_up(call, steps, after)
    }

    fn is_near(&self) -> bool {
        self.inner.is_near()
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        let split = self.inner.split(call, color, key, name)?;
        let record = self.record.clone();
        Ok(split.map(|inner| Box::new(Self { inner: inner.into(), record }) as Box<dyn Communicator<B>>))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        send: AnyBuffer<B>,
        recv: AnyBuffer<B>,
    ) -> Result<Box<dyn InFlight<B>>> {
        let (dtype, len) = (send.as_ref().dtype(), send.as_ref().len());
        match &collective {
            Collective::AllReduce(_) => self.record.push(Op::AllReduce, dtype, len),
            Collective::AllGather(shards) => self.record.push(Op::AllGather, dtype, shards.total()),
            Collective::ReduceScatter(_, shards) => {
                self.record.push(Op::ReduceScatter, dtype, shards.total())
            }
        }
        self.inner.start(call, collective, send, recv)
    }
}
