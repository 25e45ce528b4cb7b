//! Decoding on NVIDIA GPUs by the kernels of `cuda/decode.cu`: appends rows to a KV cache, and
//! computes attention of few queries to the cache.

use super::{AttentionSpec, CacheSpec, too_wide, window};
use crate::{
    device::{
        Device, Element,
        cuda::{Cuda, Grid, Kernel},
    },
    error::Result,
    kernels::{MatMut, MatRef, packs::AccessPlan},
};
use std::collections::HashSet;

/// The number of rows that one block appends.
const RUN: usize = 16;

/// The decoding kernel computes sequences of at most this many rows.
pub(super) const MAX_ROWS: usize = 8;

/// The smallest number of keys per span (a sequence's last span may have fewer), and the largest
/// number of spans per sequence.
const SPAN: usize = 256;
const SPANS: usize = 64;

/// The number of warps per block of the attention kernel.
const WARPS: usize = 8;

/// [`super::Attention::append_cached`], after its checks.
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
    let access = AccessPlan::by_rows(&operands, keys.rows(), spec.heads.head_dim);
    let (sk, sv) = (k.dims().row_stride, v.dims().row_stride);
    let (skeys, svalues) = (keys.dims().row_stride, values.dims().row_stride);
    let (keys, values) = (keys.into_data(), values.into_data());
    // A launch writes rows in no fixed order, so it must not write a row twice. A sequence whose
    // slot this launch already writes therefore begins another launch.
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
        let launch =
            launch.ints([usize::from(access.packed), spec.heads.head_dim, cache.capacity]).table(&table);
        let launch = launch.read(k.data()).int(sk).read(v.data()).int(sv);
        let launch = launch.write(&keys).int(skeys).write(&values).int(svalues);
        // SAFETY: the arguments are those of the kernel append. The caller's `check_append` has
        // verified that k and v have the rows of the sequences and the columns of the heads, that
        // each sequence ends within its slot, and that the slots lie in the cache.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid { blocks: [blocks, spec.heads.kv_heads], threads: [128, 1], shared: 0 })?;
        }
    }
    Ok(())
}

/// [`super::Attention::attention_cached`], after its checks, for the sequences of at most
/// [`MAX_ROWS`] rows. Skips all other sequences.
pub(super) fn attention<T: Element>(
    cuda: &Cuda,
    spec: &AttentionSpec<'_>,
    cache: &CacheSpec<'_>,
    q: MatRef<'_, T, Cuda>,
    k: MatRef<'_, T, Cuda>,
    v: MatRef<'_, T, Cuda>,
    out: MatMut<'_, T, Cuda>,
) -> Result<()> {
    let (heads, dim) = (spec.heads.kv_of_query.len(), spec.heads.head_dim);
    let (kernel, features) = match dim {
        0..=64 => (Kernel::Decode64, 64),
        65..=128 => (Kernel::Decode128, 128),
        129..=256 => (Kernel::Decode256, 256),
        _ => return Err(too_wide(dim)),
    };
    let size = size_of::<T>();
    // Must equal TOGETHER in `cuda/decode.cu`.
    let together = if size == 8 { 2 } else { 4 } / if size > 2 && features == 256 { 2 } else { 1 };
    let plan = Plan::new(spec, cache);
    if plan.spans.is_empty() {
        return Ok(());
    }
    let packed = AccessPlan::by_rows(&[k.operand(), v.operand()], k.rows(), dim).packed;
    let chunks = plan.queries.div_ceil(together);
    let mut numbers = plan.heads;
    numbers.extend(&plan.sequences);
    numbers.extend(&plan.spans);
    let rows_at = numbers.len();
    numbers.extend(&plan.rows);
    let table = cuda.table(&numbers)?;
    let sums = plan.partials * dim;
    let mut scratch = cuda.empty::<T::Acc>(sums + 2 * plan.partials)?;
    let so = out.dims().row_stride;
    let out = out.into_data();
    let launch = cuda.kernel(kernel, T::DTYPE);
    let launch =
        launch.ints([usize::from(packed), heads, dim, spec.heads.kv_heads, plan.sequences.len() / 8, chunks]);
    let launch = launch.ints([cache.capacity, window(spec)]).floats([spec.heads.scale()]).table(&table);
    let launch = launch.read(q.data()).int(q.dims().row_stride).read(k.data()).int(k.dims().row_stride);
    let launch = launch.read(v.data()).int(v.dims().row_stride).write(&out).int(so);
    let launch = launch.write(&Cuda::narrow_mut(Cuda::slice_mut(&mut scratch), 0..sums));
    let launch =
        launch.write(&Cuda::narrow_mut(Cuda::slice_mut(&mut scratch), sums..sums + 2 * plan.partials));
    let shared = together * (features + WARPS * (features + 2)) * size_of::<T::Acc>();
    let blocks = [plan.spans.len() * chunks, spec.heads.kv_heads];
    // SAFETY: the arguments are those of the kernel decode. The caller's `check_cached` verified
    // that q and out have the rows of the sequences and the columns of the heads, that the slots
    // lie in the cache, and that each sequence ends within its slot. `scratch` has space for all
    // partial results of `plan`.
    #[allow(unsafe_code)]
    unsafe {
        launch.run(Grid { blocks, threads: [32, WARPS as u32], shared })?;
    }
    let launch = cuda.kernel(Kernel::Combine, T::DTYPE).ints([dim, rows_at]).table(&table);
    let launch = launch.read(Cuda::narrow(Cuda::slice(&scratch), 0..sums));
    let launch = launch.read(Cuda::narrow(Cuda::slice(&scratch), sums..sums + 2 * plan.partials));
    // SAFETY: the arguments are those of the kernel combine. The rows of `plan` are rows of `out`,
    // and the launch above has written the partial results.
    #[allow(unsafe_code)]
    unsafe {
        let blocks = [plan.rows.len() / 4, heads];
        launch.write(&out).int(so).run(Grid { blocks, threads: [32, 4], shared: 0 })
    }
}

/// The tables of the kernels, as described in `cuda/decode.cu`.
struct Plan {
    /// The index at which each key/value head's list of query heads begins, followed by these
    /// lists.
    heads: Vec<i64>,
    sequences: Vec<i64>,
    spans: Vec<i64>,
    /// The rows whose results the second kernel combines from several spans.
    rows: Vec<i64>,
    /// The number of partial results, one per span, query and head.
    partials: usize,
    /// The largest number of pairs (row, query head) that share a sequence and a key/value head.
    queries: usize,
}

impl Plan {
    fn new(spec: &AttentionSpec<'_>, cache: &CacheSpec<'_>) -> Self {
        let heads = spec.heads.kv_of_query.len();
        let (mut bounds, mut list, mut sharing) = (vec![0], Vec::with_capacity(heads), 0);
        for kv in 0..spec.heads.kv_heads {
            let before = list.len();
            list.extend(
                (0..heads).filter(|&head| spec.heads.kv_of_query[head] == kv).map(|head| head as i64),
            );
            sharing = sharing.max(list.len() - before);
            bounds.push(list.len() as i64);
        }
        bounds.extend(list);
        let (sequences, spans, rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut this = Self { heads: bounds, sequences, spans, rows, partials: 0, queries: 0 };
        for (sequence, own) in spec.sequences.iter().enumerate() {
            if own.is_empty() || own.len() > MAX_ROWS {
                continue;
            }
            let place = spec.sequences.start(sequence);
            let (begin, end) = (spec.first_key(place), place + own.len());
            // The span length depends only on the number of visible keys, so that the bits of a
            // sequence do not depend on the rest of the batch.
            let span = SPAN.max((end - begin).div_ceil(SPANS).next_multiple_of(SPAN / 8));
            let count = (end - begin).div_ceil(span);
            let key_row = cache.row(spec, cache.slots[sequence], 0);
            let number = this.sequences.len() / 8;
            let about = [own.start, own.len(), place, key_row, begin, end, span].map(|number| number as i64);
            this.sequences.extend(about);
            this.sequences.push(if count > 1 { this.partials as i64 } else { -1 });
            this.spans.extend((0..count).map(|at| (number * SPANS + at) as i64));
            this.queries = this.queries.max(own.len() * sharing);
            if count > 1 {
                let step = own.len() * heads;
                for row in 0..own.len() {
                    let about = [own.start + row, this.partials + row * heads, count, step];
                    this.rows.extend(about.map(|number| number as i64));
                }
                this.partials += count * step;
            }
        }
        this
    }
}
