//! GPT-2.

use super::{
    DecoderConfig, DecoderNames, HUGE, LayerChoices, MANY, activation, checked, common, ignored, json::Json,
    positive,
};
use crate::{
    kernels::{AttentionChoices, NormKind},
    parallel::{AttentionConfig, BlockConfig, BlockNames, NormPlacement},
};

pub(super) fn read(json: &Json<'_>, text: &str) -> Result<DecoderConfig, String> {
    common(json, true, &["GPT2LMHeadModel", "GPT2Model"])?;
    json.only("scale_attn_weights", true)?;
    json.only("scale_attn_by_inverse_layer_idx", false)?;
    let (hidden, heads) = (json.size("n_embd", HUGE)?, json.size("n_head", MANY)?);
    let layers = json.size("n_layer", MANY)?;
    let context = json.size("n_positions", HUGE)?;
    let eps = json.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    let block = BlockConfig {
        attention: AttentionConfig {
            choices: AttentionChoices::CAUSAL,
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads)
        },
        ffn: json.optional_size("n_inner", HUGE)?.unwrap_or(4 * hidden),
        gated: false,
        activation: activation(json, "activation_function", "gelu_new")?,
        mlp_bias: true,
        norm: NormKind::LayerNorm { eps: positive("layer_norm_epsilon", eps)? },
        placement: NormPlacement::Pre,
        names: BlockNames::gpt2(),
    };
    let config = DecoderConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        positions: Some(context),
        context: Some(context),
        tied: json.flag("tie_word_embeddings")?.unwrap_or(true),
        block: checked(block)?,
        layers: vec![LayerChoices { attention: AttentionChoices::CAUSAL, rope: None }; layers],
        dropout: 0.0,
        recomputed: 0,
        names: DecoderNames {
            prefix: "transformer",
            embedding: "wte",
            positions: "wpe",
            blocks: "h",
            norm: "ln_f",
            head: "lm_head",
        },
        transposed: true,
        // transformers' GPT-2 does not give it to the embedding.
        padding: None,
        ends: json.tokens("eos_token_id")?.unwrap_or_else(|| vec![50256]),
        json: text.into(),
    };
    json.finish(&[ignored::COMMON, &[ignored::GPT2]].concat())?;
    Ok(config)
}
