//! A communicator that writes down what it moves.

use super::{Call, Collective, Communicator, InFlight, Incoming, Op, Outgoing, ReduceOp, Shards, Step};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, DType, Device},
    error::{Error, Result},
};
use std::{cell::RefCell, fmt, rc::Rc, time::Duration};

/// One collective's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// The operation.
    pub op: Op,
    /// The element.
    pub dtype: DType,
    /// The number of elements of the whole tensor: what is reduced, or what the ranks' parts make up together.
    pub elements: usize,
}

impl Transfer {
    /// The size of the whole tensor in bytes.
    pub fn bytes(&self) -> usize {
        self.elements.saturating_mul(self.dtype.size())
    }

    /// The bytes that each of `ranks` ranks has to send at least: 2 (n − 1) / n of the tensor for an all-reduce,
    /// (n − 1) / n for an all-gather or a reduce-scatter (the factors of nccl-tests' bus bandwidth).
    pub fn wire_bytes(&self, ranks: usize) -> usize {
        // In u128: the tensors and the size of a planned group have no limit.
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

/// What a [`Recorded`] communicator has moved, in order. Clones share the list.
#[derive(Clone, Debug, Default)]
pub struct TransferLog(Rc<RefCell<Vec<Transfer>>>);

impl TransferLog {
    /// The transfers since the last call, which are forgotten.
    pub fn take(&self) -> Vec<Transfer> {
        self.0.take()
    }

    fn push(&self, op: Op, dtype: DType, elements: usize) {
        self.0.borrow_mut().push(Transfer { op, dtype, elements });
    }
}

/// A communicator that writes down every transfer of the one it wraps.
pub struct Recorded<B: Device> {
    inner: Rc<dyn Communicator<B>>,
    record: TransferLog,
}

impl<B: Device> Recorded<B> {
    /// Wraps a communicator; the record fills as it is used.
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

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        self.record.push(Op::AllReduce, x.dtype(), x.len());
        self.inner.all_reduce(call, op, x)
    }

    fn all_gather(
        &self,
        call: &Call,
        parts: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        self.record.push(Op::AllGather, send.dtype(), parts.total());
        self.inner.all_gather(call, parts, send, recv)
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        self.record.push(Op::ReduceScatter, send.dtype(), parts.total());
        self.inner.reduce_scatter(call, op, parts, send, recv)
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

    fn came(&self, step: Step) {
        self.inner.came(step);
    }

    fn obstacle_beside(&self, call: &Call, step: Step) -> Option<Error> {
        self.inner.obstacle_beside(call, step)
    }

    fn give_up(&self, call: &Call, steps: &[Step], after: Duration) -> Error {
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
        let part = self.inner.split(call, color, key, name)?;
        let record = self.record.clone();
        Ok(part.map(|inner| Box::new(Self { inner: inner.into(), record }) as Box<dyn Communicator<B>>))
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
            Collective::AllGather(parts) => self.record.push(Op::AllGather, dtype, parts.total()),
            Collective::ReduceScatter(_, parts) => self.record.push(Op::ReduceScatter, dtype, parts.total()),
        }
        self.inner.start(call, collective, send, recv)
    }
}
