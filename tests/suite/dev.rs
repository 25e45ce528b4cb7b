//! The device of this binary: the CPU, with fresh tensors of NaN. `tests/cuda/dev.rs` is the same for GPUs, so that the tests of
//! operators, layers and models run on both.

use shardwise::{device::Cpu, launch::Threads};
use std::time::Duration;

/// The group sizes that slow tests run on.
pub(crate) const WORLDS: &[usize] = &[1, 2, 3, 4, 5, 6, 7, 8];
/// Divides the number of random cases of slow tests.
pub(crate) const FEWER: u32 = 1;

pub(crate) type Dev = Cpu;
pub(crate) type Tensor<T = f32> = shardwise::Tensor<T, Dev>;
pub(crate) type DTensor<P, T = f32> = shardwise::parallel::DTensor<P, T, Dev>;

/// A device whose fresh tensors are NaN.
pub(crate) fn poisoned() -> Dev {
    Cpu::poisoned()
}

/// A device.
pub(crate) fn fresh() -> Dev {
    Cpu::new()
}

/// Another handle of a device.
pub(crate) fn beside(_: &Dev) -> Dev {
    Cpu::poisoned()
}

/// Thread ranks whose fresh tensors are NaN.
pub(crate) fn ranks(world: usize) -> Threads {
    Threads::new(world).device(Cpu::poisoned).deadline(Duration::from_secs(60))
}
