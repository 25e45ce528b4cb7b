//! Reads the configuration of BERT.

use super::{BertConfig, HUGE, MANY, activation, checked, common, ignored, json::Json, padding, positive};
use crate::{
    kernels::NormKind,
    parallel::{AttentionConfig, BlockConfig, BlockNames, NormPlacement},
};

/// The classes with this encoder. They differ only in their heads.
const ARCHITECTURES: [&str; 8] = [
    "BertModel",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
];

pub(super) fn read(json: &Json<'_>, text: &str) -> Result<BertConfig, String> {
    common(json, false, &ARCHITECTURES)?;
    json.only("position_embedding_type", "absolute")?;
    json.only("is_decoder", false)?;
    let (hidden, heads) = (json.size("hidden_size", HUGE)?, json.size("num_attention_heads", MANY)?);
    let eps = json.number("layer_norm_eps")?.unwrap_or(1e-12);
    let block = BlockConfig::new(
        AttentionConfig::new(hidden, heads).with_qkv_bias(true).with_out_bias(true),
        json.size("intermediate_size", HUGE)?,
        activation(json, "hidden_act", "gelu")?,
        NormKind::LayerNorm { eps: positive("layer_norm_eps", eps)? },
    )
    .with_mlp_bias(true)
    .with_placement(NormPlacement::Post)
    .with_names(BlockNames::bert());
    let config = BertConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        layers: json.size("num_hidden_layers", MANY)?,
        positions: json.size("max_position_embeddings", HUGE)?,
        types: json.optional_size("type_vocab_size", HUGE)?.unwrap_or(2),
        padding: padding(json, Some(0))?,
        block: checked(block)?,
        json: text.into(),
    };
    json.finish(&[ignored::COMMON, &[ignored::BERT]].concat())?;
    Ok(config)
}
