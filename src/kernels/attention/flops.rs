//! The floating-point operations of attention's products, by the (query, key) pairs that masks
//! leave visible.

use super::AttentionSpec;
use std::ops::Range;

/// The operations of [`super::Attention::attention`]. The products are Q Kᵀ and P V.
pub(super) fn forward(spec: &AttentionSpec<'_>) -> u128 {
    products(spec, 2, pairs(spec))
}

/// The operations of [`super::Attention::attention_backward`]. The products are Q Kᵀ again, Pᵀ dO,
/// dO Vᵀ, dS K and dSᵀ Q.
pub(super) fn backward(spec: &AttentionSpec<'_>) -> u128 {
    products(spec, 5, pairs(spec))
}

/// The operations of [`super::Attention::attention_cached`].
pub(super) fn cached(spec: &AttentionSpec<'_>) -> u128 {
    products(spec, 2, cached_pairs(spec))
}

/// The positions of the cache that the queries of all sequences attend to.
pub(super) fn cached_positions(spec: &AttentionSpec<'_>) -> u128 {
    let of = |(sequence, rows): (usize, Range<usize>)| {
        let start = spec.sequences.start(sequence);
        if rows.is_empty() { 0 } else { (start + rows.len() - spec.first_key(start)) as u128 }
    };
    spec.sequences.iter().enumerate().map(of).sum()
}

/// The operations of `count` products over `pairs` (query, key) pairs of each query head. Each
/// product takes 2 head_dim operations per pair.
fn products(spec: &AttentionSpec<'_>, count: u128, pairs: u128) -> u128 {
    let width = spec.heads.kv_of_query.len() as u128 * spec.heads.head_dim as u128;
    pairs.saturating_mul(2 * count).saturating_mul(width)
}

/// The number of (query, key) pairs of one head that the mask leaves visible. Takes time linear in
/// the number of rows if there is padding, else in the number of sequences.
fn pairs(spec: &AttentionSpec<'_>) -> u128 {
    let Some(valid) = spec.sequences.valid() else {
        let of = |rows: usize| {
            if spec.heads.choices.causal { causal(spec, rows as u128) } else { (rows as u128).pow(2) }
        };
        return spec.sequences.iter().map(|rows| of(rows.len())).sum();
    };
    let mut pairs = 0;
    for rows in spec.sequences.iter() {
        let (valid, mut seen) = (&valid[rows], 0);
        if !spec.heads.choices.causal {
            pairs += valid.len() as u128 * valid.iter().filter(|&&valid| valid).count() as u128;
            continue;
        }
        for (query, &is_valid) in valid.iter().enumerate() {
            seen += u128::from(is_valid);
            // The key that has just left the window.
            if let Some(left) = spec.first_key(query).checked_sub(1) {
                seen -= u128::from(valid[left]);
            }
            pairs += seen;
        }
    }
    pairs
}

/// The number of visible (query, key) pairs of one head in attention to a cache, which has no
/// padding. Query i of a sequence that starts at position p attends to at most p + i + 1 keys.
fn cached_pairs(spec: &AttentionSpec<'_>) -> u128 {
    let of = |(sequence, rows): (usize, Range<usize>)| {
        let start = spec.sequences.start(sequence) as u128;
        causal(spec, start + rows.len() as u128) - causal(spec, start)
    };
    spec.sequences.iter().enumerate().map(of).sum()
}

/// Σ min(i, window) for i from 1 to `rows`: the number of visible pairs of a sequence's first
/// `rows` queries.
fn causal(spec: &AttentionSpec<'_>, rows: u128) -> u128 {
    let ramp = spec.heads.choices.window.map_or(rows, |window| rows.min(window as u128));
    ramp * (ramp + 1) / 2 + (rows - ramp) * ramp
}
