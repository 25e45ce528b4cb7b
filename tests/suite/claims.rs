//! A communicator that passes all calls on, and makes claims of its own about the transport and the
//! ranks, as a program could that was changed.

use shardwise::{
    Result,
    comm::{Call, Communicator, Incoming, Outgoing, ReduceOp, Shards},
    device::{AnyMut, AnyRef, Device},
    security::{Channel, Policy, Roles},
};
use std::{cell::Cell, rc::Rc};

/// What is `None` is that of the inner communicator.
pub(crate) struct Claims<B: Device> {
    pub(crate) inner: Rc<dyn Communicator<B>>,
    pub(crate) roles: Option<Roles>,
    pub(crate) channel: Option<Channel>,
    pub(crate) policy: Option<Policy>,
    /// The number of elements that have arrived from other ranks in exchanges.
    pub(crate) received: Rc<Cell<usize>>,
}

impl<B: Device> Claims<B> {
    /// Makes no claims.
    pub(crate) fn of(inner: Rc<dyn Communicator<B>>) -> Self {
        Self { inner, roles: None, channel: None, policy: None, received: Rc::default() }
    }
}

impl<B: Device> Communicator<B> for Claims<B> {
    fn roles(&self) -> Roles {
        self.roles.clone().unwrap_or_else(|| self.inner.roles())
    }

    fn channel(&self) -> Channel {
        self.channel.unwrap_or_else(|| self.inner.channel())
    }

    fn policy(&self) -> Policy {
        self.policy.unwrap_or_else(|| self.inner.policy())
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        self.inner.all_reduce(call, op, x)
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
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
        self.inner.reduce_scatter(call, op, shards, send, recv)
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()> {
        self.inner.broadcast(call, root, x)
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        let len = recv.as_ref().map_or(0, |recv| recv.data.len());
        self.inner.exchange(call, send, recv)?;
        self.received.set(self.received.get() + len);
        Ok(())
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.inner.barrier(call)
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        self.inner.split(call, color, key, name)
    }
}
