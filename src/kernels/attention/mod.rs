//! Scaled dot-product attention, forward and backward, with memory linear in the length of a sequence.

mod cpu;

use super::{
    MatMut, MatRef,
    view::{Dims, unit_columns},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    shard::Sequences,
};

/// The heads that one call computes, and how.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec<'a> {
    /// For each query head, the key/value head that it uses.
    pub kv_of_query: &'a [usize],
    /// The number of key/value heads.
    pub kv_heads: usize,
    /// The features of one head.
    pub head_dim: usize,
    /// What scores are multiplied with, usually 1 / √head_dim.
    pub scale: f64,
    /// Whether a token sees only itself and those before it in its sequence.
    pub causal: bool,
    /// Which rows belong together, and which are padding.
    pub sequences: &'a Sequences,
}

impl AttentionSpec<'_> {
    /// Whether a row may be attended to: whether it is not padding.
    fn attended(&self, row: usize) -> bool {
        self.sequences.valid().is_none_or(|valid| valid[row])
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
}

fn check(
    op: &'static str,
    spec: &AttentionSpec<'_>,
    query_like: &[(&str, Dims)],
    kv_like: &[(&str, Dims)],
    lse: usize,
) -> Result<()> {
    let (rows, heads) = (spec.sequences.rows(), spec.kv_of_query.len());
    if spec.head_dim == 0 {
        return Err(Error::invalid(op, "heads have no features"));
    }
    if let Some(kv) = spec.kv_of_query.iter().find(|&&kv| kv >= spec.kv_heads) {
        return Err(Error::invalid(
            op,
            format!("a query head uses key/value head {kv} of {}", spec.kv_heads),
        ));
    }
    let one = |name: &str, dims: Dims, heads: usize, what: &str| {
        unit_columns(op, dims)?;
        same_size(op, &format!("rows of {name}"), dims.rows, "rows of the sequences", rows)?;
        same_size(op, &format!("columns of {name}"), dims.cols, what, heads * spec.head_dim)
    };
    query_like.iter().try_for_each(|(name, dims)| one(name, *dims, heads, "heads · head_dim"))?;
    kv_like.iter().try_for_each(|(name, dims)| one(name, *dims, spec.kv_heads, "kv_heads · head_dim"))?;
    same_size(op, "the log-sum-exps", lse, "rows · heads", rows * heads)
}
