//! Point-to-point messages.

use super::{Nccl, NcclDevice, arrival::Arrival};
use crate::{
    comm::{Call, Incoming, Outgoing},
    device::{AnyMut, AnyRef, Cpu, DType, Element, each_dtype},
    error::{Error, LostReason, Result},
};
use half::{bf16, f16};

impl<B: NcclDevice> Nccl<B> {
    /// Makes one NCCL group that sends to a rank, receives from a rank, or does both.
    pub(super) fn send_recv(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, B>>,
        recv: Option<Incoming<'_, B>>,
    ) -> Result<()> {
        self.state.check()?;
        self.compare_shapes(call, send.as_ref(), recv.as_ref())?;
        let sent = send.as_ref().map_or(Ok(None), |send| self.foreign_stream(send.data))?;
        let received = recv.as_ref().map_or(Ok(None), |recv| self.foreign_stream(recv.data.shared()))?;
        let foreign = [sent, received];
        let sending = send.as_ref().map(|send| self.message_step(self.own_rank(), send.to));
        let receiving = recv.as_ref().map(|recv| self.message_step(recv.from, self.own_rank()));
        let mut steps = [sending, receiving].into_iter().flatten();
        let Some(step) = steps.next() else { return Ok(()) };
        let at = Arrival { call: *call, step, other: steps.next() };
        let begin = self.wait_for(&foreign, None)?;
        let done = self.launch(at, begin, &foreign, |at| {
            self.grouped(at, || {
                if let Some(send) = send {
                    each_dtype!(AnyRef, send.data, data => self.send_to(send.to, data))?;
                }
                match recv {
                    Some(recv) => {
                        each_dtype!(AnyMut, recv.data, data => self.recv_from(recv.from, data))
                    }
                    None => Ok(()),
                }
            })
        })?;
        done.make_wait(&self.device)
    }

    fn send_to<T: Element>(&self, to: usize, data: B::Slice<'_, T>) -> Result<()> {
        if B::len::<T>(data) == 0 { Ok(()) } else { self.state.raw.send::<T, B>(self.stream(), to, data) }
    }

    fn recv_from<T: Element>(&self, from: usize, mut data: B::SliceMut<'_, T>) -> Result<()> {
        if B::len_mut::<T>(&data) == 0 {
            return Ok(());
        }
        self.state.raw.recv::<T, B>(self.stream(), from, &mut data)
    }

    /// Sends the element type and shape of the outgoing message to its receiver. Compares the
    /// element type and shape of the incoming message with the expected ones.
    fn compare_shapes(
        &self,
        call: &Call,
        send: Option<&Outgoing<'_, B>>,
        recv: Option<&Incoming<'_, B>>,
    ) -> Result<()> {
        // These messages carry an element type and a shape, but no elements.
        let outgoing =
            send.map(|send| Outgoing { to: send.to, shape: send.shape, data: empty(send.data.dtype()) });
        let incoming = recv.map(|recv| Incoming {
            from: recv.from,
            shape: recv.shape,
            data: empty_mut(recv.data.dtype()),
        });
        self.control.exchange(call, outgoing, incoming).map_err(|error| match error {
            // Only this peer is known to have left, so the group stays usable.
            Error::PeerLost { reason: LostReason::Left, .. } => error,
            error => self.state.fail(error),
        })
    }
}

fn empty<'a>(dtype: DType) -> AnyRef<'a, Cpu> {
    match dtype {
        DType::F64 => AnyRef::F64(&[] as &[f64]),
        DType::F32 => AnyRef::F32(&[] as &[f32]),
        DType::BF16 => AnyRef::BF16(&[] as &[bf16]),
        DType::F16 => AnyRef::F16(&[] as &[f16]),
    }
}

fn empty_mut<'a>(dtype: DType) -> AnyMut<'a, Cpu> {
    match dtype {
        DType::F64 => AnyMut::F64(&mut [] as &mut [f64]),
        DType::F32 => AnyMut::F32(&mut [] as &mut [f32]),
        DType::BF16 => AnyMut::BF16(&mut [] as &mut [bf16]),
        DType::F16 => AnyMut::F16(&mut [] as &mut [f16]),
    }
}
