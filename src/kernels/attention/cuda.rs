//! Attention on NVIDIA GPUs by the kernels of `cuda/attention.cu` and, on tensor cores, of
//! `cuda/flash.cu`.

use super::{
    Attention, AttentionSpec, CacheSpec, check, check_append, check_cached, decode, too_wide, window,
};
use crate::{
    device::{
        DType, Device, Element,
        cuda::{Cuda, CudaSlice, CudaSliceMut, Grid, Kernel, Table},
    },
    error::{Result, same_size},
    kernels::{
        MatMut, MatRef,
        packs::{AccessPlan, Operand},
        view::unit_columns,
    },
};

/// The number of keys that are in shared memory at a time, and the number of warps per block.
const KEYS: usize = 32;
const WARPS: usize = 4;

/// The kernels for a range of head widths, and their tile size.
struct Heads {
    /// The kernels of the forward, of the backward for the queries, and of the backward for the
    /// keys and values.
    kernels: [Kernel; 3],
    /// The number of queries per block, or of keys in the backward for the keys and values.
    tile: usize,
}

impl Heads {
    fn new(head_dim: usize) -> Result<Self> {
        use Kernel as Is;
        match head_dim {
            0..=64 => Ok(Self {
                kernels: [Is::Attention64, Is::AttentionBackwardQueries64, Is::AttentionBackwardKeys64],
                tile: 4 * WARPS,
            }),
            65..=128 => Ok(Self {
                kernels: [Is::Attention128, Is::AttentionBackwardQueries128, Is::AttentionBackwardKeys128],
                tile: 4 * WARPS,
            }),
            129..=256 => Ok(Self {
                kernels: [Is::Attention256, Is::AttentionBackwardQueries256, Is::AttentionBackwardKeys256],
                tile: 2 * WARPS,
            }),
            _ => Err(too_wide(head_dim)),
        }
    }

    /// The bytes of shared memory for `own` matrices of a tile's rows and `others` matrices of
    /// [`KEYS`] rows.
    fn shared<T: Element>(&self, dim: usize, own: usize, others: usize) -> usize {
        (own * self.tile + others * KEYS) * (dim + 1) * size_of::<T::Acc>()
    }
}

/// The kernels of one call.
struct Kernels {
    forward: Kernel,
    backward_queries: Kernel,
    backward_keys: Kernel,
    /// The number of queries per block in the forward.
    tile: usize,
    /// The number of queries, or of keys, per block in the backward.
    backward_tile: usize,
    forward_shared: usize,
    backward_shared: usize,
}

impl Kernels {
    /// Selects tensor cores for 16-bit elements whose rows are aligned to 16 bytes, in heads of at
    /// most 128 features. The forward then holds two tiles each of queries, keys and values in
    /// shared memory. The backward for the queries holds one tile of queries, one of output
    /// gradients, and two each of keys and values. The backward for the keys needs less.
    fn new<T: Element>(head_dim: usize, operands: &[Operand]) -> Result<Self> {
        let rows = operands.iter().map(|operand| operand.dims.rows).max().unwrap_or(0);
        let fits = AccessPlan::by_rows(operands, rows, head_dim).packed && head_dim <= 128;
        if fits && matches!(T::DTYPE, DType::BF16 | DType::F16) {
            let (features, [forward, backward_queries, backward_keys]) = if head_dim <= 64 {
                (64, [Kernel::Flash64, Kernel::FlashBackwardQueries64, Kernel::FlashBackwardKeys64])
            } else {
                (128, [Kernel::Flash128, Kernel::FlashBackwardQueries128, Kernel::FlashBackwardKeys128])
            };
            let tile = 16 * WARPS;
            let shared = 6 * tile * features * size_of::<T>();
            return Ok(Self {
                forward,
                backward_queries,
                backward_keys,
                tile: 2 * tile,
                backward_tile: tile,
                forward_shared: shared,
                backward_shared: shared,
            });
        }
        let heads = Heads::new(head_dim)?;
        let [forward, backward_queries, backward_keys] = heads.kernels;
        Ok(Self {
            forward,
            backward_queries,
            backward_keys,
            tile: heads.tile,
            backward_tile: heads.tile,
            forward_shared: heads.shared::<T>(head_dim, 1, 2),
            backward_shared: heads.shared::<T>(head_dim, 2, 2),
        })
    }
}

/// A grid over tiles and heads.
fn grid(tiles: usize, heads: usize, shared: usize) -> Grid {
    Grid { blocks: [tiles, heads], threads: [32, WARPS as u32], shared }
}

impl Cuda {
    /// Uploads the tables of a kernel: the tiles of the sequences, the key/value head of each query
    /// head, and one flag per row, false for padding. Also returns the number of tiles.
    fn tables(
        &self,
        spec: &AttentionSpec<'_>,
        tile: usize,
        keys: impl Fn(usize, &std::ops::Range<usize>) -> [usize; 3],
    ) -> Result<(usize, Table, Table, Option<Table>)> {
        let mut tiles: Vec<i64> = Vec::new();
        for (sequence, rows) in spec.sequences.iter().enumerate() {
            let [place, first_key, count] = keys(sequence, &rows);
            for at in (0..rows.len()).step_by(tile) {
                let own = tile.min(rows.len() - at);
                tiles
                    .extend([rows.start + at, own, place + at, first_key, count].map(|number| number as i64));
            }
        }
        let kv: Vec<i64> = spec.heads.kv_of_query.iter().map(|&kv| kv as i64).collect();
        let valid =
            spec.sequences.valid().map(|valid| self.table_of_flags(valid.iter().copied())).transpose()?;
        Ok((tiles.len() / 5, self.table(&tiles)?, self.table(&kv)?, valid))
    }
}

impl Attention for Cuda {
    fn attention<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
        lse: CudaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        let (query_like, kv_like) =
            ([("q", q.dims()), ("out", out.dims())], [("k", k.dims()), ("v", v.dims())]);
        check("attention", spec, &query_like, &kv_like, Self::len_mut(&lse))?;
        let (heads, dim) = (spec.heads.kv_of_query.len(), spec.heads.head_dim);
        let kind = Kernels::new::<T>(dim, &[q.operand(), k.operand(), v.operand(), out.operand()])?;
        let (count, tiles, kv, valid) =
            self.tables(spec, kind.tile, |_, rows| [0, rows.start, rows.len()])?;
        let so = out.dims().row_stride;
        let out = out.into_data();
        let launch = self.kernel(kind.forward, T::DTYPE);
        let launch = launch
            .ints([heads, dim, 0, dim, usize::from(spec.heads.choices.causal), window(spec)])
            .floats([spec.heads.scale()]);
        let launch = launch.table(&tiles).table(&kv).table_if(valid.as_ref());
        let launch = launch.read(q.data()).int(q.dims().row_stride).read(k.data()).int(k.dims().row_stride);
        let launch = launch.read(v.data()).int(v.dims().row_stride).write(&out).int(so).write(&lse);
        // SAFETY: the arguments are those of the kernel attention. `check` has verified that the
        // matrices have the rows of the sequences and the columns of the heads, that every query
        // head's key/value head exists, and that there is one log-sum-exp per row and head.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(grid(count, heads, kind.forward_shared))
        }
    }

    fn attention_backward<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatRef<'_, T, Self>,
        lse: CudaSlice<'_, T::Acc>,
        dout: MatRef<'_, T, Self>,
        dqkv: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "attention backward";
        let query_like = [("q", q.dims()), ("out", out.dims()), ("dout", dout.dims())];
        check(OP, spec, &query_like, &[("k", k.dims()), ("v", v.dims())], Self::len(lse))?;
        let (rows, heads, dim) = (q.rows(), spec.heads.kv_of_query.len(), spec.heads.head_dim);
        unit_columns(OP, dqkv.dims())?;
        same_size(OP, "rows of the gradient", dqkv.rows(), "rows of q", rows)?;
        let width = (heads + 2 * spec.heads.kv_heads) * dim;
        same_size(OP, "columns of the gradient", dqkv.cols(), "those of q, k and v", width)?;
        let operands = [q.operand(), k.operand(), v.operand(), dout.operand(), dqkv.operand()];
        let kind = Kernels::new::<T>(dim, &operands)?;
        let mut delta = self.empty::<T::Acc>(rows * heads)?;
        let access = AccessPlan::by_rows(&[out.operand(), dout.operand()], rows, dim);
        let launch = self.kernel(Kernel::AttentionDelta, T::DTYPE);
        let launch = launch.ints([usize::from(access.packed), rows, heads, dim]);
        let launch =
            launch.read(out.data()).int(out.dims().row_stride).read(dout.data()).int(dout.dims().row_stride);
        // SAFETY: the arguments are those of the kernel attention_delta. `check` has verified that
        // out and dout have heads · dim columns. `delta` was allocated for rows · heads elements.
        #[allow(unsafe_code)]
        unsafe {
            let grid = Grid { blocks: [(rows * heads).div_ceil(8), 1], threads: [32, 8], shared: 0 };
            launch.write(&Self::slice_mut(&mut delta)).run(grid)?;
        }
        let (count, tiles, kv, valid) =
            self.tables(spec, kind.backward_tile, |_, rows| [0, rows.start, rows.len()])?;
        let sd = dqkv.dims().row_stride;
        let dqkv = dqkv.into_data();
        for (kernel, numbers, blocks) in [
            (kind.backward_queries, vec![heads, dim], heads),
            (kind.backward_keys, vec![heads, spec.heads.kv_heads, dim], spec.heads.kv_heads),
        ] {
            let launch = self.kernel(kernel, T::DTYPE);
            let launch = numbers.into_iter().fold(launch, |launch, number| launch.int(number));
            let launch = launch
                .ints([usize::from(spec.heads.choices.causal), window(spec)])
                .floats([spec.heads.scale()]);
            let launch = launch.table(&tiles).table(&kv).table_if(valid.as_ref());
            let launch =
                launch.read(q.data()).int(q.dims().row_stride).read(k.data()).int(k.dims().row_stride);
            let launch = launch.read(v.data()).int(v.dims().row_stride).read(lse).read(Self::slice(&delta));
            let launch = launch.read(dout.data()).int(dout.dims().row_stride).write(&dqkv).int(sd);
            // SAFETY: the arguments are those of the kernels attention_backward_queries and
            // attention_backward_keys. `check` and `same_size` have compared all dimensions. The
            // two kernels write different columns of `dqkv`.
            #[allow(unsafe_code)]
            unsafe {
                launch.run(grid(count, blocks, kind.backward_shared))?;
            }
        }
        Ok(())
    }

    fn append_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        keys: MatMut<'_, T, Self>,
        values: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let from = [("k", k.dims()), ("v", v.dims())];
        check_append(spec, cache, from, [("the keys", keys.dims()), ("the values", values.dims())])?;
        decode::append(self, spec, cache, k, v, keys, values)
    }

    fn attention_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        mut out: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let kv_like = [("the keys", k.dims()), ("the values", v.dims())];
        check_cached(spec, cache, &[("q", q.dims()), ("out", out.dims())], &kv_like)?;
        decode::attention(self, spec, cache, q, k, v, out.reborrow())?;
        // The decoding kernel skips sequences with more than `MAX_ROWS` rows, such as prompts. The
        // kernels of the forward compute them here.
        let (heads, dim) = (spec.heads.kv_of_query.len(), spec.heads.head_dim);
        let kind = Kernels::new::<T>(dim, &[q.operand(), k.operand(), v.operand(), out.operand()])?;
        let mut tiles: Vec<i64> = Vec::new();
        for (sequence, rows) in
            spec.sequences.iter().enumerate().filter(|(_, rows)| rows.len() > decode::MAX_ROWS)
        {
            let start = spec.sequences.start(sequence);
            let (key_row, end) = (cache.row(spec, cache.slots[sequence], 0), start + rows.len());
            for at in (0..rows.len()).step_by(kind.tile) {
                let own = kind.tile.min(rows.len() - at);
                tiles.extend([rows.start + at, own, start + at, key_row, end].map(|number| number as i64));
            }
        }
        if tiles.is_empty() {
            return Ok(());
        }
        let kv: Vec<i64> = spec.heads.kv_of_query.iter().map(|&kv| kv as i64).collect();
        let (count, tiles, kv) = (tiles.len() / 5, self.table(&tiles)?, self.table(&kv)?);
        let so = out.dims().row_stride;
        let out = out.into_data();
        let launch = self.kernel(kind.forward, T::DTYPE);
        let launch =
            launch.ints([heads, dim, cache.capacity, 0, 1, window(spec)]).floats([spec.heads.scale()]);
        let launch = launch.table(&tiles).table(&kv).null();
        let launch = launch.read(q.data()).int(q.dims().row_stride).read(k.data()).int(k.dims().row_stride);
        let launch = launch.read(v.data()).int(v.dims().row_stride).write(&out).int(so).null();
        // SAFETY: the arguments are those of the kernel attention. `check_cached` has verified the
        // dimensions of all matrices, that the slots lie in the cache, and that each sequence ends
        // within its slot.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(grid(count, heads, kind.forward_shared))
        }
    }
}
