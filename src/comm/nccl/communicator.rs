//! [`Communicator`] over NCCL.

use super::{
    Nccl, NcclDevice,
    state::{State, Work},
};
use crate::{
    comm::{
        Call, Collective, Communicator, InFlight, Incoming, Outgoing, ReduceOp, Shards, call::hash, each_pair,
    },
    device::{AnyBuffer, AnyMut, AnyRef, each_dtype},
    error::{Error, Result},
    security::{Channel, Policy, Roles},
};
use std::rc::Rc;

impl<B: NcclDevice> Communicator<B> for Nccl<B> {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn size(&self) -> usize {
        self.control.size()
    }

    /// NCCL encrypts nothing.
    fn channel(&self) -> Channel {
        Channel::plaintext(self.control.channel().reach)
    }

    fn policy(&self) -> Policy {
        self.control.policy()
    }

    /// The ranks' GPUs send each other tensors without the relay of `control`.
    fn roles(&self) -> Roles {
        self.control.roles().direct()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        let foreign = [self.foreign_stream(x.shared())?];
        self.run_now(call, &foreign, |at| each_dtype!(AnyMut, x, x => self.reduce(at, op, x)))
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let foreign = [self.foreign_stream(send)?, self.foreign_stream(recv.shared())?];
        self.run_now(
            call,
            &foreign,
            |at| each_pair!(send, recv, (send, recv) => self.gather(at, shards, send, recv)),
        )
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let foreign = [self.foreign_stream(send)?, self.foreign_stream(recv.shared())?];
        self.run_now(
            call,
            &foreign,
            |at| each_pair!(send, recv, (send, recv) => self.scatter(at, op, shards, send, recv)),
        )
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()> {
        let foreign = [self.foreign_stream(x.shared())?];
        self.run_now(call, &foreign, |at| each_dtype!(AnyMut, x, x => self.broadcast_from(at, root, x)))
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        self.send_recv(call, send, recv)
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.state.check()?;
        self.control.barrier(call).map_err(|error| self.state.fail(error))
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.state.check().err().or_else(|| self.control.obstacle(call))
    }

    fn is_near(&self) -> bool {
        self.control.is_near()
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        self.state.check()?;
        let control = self.control.split(call, color, key, name).map_err(|error| self.state.fail(error))?;
        // NCCL's colors are of type `int`. The new group's color is the rank that its rank 0 has in
        // this group.
        let mut first = [self.own_rank() as f64];
        if let Some(control) = &control {
            control.broadcast(call, 0, AnyMut::F64(first.as_mut_slice()))?;
        }
        let color = control.as_ref().map(|_| first[0] as usize);
        let key = control.as_ref().map_or(0, |control| control.rank());
        self.device.make_current()?;
        let at = self.arrival(call);
        at.arrive(&*self.control);
        let poll = at.poll(&*self.control, self.options.deadline);
        let raw = self.state.watchdog.inside(at, || self.state.raw.split(color, key, &poll));
        let raw = raw.map_err(|error| self.state.abort(at.explain(&*self.control, error)))?;
        let (Some(raw), Some(control)) = (raw, control) else { return Ok(None) };
        let id = hash((self.id, call.seq, color));
        let group = Self::new(raw, control.into(), &self.device, id, self.options.clone())?;
        Ok(Some(Box::new(group)))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        mut send: AnyBuffer<B>,
        mut recv: AnyBuffer<B>,
    ) -> Result<Box<dyn InFlight<B>>> {
        let foreign = [self.foreign_stream(send.as_ref())?, self.foreign_stream(recv.as_ref())?];
        let work = self.run(call, &foreign, |at| self.collective(at, &collective, &mut send, &mut recv))?;
        let (result, used) = match collective {
            Collective::AllReduce(_) => (send, recv),
            _ => (recv, send),
        };
        let state = Rc::clone(&self.state);
        let memory = Some((result, used));
        Ok(Box::new(Started { state, work, device: self.device.clone(), memory }))
    }
}

/// A started collective. No call has waited for it yet.
struct Started<B: NcclDevice> {
    state: Rc<State<B>>,
    work: Rc<Work<B>>,
    device: B,
    /// The result, and the other buffer that the collective uses.
    memory: Option<(AnyBuffer<B>, AnyBuffer<B>)>,
}

impl<B: NcclDevice> InFlight<B> for Started<B> {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<B>> {
        self.state.poll()?;
        self.work.make_wait(&self.device)?;
        match self.memory.take() {
            Some((result, _)) => Ok(result),
            None => Err(Error::internal("wait", "a collective was waited for twice")),
        }
    }
}

impl<B: NcclDevice> Drop for Started<B> {
    /// Makes the compute stream wait for the collective, so that the buffers are freed after it.
    fn drop(&mut self) {
        if self.memory.is_some() {
            let _ = self.work.make_wait(&self.device);
        }
    }
}
