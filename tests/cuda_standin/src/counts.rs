//! Counters of calls that cost a device or its host time, for tests that check these costs.
//!
//! A test that has loaded this library as the driver looks up [`cuda_standin_counts`] by its name
//! and compares two snapshots. A call counts once it has been accepted. A captured call counts at
//! its capture, a launch of a graph as one [`Count::Graph`].

use std::{
    cell::Cell,
    ffi::c_int,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// The counters, in the order in which [`cuda_standin_counts`] returns them.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Count {
    /// `cuLaunchKernel`.
    Launch,
    /// `cublasLtMatmul`.
    Matmul,
    /// Copies from the host to the device.
    Upload,
    /// Copies from the device to the host.
    Download,
    /// Copies on the device.
    Copy,
    Memset,
    /// Device memory.
    Allocation,
    Free,
    /// `cuEventCreate`.
    Event,
    /// `cuEventRecord`.
    Record,
    /// `cuStreamWaitEvent`.
    StreamWait,
    /// Host waits for a stream, an event, the context, or a copy to memory that is not pinned.
    HostWait,
    /// `cuMemAllocHost`.
    Pinned,
    /// `cuModuleLoadData`.
    Module,
    Graph,
    /// `cuCtxSetCurrent`: counted for the calling thread only.
    SetCurrent,
}

/// The number of counters.
pub const COUNTS: usize = Count::SetCurrent as usize + 1;
const DEVICES: usize = 64;

static ALL: [[AtomicU64; COUNTS]; DEVICES] = [const { [const { AtomicU64::new(0) }; COUNTS] }; DEVICES];

thread_local!(static OWN: [Cell<u64>; COUNTS] = const { [const { Cell::new(0) }; COUNTS] });

/// Counts a call of this thread on a device.
pub fn add(device: usize, count: Count) {
    own(count);
    if let Some(counts) = ALL.get(device) {
        counts[count as usize].fetch_add(1, Relaxed);
    }
}

/// Counts a call of this thread.
pub fn own(count: Count) {
    OWN.with(|own| own[count as usize].set(own[count as usize].get() + 1));
}

/// Writes the first `len` counters, in the order of [`Count`], to `out`: those of the calling
/// thread if `device` is negative, else those of a device by all threads of this process. Returns
/// the number of counters; with a null `out` it does nothing else.
///
/// # Safety
/// `out` is null or has room for `len` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_standin_counts(device: c_int, out: *mut u64, len: usize) -> usize {
    if out.is_null() {
        return COUNTS;
    }
    for at in 0..len.min(COUNTS) {
        let value = match usize::try_from(device) {
            Ok(device) => ALL.get(device).map_or(0, |counts| counts[at].load(Relaxed)),
            Err(_) => OWN.with(|own| own[at].get()),
        };
        // SAFETY: the caller's promise.
        unsafe { out.add(at).write(value) };
    }
    COUNTS
}
