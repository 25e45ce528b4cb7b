//! The layouts of the weights of q, k and v in checkpoints.

use crate::shard::Heads;

/// The layout of the weights of q, k and v in a checkpoint.
///
/// The tensors of several layouts have the same shape. The caller therefore declares the layout,
/// and nothing guesses it from shapes or names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QkvLayout {
    /// Three tensors (Llama, Mistral, Qwen2, BERT), by their names.
    Separate {
        /// The name of q, relative to the layer.
        q: String,
        /// The name of k.
        k: String,
        /// The name of v.
        v: String,
    },
    /// One tensor, `[all q | all k | all v]` (GLM, MPT, Baichuan, Phi-3), by its name.
    Concatenated(String),
    /// One tensor, `[q, k, v]` for each head in turn (BLOOM, GPT-NeoX), by its name. Only for
    /// layers with as many key/value heads as query heads.
    PerHead(String),
    /// One tensor, `[the group's q …, k, v]` for each key/value head in turn (Megatron-LM, Falcon),
    /// by its name.
    PerKvGroup(String),
}

impl QkvLayout {
    /// Makes [`QkvLayout::Separate`] with these names.
    pub fn separate(q: &str, k: &str, v: &str) -> Self {
        Self::Separate { q: q.into(), k: k.into(), v: v.into() }
    }

    /// Returns the tensor that holds head `head` of a projection, the number of heads in this
    /// tensor, and the head's index among them.
    pub(super) fn head(&self, heads: &Heads, projection: Projection, head: usize) -> (&str, usize, usize) {
        let (query, kv, group) = (heads.query_heads(), heads.kv_heads(), heads.group());
        match (self, projection) {
            (Self::Separate { q, .. }, Projection::Q) => (q, query, head),
            (Self::Separate { k, .. }, Projection::K) => (k, kv, head),
            (Self::Separate { v, .. }, Projection::V) => (v, kv, head),
            (Self::Concatenated(name), Projection::Q) => (name, query + 2 * kv, head),
            (Self::Concatenated(name), Projection::K) => (name, query + 2 * kv, query + head),
            (Self::Concatenated(name), Projection::V) => (name, query + 2 * kv, query + kv + head),
            (Self::PerHead(name) | Self::PerKvGroup(name), projection) => {
                let (owner, offset) = match projection {
                    Projection::Q => (head / group, head % group),
                    Projection::K => (head, group),
                    Projection::V => (head, group + 1),
                };
                (name, query + 2 * kv, owner * (group + 2) + offset)
            }
        }
    }
}

/// One of the three projections of attention.
#[derive(Clone, Copy)]
pub(super) enum Projection {
    Q,
    K,
    V,
}
