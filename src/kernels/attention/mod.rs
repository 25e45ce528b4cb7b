//! Scaled dot-product attention, forward and backward, in memory linear in the sequence length.

mod cached;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod decode;
mod flops;
mod meta;
mod softmax;

use super::{
    MatMut, MatRef,
    view::{Dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    shard::Sequences,
};

/// The mask of attention and the scale of its scores, shared by layer configurations and kernels.
///
/// ```
/// use shardwise::{kernels::QkvHeads, prelude::*};
///
/// let choices = AttentionChoices { window: Some(2), ..AttentionChoices::CAUSAL };
/// let heads = QkvHeads { kv_of_query: vec![0], kv_heads: 1, head_dim: 1, choices };
/// // Three tokens with v = 2, 6, 10. All q and k are 0, so all weights are equal.
/// let qkv = [0.0, 0.0, 2.0, 0.0, 0.0, 6.0, 0.0, 0.0, 10.0];
/// let qkv = Tensor::<f32>::from_slice(&Cpu::new(), [3, 3], &qkv)?;
/// let (out, _) = ops::attention(&heads, &qkv, &Sequences::packed([3]))?;
/// assert_eq!(out.to_vec()?, [2.0, 4.0, 8.0]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionChoices {
    /// Whether a token attends only to itself and to earlier tokens.
    pub causal: bool,
    /// The size of the sliding window, for causal attention only. A token attends to this many
    /// rows: its own row and the rows just before it, padding included. `None`: no window.
    pub window: Option<usize>,
    /// The factor of the scores. `None`: 1 / √head_dim.
    pub scale: Option<f64>,
}

impl AttentionChoices {
    /// Causal attention without a window.
    pub const CAUSAL: Self = Self { causal: true, window: None, scale: None };
}

/// The heads in the columns of `[q | k | v]`, and their mask and scale.
#[derive(Clone, Debug, PartialEq)]
pub struct QkvHeads {
    /// The key/value head of each query head.
    pub kv_of_query: Vec<usize>,
    /// The number of key/value heads.
    pub kv_heads: usize,
    /// The features per head.
    pub head_dim: usize,
    /// The mask and the scale.
    pub choices: AttentionChoices,
}

impl QkvHeads {
    /// The width of q: query heads · head_dim.
    pub fn query_width(&self) -> usize {
        self.kv_of_query.len() * self.head_dim
    }

    /// The width of k, and of v: kv_heads · head_dim.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The width of `[q | k | v]`.
    pub fn width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }

    /// The factor of the scores: `choices.scale`, or 1 / √head_dim.
    pub fn scale(&self) -> f64 {
        self.choices.scale.unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }
}

/// The heads that one call computes, and the sequences in its rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec<'a> {
    /// The heads, their mask and scale.
    pub heads: &'a QkvHeads,
    /// How rows are grouped into sequences.
    pub sequences: &'a Sequences,
}

impl AttentionSpec<'_> {
    /// The first key that query `query` may attend to. Both are indices in the sequence.
    pub(crate) fn first_key(&self, query: usize) -> usize {
        self.heads.choices.window.map_or(0, |window| (query + 1).saturating_sub(window))
    }

    /// Whether queries may attend to the key in this row. False for padding.
    fn attended(&self, row: usize) -> bool {
        self.sequences.valid().is_none_or(|valid| valid[row])
    }
}

/// The layout of a KV cache.
///
/// A cache is a matrix `[slots · kv_heads · capacity, head_dim]`. It has `capacity` rows for each
/// slot and key/value head, one per position, so that the keys of a head are contiguous.
#[derive(Clone, Copy, Debug)]
pub struct CacheSpec<'a> {
    /// The slot of each sequence.
    pub slots: &'a [usize],
    /// The number of positions per slot.
    pub capacity: usize,
}

impl CacheSpec<'_> {
    /// The first row of the cache for this slot and key/value head.
    pub(crate) fn row(&self, spec: &AttentionSpec<'_>, slot: usize, kv_head: usize) -> usize {
        (slot * spec.heads.kv_heads + kv_head) * self.capacity
    }

    /// One past the last row of a slot in the cache.
    fn end(&self, spec: &AttentionSpec<'_>, slot: usize) -> usize {
        slot.saturating_add(1).saturating_mul(spec.heads.kv_heads.saturating_mul(self.capacity))
    }
}

/// Attention over all heads of a rank.
///
/// For each sequence and query head h with key/value head g: P = softmax(scale Qₕ K_gᵀ) under the
/// mask, Oₕ = P V_g (Vaswani et al., 2017). The output of a query without visible keys is 0. Masked
/// values have no influence, even if they are NaN or ∞. The forward saves only log Σ e^score
/// (`lse`). The backward recomputes P from `lse`, tile by tile (Dao, 2023: FlashAttention-2,
/// section 3.1).
///
/// Shapes: `q`, `out` and their gradients `[rows, heads · head_dim]`; `k`, `v` and their gradients
/// `[rows, kv_heads · head_dim]`; `lse`: `[rows, heads]`. The heads lie side by side in the
/// columns. The row stride is arbitrary.
pub trait Attention: Device {
    /// `out`, `lse` ← attention(`q`, `k`, `v`).
    ///
    /// # Errors
    /// When sizes disagree.
    #[allow(clippy::too_many_arguments)]
    fn attention<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
        lse: Self::SliceMut<'_, T::Acc>,
    ) -> Result<()>;

    /// `dqkv` ← the gradients of q, k and v.
    ///
    /// With D = rowsum(dO ∘ O): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − D), dQ = scale dS K, dK = scale dSᵀ
    /// Q. Gradients of a key/value head are summed over its query heads. `dqkv` is `[rows, (heads +
    /// 2 kv_heads) · head_dim]`: dQ, dK and dV side by side, as in a fused projection.
    ///
    /// The rounding error of lse becomes a relative error of P = e^(score − lse), as in
    /// FlashAttention. In f32 this error is up to 3e-5 at scores of 1e3.
    ///
    /// # Errors
    /// When sizes disagree.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatRef<'_, T, Self>,
        lse: Self::Slice<'_, T::Acc>,
        dout: MatRef<'_, T, Self>,
        dqkv: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// Appends keys and values to a cache: `keys`, `values` ← the rows of `k` and `v`. The rows of
    /// each sequence go to its slot, beginning at its start position.
    ///
    /// * `k`, `v`: `[rows, kv_heads · head_dim]`; `keys`, `values`: see [`CacheSpec`].
    /// * If two sequences write the same position of a slot, the cache keeps the row of the later
    ///   sequence.
    ///
    /// # Errors
    /// When sizes disagree, a slot is out of bounds, or a sequence exceeds the capacity. The kernel
    /// writes nothing in these cases.
    fn append_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        keys: MatMut<'_, T, Self>,
        values: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// `out` ← attention of `q` to a cache. Row i of a sequence that starts at position p attends
    /// to positions 0 to p + i of its slot, limited by the window. The cache must already hold the
    /// keys and values of these rows ([`Attention::append_cached`]).
    ///
    /// * `q`, `out`: `[rows, heads · head_dim]`; `k`, `v`: see [`CacheSpec`]. The spec must be
    ///   causal and without padding.
    /// * The result equals [`Attention::attention`] of the whole sequence up to rounding. Temporary
    ///   memory is linear in the length. For one row per sequence, the CPU allocates only scores
    ///   and sums.
    ///
    /// # Errors
    /// When sizes disagree, a slot is out of bounds, a sequence exceeds the capacity, or the spec
    /// is invalid, not causal or has padding.
    fn attention_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
    ) -> Result<()>;
}

/// The window argument of the CUDA kernels, at most 2⁴⁰. A window of 2⁴⁰ is the same as no window.
#[cfg(feature = "cuda")]
fn window(spec: &AttentionSpec<'_>) -> usize {
    spec.heads.choices.window.unwrap_or(usize::MAX).min(1 << 40)
}

/// The error for heads wider than any CUDA kernel supports.
#[cfg(feature = "cuda")]
fn too_wide(head_dim: usize) -> Error {
    let reason = format!("heads have {head_dim} features, but the CUDA kernels support at most 256");
    Error::Unsupported { op: "attention", reason }
}

fn check_append(
    spec: &AttentionSpec<'_>,
    cache: &CacheSpec<'_>,
    from: [(&str, Dims); 2],
    to: [(&str, Dims); 2],
) -> Result<()> {
    const OP: &str = "append to cache";
    let sequences = spec.sequences;
    same_size(OP, "the number of slots", cache.slots.len(), "that of sequences", sequences.len())?;
    for (name, dims) in from {
        unit_columns(OP, dims)?;
        same_size(OP, "rows of the sequences", sequences.rows(), &format!("rows of {name}"), dims.rows)?;
        let width = spec.heads.kv_heads.saturating_mul(spec.heads.head_dim);
        same_size(OP, &format!("columns of {name}"), dims.cols, "kv_heads · head_dim", width)?;
    }
    for (name, dims) in to {
        unit_columns(OP, dims)?;
        same_size(OP, &format!("columns of {name}"), dims.cols, "head_dim", spec.heads.head_dim)?;
        for (at, (rows, &slot)) in sequences.iter().zip(cache.slots).enumerate() {
            let end = sequences.start(at) + rows.len();
            if end > cache.capacity {
                let what = format!("the end of sequence {at}");
                return Err(Error::sizes(OP, what, end, "the capacity", cache.capacity));
            }
            let end = cache.end(spec, slot);
            if end > dims.rows {
                return Err(Error::sizes(OP, format!("the end of slot {slot}"), end, "rows", dims.rows));
            }
        }
    }
    Ok(())
}

fn check_cached(
    spec: &AttentionSpec<'_>,
    cache: &CacheSpec<'_>,
    query_like: &[(&str, Dims)],
    kv_like: &[(&str, Dims)],
) -> Result<()> {
    const OP: &str = "cached attention";
    let rows = spec.sequences.rows();
    check(OP, spec, query_like, &[], rows.saturating_mul(spec.heads.kv_of_query.len()))?;
    if !spec.heads.choices.causal || spec.sequences.valid().is_some() {
        return Err(Error::invalid(
            OP,
            "attention to a cache needs a causal mask (`AttentionChoices`) and sequences without padding",
        ));
    }
    same_size(OP, "the number of slots", cache.slots.len(), "that of sequences", spec.sequences.len())?;
    for (name, dims) in kv_like {
        unit_columns(OP, *dims)?;
        same_size(OP, &format!("columns of {name}"), dims.cols, "head_dim", spec.heads.head_dim)?;
        for (sequence, (rows, &slot)) in spec.sequences.iter().zip(cache.slots).enumerate() {
            let end = cache.end(spec, slot);
            if end > dims.rows {
                return Err(Error::sizes(
                    OP,
                    format!("the end of slot {slot}"),
                    end,
                    "rows of the cache",
                    dims.rows,
                ));
            }
            let end = spec.sequences.start(sequence) + rows.len();
            if end > cache.capacity {
                let what = format!("the end of sequence {sequence}");
                return Err(Error::sizes(OP, what, end, "the capacity of the cache", cache.capacity));
            }
        }
    }
    Ok(())
}

fn check(
    op: &'static str,
    spec: &AttentionSpec<'_>,
    query_like: &[(&str, Dims)],
    kv_like: &[(&str, Dims)],
    lse: usize,
) -> Result<()> {
    let (rows, heads) = (spec.sequences.rows(), spec.heads.kv_of_query.len());
    if spec.heads.head_dim == 0 {
        return Err(Error::invalid(op, "heads have no features"));
    }
    if !spec.heads.scale().is_finite() {
        return Err(Error::invalid(
            op,
            format!("the scale of the scores is {}, but must be finite", spec.heads.scale()),
        ));
    }
    if spec.heads.choices.window.is_some_and(|window| window == 0 || !spec.heads.choices.causal) {
        return Err(Error::invalid(op, "the window must be at least 1, and needs causal attention"));
    }
    if let Some(kv) = spec.heads.kv_of_query.iter().find(|&&kv| kv >= spec.heads.kv_heads) {
        return Err(Error::invalid(
            op,
            format!("a query head uses key/value head {kv} of {}", spec.heads.kv_heads),
        ));
    }
    let one = |name: &str, dims: Dims, heads: usize, what: &str| {
        unit_columns(op, dims)?;
        same_size(op, &format!("rows of {name}"), dims.rows, "rows of the sequences", rows)?;
        same_size(
            op,
            &format!("columns of {name}"),
            dims.cols,
            what,
            heads.saturating_mul(spec.heads.head_dim),
        )
    };
    query_like.iter().try_for_each(|(name, dims)| one(name, *dims, heads, "heads · head_dim"))?;
    kv_like
        .iter()
        .try_for_each(|(name, dims)| one(name, *dims, spec.heads.kv_heads, "kv_heads · head_dim"))?;
    same_size(op, "the log-sum-exps", lse, "rows · heads", rows.saturating_mul(heads))
}
