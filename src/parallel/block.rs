//! A transformer block.

use super::{
    AttentionConfig, DTensor, Layer, LayerCache, MlpNames, Normalize, ParallelAttention, ParallelMlp,
    QkvLayout, Stream, Traffic,
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::{Activation, Backend, NormKind},
    shard::Shape,
    tensor::{Param, Weights},
};

/// Where a block normalizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before each part, on the way into it: h = x + attention(norm₁ x), y = h + mlp(norm₂ h). GPT-2, Llama.
    Pre,
    /// After each residual sum: h = norm₁(x + attention x), y = norm₂(h + mlp h). BERT.
    Post,
}

/// The sizes and choices of a [`TransformerBlock`].
#[derive(Clone, Debug, PartialEq)]
pub struct BlockConfig {
    /// The attention layer.
    pub attention: AttentionConfig,
    /// The features between the two projections of the feed-forward layer.
    pub ffn: usize,
    /// Its non-linear function.
    pub activation: Activation,
    /// Whether its projections have biases.
    pub mlp_bias: bool,
    /// The normalization.
    pub norm: NormKind,
    /// Where it stands.
    pub placement: NormPlacement,
    /// What the tensors are called.
    pub names: BlockNames,
}

/// What the tensors of a block are called, relative to the block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockNames {
    /// Where q, k and v are.
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
        let name = |name: &str| format!("mlp.{name}");
        Self {
            qkv: QkvLayout::separate("attention.q", "attention.k", "attention.v"),
            out: "attention.o".into(),
            norm1: "norm1".into(),
            norm2: "norm2".into(),
            mlp: MlpNames { gate: name("gate"), up: name("up"), down: name("down") },
        }
    }
}

impl BlockNames {
    /// The names in Hugging Face's Llama, Mistral and Qwen2 checkpoints, under `model.layers.N`.
    pub fn llama() -> Self {
        let name = |name: &str| format!("mlp.{name}_proj");
        Self {
            qkv: QkvLayout::separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out: "self_attn.o_proj".into(),
            norm1: "input_layernorm".into(),
            norm2: "post_attention_layernorm".into(),
            mlp: MlpNames { gate: name("gate"), up: name("up"), down: name("down") },
        }
    }

    /// The names in Hugging Face's GPT-2 checkpoints, under `h.N`. Its matrices are stored as `[in, out]`:
    /// [`crate::weights::Transposed`].
    pub fn gpt2() -> Self {
        Self {
            qkv: QkvLayout::Concatenated("attn.c_attn".into()),
            out: "attn.c_proj".into(),
            norm1: "ln_1".into(),
            norm2: "ln_2".into(),
            mlp: MlpNames { gate: String::new(), up: "mlp.c_fc".into(), down: "mlp.c_proj".into() },
        }
    }

    /// The names in Hugging Face's BERT checkpoints, under `encoder.layer.N`.
    pub fn bert() -> Self {
        Self {
            qkv: QkvLayout::separate("attention.self.query", "attention.self.key", "attention.self.value"),
            out: "attention.output.dense".into(),
            norm1: "attention.output.LayerNorm".into(),
            norm2: "output.LayerNorm".into(),
            mlp: MlpNames {
                gate: String::new(),
                up: "intermediate.dense".into(),
                down: "output.dense".into(),
            },
        }
    }
}

/// Attention and a feed-forward layer, each with a residual sum and a normalization: S → S.
///
/// Collectives: two entering and two leaving the tensor-parallel region each way; with
/// `S = Shard<0>` also those of the normalizations' and biases' gradients.
#[derive(Debug)]
pub struct TransformerBlock<S: Stream, T: Element, B: Device> {
    norm1: Normalize<S, T, B>,
    attention: ParallelAttention<S, T, B>,
    norm2: Normalize<S, T, B>,
    mlp: ParallelMlp<S, T, B>,
    placement: NormPlacement,
}

impl<S: Stream, T: Element, B: Backend> TransformerBlock<S, T, B> {
    /// Reads this rank's part of a block whose feed-forward layer has no gate.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer heads or features than ranks.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, config: &BlockConfig) -> Result<Self> {
        Self::with_mlp(group, weights, config, false)
    }

    /// Reads this rank's part of a block with a gated feed-forward layer.
    ///
    /// # Errors
    /// As [`TransformerBlock::load`].
    pub fn load_gated(group: &Group<B>, weights: &Weights<'_>, config: &BlockConfig) -> Result<Self> {
        Self::with_mlp(group, weights, config, true)
    }

    fn with_mlp(group: &Group<B>, weights: &Weights<'_>, config: &BlockConfig, gated: bool) -> Result<Self> {
        let (names, sizes) = (&config.names, (config.attention.hidden, config.ffn));
        let load = if gated { ParallelMlp::load_gated } else { ParallelMlp::load };
        let norm =
            |name: &str| Normalize::load(group, &weights.at(name), config.norm, config.attention.hidden);
        Ok(Self {
            norm1: norm(&names.norm1)?,
            attention: ParallelAttention::load(group, weights, &names.qkv, &names.out, &config.attention)?,
            norm2: norm(&names.norm2)?,
            mlp: load(group, weights, &names.mlp, sizes, config.activation, config.mlp_bias)?,
            placement: config.placement,
        })
    }

    /// The forward for tokens that go on from a cache, without a backward: see [`super::Attention::forward_cached`].
    ///
    /// # Errors
    /// As there, and when a collective fails.
    #[track_caller]
    pub fn forward_cached(
        &self,
        x: &DTensor<S, T, B>,
        cache: &mut LayerCache<T, B>,
        slots: &[usize],
    ) -> Result<DTensor<S, T, B>> {
        let norm = |norm: &Normalize<S, T, B>, x: &DTensor<S, T, B>| Ok(norm.forward(x)?.0);
        match self.placement {
            NormPlacement::Pre => {
                let h = x.add(&self.attention.forward_cached(&norm(&self.norm1, x)?, cache, slots)?)?;
                h.add(&self.mlp.forward(&norm(&self.norm2, &h)?)?.0)
            }
            NormPlacement::Post => {
                let h = norm(&self.norm1, &x.add(&self.attention.forward_cached(x, cache, slots)?)?)?;
                norm(&self.norm2, &h.add(&self.mlp.forward(&h)?.0)?)
            }
        }
    }

    /// An empty cache for this rank's key/value heads.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<LayerCache<T, B>> {
        self.attention.cache(slots, capacity)
    }
}

/// What the backward of each part needs: first normalization, attention, second normalization, feed-forward layer.
type Saved<S, T, B> = (
    <Normalize<S, T, B> as Layer<T, B>>::Saved,
    <ParallelAttention<S, T, B> as Layer<T, B>>::Saved,
    <Normalize<S, T, B> as Layer<T, B>>::Saved,
    <ParallelMlp<S, T, B> as Layer<T, B>>::Saved,
);

impl<S: Stream, T: Element, B: Backend> Layer<T, B> for TransformerBlock<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = Saved<S, T, B>;

    #[track_caller]
    fn forward(&self, x: &DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        match self.placement {
            NormPlacement::Pre => {
                let (normed, norm1) = self.norm1.forward(x)?;
                let (attended, attention) = self.attention.forward(&normed)?;
                let h = x.add(&attended)?;
                let (normed, norm2) = self.norm2.forward(&h)?;
                let (fed, mlp) = self.mlp.forward(&normed)?;
                Ok((h.add(&fed)?, (norm1, attention, norm2, mlp)))
            }
            NormPlacement::Post => {
                let (attended, attention) = self.attention.forward(x)?;
                let (h, norm1) = self.norm1.forward(&x.add(&attended)?)?;
                let (fed, mlp) = self.mlp.forward(&h)?;
                let (y, norm2) = self.norm2.forward(&h.add(&fed)?)?;
                Ok((y, (norm1, attention, norm2, mlp)))
            }
        }
    }

    #[track_caller]
    fn backward(
        &self,
        (norm1, attention, norm2, mlp): Self::Saved,
        dy: &DTensor<S, T, B>,
    ) -> Result<DTensor<S, T, B>> {
        match self.placement {
            NormPlacement::Pre => {
                let dfed = self.mlp.backward(mlp, dy)?;
                let dh = dy.add(&self.norm2.backward(norm2, &dfed)?)?;
                let dattended = self.attention.backward(attention, &dh)?;
                dh.add(&self.norm1.backward(norm1, &dattended)?)
            }
            NormPlacement::Post => {
                let dsum = self.norm2.backward(norm2, dy)?;
                let dh = dsum.add(&self.mlp.backward(mlp, &dsum)?)?;
                let dsum = self.norm1.backward(norm1, &dh)?;
                dsum.add(&self.attention.backward(attention, &dsum)?)
            }
        }
    }

    fn params(&self) -> Vec<Param<T, B>> {
        let (norm1, attention) = (self.norm1.params(), self.attention.params());
        [norm1, attention, self.norm2.params(), self.mlp.params()].concat()
    }

    fn traffic(&self, group: &Group<B>, x: Shape) -> (Traffic, Shape) {
        let (norm1, _) = Layer::<T, B>::traffic(&self.norm1, group, x);
        let (attention, _) = Layer::<T, B>::traffic(&self.attention, group, x);
        let (norm2, _) = Layer::<T, B>::traffic(&self.norm2, group, x);
        let (mlp, _) = self.mlp.traffic(group, x);
        let traffic = match self.placement {
            NormPlacement::Pre => norm1.then(attention).then(norm2).then(mlp),
            NormPlacement::Post => attention.then(norm1).then(mlp).then(norm2),
        };
        (traffic, x)
    }
}
