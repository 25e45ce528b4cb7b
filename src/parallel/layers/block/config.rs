//! The configuration of transformer blocks, and the names of their tensors.

use super::super::{AttentionConfig, MlpNames, QkvLayout};
use crate::kernels::{Activation, NormKind};

/// The position of the normalizations in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormPlacement {
    /// Before attention and feed-forward layer: h = x + attention(norm₁ x), y = h + mlp(norm₂ h).
    /// GPT-2, Llama.
    Pre,
    /// After each residual sum: h = norm₁(x + attention x), y = norm₂(h + mlp h). BERT.
    Post,
}

/// The sizes and options of a [`TransformerBlock`](super::TransformerBlock).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BlockConfig {
    /// The attention layer.
    pub attention: AttentionConfig,
    /// The features between the two projections of the feed-forward layer.
    pub ffn: usize,
    /// Whether the feed-forward layer has a gate:
    /// [`ParallelMlp::load_gated`](crate::parallel::ParallelMlp::load_gated).
    pub gated: bool,
    /// The activation of the feed-forward layer.
    pub activation: Activation,
    /// Whether the projections of the feed-forward layer have biases.
    pub mlp_bias: bool,
    /// The kind of the normalizations.
    pub norm: NormKind,
    /// The position of the normalizations.
    pub placement: NormPlacement,
    /// The names of the tensors.
    pub names: BlockNames,
}

impl BlockConfig {
    /// Makes a pre-norm block with this attention, an ungated feed-forward layer of `ffn` features
    /// without biases, and the default names.
    pub fn new(attention: AttentionConfig, ffn: usize, activation: Activation, norm: NormKind) -> Self {
        Self {
            attention,
            ffn,
            gated: false,
            activation,
            mlp_bias: false,
            norm,
            placement: NormPlacement::Pre,
            names: BlockNames::default(),
        }
    }

    /// Sets whether the feed-forward layer has a gate.
    pub fn with_gate(self, gated: bool) -> Self {
        Self { gated, ..self }
    }

    /// Sets whether the projections of the feed-forward layer have biases.
    pub fn with_mlp_bias(self, mlp_bias: bool) -> Self {
        Self { mlp_bias, ..self }
    }

    /// Sets the position of the normalizations.
    pub fn with_placement(self, placement: NormPlacement) -> Self {
        Self { placement, ..self }
    }

    /// Sets the names of the tensors.
    pub fn with_names(self, names: BlockNames) -> Self {
        Self { names, ..self }
    }
}

/// The names of the tensors of a block, relative to the block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockNames {
    /// The tensors of q, k and v.
    pub qkv: QkvLayout,
    /// The output projection of the attention.
    pub out: String,
    /// The first normalization.
    pub norm1: String,
    /// The second normalization.
    pub norm2: String,
    /// The feed-forward layer.
    pub mlp: MlpNames,
}

impl Default for BlockNames {
    /// The names of [`crate::reference`]'s block.
    fn default() -> Self {
        let qkv = QkvLayout::separate("attention.q", "attention.k", "attention.v");
        let mlp = MlpNames::new("mlp.up", "mlp.down").with_gate("mlp.gate");
        Self::new(qkv, "attention.o", ("norm1", "norm2"), mlp)
    }
}

impl BlockNames {
    /// Names q, k and v, the output projection, the two normalizations and the feed-forward layer.
    pub fn new(qkv: QkvLayout, out: &str, (norm1, norm2): (&str, &str), mlp: MlpNames) -> Self {
        Self { qkv, out: out.into(), norm1: norm1.into(), norm2: norm2.into(), mlp }
    }

    /// The names in Hugging Face's Llama, Mistral and Qwen2 checkpoints, under `model.layers.N`.
    pub fn llama() -> Self {
        let qkv = QkvLayout::separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj");
        let mlp = MlpNames::new("mlp.up_proj", "mlp.down_proj").with_gate("mlp.gate_proj");
        Self::new(qkv, "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm"), mlp)
    }

    /// The names in Hugging Face's GPT-2 checkpoints, under `h.N`. These checkpoints store matrices
    /// as `[in, out]`: read them by [`crate::weights::Transposed`].
    pub fn gpt2() -> Self {
        let qkv = QkvLayout::Concatenated("attn.c_attn".into());
        Self::new(qkv, "attn.c_proj", ("ln_1", "ln_2"), MlpNames::new("mlp.c_fc", "mlp.c_proj"))
    }

    /// The names in Hugging Face's BERT checkpoints, under `encoder.layer.N`.
    pub fn bert() -> Self {
        let qkv = QkvLayout::separate("attention.self.query", "attention.self.key", "attention.self.value");
        let norms = ("attention.output.LayerNorm", "output.LayerNorm");
        let mlp = MlpNames::new("intermediate.dense", "output.dense");
        Self::new(qkv, "attention.output.dense", norms, mlp)
    }
}
