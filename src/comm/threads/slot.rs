//! A rank's slot: its call and the address of its data, for the others to read. See `README.md`,
//! R1, R3 and R5.

#![allow(unsafe_code)]

use super::sync::{AtomicU64, Ordering};
use crate::{
    comm::Call,
    device::{DType, Element},
};
use std::{cell::UnsafeCell, ptr};

/// Payloads of at most this many bytes are published by copy.
pub(super) const EAGER: usize = 16 << 10;

/// One rank's publications: two, used in turn, so that one can still be read while the next is
/// written.
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

// SAFETY: publications are written by their owner and read by others, never both at a time: R1.
// Others touch the slices they point to only between the rounds of an operation, while the owner
// stays inside: R3.
unsafe impl Sync for Slot {}
// SAFETY: a slot holds no thread's identity; its pointers are used as said for `Sync`.
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
    /// By the owner only, before it arrives at operation `at`'s first round, and after the first
    /// round of `at − 1`.
    pub(super) unsafe fn publish(&self, at: u64, call: &Call) {
        // SAFETY: the caller has passed the first round of operation `at − 1`, so no rank reads
        // this publication: R1.
        unsafe { (*self.publications[(at % 2) as usize].get()).call = Some(*call) };
        self.published.store(at + 1, Ordering::Release);
    }

    /// Publishes a call with its data, by copy if it is small.
    ///
    /// # Safety
    /// As [`Slot::publish`]. If `data` is longer than [`EAGER`] bytes, it stays where it is,
    /// untouched by the owner's other code, until the operation's second round is complete or its
    /// first is broken.
    pub(super) unsafe fn publish_ref<T: Element>(&self, at: u64, call: &Call, data: &[T]) {
        // SAFETY: the publication is not being read, as the caller promises: R1. A payload that
        // fits is copied into it; u64 aligns every element.
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

    /// Publishes a call with data that the others will write.
    ///
    /// # Safety
    /// As [`Slot::publish_ref`].
    pub(super) unsafe fn publish_mut<T: Element>(&self, at: u64, call: &Call, data: &mut [T]) {
        // SAFETY: the publication is not being read, as the caller promises: R1.
        unsafe {
            let publication = &mut *self.publications[(at % 2) as usize].get();
            publication.data = Span { start: data.as_mut_ptr().cast(), len: data.len(), dtype: T::DTYPE };
            self.publish(at, call);
        }
    }

    /// Returns the call published for operation `at`.
    ///
    /// # Safety
    /// After operation `at`'s first round is complete, before the reader arrives at that of
    /// `at + 1`.
    pub(super) unsafe fn call(&self, at: u64) -> &Call {
        // SAFETY: the owner wrote the publication before the round that the caller has passed, and
        // does not write it again before the caller arrives at the next operation: R1.
        let publication = unsafe { &*self.publications[(at % 2) as usize].get() };
        publication.call.as_ref().expect("a rank publishes its call before it arrives")
    }

    /// Returns the data published for operation `at`.
    ///
    /// # Safety
    /// As [`Slot::call`]; and no rank writes the data: it was published by [`Slot::publish_ref`].
    pub(super) unsafe fn data<T: Element>(&self, at: u64) -> &[T] {
        // SAFETY: as in `call`. The span is a slice of `len` elements of `dtype`, which is T's:
        // asserted. It is in the publication, or in a buffer that stays where it is until the
        // second round: R3.
        unsafe {
            let span = (*self.publications[(at % 2) as usize].get()).data;
            assert_eq!(span.dtype, T::DTYPE, "the ranks' calls agree on the element");
            std::slice::from_raw_parts(span.start.cast::<T>(), span.len)
        }
    }

    /// Returns a range of the buffer published for operation `at`, for reading.
    ///
    /// # Safety
    /// Between the rounds of operation `at`, for which the buffer was published by
    /// [`Slot::publish_mut`]; no rank but the caller touches the range there: R5.
    pub(super) unsafe fn range<T: Element>(&self, at: u64, start: usize, len: usize) -> &[T] {
        // SAFETY: as the caller promises, and inside the buffer: asserted.
        unsafe { std::slice::from_raw_parts(self.range_start::<T>(at, start, len), len) }
    }

    /// Returns a range of the buffer published for operation `at`, for writing.
    ///
    /// # Safety
    /// As [`Slot::range`]; and the caller holds no other reference to the range.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn range_mut<T: Element>(&self, at: u64, start: usize, len: usize) -> &mut [T] {
        // SAFETY: as the caller promises, and inside the buffer: asserted.
        unsafe { std::slice::from_raw_parts_mut(self.range_start::<T>(at, start, len), len) }
    }

    /// Returns the start of a range of the buffer published for operation `at`.
    ///
    /// # Safety
    /// As [`Slot::range`].
    unsafe fn range_start<T: Element>(&self, at: u64, start: usize, len: usize) -> *mut T {
        // SAFETY: as in `call`; the offset is inside the span: asserted.
        unsafe {
            let span = (*self.publications[(at % 2) as usize].get()).data;
            assert!(span.dtype == T::DTYPE && start + len <= span.len, "the ranks' calls agree on the shape");
            span.start.cast::<T>().add(start)
        }
    }
}
