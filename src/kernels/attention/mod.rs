//! Scaled dot-product attention, forward and backward, with memory linear in the length of a sequence.

mod cached;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod decode;
mod meta;

use super::{
    MatMut, MatRef,
    view::{Dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    shard::Sequences,
};

/// The mask of attention and the scale of its scores: one struct from the configuration of a layer
/// down to a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionChoices {
    /// Whether a token sees only itself and those before it.
    pub causal: bool,
    /// With causal attention, how many rows a token sees at most, itself and those just before it,
    /// padding among them; all if not given.
    pub window: Option<usize>,
    /// What scores are multiplied with; 1 / √head_dim if not given.
    pub scale: Option<f64>,
}

impl AttentionChoices {
    /// A token sees itself and all before it.
    pub const CAUSAL: Self = Self { causal: true, window: None, scale: None };
}

/// The heads in the columns of `[q | k | v]`, and how they attend.
#[derive(Clone, Debug, PartialEq)]
pub struct QkvHeads {
    /// For each query head, the key/value head that it uses.
    pub kv_of_query: Vec<usize>,
    /// The number of key/value heads.
    pub kv_heads: usize,
    /// The features of one head.
    pub head_dim: usize,
    /// How they attend.
    pub choices: AttentionChoices,
}

impl QkvHeads {
    /// The number of columns of q.
    pub fn query_width(&self) -> usize {
        self.kv_of_query.len() * self.head_dim
    }

    /// The number of columns of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The number of columns of `[q | k | v]`.
    pub fn width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }

    /// What scores are multiplied with.
    pub fn scale(&self) -> f64 {
        self.choices.scale.unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }
}

/// The heads that one call computes, and the sequences of its rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec<'a> {
    /// The heads, and how they attend.
    pub heads: &'a QkvHeads,
    /// Which rows belong together.
    pub sequences: &'a Sequences,
}

impl AttentionSpec<'_> {
    /// The first key of its sequence that the query at this place in it may see.
    pub(crate) fn first_key(&self, query: usize) -> usize {
        self.heads.choices.window.map_or(0, |window| (query + 1).saturating_sub(window))
    }

    /// Whether a row may be attended to: whether it is not padding.
    fn attended(&self, row: usize) -> bool {
        self.sequences.valid().is_none_or(|valid| valid[row])
    }
}

/// Where the keys and values of tokens lie that were computed before, for attention that goes on from there.
///
/// The cache is a matrix `[slots · kv_heads · capacity, head_dim]`: for each slot and key/value head the vectors of up to
/// `capacity` positions, one below the other, so that a head's are read in one stream.
#[derive(Clone, Copy, Debug)]
pub struct CacheSpec<'a> {
    /// The slot of each sequence.
    pub slots: &'a [usize],
    /// The positions that a slot has room for.
    pub capacity: usize,
}

impl CacheSpec<'_> {
    /// The first row of the cache that belongs to a slot's head.
    pub(crate) fn row(&self, spec: &AttentionSpec<'_>, slot: usize, kv_head: usize) -> usize {
        (slot * spec.heads.kv_heads + kv_head) * self.capacity
    }

    /// The row of the cache behind a slot.
    fn end(&self, spec: &AttentionSpec<'_>, slot: usize) -> usize {
        slot.saturating_add(1).saturating_mul(spec.heads.kv_heads.saturating_mul(self.capacity))
    }
}

/// Attention over all heads of a rank.
///
/// For each sequence and query head h, with its key/value head g: P = softmax(scale Qₕ K_gᵀ) under the masks, Oₕ = P V_g
/// (Vaswani et al., 2017). A query that sees no key gives 0; what the masks hide has no influence, NaN and ∞ included.
/// Only log Σ e^score is kept for the backward, which computes P anew, tile by tile (Dao, 2023: FlashAttention-2,
/// section 3.1).
///
/// Matrices: `q`, `out` and their gradients `[rows, heads · head_dim]`, `k`, `v` and theirs `[rows, kv_heads · head_dim]`,
/// head after head in the columns, any row stride; `lse`: `[rows, heads]`.
pub trait Attention: Device {
    /// `out`, `lse` ← attention of `q`, `k`, `v`.
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

    /// The gradient of q, k and v.
    ///
    /// With D = rowsum(dO ∘ O): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − D), dQ = scale dS K, dK = scale dSᵀ Q; the gradients of a
    /// key/value head are summed over its query heads. `dqkv` is `[rows, (heads + 2 kv_heads) · head_dim]`: the three
    /// side by side, as a fused projection made q, k and v.
    ///
    /// P = e^(score − lse) has the rounding of lse as its relative error, as in FlashAttention: in
    /// f32 up to 3e-5 at scores of 1e3.
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

    /// `keys`, `values` ← the rows of `k` and `v`, those of each sequence in its slot, from its
    /// start on.
    ///
    /// * `k`, `v`: `[rows, kv_heads · head_dim]`; `keys`, `values`: see [`CacheSpec`].
    /// * Where two sequences have the same slot and overlap there, the later one's rows remain.
    ///
    /// # Errors
    /// When sizes disagree, or a sequence goes beyond the capacity; nothing is written then.
    fn append_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        keys: MatMut<'_, T, Self>,
        values: MatMut<'_, T, Self>,
    ) -> Result<()>;

    /// `out` ← attention of `q` to a cache: row i of a sequence that starts at position p sees the positions 0 to p + i of
    /// its slot, or with a window the last of them. The cache already holds the keys and values of these rows.
    ///
    /// * `q`, `out`: `[rows, heads · head_dim]`; `k`, `v`: see [`CacheSpec`]. Causal; no padding.
    /// * The same values as [`Attention::attention`] gives for the whole sequence, up to rounding. Memory is linear in
    ///   the length; a few rows a sequence take the memory of their scores alone.
    ///
    /// # Errors
    /// When sizes disagree, a sequence goes beyond the capacity, or the spec is not causal or has padding.
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
            "attention to a cache has to be causal (`AttentionChoices`), and to sequences without padding",
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
        return Err(Error::invalid(op, format!("scores are multiplied with {}", spec.heads.scale())));
    }
    if spec.heads.choices.window.is_some_and(|window| window == 0 || !spec.heads.choices.causal) {
        return Err(Error::invalid(op, "a window is of one token at least, and needs causal attention"));
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
