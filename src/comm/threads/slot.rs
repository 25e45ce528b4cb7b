//! A rank's slot, in which it publishes its call and the address of its data. The other ranks read
//! them. See `README.md`, R1, R3 and R5.

#![allow(unsafe_code)]

use super::sync::{AtomicU64, Ordering};
use crate::{
    comm::Call,
    device::{DType, Element},
};
use std::{cell::UnsafeCell, ptr};

/// A rank publishes payloads of at most this many bytes by copy.
pub(super) const EAGER: usize = 16 << 10;

/// The two publications of one rank, used in turn. Other ranks may still read one publication while
/// the rank writes the next.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Slot {
    /// The number of operations that the rank has published.
    published: AtomicU64,
    publications: [UnsafeCell<Publication>; 2],
}

/// The publication for one operation.
#[derive(Debug)]
struct Publication {
    call: Option<Call>,
    data: Span,
    payload: Box<[u64; EAGER / 8]>,
}

/// A published slice, without its lifetime and element type.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: *mut u8,
    len: usize,
    dtype: DType,
}

// SAFETY: the owner writes a publication and other ranks read it, never at the same time: R1. Other
// ranks touch the published slices only between the rounds of an operation, while the owner stays
// inside the operation: R3.
unsafe impl Sync for Slot {}
// SAFETY: no field of a slot depends on a thread. Its pointers are used as described for `Sync`.
unsafe impl Send for Slot {}

impl Slot {
    pub(super) fn new() -> Self {
        let publication = || {
            UnsafeCell::new(Publication {
                call: None,
                data: Span { start: ptr::null_mut(), len: 0, dtype: DType::F64 },
                payload: Box::new([0; EAGER / 8]),
            })
        };
        Self { published: AtomicU64::new(0), publications: [publication(), publication()] }
    }

    /// Returns the number of operations that the rank has published.
    pub(super) fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// Publishes a call without data.
    ///
    /// # Safety
    /// Only the owner may call this: after the first round of operation `at − 1`, and before it
    /// arrives at the first round of operation `at`.
    pub(super) unsafe fn publish(&self, at: u64, call: &Call) {
        // SAFETY: the caller has passed the first round of operation `at − 1`, so no rank reads
        // this publication: R1.
        unsafe { (*self.publications[(at % 2) as usize].get()).call = Some(*call) };
        self.published.store(at + 1, Ordering::Release);
    }

    /// Publishes a call with its data. Copies the data if it has at most [`EAGER`] bytes.
    ///
    /// # Safety
    /// As [`Slot::publish`]. If `data` is longer than [`EAGER`] bytes, the owner must neither move
    /// nor touch it until the operation's second round is complete or its first round is broken.
    pub(super) unsafe fn publish_ref<T: Element>(&self, at: u64, call: &Call, data: &[T]) {
        // SAFETY: the caller promises that no rank reads the publication: R1. A payload that fits
        // is copied into the publication, whose u64 are aligned for every element type.
        unsafe {
            let publication = &mut *self.publications[(at % 2) as usize].get();
            let mut start = data.as_ptr().cast::<u8>().cast_mut();
            if size_of_val(data) <= EAGER {
                let payload = publication.payload.as_mut_ptr().cast::<u8>();
                ptr::copy_nonoverlapping(start, payload, size_of_val(data));
                start = payload;
            }
            publication.data = Span { start, len: data.len(), dtype: T::DTYPE };
            self.publish(at, call);
        }
    }

    /// Publishes a call with data that the other ranks will write.
    ///
    /// # Safety
    /// As [`Slot::publish`]. The owner must neither move nor touch `data`, whatever its length,
    /// until the operation's second round is complete or its first round is broken.
    pub(super) unsafe fn publish_mut<T: Element>(&self, at: u64, call: &Call, data: &mut [T]) {
        // SAFETY: the caller promises that no rank reads the publication: R1.
        unsafe {
            let publication = &mut *self.publications[(at % 2) as usize].get();
            publication.data = Span { start: data.as_mut_ptr().cast(), len: data.len(), dtype: T::DTYPE };
            self.publish(at, call);
        }
    }

    /// Returns the call published for operation `at`.
    ///
    /// # Safety
    /// The first round of operation `at` is complete, and the reader has not yet arrived at the
    /// first round of operation `at + 1`.
    pub(super) unsafe fn call(&self, at: u64) -> &Call {
        // SAFETY: the owner wrote the publication before the round that the caller has passed, and
        // does not write it again before the caller arrives at the next operation: R1.
        let publication = unsafe { &*self.publications[(at % 2) as usize].get() };
        publication.call.as_ref().expect("a rank publishes its call before it arrives")
    }

    /// Returns the data published for operation `at`.
    ///
    /// # Safety
    /// As [`Slot::call`]. The owner published the data by [`Slot::publish_ref`], so that no rank
    /// writes it.
    pub(super) unsafe fn data<T: Element>(&self, at: u64) -> &[T] {
        // SAFETY: as in `call`. The span is a slice of `len` elements of type T: the type is
        // asserted. It lies in the publication, or in a buffer that does not move before the second
        // round: R3.
        unsafe {
            let span = (*self.publications[(at % 2) as usize].get()).data;
            assert_eq!(span.dtype, T::DTYPE, "a rank published another element type");
            std::slice::from_raw_parts(span.start.cast::<T>(), span.len)
        }
    }

    /// Returns a range, for reading, of the buffer published for operation `at`.
    ///
    /// # Safety
    /// The caller is between the rounds of operation `at`. The owner published the buffer by
    /// [`Slot::publish_mut`], and no rank but the caller touches the range between the rounds: R5.
    pub(super) unsafe fn range<T: Element>(&self, at: u64, start: usize, len: usize) -> &[T] {
        // SAFETY: the caller promises exclusive access. `range_start` asserts that the range is
        // inside the buffer.
        unsafe { std::slice::from_raw_parts(self.range_start::<T>(at, start, len), len) }
    }

    /// Returns a range, for writing, of the buffer published for operation `at`.
    ///
    /// # Safety
    /// As [`Slot::range`]. The caller holds no other reference to the range.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn range_mut<T: Element>(&self, at: u64, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller promises exclusive access. `range_start` asserts that the range is
        // inside the buffer.
        unsafe { std::slice::from_raw_parts_mut(self.range_start::<T>(at, start, len), len) }
    }

    /// Returns the start of a range of the buffer published for operation `at`.
    ///
    /// # Safety
    /// As [`Slot::range`].
    unsafe fn range_start<T: Element>(&self, at: u64, start: usize, len: usize) -> *mut T {
        // SAFETY: as in `call`. The range is inside the span, as asserted.
        unsafe {
            let span = (*self.publications[(at % 2) as usize].get()).data;
            assert!(
                span.dtype == T::DTYPE && start + len <= span.len,
                "a rank published another element type or a shorter buffer"
            );
            span.start.cast::<T>().add(start)
        }
    }
}
