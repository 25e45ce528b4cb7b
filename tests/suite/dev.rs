//! The device of this binary: the CPU, with fresh tensors of NaN. `tests/cuda/dev.rs` is its
//! counterpart for GPUs, so that the tests of operators, layers and models run on both.

use shardwise::{device::Cpu, launch::Threads, security::Role};
use std::time::Duration;

/// The group sizes of slow tests.
pub(crate) const WORLDS: &[usize] = &[1, 2, 3, 4, 5, 6, 7, 8];
/// The divisor of the number of random cases in slow tests.
pub(crate) const FEWER: u32 = 1;

pub(crate) type Dev = Cpu;
pub(crate) type Tensor<T = f32> = shardwise::Tensor<T, Dev>;
pub(crate) type DTensor<P, T = f32> = shardwise::parallel::DTensor<P, T, Dev>;

/// Creates a device whose fresh tensors are NaN.
pub(crate) fn poisoned() -> Dev {
    Cpu::poisoned()
}

/// Creates a device.
pub(crate) fn fresh() -> Dev {
    Cpu::new()
}

/// Returns another handle of a device.
pub(crate) fn another_handle(_: &Dev) -> Dev {
    Cpu::poisoned()
}

/// Thread ranks whose fresh tensors are NaN. Only the first may see the weights of the others, so
/// that every test also shows that the library sends a weight to no other rank.
pub(crate) fn ranks(world: usize) -> Threads {
    let role = |rank| if rank == 0 { Role::Checkpointer } else { Role::Trainer };
    let ranks = Threads::new(world).device(Cpu::poisoned).deadline(Duration::from_secs(60));
    ranks.roles((0..world).map(role))
}
