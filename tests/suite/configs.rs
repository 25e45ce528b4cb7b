//! Configurations and checkpoints from the Hugging Face Hub. The tests check which ones are read,
//! and which ones are rejected because they would be misread.

use crate::dev::{self, Dev, ranks};
use crate::support::close;
use ndarray::{Array2, ArrayD};
use serde_json::{Value, json};
use shardwise::{
    Result,
    comm::Group,
    device::{AnyMut, AnyRef},
    models::{Bert, BertConfig, Decoder, DecoderConfig, ModelConfig},
    ops::RopeScaling,
    shard::{Replicated, Sequences},
    tensor::{Region, Role, WeightSource},
    weights::{self, Checkpoint},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Configurations of well-known models, with all their keys.
const PUBLISHED: [(&str, &str); 21] = [
    (
        "Llama-2-7b-hf",
        r#"{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true,
        "vocab_size": 32000}"#,
    ),
    (
        "vicuna-7b-v1.5",
        r#"{"_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_length": 4096,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "temperature": 0.9, "top_p": 0.6, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0", "use_cache": true, "vocab_size": 32000}"#,
    ),
    (
        "Meta-Llama-3-8B",
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0", "use_cache": true, "vocab_size": 128256}"#,
    ),
    (
        "Llama-3.1-8B-Instruct",
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
        "vocab_size": 128256}"#,
    ),
    (
        "Llama-3.2-1B (unsloth)",
        r#"{"_name_or_path": "meta-llama/Llama-3.2-1B", "architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pad_token_id": 128004, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.1", "unsloth_fixed": true,
        "use_cache": true, "vocab_size": 128256}"#,
    ),
    (
        "TinyLlama-1.1B-Chat-v1.0",
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true,
        "vocab_size": 32000}"#,
    ),
    (
        "SmolLM2-135M-Instruct",
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}"#,
    ),
    (
        "Mistral-7B-v0.1",
        r#"{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"#,
    ),
    (
        "Mistral-7B-Instruct-v0.2",
        r#"{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": true,
        "vocab_size": 32000}"#,
    ),
    (
        "Mistral-7B-v0.3",
        r#"{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": true,
        "vocab_size": 32768}"#,
    ),
    (
        "a Ministral",
        r#"{"architectures": ["MinistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float32",
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 12288, "layer_types": ["full_attention", "sliding_attention"],
        "max_position_embeddings": 32768, "model_type": "ministral", "num_attention_heads": 32, "num_hidden_layers": 2,
        "num_key_value_heads": 8, "pad_token_id": null, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 100000000.0, "rope_type": "default"}, "sliding_window": 32768,
        "tie_word_embeddings": false, "transformers_version": "5.0.0", "use_cache": true, "vocab_size": 131072}"#,
    ),
    (
        "Qwen2-0.5B",
        r#"{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"#,
    ),
    (
        "Qwen2.5-0.5B",
        r#"{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}"#,
    ),
    (
        "Qwen3-0.6B",
        r#"{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936}"#,
    ),
    (
        "gpt2",
        r#"{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"#,
    ),
    (
        "gpt2-medium",
        r#"{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24,
        "n_positions": 1024, "n_special": 0, "predict_special_tokens": true, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"#,
    ),
    (
        "distilgpt2",
        r#"{"_num_labels": 1, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02, "label2id": {"LABEL_0": 0}, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 6, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"#,
    ),
    (
        "bert-base-uncased",
        r#"{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522}"#,
    ),
    (
        "bert-base-multilingual-cased",
        r#"{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform", "type_vocab_size": 2, "vocab_size": 119547}"#,
    ),
    (
        "all-MiniLM-L6-v2",
        r#"{"_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.8.2", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522}"#,
    ),
    (
        "bge-small-en-v1.5",
        r#"{"_name_or_path": "/root/.cache/torch/sentence_transformers/BAAI_bge-small-en/", "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1, "classifier_dropout": null, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 384, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02,
        "intermediate_size": 1536, "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.30.0",
        "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522}"#,
    ),
];

/// Returns a small configuration of a model family, with one key set.
fn with(kind: &str, key: &str, value: Value) -> Value {
    let mut config = match kind {
        "gpt2" => json!({"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16}),
        "bert" => {
            json!({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 4,
            "max_position_embeddings": 16})
        }
        _ => {
            json!({"hidden_size": 512, "num_attention_heads": 32, "num_hidden_layers": 2, "intermediate_size": 4})
        }
    };
    config["model_type"] = kind.into();
    config["vocab_size"] = 7.into();
    config[key] = value;
    config
}

fn parse(config: &Value) -> Result<ModelConfig, String> {
    ModelConfig::parse(&config.to_string())
}

fn parse_decoder(config: &Value) -> DecoderConfig {
    match parse(config) {
        Ok(ModelConfig::Decoder(config)) => config,
        other => panic!("{config}: {other:?}"),
    }
}

/// Returns each layer's window.
fn windows(config: &DecoderConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.attention.window).collect()
}

#[test]
fn published_configurations_are_read() {
    for (name, text) in PUBLISHED {
        ModelConfig::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let ministral = ModelConfig::parse(PUBLISHED[10].1);
    let Ok(ModelConfig::Decoder(ministral)) = ministral else { panic!("Ministral is a decoder") };
    assert_eq!(windows(&ministral), [None, Some(32768)]);
}

/// An unknown key that may change the result is rejected by name.
#[test]
fn configurations_with_other_keys_are_refused() {
    let decoders = ["llama", "mistral", "qwen2", "qwen3", "gpt2"];
    let everywhere = [
        ("is_causal", json!(false)),
        ("attn_logit_softcapping", json!(30.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("logit_scale", json!(0.5)),
        ("residual_multiplier", json!(0.2)),
        ("embedding_multiplier", json!(12)),
        ("query_pre_attn_scalar", json!(256)),
        ("clip_qkv", json!(8.0)),
        ("use_qk_norm", json!(true)),
        ("num_local_experts", json!(8)),
        ("rope_interleaved", json!(true)),
        ("position_embedding_type", json!("alibi")),
        ("alibi", json!(true)),
        ("no_rope_layers", json!([1, 0])),
        ("attention_chunk_size", json!(8192)),
        ("use_bidirectional_attention", json!(true)),
        ("parallel_attn", json!(true)),
        ("norm_type", json!("layernorm")),
        ("pretraining_tp", json!(2)),
        ("architectures", json!(["LlamaForSequenceClassification"])),
        ("auto_map", json!({"AutoModel": "modeling.Model"})),
        ("is_encoder_decoder", json!(true)),
        ("add_cross_attention", json!(true)),
        ("text_config", json!({})),
        ("per_layer_config", json!({"0": {}})),
        ("pruned_heads", json!({"0": [1]})),
        ("kv_lora_rank", json!(512)),
        ("dual_chunk_attention_config", json!({"chunk_size": 262144})),
        ("multi_query", json!(true)),
        ("a_key_of_tomorrow", json!(1)),
    ];
    for kind in decoders {
        for (key, value) in &everywhere {
            let error = parse(&with(kind, key, value.clone())).expect_err(&format!("{kind}: {key}"));
            let want =
                format!("`{key}`: {value} is not known for a model of type {kind}: it may change the result");
            assert_eq!(error, want);
            // A key with the value null counts as absent.
            parse(&with(kind, key, Value::Null)).unwrap();
        }
    }
    for (kind, key, value) in [
        ("llama", "sliding_window", json!(4096)),
        ("llama", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("gpt2", "rope_theta", json!(1e4)),
        ("gpt2", "scale_attn_weights", json!(false)),
        ("bert", "is_decoder", json!(true)),
        ("bert", "is_causal", json!(true)),
        ("bert", "position_embedding_type", json!("relative_key")),
        ("bert", "use_rope", json!(true)),
        ("bert", "architectures", json!(["BertLMHeadModel"])),
        ("mistral", "attention_bias", json!(true)),
        ("qwen2", "use_mrope", json!(true)),
        ("qwen3", "mlp_bias", json!(true)),
    ] {
        let error = parse(&with(kind, key, value)).expect_err(&format!("{kind}: {key}"));
        assert!(error.starts_with(&format!("`{key}`: ")), "{error}");
    }
    let quantized = json!({"quant_method": "bitnet", "quantization_mode": "online"});
    for kind in decoders.into_iter().chain(["bert"]) {
        let error = parse(&with(kind, "quantization_config", quantized.clone())).unwrap_err();
        let known = if ["gpt2", "bert"].contains(&kind) {
            "is not known for a model of type"
        } else {
            "known are awq"
        };
        assert!(error.starts_with("`quantization_config`: ") && error.contains("bitnet"), "{error}");
        assert!(error.contains(known), "{error}");
    }
    // The error truncates long values and escapes unprintable characters.
    let error = parse(&with("llama", "no\u{1b}key", json!("x".repeat(500)))).unwrap_err();
    assert!(error.len() < 200 && error.contains(r"no\u{1b}key"), "{error}");
}

/// Keys like dropout, labels and tokens do not influence the result, so any value is accepted.
#[test]
fn keys_without_influence_are_ignored() {
    for kind in ["llama", "mistral", "ministral", "qwen2", "qwen3", "gpt2", "bert"] {
        for (key, value) in [
            ("_name_or_path", json!("x/y")),
            ("torch_dtype", json!("bfloat16")),
            ("use_cache", json!(false)),
            ("id2label", json!({"0": "A"})),
            ("pad_token_id", json!(0)),
            ("output_hidden_states", json!(true)),
            ("task_specific_params", json!({"a": 1})),
        ] {
            parse(&with(kind, key, value)).unwrap();
        }
    }
    parse(&with("llama", "is_causal", json!(true))).unwrap();
    parse(&with("bert", "is_causal", json!(false))).unwrap();
    parse(&with("llama", "architectures", json!(["LlamaModel"]))).unwrap();
    parse(&with("llama", "layer_types", json!(["full_attention", "full_attention"]))).unwrap();
    parse(&with("gpt2", "attn_pdrop", json!(0.5))).unwrap();
}

/// An absent key has the default of transformers' configuration class.
#[test]
fn missing_keys_have_the_defaults_of_the_class() {
    let plain = |kind: &str| parse_decoder(&with(kind, "use_cache", true.into()));
    for (kind, kv_heads, head_dim, context, ends, tied) in [
        ("llama", 32, 16, 2048, vec![2], false),
        ("mistral", 8, 16, 131072, vec![2], false),
        ("ministral", 8, 16, 131072, vec![2], false),
        ("qwen2", 32, 16, 32768, vec![], false),
        ("qwen3", 32, 128, 32768, vec![], false),
        ("gpt2", 2, 4, 16, vec![50256], true),
    ] {
        let config = plain(kind);
        let attention = &config.block.attention;
        assert_eq!((attention.kv_heads, attention.head_dim), (kv_heads, head_dim), "{kind}");
        assert_eq!((config.context, config.ends, config.tied), (Some(context), ends, tied), "{kind}");
    }
    // Null disables an option whose value is a number.
    let null = |kind: &str, key: &str| parse_decoder(&with(kind, key, Value::Null));
    assert_eq!(null("mistral", "num_key_value_heads").block.attention.kv_heads, 32);
    assert!(null("llama", "eos_token_id").ends.is_empty());

    let every = vec![Some(4096); 2];
    assert_eq!(windows(&plain("mistral")), every);
    assert_eq!(windows(&null("mistral", "sliding_window")), [None; 2]);
    for kind in ["qwen2", "qwen3"] {
        assert_eq!(windows(&plain(kind)), [None; 2]);
        let mut config = with(kind, "use_sliding_window", true.into());
        // By default the first 28 layers have no window.
        assert_eq!(windows(&parse_decoder(&config)), [None; 2]);
        config["max_window_layers"] = 0.into();
        assert_eq!(windows(&parse_decoder(&config)), every);
        config["sliding_window"] = Value::Null;
        assert_eq!(windows(&parse_decoder(&config)), [None; 2]);
        config["layer_types"] = json!(["full_attention", "sliding_attention"]);
        let error = parse(&config).unwrap_err();
        assert_eq!(
            error,
            "`layer_types` has a layer of type \"sliding_attention\", but there is no `sliding_window`"
        );
        config["layer_types"] = json!(["full_attention", "chunked_attention"]);
        assert_eq!(parse(&config).unwrap_err(), "a layer of type \"chunked_attention\" is not known");
    }
}

#[test]
fn rope_is_read_as_transformers_reads_it() {
    let rope = |config: &Value| {
        let layers = parse_decoder(config).layers;
        let rope = layers[0].rope.clone().unwrap();
        assert!(layers.iter().all(|layer| layer.rope.as_ref() == Some(&rope)), "{config}");
        rope
    };
    // `rope_scaling` takes precedence over `rope_parameters`. The top-level theta then applies,
    // too.
    let mut both = with("llama", "rope_parameters", json!({"rope_theta": 5e5, "rope_type": "default"}));
    assert_eq!(rope(&both).base, 5e5);
    both["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    both["rope_theta"] = json!(7e4);
    assert_eq!((rope(&both).base, rope(&both).scaling), (7e4, RopeScaling::Linear { factor: 4.0 }));
    both["rope_scaling"] = json!({});
    assert_eq!((rope(&both).base, rope(&both).scaling), (5e5, RopeScaling::None));

    // The original length may be next to `rope_parameters` or inside it. If it is in neither place,
    // the model's length applies.
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    let mut config = with("qwen3", "rope_parameters", yarn);
    let trained = |config: &Value| match rope(config).scaling {
        RopeScaling::Yarn { trained, .. } => trained,
        other => panic!("{other:?}"),
    };
    assert_eq!(trained(&config), 16);
    config["original_max_position_embeddings"] = 8.into();
    assert_eq!(trained(&config), 8);
    let bare = with("qwen3", "rope_parameters", json!({"rope_type": "yarn", "factor": 4.0}));
    assert_eq!(trained(&bare), 32768);

    // transformers ignores `partial_rotary_factor` for these models.
    for place in ["partial_rotary_factor", "rope_parameters"] {
        let value = |share: f64| match place {
            "rope_parameters" => json!({"rope_theta": 1e4, "partial_rotary_factor": share}),
            _ => json!(share),
        };
        parse(&with("llama", place, value(1.0))).unwrap();
        let error = parse(&with("llama", place, value(0.5))).unwrap_err();
        assert!(error.contains("partial_rotary_factor`: 0.5 is not known"), "{error}");
    }
    for (value, reason) in [
        (
            json!({"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}),
            "`rope_parameters` by type of layer (`full_attention`) is not known",
        ),
        (json!({"rope_type": "mrope", "mrope_section": [1, 2, 3]}), "rope of type `mrope` is not known"),
        (
            json!({"rope_type": "default", "mrope_section": [1, 2, 3]}),
            "`rope_parameters.mrope_section`: [1,2,3] is not known for a model of type llama: it may change the result",
        ),
        (
            json!({"rope_theta": 1e4, "factor": 8.0}),
            "`rope_parameters.factor`: 8.0 is not known for a model of type llama: it may change the result",
        ),
    ] {
        assert_eq!(parse(&with("llama", "rope_parameters", value)).unwrap_err(), reason);
    }
}

#[test]
fn a_refused_configuration_says_what_it_is_about() {
    let types = "known are llama, mistral, ministral, qwen2, qwen3, gpt2, bert";
    let unknown = parse(&with("gemma2", "use_cache", true.into())).unwrap_err();
    assert_eq!(unknown, format!("a model of type `gemma2` is not known; {types}"));
    for (word, text) in [
        ("Infinity", r#"{"model_type": "llama", "rope_theta": Infinity}"#),
        ("-Infinity", r#"{"model_type": "llama", "rope_theta":-Infinity}"#),
        ("NaN", "{\"model_type\": \"llama\",\n \"initializer_range\": NaN}"),
    ] {
        let error = ModelConfig::parse(text).unwrap_err();
        assert!(error.starts_with(&format!("JSON has no {word}: ")), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        ModelConfig::read(&path).unwrap_err().to_string().replace(path.to_str().unwrap(), "PATH")
    };
    let text = with("gemma2", "use_cache", true.into()).to_string();
    assert_eq!(read("config.json", text.as_bytes()), format!("PATH: {unknown}"));
    let gguf = read("model.gguf", b"GGUF\x03\0\0\0\x80\0\xff\xff\xff");
    assert_eq!(gguf, "PATH: this is a GGUF file, not a config.json: pass the folder of the model");
    let tensors = read("model.safetensors", b"\x10\0\0\0\0\0\0\0{}\xff\xff");
    assert_eq!(tensors, "PATH: this is a binary file, not a config.json: pass the folder of the model");
}

/// The tensors and the configuration of a small model, which a test modifies.
struct Variant {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    config: Value,
}

fn data(name: &str) -> PathBuf {
    let carried = std::env::var_os("SHARDWISE_TEST_DATA").map(PathBuf::from);
    carried.unwrap_or_else(|| shardwise_tests::root().join("tests/data")).join(name)
}

impl Variant {
    fn of(name: &str) -> Self {
        let file = Checkpoint::open(data(name)).unwrap();
        let read = |name: &str| {
            let shape = file.shape(name).unwrap().to_vec();
            let mut all = vec![0.0; shape.iter().product()];
            let whole = Region::whole(shape.as_slice());
            file.read(name, Role::Weight, &whole, AnyMut::F32(all.as_mut_slice())).unwrap();
            (name.to_string(), (shape, all))
        };
        let config = fs::read_to_string(data(name).join("config.json")).unwrap();
        Self { tensors: file.names().map(read).collect(), config: serde_json::from_str(&config).unwrap() }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn add(mut self, name: &str, shape: &[usize]) -> Self {
        let values = (0..shape.iter().product()).map(|at: usize| (at * 37 % 19) as f32 / 8.0 - 1.0);
        self.tensors.insert(name.into(), (shape.to_vec(), values.collect()));
        self
    }

    fn rename(mut self, to: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(name, tensor)| (to(&name), tensor)).collect();
        self
    }

    fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let views = self.tensors.iter().map(|(name, (shape, values))| {
            (name.clone(), shardwise::shard::Shape::new(shape), AnyRef::F32(values.as_slice()))
        });
        weights::write(folder.path().join("model.safetensors"), views).unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        folder
    }

    fn logits(&self, world: usize) -> Result<Array2<f64>> {
        let (ids, folder) = ([5, 17, 99, 3, 88], self.write());
        let (checkpoint, config) = opened(folder.path());
        let parts = ranks(world).run(|group| {
            let model = Decoder::<Replicated, f64, Dev>::load(&group, &checkpoint, &config)?;
            let (logits, _) = model.forward(&ids, Sequences::one(ids.len()))?;
            logits.all_gather()?.local().to_array()
        })?;
        Ok(parts[0].clone().into_dimensionality().unwrap())
    }
}

fn opened(folder: &Path) -> (Checkpoint, DecoderConfig) {
    let ModelConfig::Decoder(config) = ModelConfig::read(folder).unwrap() else { panic!("no decoder") };
    (Checkpoint::open(folder).unwrap(), config)
}

fn bert(folder: &Path) -> (Checkpoint, BertConfig) {
    let ModelConfig::Bert(config) = ModelConfig::read(folder).unwrap() else { panic!("no BERT") };
    (Checkpoint::open(folder).unwrap(), config)
}

#[test]
fn the_ends_are_those_of_both_configurations() {
    let ends = |config: Option<Value>, generation: Option<&str>| {
        let mut variant = Variant::of("llama");
        variant.config.as_object_mut().unwrap().remove("eos_token_id");
        if let Some(value) = config {
            variant = variant.set("eos_token_id", value);
        }
        let folder = variant.write();
        if let Some(text) = generation {
            fs::write(folder.path().join("generation_config.json"), text).unwrap();
        }
        match ModelConfig::read(folder.path()) {
            Ok(ModelConfig::Decoder(config)) => Ok(config.ends),
            Ok(_) => panic!("no decoder"),
            Err(error) => Err(error.to_string()),
        }
    };
    assert_eq!(ends(Some(json!(2)), None), Ok(vec![2]));
    assert_eq!(ends(Some(json!(2)), Some(r#"{"eos_token_id": [2, 7, 231]}"#)), Ok(vec![2, 7, 231]));
    assert_eq!(ends(Some(json!([9, 2])), Some(r#"{"eos_token_id": 7, "top_k": 50}"#)), Ok(vec![9, 2, 7]));
    assert_eq!(
        ends(None, Some(r#"{"eos_token_id": 7}"#)),
        Ok(vec![7]),
        "the class's default must not be added"
    );
    assert_eq!(ends(None, Some("{}")), Ok(vec![2]));
    for bad in ["[]", "{", r#"{"eos_token_id": "x"}"#, "\u{1}"] {
        let error = ends(Some(json!(2)), Some(bad)).unwrap_err();
        assert!(error.contains("generation_config.json: "), "{error}");
    }
}

/// A file that has more tensors than the configured model belongs to another model.
#[test]
fn tensors_that_nothing_reads_are_named() {
    let refused = |variant: Variant| {
        let folder = variant.write();
        let (checkpoint, config) = opened(folder.path());
        let outcome = ranks(2)
            .run(|group| Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config).map(|_| ()));
        outcome.unwrap_err().to_string()
    };
    let layers = refused(Variant::of("llama").set("num_hidden_layers", 1.into()));
    assert_eq!(
        layers,
        "rank 0: decoder: the configuration's model has no parameter for 9 tensors of the checkpoint: \
         `model.layers.1.input_layernorm.weight`, `model.layers.1.mlp.down_proj.weight`, \
         `model.layers.1.mlp.gate_proj.weight`, …"
    );
    for (of, name, shape) in [
        ("llama", "model.layers.0.self_attn.q_norm.weight", vec![8]),
        ("llama", "model.layers.1.self_attn.q_proj.bias", vec![72]),
        ("llama", "lm_head.bias", vec![591]),
        ("mistral", "model.layers.0.self_attn.sinks", vec![8]),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight", vec![32, 64]),
    ] {
        let error = refused(Variant::of(of).add(name, &shape));
        assert!(error.contains(&format!("no parameter for 1 tensor of the checkpoint: `{name}`")), "{error}");
    }
    let folder = Variant::of("bert").set("num_hidden_layers", 1.into()).write();
    let (checkpoint, config) = bert(folder.path());
    let solo = Group::solo(&dev::fresh());
    let error = Bert::<Replicated, f32, Dev>::load(&solo, &checkpoint, &config).map(|_| ()).unwrap_err();
    assert!(
        error.to_string().starts_with("bert: the configuration's model has no parameter for 16 tensors"),
        "{error}"
    );
}

/// Buffers of old checkpoints, and heads of other tasks, are ignored.
#[test]
fn tensors_without_influence_are_passed_over() {
    for (of, name, shape) in [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", vec![4]),
        ("qwen3", "model.rotary_emb.inv_freq", vec![4]),
        ("gpt2", "transformer.h.0.attn.bias", vec![1, 1, 32, 32]),
        ("gpt2", "transformer.h.1.attn.masked_bias", vec![1]),
        ("llama", "v_head.summary.weight", vec![1, 36]),
    ] {
        let plain = Variant::of(of).logits(1).unwrap();
        let got = Variant::of(of).add(name, &shape).logits(1).unwrap();
        assert_eq!(got, plain, "{name}");
    }
    // GPT-2's original file has names without a prefix.
    let bare = |name: &str| name.strip_prefix("transformer.").unwrap_or(name).to_string();
    let plain = Variant::of("gpt2").logits(1).unwrap();
    let variant = Variant::of("gpt2").rename(bare).add("h.0.attn.bias", &[1, 1, 32, 32]);
    assert_eq!(variant.logits(1).unwrap(), plain);
    assert!(variant.add("h.2.ln_1.weight", &[32]).logits(1).is_err());
    for prefix in ["", "bert."] {
        let variant = Variant::of("bert")
            .rename(|name| format!("{prefix}{name}"))
            .add(&format!("{prefix}embeddings.position_ids"), &[1, 32])
            .add(&format!("{prefix}pooler.dense.weight"), &[32, 32])
            .add("cls.predictions.bias", &[591]);
        let folder = variant.write();
        let (checkpoint, config) = bert(folder.path());
        Bert::<Replicated, f32, Dev>::load(&Group::solo(&dev::fresh()), &checkpoint, &config).unwrap();
    }
}

/// The file of a tied model has a head. The head may equal the embedding; a different head is an
/// error.
#[test]
fn a_tied_model_with_another_head_is_refused() {
    for (name, table) in [("qwen2", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")] {
        let plain = Variant::of(name);
        let mut same = Variant::of(name);
        let head = same.tensors[table].clone();
        same.tensors.insert("lm_head.weight".into(), head);
        assert_eq!(same.logits(3).unwrap(), plain.logits(3).unwrap());
        // Only one rank's rows differ, but every rank gets the error.
        let last = same.tensors["lm_head.weight"].1.len() - 1;
        same.tensors.get_mut("lm_head.weight").unwrap().1[last] += 1.0;
        for world in [1, 3] {
            let folder = same.write();
            let (checkpoint, config) = opened(folder.path());
            let outcomes = ranks(world).run(|group| {
                let model = Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config);
                Ok(model.err().map(|error| error.to_string()))
            });
            for outcome in outcomes.unwrap() {
                let want = format!(
                    "decoder: the configuration ties the head to the embedding, but `lm_head.weight` differs from `{table}`: to use \
                     `lm_head.weight`, set `tie_word_embeddings` to false in config.json"
                );
                assert_eq!(outcome, Some(want));
            }
        }
        let untied = same.set("tie_word_embeddings", false.into());
        assert!(untied.logits(3).unwrap() != plain.logits(3).unwrap());
        let short = Variant::of(name).add("lm_head.weight", &[590, 32]);
        assert!(
            short.logits(2).unwrap_err().to_string().contains("tensor `lm_head.weight` has shape [590, 32]")
        );
    }
}

/// With dynamic NTK scaling a step uses the frequencies of the text's length after the step. A text
/// beyond the trained length continues token by token, but its prompt must be read at once.
#[test]
fn dynamic_rope_refuses_a_prompt_in_parts() {
    let rope = json!({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0});
    let folder =
        Variant::of("llama").set("rope_parameters", rope).set("max_position_embeddings", 16.into()).write();
    let (checkpoint, config) = opened(folder.path());
    let ids: Vec<u32> = (0..24).map(|at| (at * 37 + 5) % 591).collect();
    let all = ranks(2).run(|group| {
        let model = Decoder::<Replicated, f64, Dev>::load(&group, &checkpoint, &config)?;
        let whole = model.forward(&ids, Sequences::one(ids.len()))?.0.all_gather()?.local().to_array()?;
        let mut cache = model.cache(1, 30)?;
        let at_once = model.step(&ids, &[0], &[ids.len()], &mut cache)?.all_gather()?.local().to_array()?;
        model.step(&[7], &[0], &[1], &mut cache)?;
        let refused = model.step(&[7, 8], &[0], &[2], &mut cache).unwrap_err();
        // Within the trained length, a prompt in chunks gives the same result as the whole prompt.
        cache.truncate(0, 0)?;
        let short = model.forward(&ids[..16], Sequences::one(16))?.0.all_gather()?.local().to_array()?;
        model.step(&ids[..10], &[0], &[10], &mut cache)?;
        let parts = model.step(&ids[10..16], &[0], &[6], &mut cache)?.all_gather()?.local().to_array()?;
        Ok(([whole, at_once, short, parts], refused.to_string()))
    });
    for ([whole, at_once, short, parts], refused) in all.unwrap() {
        let last = |all: &ArrayD<f64>| all.slice(ndarray::s![-1.., ..]).to_owned();
        close("a prompt in one step", &at_once, &last(&whole), 1e-12);
        close("a short prompt in parts", &parts, &last(&short), 1e-12);
        assert_eq!(
            refused,
            "decoder: 2 tokens after 25 of sequence 0 end at 27, beyond the trained length of 16: with dynamic NTK scaling of \
             RoPE, pass a prompt in one step"
        );
    }
}

#[test]
fn bert_with_the_first_names_of_its_norms_is_read() {
    let old = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let (new, old) = (Variant::of("bert").write(), Variant::of("bert").rename(old).write());
    let saved = tempfile::tempdir().unwrap();
    let hidden = |folder: &Path, to: Option<&Path>| {
        let (checkpoint, config) = bert(folder);
        let hidden = ranks(2).run(|group| {
            let model = Bert::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
            if let Some(to) = to {
                model.save(to)?;
            }
            model.forward(&[5, 17, 99], None, Sequences::one(3))?.0.local().to_vec()
        });
        hidden.unwrap()
    };
    let want = hidden(new.path(), None);
    assert_eq!(hidden(old.path(), Some(saved.path())), want);
    // Saved files use the current names.
    assert_eq!(hidden(saved.path(), None), want);
    let (saved, new) = (Checkpoint::open(saved.path()).unwrap(), Checkpoint::open(new.path()).unwrap());
    let encoder = new.names().filter(|name| !name.starts_with("pooler."));
    assert!(saved.names().eq(encoder), "{:?}", saved.names().collect::<Vec<_>>());
}

#[test]
fn learned_positions_are_counted() {
    let folder = Variant::of("gpt2").write();
    let (checkpoint, config) = opened(folder.path());
    let model =
        Decoder::<Replicated, f32, Dev>::load(&Group::solo(&dev::fresh()), &checkpoint, &config).unwrap();
    let error = model.forward(&[0; 33], Sequences::one(33)).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "decoder: the end of sequence 0 is 33, but the number of learned positions is 32"
    );
}
