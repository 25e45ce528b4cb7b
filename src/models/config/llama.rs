//! Reads the configurations of Llama, Mistral, Ministral, Qwen2 and Qwen3.

use super::{
    DecoderConfig, DecoderNames, HUGE, LayerChoices, MANY, activation, checked, common, ignored, json::Json,
    packing, padding, positive, rope,
};
use crate::{
    kernels::{AttentionChoices, NormKind},
    parallel::{AttentionConfig, BlockConfig, BlockNames, QkNorm},
};
use serde_json::Value;

/// The defaults of transformers' classes for missing keys.
struct Defaults {
    /// `None` means the number of query heads. So does a `null` in the file.
    kv_heads: Option<usize>,
    /// The features of a head; `None` means hidden / heads.
    head_dim: Option<usize>,
    context: usize,
    window: usize,
    end: Option<u32>,
}

impl Defaults {
    fn of(kind: &str) -> Self {
        let (kv_heads, head_dim, context, end) = match kind {
            "mistral" | "ministral" => (Some(8), None, 4096 * 32, Some(2)),
            "qwen2" => (Some(32), None, 32768, None),
            "qwen3" => (Some(32), Some(128), 32768, None),
            _ => (None, None, 2048, Some(2)),
        };
        Self { kv_heads, head_dim, context, window: 4096, end }
    }
}

fn architectures(kind: &str) -> &'static [&'static str] {
    match kind {
        "mistral" => &["MistralForCausalLM", "MistralModel"],
        "ministral" => &["MinistralForCausalLM", "MinistralModel"],
        "qwen2" => &["Qwen2ForCausalLM", "Qwen2Model"],
        "qwen3" => &["Qwen3ForCausalLM", "Qwen3Model"],
        _ => &["LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"],
    }
}

pub(super) fn read(kind: &str, json: &Json<'_>, text: &str) -> Result<DecoderConfig, String> {
    common(json, true, architectures(kind))?;
    for key in ["rope_interleaved", "use_mrope", "use_qk_norm", "qk_layernorm"] {
        json.only(key, false)?;
    }
    json.only("pretraining_tp", 1)?;
    let usual = Defaults::of(kind);
    let (hidden, heads) = (json.size("hidden_size", HUGE)?, json.size("num_attention_heads", MANY)?);
    let layers = json.size("num_hidden_layers", MANY)?;
    let head_dim = match json.optional_size("head_dim", MANY)?.or(usual.head_dim) {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) && hidden / heads <= MANY => hidden / heads,
        None => return Err(format!("{hidden} features are not a multiple of {heads} heads")),
    };
    let kv_heads = match json.optional_size("num_key_value_heads", MANY)? {
        Some(heads) => heads,
        None if json.is_null("num_key_value_heads") => heads,
        None => usual.kv_heads.unwrap_or(heads),
    };
    let context = json.optional_size("max_position_embeddings", HUGE)?.unwrap_or(usual.context);
    // Only Llama and Qwen3 have the option. Qwen2 always has biases of q, k and v.
    let bias = match kind {
        "llama" | "qwen3" => json.flag("attention_bias")?.unwrap_or(false),
        "qwen2" => false,
        _ => json.only("attention_bias", false).map(|()| false)?,
    };
    let mlp_bias = match kind {
        "llama" => json.flag("mlp_bias")?.unwrap_or(false),
        _ => json.only("mlp_bias", false).map(|()| false)?,
    };
    let qk_norm = |name: &str| format!("self_attn.{name}_norm");
    let eps = json.number("rms_norm_eps")?.unwrap_or(1e-6);
    let norm = NormKind::RmsNorm { eps: positive("rms_norm_eps", eps)? };
    let attention = AttentionConfig::new(hidden, heads)
        .with_kv_heads(kv_heads)
        .with_head_dim(head_dim)
        .with_choices(AttentionChoices::CAUSAL)
        .with_rope(rope::rope(json, head_dim, context)?)
        .with_qk_norm((kind == "qwen3").then(|| QkNorm::new(eps, &qk_norm("q"), &qk_norm("k"))))
        .with_qkv_bias(bias || kind == "qwen2")
        .with_out_bias(bias);
    let choices = |window| LayerChoices {
        attention: AttentionChoices { window, ..AttentionChoices::CAUSAL },
        rope: attention.rope.clone(),
    };
    let layers: Vec<_> = windows(kind, json, layers, usual.window)?.into_iter().map(choices).collect();
    let first = layers.first().map_or(AttentionChoices::CAUSAL, |layer| layer.attention);
    let block = BlockConfig::new(
        attention.with_choices(first),
        json.size("intermediate_size", HUGE)?,
        activation(json, "hidden_act", "silu")?,
        norm,
    )
    .with_gate(true)
    .with_mlp_bias(mlp_bias)
    .with_names(BlockNames::llama());
    let config = DecoderConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        positions: None,
        context: Some(context),
        tied: json.flag("tie_word_embeddings")?.unwrap_or(false),
        block: checked(block)?,
        layers,
        dropout: 0.0,
        recomputed: 0,
        names: DecoderNames {
            prefix: "model",
            embedding: "embed_tokens",
            positions: "",
            blocks: "layers",
            norm: "norm",
            head: "lm_head",
        },
        transposed: false,
        packing: packing(json)?,
        padding: padding(json, None)?,
        ends: json.tokens("eos_token_id")?.unwrap_or_else(|| usual.end.into_iter().collect()),
        json: text.into(),
    };
    json.finish(&[ignored::COMMON, &[ignored::LLAMA]].concat())?;
    Ok(config)
}

/// Reads each layer's window. A missing key means `usual`, `null` means no window.
fn windows(kind: &str, json: &Json<'_>, layers: usize, usual: usize) -> Result<Vec<Option<usize>>, String> {
    if kind == "llama" {
        json.each("sliding_window", |_| false)?;
        json.each("layer_types", |types| {
            types.as_array().is_some_and(|types| types.iter().all(|of| of == "full_attention"))
        })?;
        json.only("use_sliding_window", false)?;
        return Ok(vec![None; layers]);
    }
    let window = json.optional_size("sliding_window", HUGE)?;
    let usual = (!json.is_null("sliding_window")).then_some(usual);
    // In Qwen2 and Qwen3, the first `max_window_layers` layers have no window.
    let (used, first) = match kind {
        "qwen2" | "qwen3" => (
            json.flag("use_sliding_window")?.unwrap_or(false),
            json.optional_number_of("max_window_layers")?.unwrap_or(28),
        ),
        _ => (true, 0),
    };
    let window = window.or(usual).filter(|_| used);
    let Some(types) = json.list("layer_types")? else {
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    if types.len() != layers {
        return Err(format!("`layer_types` is not a list of {layers} layers"));
    }
    let of = |of: &Value| match of.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(format!("`layer_types` has a layer of type {of}, but there is no `sliding_window`"))
        }
        _ => Err(format!("a layer of type {of} is not known")),
    };
    types.iter().map(of).collect()
}
