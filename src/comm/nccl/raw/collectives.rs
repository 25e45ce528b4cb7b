//! The NCCL calls that move data.

use super::{RawComm, number};
use crate::{
    comm::nccl::{NcclDevice, api::SUM},
    device::{DType, Element},
    error::{Result, same_size},
};
use std::{ffi::c_int, ptr::null_mut};

impl RawComm {
    /// x ← the sum of all ranks' x.
    pub(in crate::comm::nccl) fn all_reduce<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        x: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (len, x) = (B::len_mut::<T>(x), B::address_mut::<T>(x));
        // SAFETY: `x` is an exclusive borrow of `len` elements on the device. `Nccl::launch` orders
        // the work of `stream` before the borrower's next use. The handle is live.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.all_reduce)(
                x.cast_const(),
                x,
                len,
                dtype(T::DTYPE),
                SUM,
                self.alive()?,
                stream.stream(),
            )
        };
        self.returned("ncclAllReduce", code)
    }

    /// recv ← all ranks' shards, which have equal lengths.
    pub(in crate::comm::nccl) fn all_gather<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        size: usize,
        send: B::Slice<'_, T>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len::<T>(send);
        same_size(
            "all_gather",
            "the shards' total",
            len * size,
            "the receive buffer",
            B::len_mut::<T>(recv),
        )?;
        let (send, recv) = (B::address::<T>(send), B::address_mut::<T>(recv));
        // SAFETY: as in `all_reduce`; `same_size` checked that `recv` has `size` times the length
        // of `send`.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.all_gather)(send, recv, len, dtype(T::DTYPE), self.alive()?, stream.stream())
        };
        self.returned("ncclAllGather", code)
    }

    /// recv ← this rank's shard of the sum. All shards have equal lengths.
    pub(in crate::comm::nccl) fn reduce_scatter<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        size: usize,
        send: B::Slice<'_, T>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len_mut::<T>(recv);
        same_size("reduce_scatter", "the shards' total", len * size, "the send buffer", B::len::<T>(send))?;
        let (send, recv) = (B::address::<T>(send), B::address_mut::<T>(recv));
        // SAFETY: as in `all_reduce`; `same_size` checked that `send` has `size` times the length
        // of `recv`.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.reduce_scatter)(send, recv, len, dtype(T::DTYPE), SUM, self.alive()?, stream.stream())
        };
        self.returned("ncclReduceScatter", code)
    }

    /// recv on the root ← the sum of all ranks' `send`. The other ranks have no `recv`.
    pub(in crate::comm::nccl) fn reduce<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        root: usize,
        send: B::Slice<'_, T>,
        recv: Option<&mut B::SliceMut<'_, T>>,
    ) -> Result<()> {
        let len = B::len::<T>(send);
        if let Some(recv) = &recv {
            same_size("reduce", "the send buffer", len, "the receive buffer", B::len_mut::<T>(recv))?;
        }
        let recv = recv.map_or(null_mut(), |recv| B::address_mut::<T>(recv));
        let (send, root) = (B::address::<T>(send), number("the root", root)?);
        // SAFETY: as in `all_reduce`; `same_size` checked the lengths. NCCL accepts null on ranks
        // other than the root, and the root passes `recv` (`Nccl::scatter_flat`).
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.reduce)(send, recv, len, dtype(T::DTYPE), SUM, root, self.alive()?, stream.stream())
        };
        self.returned("ncclReduce", code)
    }

    /// recv ← the root's `send`, or the root's `recv` if the root passes no `send`.
    pub(in crate::comm::nccl) fn broadcast<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        root: usize,
        send: Option<B::Slice<'_, T>>,
        recv: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let len = B::len_mut::<T>(recv);
        if let Some(send) = send {
            same_size("broadcast", "the send buffer", B::len::<T>(send), "the receive buffer", len)?;
        }
        let (recv, root) = (B::address_mut::<T>(recv), number("the root", root)?);
        let send = send.map_or(recv.cast_const(), B::address::<T>);
        // SAFETY: as in `all_reduce`; `same_size` checked the lengths.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.broadcast)(send, recv, len, dtype(T::DTYPE), root, self.alive()?, stream.stream())
        };
        self.returned("ncclBroadcast", code)
    }

    pub(in crate::comm::nccl) fn send<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        to: usize,
        data: B::Slice<'_, T>,
    ) -> Result<()> {
        let (len, data, to) = (B::len::<T>(data), B::address::<T>(data), number("the receiver", to)?);
        // SAFETY: as in `all_reduce`, but `data` is a shared borrow, which NCCL only reads.
        #[allow(unsafe_code)]
        let code = unsafe { (self.api.send)(data, len, dtype(T::DTYPE), to, self.alive()?, stream.stream()) };
        self.returned("ncclSend", code)
    }

    pub(in crate::comm::nccl) fn recv<T: Element, B: NcclDevice>(
        &self,
        stream: &B,
        from: usize,
        data: &mut B::SliceMut<'_, T>,
    ) -> Result<()> {
        let (len, from) = (B::len_mut::<T>(data), number("the sender", from)?);
        let data = B::address_mut::<T>(data);
        // SAFETY: as in `all_reduce`.
        #[allow(unsafe_code)]
        let code =
            unsafe { (self.api.recv)(data, len, dtype(T::DTYPE), from, self.alive()?, stream.stream()) };
        self.returned("ncclRecv", code)
    }
}

/// Returns the `ncclDataType_t` of an element type.
fn dtype(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}
