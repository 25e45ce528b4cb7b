//! Device memory: buffers, views of buffers, and pinned host memory.

use super::{Cuda, Handle, context::Context, lock, status::driver, stream::Event};
use crate::{
    device::Element,
    error::{Error, Result},
};
use cudarc::driver::sys::{self, CUdeviceptr, CUstream};
use std::{fmt, marker::PhantomData, ops::Range, rc::Rc};

/// Device memory from the GPU's pool. The pool allocates and frees the memory in the order of the
/// allocating handle's stream.
pub struct CudaBuffer<T: Element> {
    address: CUdeviceptr,
    len: usize,
    owner: Rc<Handle>,
    element: PhantomData<T>,
}

impl<T: Element> CudaBuffer<T> {
    pub(super) fn new(cuda: &Cuda, len: usize) -> Result<Self> {
        let owner = &cuda.0;
        owner.context.make_current()?;
        let size = size_of::<T>();
        let bytes = len.checked_mul(size).ok_or(Error::Memory { len, size })?;
        let mut buffer = Self { address: 0, len, owner: Rc::clone(owner), element: PhantomData };
        // Counts the bytes before the allocation, which may fail: dropping the buffer subtracts
        // them in any case.
        owner.memory.add(bytes);
        if bytes > 0 {
            // SAFETY: `address` is valid for writing an address, and the stream belongs to the
            // current context.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemAllocAsync(&mut buffer.address, bytes, owner.stream.handle) };
            driver("cuMemAllocAsync", code)?;
        }
        if bytes > 0 && owner.poison {
            // A value with all bits set is NaN in every element type.
            // SAFETY: the allocation has `bytes` bytes, and later work of the stream may use them.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemsetD8Async(buffer.address, 0xff, bytes, owner.stream.handle) };
            driver("cuMemsetD8Async", code)?;
        }
        Ok(buffer)
    }

    pub(super) fn slice(&self) -> CudaSlice<'_, T> {
        CudaSlice { address: self.address, len: self.len, owner: &self.owner, element: PhantomData }
    }

    pub(super) fn slice_mut(&mut self) -> CudaSliceMut<'_, T> {
        CudaSliceMut { address: self.address, len: self.len, owner: &self.owner, element: PhantomData }
    }
}

impl<T: Element> Drop for CudaBuffer<T> {
    fn drop(&mut self) {
        self.owner.memory.subtract(self.len * size_of::<T>());
        if self.address != 0 && self.owner.context.make_current().is_ok() {
            // SAFETY: the memory came from `cuMemAllocAsync`. Earlier work of the stream may still
            // use the memory, and the pool waits for that work. If work of other handles uses the
            // memory, `Cuda::joins` has made the stream wait for that work.
            #[allow(unsafe_code)]
            let _ = unsafe { sys::cuMemFreeAsync(self.address, self.owner.stream.handle) };
        }
    }
}

impl<T: Element> fmt::Debug for CudaBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaBuffer<{}>({})", T::DTYPE, self.len)
    }
}

/// Memory for the work of one stream. The stream's handle owns the memory. Unlike a buffer, the
/// memory does not reference the handle, because that would be a reference cycle.
pub(super) struct StreamMemory {
    address: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
    context: &'static Context,
}

impl StreamMemory {
    /// Allocates at least one byte, so that the memory has an address. The caller has made the
    /// handle's context current.
    pub(super) fn new(handle: &Handle, bytes: usize) -> Result<Self> {
        let (stream, context) = (handle.stream.handle, handle.context);
        let mut memory = Self { address: 0, bytes, stream, context };
        // SAFETY: `address` is valid for writing an address, and the stream belongs to the current
        // context.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuMemAllocAsync(&mut memory.address, bytes.max(1), stream) };
        driver("cuMemAllocAsync", code)?;
        Ok(memory)
    }

    pub(super) fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for StreamMemory {
    fn drop(&mut self) {
        if self.address != 0 && self.context.make_current().is_ok() {
            // SAFETY: the memory came from `cuMemAllocAsync` on this stream. The stream is live,
            // because the handle drops its memory before its stream, and other owners of the memory
            // borrow the handle. The pool waits for earlier work of the stream.
            #[allow(unsafe_code)]
            let _ = unsafe { sys::cuMemFreeAsync(self.address, self.stream) };
        }
    }
}

/// A shared view of device memory.
#[derive(Clone, Copy)]
pub struct CudaSlice<'a, T: Element> {
    pub(super) address: CUdeviceptr,
    pub(super) len: usize,
    pub(super) owner: &'a Rc<Handle>,
    element: PhantomData<&'a [T]>,
}

impl<T: Element> CudaSlice<'_, T> {
    /// Returns the address of the first element.
    pub(crate) fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Returns the handle that allocated the memory.
    pub(crate) fn owner(&self) -> Rc<Handle> {
        Rc::clone(self.owner)
    }

    pub(super) fn narrow(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a view of {}", self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }
}

/// An exclusive view of device memory.
pub struct CudaSliceMut<'a, T: Element> {
    pub(super) address: CUdeviceptr,
    pub(super) len: usize,
    pub(super) owner: &'a Rc<Handle>,
    element: PhantomData<&'a mut [T]>,
}

impl<T: Element> CudaSliceMut<'_, T> {
    /// Returns the address of the first element.
    pub(crate) fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub(super) fn narrow(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a view of {}", self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }

    pub(super) fn shared(&self) -> CudaSlice<'_, T> {
        CudaSlice { address: self.address, len: self.len, owner: self.owner, element: PhantomData }
    }

    pub(super) fn reborrow(&mut self) -> CudaSliceMut<'_, T> {
        CudaSliceMut { address: self.address, len: self.len, owner: self.owner, element: PhantomData }
    }
}

/// Returns the bytes of a slice of elements.
pub(super) fn bytes<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: elements are f64, f32, bf16 or f16. They have no padding, so every byte is
    // initialized.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements))
    }
}

/// Returns the bytes of an exclusive slice of elements.
pub(super) fn bytes_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes`, and any bits are a valid element.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), size_of_val(elements))
    }
}

/// Pinned host memory in two halves, for asynchronous copies to and from the device. The memory is
/// never returned to the driver, because the driver may wait for the device when it frees memory.
/// The next handle reuses the memory.
struct Pinned {
    address: *mut u8,
    context: &'static Context,
}

impl Pinned {
    fn new(context: &'static Context) -> Result<Self> {
        let spare = lock(&context.spare_pinned).pop();
        if let Some(address) = spare {
            return Ok(Self { address, context });
        }
        context.make_current()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: `address` is valid for writing a pointer.
        #[allow(unsafe_code)]
        driver("cuMemAllocHost", unsafe { sys::cuMemAllocHost_v2(&mut address, 2 * HALF) })?;
        Ok(Self { address: address.cast(), context })
    }
}

impl Drop for Pinned {
    /// The handle's stream has finished, so nothing uses the memory any more.
    fn drop(&mut self) {
        lock(&self.context.spare_pinned).push(self.address);
    }
}

/// Copies between host and device through pinned memory, so that a small upload does not wait for
/// the device. Uploads fill two halves in turn, and reuse a half after the device has read it.
#[derive(Default)]
pub(super) struct Staging {
    memory: Option<Pinned>,
    /// The offset of the next upload, in bytes.
    at: usize,
    /// For each half, the event after the device's last copy to or from that half.
    copied: [Option<Event>; 2],
}

/// The number of bytes of one half.
const HALF: usize = 1 << 20;

impl Staging {
    /// Returns the pinned memory. The first call allocates it.
    pub(super) fn memory(&mut self, context: &'static Context) -> Result<*mut u8> {
        if self.memory.is_none() {
            self.memory = Some(Pinned::new(context)?);
        }
        Ok(self.memory.as_ref().map_or(std::ptr::null_mut(), |memory| memory.address))
    }

    /// Copies `from` to the device in stream order. The destination has as many bytes as `from`.
    pub(super) fn upload(&mut self, cuda: &Handle, mut from: &[u8], mut to: CUdeviceptr) -> Result<()> {
        let pinned = self.memory(cuda.context)?;
        while !from.is_empty() {
            let half = self.at / HALF;
            if self.at.is_multiple_of(HALF) {
                // Waits until the device has copied this half's previous contents.
                if let Some(event) = &self.copied[half] {
                    cuda.wait_for(event)?;
                }
                self.copied[half] = None;
            }
            let (now, rest) = from.split_at(from.len().min(HALF - self.at % HALF));
            // SAFETY: the `now.len()` bytes at `at` lie in one half of the memory. The device does
            // not read them: `wait_for` above waited for the half's previous copies, and the copies
            // that were launched since read only bytes before `at`. The destination is as long as
            // `now` and `rest` together, and the caller borrows it exclusively.
            #[allow(unsafe_code)]
            unsafe {
                let place = pinned.add(self.at);
                std::ptr::copy_nonoverlapping(now.as_ptr(), place, now.len());
                let code = sys::cuMemcpyHtoDAsync_v2(to, place.cast(), now.len(), cuda.stream.handle);
                driver("cuMemcpyHtoDAsync", code)?;
            }
            from = rest;
            to += now.len() as u64;
            // Aligns the next upload to 16 bytes.
            self.at = (self.at + now.len()).next_multiple_of(16).min((half + 1) * HALF);
            if self.at == (half + 1) * HALF {
                self.copied[half] = Some(cuda.stream.record_event()?);
                self.at %= 2 * HALF;
            }
        }
        Ok(())
    }

    /// Copies from the device to `to`, and waits for the copy. The source has as many bytes as
    /// `to`. While the host reads one half, the device fills the other half.
    pub(super) fn download(&mut self, cuda: &Handle, mut from: CUdeviceptr, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let pinned = self.memory(cuda.context)?;
        // Later uploads start at the first half again. The device has then read all earlier
        // uploads, because this function waits for a chunk that the device writes after them.
        self.at = 0;
        let mut pending: Option<(usize, &mut [u8])> = None;
        for (chunk, to) in to.chunks_mut(HALF).map(Some).chain([None]).enumerate() {
            let half = chunk % 2;
            if let Some(to) = &to {
                // SAFETY: the half has room for a chunk, and the host has read the half's previous
                // chunk. The stream reads earlier uploads from the half before it writes here.
                #[allow(unsafe_code)]
                unsafe {
                    let place = pinned.add(half * HALF).cast();
                    let code = sys::cuMemcpyDtoHAsync_v2(place, from, to.len(), cuda.stream.handle);
                    driver("cuMemcpyDtoHAsync", code)?;
                }
                // If a wait ends with an error, the device may still write to this half. Later
                // uploads to the half wait for this event.
                self.copied[half] = Some(cuda.stream.record_event()?);
                from += to.len() as u64;
            }
            if let Some((half, to)) = pending.take() {
                if let Some(event) = &self.copied[half] {
                    cuda.wait_for(event)?;
                }
                // SAFETY: `wait_for` waited until the device had written `to.len()` bytes to this
                // half, and the device does not use the half meanwhile.
                #[allow(unsafe_code)]
                unsafe {
                    std::ptr::copy_nonoverlapping(pinned.add(half * HALF), to.as_mut_ptr(), to.len());
                }
            }
            pending = to.map(|to| (half, to));
        }
        Ok(())
    }
}
