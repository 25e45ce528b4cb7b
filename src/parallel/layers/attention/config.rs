//! The configuration of attention layers.

use crate::{kernels::AttentionChoices, ops::RopeConfig};

/// The sizes and options of a [`ParallelAttention`](super::ParallelAttention).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionConfig {
    /// The features of the residual stream.
    pub hidden: usize,
    /// The number of query heads.
    pub heads: usize,
    /// The number of key/value heads. `heads` must be a multiple of this number.
    pub kv_heads: usize,
    /// The features of one head.
    pub head_dim: usize,
    /// The mask and the scale of the attention scores.
    pub choices: AttentionChoices,
    /// The rotary embedding of q and k, if there is one.
    pub rope: Option<RopeConfig>,
    /// The normalization of the heads of q and k, if there is one.
    pub qk_norm: Option<QkNorm>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
}

impl AttentionConfig {
    /// Makes attention over `hidden` features with `heads` heads of `hidden / heads` features. Each
    /// head has its own keys and values. There is no mask, rotary embedding or bias.
    pub fn new(hidden: usize, heads: usize) -> Self {
        Self {
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden.checked_div(heads).unwrap_or(0),
            choices: AttentionChoices::default(),
            rope: None,
            qk_norm: None,
            qkv_bias: false,
            out_bias: false,
        }
    }

    /// Sets the number of key/value heads.
    pub fn with_kv_heads(self, kv_heads: usize) -> Self {
        Self { kv_heads, ..self }
    }

    /// Sets the features of one head.
    pub fn with_head_dim(self, head_dim: usize) -> Self {
        Self { head_dim, ..self }
    }

    /// Sets the mask and the scale of the attention scores.
    pub fn with_choices(self, choices: AttentionChoices) -> Self {
        Self { choices, ..self }
    }

    /// Sets the rotary embedding of q and k.
    pub fn with_rope(self, rope: impl Into<Option<RopeConfig>>) -> Self {
        Self { rope: rope.into(), ..self }
    }

    /// Sets the normalization of the heads of q and k.
    pub fn with_qk_norm(self, qk_norm: impl Into<Option<QkNorm>>) -> Self {
        Self { qk_norm: qk_norm.into(), ..self }
    }

    /// Sets whether q, k and v have biases.
    pub fn with_qkv_bias(self, qkv_bias: bool) -> Self {
        Self { qkv_bias, ..self }
    }

    /// Sets whether the output projection has a bias.
    pub fn with_out_bias(self, out_bias: bool) -> Self {
        Self { out_bias, ..self }
    }
}

/// RMSNorm of every head of q, and of k, over the head's features. All heads of q share one γ
/// `[head_dim]`, and all heads of k share another one (Qwen3; Henry et al., 2020).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QkNorm {
    /// The ε that is added to the mean square.
    pub eps: f64,
    /// The name of q's normalization, relative to the layer.
    pub q: String,
    /// The name of k's normalization, relative to the layer.
    pub k: String,
}

impl QkNorm {
    /// Normalizes with this ε and the weights of these names.
    pub fn new(eps: f64, q: &str, k: &str) -> Self {
        Self { eps, q: q.into(), k: k.into() }
    }
}
