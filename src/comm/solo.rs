//! The communicator of a group of one rank.

use super::{Call, Communicator, Incoming, Outgoing, ReduceOp, Shards};
use crate::{
    device::{AnyMut, AnyRef, Device, Element, each_dtype, zeroed},
    error::{Error, Result, same_shape},
    security::{Channel, Roles},
};

/// The communicator of a single rank, on any device. A tensor-parallel layer on one rank is the
/// plain layer.
#[derive(Clone, Debug)]
pub struct Solo<B: Device> {
    device: B,
}

impl<B: Device> Solo<B> {
    /// Returns the communicator of one rank with tensors on `device`.
    pub fn new(device: &B) -> Self {
        Self { device: device.clone() }
    }

    /// recv ← send, through the host; does nothing on devices without values. A group of one rank
    /// copies only in a gather, a scatter, or an exchange of the rank with itself.
    fn copy(&self, send: AnyRef<'_, B>, recv: AnyMut<'_, B>) -> Result<()> {
        fn copy<T: Element, B: Device>(
            device: &B,
            send: B::Slice<'_, T>,
            recv: B::SliceMut<'_, T>,
        ) -> Result<()> {
            if !B::HAS_VALUES {
                return Ok(());
            }
            let mut host = zeroed(B::len::<T>(send))?;
            device.download::<T>(send, &mut host)?;
            device.upload::<T>(&host, recv)
        }
        each_dtype!(AnyRef, send, send => match recv.of() {
            Some(recv) => copy(&self.device, send, recv),
            None => Err(Error::invalid("collective", "send and receive have different elements")),
        })
    }
}

impl<B: Device> Communicator<B> for Solo<B> {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn channel(&self) -> Channel {
        Channel::MEMORY
    }

    fn roles(&self) -> Roles {
        Roles::UNRESTRICTED
    }

    fn all_reduce(&self, _: &Call, _: ReduceOp, _: AnyMut<'_, B>) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, _: &Call, _: &Shards, send: AnyRef<'_, B>, recv: AnyMut<'_, B>) -> Result<()> {
        self.copy(send, recv)
    }

    fn reduce_scatter(
        &self,
        _: &Call,
        _: ReduceOp,
        _: &Shards,
        send: AnyRef<'_, B>,
        recv: AnyMut<'_, B>,
    ) -> Result<()> {
        self.copy(send, recv)
    }

    fn broadcast(&self, _: &Call, _: usize, _: AnyMut<'_, B>) -> Result<()> {
        Ok(())
    }

    fn exchange(&self, _: &Call, send: Option<Outgoing<'_, B>>, recv: Option<Incoming<'_, B>>) -> Result<()> {
        match (send, recv) {
            (Some(send), Some(recv)) => {
                same_shape(
                    "exchange",
                    "the sent tensor",
                    send.shape.dims(),
                    "the expected tensor",
                    recv.shape.dims(),
                )?;
                self.copy(send.data, recv.data)
            }
            (None, None) => Ok(()),
            _ => Err(Error::invalid(
                "exchange",
                "the only rank of a group has to send and receive in the same exchange",
            )),
        }
    }

    fn barrier(&self, _: &Call) -> Result<()> {
        Ok(())
    }

    fn split(
        &self,
        _: &Call,
        color: Option<u64>,
        _: u64,
        _: &str,
    ) -> Result<Option<Box<dyn Communicator<B>>>> {
        Ok(color.map(|_| Box::new(self.clone()) as Box<dyn Communicator<B>>))
    }
}
