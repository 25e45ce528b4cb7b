//! Collectives on tensors of any device, staged through host memory.

use super::{Call, Collective, Communicator, InFlight, Incoming, Outgoing, ReduceOp, Shards};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, DType, Device, Element, each_dtype},
    error::{Error, Result},
    security::{Channel, Policy, Roles},
};
use half::{bf16, f16};
use std::rc::Rc;

/// Runs a communicator for host memory on tensors of any device: download, collective, upload.
///
/// So thread ranks can share one GPU, and transports for host memory can move GPU tensors. The
/// wrapped communicator determines the results, the errors and the order of additions. A started
/// collective downloads its input at once and uploads its result in `wait`. The host copies' memory
/// comes from a separate pool.
pub struct HostStaged<B: Device> {
    host: Rc<dyn Communicator<Cpu>>,
    staging: Staging<B>,
}

/// Copies between a device and a pool of host memory.
#[derive(Clone)]
struct Staging<B: Device> {
    device: B,
    pool: Cpu,
}

impl<B: Device> Staging<B> {
    /// Host memory for `len` elements.
    fn allocate(&self, dtype: DType, len: usize) -> Result<AnyBuffer<Cpu>> {
        Ok(match dtype {
            DType::F64 => AnyBuffer::F64(self.pool.empty::<f64>(len)?),
            DType::F32 => AnyBuffer::F32(self.pool.empty::<f32>(len)?),
            DType::BF16 => AnyBuffer::BF16(self.pool.empty::<bf16>(len)?),
            DType::F16 => AnyBuffer::F16(self.pool.empty::<f16>(len)?),
        })
    }

    /// Copies device data to the host.
    fn download(&self, from: AnyRef<'_, B>) -> Result<AnyBuffer<Cpu>> {
        fn download<T: Element, B: Device>(
            staging: &Staging<B>,
            from: B::Slice<'_, T>,
        ) -> Result<AnyBuffer<Cpu>> {
            let mut host = staging.pool.empty::<T>(B::len::<T>(from))?;
            staging.device.download::<T>(from, &mut host)?;
            Ok(T::any_buffer(host))
        }
        each_dtype!(AnyRef, from, from => download(self, from))
    }

    /// to ← host data.
    fn upload(&self, from: &AnyBuffer<Cpu>, to: AnyMut<'_, B>) -> Result<()> {
        each_dtype!(AnyRef, from.as_ref(), from => match to.of() {
            Some(to) => self.device.upload(from, to),
            None => Err(Error::invalid("collective", "send and receive have different elements")),
        })
    }
}

impl<B: Device> HostStaged<B> {
    /// Stages tensors on `device` through the host communicator `host`.
    pub fn new(host: Rc<dyn Communicator<Cpu>>, device: &B) -> Self {
        Self { host, staging: Staging { device: device.clone(), pool: Cpu::new() } }
    }
}

impl<B: Device> Communicator<B> for HostStaged<B> {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn channel(&self) -> Channel {
        self.host.channel()
    }

    fn policy(&self) -> Policy {
        self.host.policy()
    }

    fn roles(&self) -> Roles {
        self.host.roles()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, B>) -> Result<()> {
        let mut host = self.staging.download(x.shared())?;
        self.host.all_reduce(call, op, host.as_mut())?;
        self.staging.upload(&host, x)
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let host = self.staging.download(send)?;
        let mut whole = self.staging.allocate(recv.dtype(), recv.len())?;
        self.host.all_gather(call, shards, host.as_ref(), whole.as_mut())?;
        self.staging.upload(&whole, recv)
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        let host = self.staging.download(send)?;
        let mut shard = self.staging.allocate(recv.dtype(), recv.len())?;
        self.host.reduce_scatter(call, op, shards, host.as_ref(), shard.as_mut())?;
        self.staging.upload(&shard, recv)
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, B>) -> Result<()> {
        if self.rank() == root {
            return self.host.broadcast(call, root, self.staging.download(x.shared())?.as_mut());
        }
        let mut host = self.staging.allocate(x.dtype(), x.len())?;
        self.host.broadcast(call, root, host.as_mut())?;
        self.staging.upload(&host, x)
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        let sending = send.as_ref().map(|send| self.staging.download(send.data)).transpose()?;
        let mut receiving = match &recv {
            Some(recv) => Some(self.staging.allocate(recv.data.dtype(), recv.data.len())?),
            None => None,
        };
        let outgoing = send.as_ref().zip(sending.as_ref());
        let outgoing =
            outgoing.map(|(send, data)| Outgoing { to: send.to, shape: send.shape, data: data.as_ref() });
        let incoming = recv.as_ref().zip(receiving.as_mut());
        let incoming =
            incoming.map(|(recv, data)| Incoming { from: recv.from, shape: recv.shape, data: data.as_mut() });
        self.host.exchange(call, outgoing, incoming)?;
        match (receiving, recv) {
            (Some(host), Some(recv)) => self.staging.upload(&host, recv.data),
            _ => Ok(()),
        }
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.host.barrier(call)
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.host.obstacle(call)
    }

    fn is_near(&self) -> bool {
        self.host.is_near()
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        let split = self.host.split(call, color, key, name)?;
        let staging = self.staging.clone();
        Ok(split.map(|host| Box::new(Self { host: host.into(), staging }) as Box<dyn Communicator<B>>))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        send: AnyBuffer<B>,
        recv: AnyBuffer<B>,
    ) -> Result<Box<dyn InFlight<B>>> {
        let host = self.staging.download(send.as_ref())?;
        let result = self.staging.allocate(recv.as_ref().dtype(), recv.as_ref().len())?;
        let flight = self.host.start(call, collective, host, result)?;
        Ok(Box::new(Staged { flight, recv, staging: self.staging.clone() }))
    }
}

/// A started collective of the host communicator.
struct Staged<B: Device> {
    flight: Box<dyn InFlight<Cpu>>,
    recv: AnyBuffer<B>,
    staging: Staging<B>,
}

impl<B: Device> InFlight<B> for Staged<B> {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<B>> {
        let host = self.flight.wait()?;
        self.staging.upload(&host, self.recv.as_mut())?;
        Ok(self.recv)
    }
}
