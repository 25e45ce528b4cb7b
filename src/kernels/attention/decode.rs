//! Decoding on NVIDIA GPUs: appending to a cache, and attention of few queries to it: `cuda/decode.cu`.

use super::{AttentionSpec, CacheSpec};
use crate::{
    device::{
        Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::Walk},
};
use std::collections::HashSet;

/// Rows that a block appends.
const RUN: usize = 16;

/// [`super::Attention::append_cached`], of what its check has seen.
pub(super) fn append<T: Element>(
    cuda: &Cuda,
    spec: &AttentionSpec<'_>,
    cache: &CacheSpec<'_>,
    k: MatRef<'_, T, Cuda>,
    v: MatRef<'_, T, Cuda>,
    keys: MatMut<'_, T, Cuda>,
    values: MatMut<'_, T, Cuda>,
) -> Result<()> {
    let operands = [k.operand(), v.operand(), keys.operand(), values.operand()];
    let walk = Walk::by_rows(&operands, keys.rows(), spec.head_dim);
    let (sk, sv) = (k.dims().row_stride, v.dims().row_stride);
    let (skeys, svalues) = (keys.dims().row_stride, values.dims().row_stride);
    let (keys, values) = (keys.into_data(), values.into_data());
    // One launch writes a place once: a sequence whose slot was written before begins another.
    let mut first = 0;
    while first < cache.slots.len() {
        let mut written = HashSet::new();
        let count = cache.slots[first..].iter().take_while(|&&slot| written.insert(slot)).count();
        let mut runs: Vec<i64> = Vec::new();
        for (at, rows) in spec.sequences.iter().enumerate().skip(first).take(count) {
            let to = cache.row(spec, cache.slots[at], 0) + spec.sequences.start(at);
            for done in (0..rows.len()).step_by(RUN) {
                let rows_here = RUN.min(rows.len() - done);
                runs.extend([rows.start + done, rows_here, to + done].map(|number| number as i64));
            }
        }
        first += count;
        let blocks = runs.len() / 3;
        let table = cuda.table(&runs)?;
        let launch = cuda.kernel(Kernel::Append, T::DTYPE);
        let launch = launch.ints([usize::from(walk.packed), spec.head_dim, cache.capacity]).table(&table);
        let launch = launch.read(k.data()).int(sk).read(v.data()).int(sv);
        let launch = launch.write(&keys).int(skeys).write(&values).int(svalues);
        // SAFETY: the arguments are append's; `check_append` has seen that k and v have the rows of the sequences and
        // the columns of the heads, and that the sequences end in their slots and these in the cache.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid { blocks: [blocks, spec.kv_heads], threads: [128, 1], shared: 0 })?;
        }
    }
    Ok(())
}
