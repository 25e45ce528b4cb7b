//! The keys that transformers writes and that do not change the result of a model.

/// Keys for the origin of the file, and for running the model.
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

/// Keys that select the outputs of transformers' functions.
const OUTPUTS: &[&str] = &[
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "return_dict",
    "return_dict_in_generate",
    "use_return_dict",
];

/// Keys for the heads of other tasks.
const TASKS: &[&str] = &[
    "_num_labels",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
];

/// Keys for special tokens and sampling. The families' files read `eos_token_id`.
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

/// Probabilities of dropout. A model that is read from a file has no dropout, even in training: its
/// results are those of transformers' model after `eval()`.
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

/// The ignored keys of every family.
pub(super) const COMMON: &[&[&str]] = &[ORIGIN, OUTPUTS, TASKS, GENERATION, DROPOUT];

/// The ignored keys of Llama, Mistral and Qwen: keys of Hugging Face's training, keys of files that
/// are older than transformers' class of the model, and `attention_bias`, because Qwen2 always has
/// biases.
pub(super) const LLAMA: &[&str] = &["attention_bias", "is_decoder", "is_llama_config", "max_sequence_length"];

/// The ignored keys of GPT-2: keys for the heads of other tasks, and for the order of sums in half
/// precision.
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

/// The ignored keys of BERT: keys for the pooler and the heads, which the encoder does not have.
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
