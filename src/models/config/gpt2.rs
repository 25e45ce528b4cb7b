//! Reads the configuration of GPT-2.

use super::{
    DecoderConfig, DecoderNames, HUGE, LayerChoices, MANY, activation, checked, common, ignored, json::Json,
    positive,
};
use crate::{
    kernels::{AttentionChoices, NormKind},
    parallel::{AttentionConfig, BlockConfig, BlockNames},
};

pub(super) fn read(json: &Json<'_>, text: &str) -> Result<DecoderConfig, String> {
    common(json, true, &["GPT2LMHeadModel", "GPT2Model"])?;
    json.only("scale_attn_weights", true)?;
    json.only("scale_attn_by_inverse_layer_idx", false)?;
    let (hidden, heads) = (json.size("n_embd", HUGE)?, json.size("n_head", MANY)?);
    let layers = json.size("n_layer", MANY)?;
    let context = json.size("n_positions", HUGE)?;
    let eps = json.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    let block = BlockConfig::new(
        AttentionConfig::new(hidden, heads)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qkv_bias(true)
            .with_out_bias(true),
        json.optional_size("n_inner", HUGE)?.unwrap_or(4 * hidden),
        activation(json, "activation_function", "gelu_new")?,
        NormKind::LayerNorm { eps: positive("layer_norm_epsilon", eps)? },
    )
    .with_mlp_bias(true)
    .with_names(BlockNames::gpt2());
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
        packing: None,
        // The embedding of transformers' GPT-2 has no `padding_idx`.
        padding: None,
        ends: json.tokens("eos_token_id")?.unwrap_or_else(|| vec![50256]),
        json: text.into(),
    };
    json.finish(&[ignored::COMMON, &[ignored::GPT2]].concat())?;
    Ok(config)
}
