//! Keys that say nothing about what a model computes: transformers writes them, and nothing here
//! reads them.

/// What the file is, where it comes from, and how it is to be run.
const ORIGIN: &[&str] = &[
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "transformers_version",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "dtype",
    "torch_dtype",
    "use_bfloat16",
    "torchscript",
    "tokenizer_class",
    "prefix",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "attn_implementation",
    "_flash_attn_2_enabled",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "initializer_range",
    "use_cache",
    "xla_device",
    "tf_legacy_loss",
];

/// What transformers' functions return.
const OUTPUTS: &[&str] = &[
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "return_dict",
    "return_dict_in_generate",
    "use_return_dict",
];

/// Heads of other tasks.
const TASKS: &[&str] = &[
    "_num_labels",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
];

/// Tokens with a meaning, and how a text is drawn. The tokens that end a text are read.
const GENERATION: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "remove_invalid_values",
    "repetition_penalty",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "unk_token_id",
];

/// Dropout is not a part of these models: they compute as transformers' do after `eval()`, also
/// when they are trained.
const DROPOUT: &[&str] = &[
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "summary_first_dropout",
];

/// Of every family.
pub(super) const COMMON: &[&[&str]] = &[ORIGIN, OUTPUTS, TASKS, GENERATION, DROPOUT];

/// Of Llama and its relatives: Hugging Face's own training, files from before transformers had the
/// model, and what tensors say better (Qwen2's biases).
pub(super) const LLAMA: &[&str] = &["attention_bias", "is_decoder", "is_llama_config", "max_sequence_length"];

/// Of GPT-2: its heads for other tasks, and how sums are made in half precision.
pub(super) const GPT2: &[&str] = &[
    "is_decoder",
    "n_ctx",
    "n_special",
    "predict_special_tokens",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
];

/// Of BERT: its pooler and heads, which the encoder does not have.
pub(super) const BERT: &[&str] = &[
    "directionality",
    "eos_token_id",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "tie_word_embeddings",
];
