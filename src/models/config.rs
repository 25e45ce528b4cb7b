//! Hugging Face's `config.json`: what a model is. It comes from elsewhere, so that nothing in it is believed: every number
//! has a limit, and what is not understood is refused rather than ignored where it would change the result.

use crate::{
    device::DType,
    error::{Error, Result},
    kernels::{Activation, NormKind, RopePairs},
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig, BlockNames, NormPlacement, QkNorm},
    weights,
};
use serde_json::{Map, Value};
use std::{fs, io::Read, path::Path};

/// The longest configuration that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The most layers, heads, and features of a head.
const MANY: usize = 1 << 16;

/// The most features, words and positions. Products of two are far from overflow.
const HUGE: usize = 1 << 28;

/// A model that this crate has.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelConfig {
    /// A causal language model: [`super::Decoder`].
    Decoder(DecoderConfig),
    /// An encoder: [`super::Bert`].
    Bert(BertConfig),
}

/// What a [`super::Decoder`] is: Llama, Mistral, Qwen2, Qwen3 and GPT-2 differ in these choices alone.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The number of words.
    pub vocabulary: usize,
    /// The number of blocks.
    pub layers: usize,
    /// The rows of the table of learned positions, if there is one.
    pub positions: Option<usize>,
    /// The most tokens of a sequence that the model was made for, if it says.
    pub context: Option<usize>,
    /// Whether the output head is the embedding's table.
    pub tied: bool,
    /// The blocks, but for their windows.
    pub block: BlockConfig,
    /// The window of each layer's attention.
    pub windows: Vec<Option<usize>>,
    /// What the tensors around the blocks are called.
    pub names: DecoderNames,
    /// Whether the blocks' matrices are stored as `[in, out]` (GPT-2's `Conv1D`).
    pub transposed: bool,
    /// The tokens that end a text.
    pub ends: Vec<u32>,
    /// The configuration as it was read; a saved model gets it, with the `dtype` of its weights.
    pub json: String,
}

/// What the tensors around the blocks of a decoder are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderNames {
    /// What stands before all names but the head's, in checkpoints of whole language models. Those of bare models lack it.
    pub prefix: &'static str,
    /// The embedding.
    pub embedding: &'static str,
    /// The learned positions.
    pub positions: &'static str,
    /// The blocks, numbered from 0 under this name.
    pub blocks: &'static str,
    /// The last normalization.
    pub norm: &'static str,
    /// The head, where it is not tied.
    pub head: &'static str,
}

/// What a [`super::Bert`] is.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// The number of words.
    pub vocabulary: usize,
    /// The number of blocks.
    pub layers: usize,
    /// The number of learned positions.
    pub positions: usize,
    /// The number of token types.
    pub types: usize,
    /// The blocks.
    pub block: BlockConfig,
    /// The configuration as it was read; a saved model gets it, with the `dtype` of its weights.
    pub json: String,
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint's folder, or the file itself. Where a save was killed, a
    /// folder's configuration is that of its weights: see [`crate::weights::Save`].
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Checkpoint`] when it is longer than 1 MiB, is no such
    /// configuration, or is of a model that this crate does not have.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() { weights::config(path) } else { path.into() };
        let io = |error: std::io::Error| Error::Io { path: path.clone(), reason: error.to_string() };
        let bad = |reason: String| Error::Checkpoint { path: path.clone(), reason };
        if !fs::metadata(&path).map_err(io)?.is_file() {
            return Err(Error::Io { path: path.clone(), reason: "not a regular file".into() });
        }
        let mut text = String::new();
        fs::File::open(&path).map_err(io)?.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(format!("a configuration of more than {MAX_BYTES} bytes")));
        }
        Self::parse(&text).map_err(bad)
    }

    /// The model that a configuration describes.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let json = Json(value.as_object().ok_or("the configuration is not a JSON object")?);
        match json.text("model_type")?.ok_or("`model_type` is missing")? {
            kind @ ("llama" | "mistral" | "qwen2" | "qwen3") => Ok(Self::Decoder(llama(kind, &json, text)?)),
            "gpt2" => Ok(Self::Decoder(gpt2(&json, text)?)),
            "bert" => Ok(Self::Bert(bert(&json, text)?)),
            other => Err(format!("a model of type `{}` is not known", other.escape_debug())),
        }
    }
}

/// A configuration that says in which element the weights are stored: under `torch_dtype`, the older
/// key, where it has only that one, else under `dtype`. Unchanged if it says so already, or is no
/// JSON object.
pub(super) fn stored_as(text: &str, dtype: DType) -> String {
    let Ok(Value::Object(mut json)) = serde_json::from_str(text) else { return text.into() };
    let name = Value::from(match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
    });
    let older = json.contains_key("torch_dtype");
    let mut changed = false;
    for (key, is_used) in [("torch_dtype", older), ("dtype", !older || json.contains_key("dtype"))] {
        if is_used && json.get(key) != Some(&name) {
            json.insert(key.into(), name.clone());
            changed = true;
        }
    }
    if changed { format!("{:#}\n", Value::Object(json)) } else { text.into() }
}

fn llama(kind: &str, json: &Json<'_>, text: &str) -> Result<DecoderConfig, String> {
    let (hidden, heads) = (json.size("hidden_size", HUGE)?, json.size("num_attention_heads", MANY)?);
    let layers = json.size("num_hidden_layers", MANY)?;
    let head_dim = match json.optional_size("head_dim", MANY)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) && hidden / heads <= MANY => hidden / heads,
        None => return Err(format!("{hidden} features are not a multiple of {heads} heads")),
    };
    let context = json.optional_size("max_position_embeddings", HUGE)?;
    let bias = json.flag("attention_bias")?.unwrap_or(false);
    let qk_norm = |name: &str| format!("self_attn.{name}_norm");
    let eps = json.number("rms_norm_eps")?.unwrap_or(1e-6);
    let norm = NormKind::RmsNorm { eps: positive("rms_norm_eps", eps)? };
    let attention = AttentionConfig {
        kv_heads: json.optional_size("num_key_value_heads", MANY)?.unwrap_or(heads),
        head_dim,
        causal: true,
        rope: Some(rope(json, head_dim, context)?),
        qk_norm: (kind == "qwen3").then(|| QkNorm { eps, q: qk_norm("q"), k: qk_norm("k") }),
        qkv_bias: bias || kind == "qwen2",
        out_bias: bias,
        ..AttentionConfig::new(hidden, heads)
    };
    let block = BlockConfig {
        attention,
        ffn: json.size("intermediate_size", HUGE)?,
        activation: activation(json, "hidden_act", "silu")?,
        mlp_bias: json.flag("mlp_bias")?.unwrap_or(false),
        norm,
        placement: NormPlacement::Pre,
        names: BlockNames::llama(),
    };
    Ok(DecoderConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        layers,
        positions: None,
        context,
        tied: json.flag("tie_word_embeddings")?.unwrap_or(false),
        block: checked(block)?,
        windows: windows(kind, json, layers)?,
        names: DecoderNames {
            prefix: "model",
            embedding: "embed_tokens",
            positions: "",
            blocks: "layers",
            norm: "norm",
            head: "lm_head",
        },
        transposed: false,
        ends: ends(json)?,
        json: text.into(),
    })
}

fn gpt2(json: &Json<'_>, text: &str) -> Result<DecoderConfig, String> {
    let (hidden, heads) = (json.size("n_embd", HUGE)?, json.size("n_head", MANY)?);
    let layers = json.size("n_layer", MANY)?;
    for (key, usual) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ] {
        if json.flag(key)?.unwrap_or(usual) != usual {
            return Err(format!("`{key}` as {} is not known", !usual));
        }
    }
    let context = json.size("n_positions", HUGE)?;
    let eps = json.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    let block = BlockConfig {
        attention: AttentionConfig {
            causal: true,
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads)
        },
        ffn: json.optional_size("n_inner", HUGE)?.unwrap_or(4 * hidden),
        activation: activation(json, "activation_function", "gelu_new")?,
        mlp_bias: true,
        norm: NormKind::LayerNorm { eps: positive("layer_norm_epsilon", eps)? },
        placement: NormPlacement::Pre,
        names: BlockNames::gpt2(),
    };
    Ok(DecoderConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        layers,
        positions: Some(context),
        context: Some(context),
        tied: json.flag("tie_word_embeddings")?.unwrap_or(true),
        block: checked(block)?,
        windows: vec![None; layers],
        names: DecoderNames {
            prefix: "transformer",
            embedding: "wte",
            positions: "wpe",
            blocks: "h",
            norm: "ln_f",
            head: "lm_head",
        },
        transposed: true,
        ends: ends(json)?,
        json: text.into(),
    })
}

fn bert(json: &Json<'_>, text: &str) -> Result<BertConfig, String> {
    let (hidden, heads) = (json.size("hidden_size", HUGE)?, json.size("num_attention_heads", MANY)?);
    let positions = json.text("position_embedding_type")?.unwrap_or("absolute");
    if positions != "absolute" || json.flag("is_decoder")?.unwrap_or(false) {
        return Err("only BERT encoders with absolute positions are known".into());
    }
    let eps = json.number("layer_norm_eps")?.unwrap_or(1e-12);
    let block = BlockConfig {
        attention: AttentionConfig { qkv_bias: true, out_bias: true, ..AttentionConfig::new(hidden, heads) },
        ffn: json.size("intermediate_size", HUGE)?,
        activation: activation(json, "hidden_act", "gelu")?,
        mlp_bias: true,
        norm: NormKind::LayerNorm { eps: positive("layer_norm_eps", eps)? },
        placement: NormPlacement::Post,
        names: BlockNames::bert(),
    };
    Ok(BertConfig {
        vocabulary: json.size("vocab_size", HUGE)?,
        layers: json.size("num_hidden_layers", MANY)?,
        positions: json.size("max_position_embeddings", HUGE)?,
        types: json.optional_size("type_vocab_size", HUGE)?.unwrap_or(2),
        block: checked(block)?,
        json: text.into(),
    })
}

/// Refuses sizes that no attention has.
fn checked(block: BlockConfig) -> Result<BlockConfig, String> {
    let AttentionConfig { hidden, heads, kv_heads, head_dim, .. } = block.attention;
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} query heads are not a multiple of {kv_heads} key/value heads"));
    }
    if head_dim == 0 || head_dim > MANY || heads * head_dim > HUGE || block.ffn > HUGE {
        return Err(format!("{heads} heads of {head_dim} features and {} between are no sizes", block.ffn));
    }
    if block.attention.rope.is_none() && heads * head_dim != hidden {
        return Err(format!("{hidden} features are not a multiple of {heads} heads"));
    }
    Ok(block)
}

/// The rotary embedding: `rope_parameters`, or as it was before that, `rope_theta` and `rope_scaling`.
fn rope(json: &Json<'_>, head_dim: usize, context: Option<usize>) -> Result<RopeConfig, String> {
    let nested = match json.object("rope_parameters")? {
        Some(nested) => Some(nested),
        None => json.object("rope_scaling")?,
    };
    let empty = Map::new();
    let inner = Json(nested.map_or(&empty, |nested| nested.0));
    let either = |key: &str| Ok::<_, String>(inner.number(key)?.or(json.number(key)?));
    let base = positive("rope_theta", either("rope_theta")?.unwrap_or(10000.0))?;
    let share = either("partial_rotary_factor")?.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&share) {
        return Err(format!("`partial_rotary_factor` is {share}"));
    }
    let dim = (head_dim as f64 * share) as usize;
    let kind = match inner.text("rope_type")? {
        Some(kind) => Some(kind),
        None => inner.text("type")?,
    };
    let kind = kind.unwrap_or("default");
    let factor = || {
        let factor = inner.number("factor")?;
        positive("factor", factor.ok_or_else(|| format!("rope of type `{kind}` without a `factor`"))?)
    };
    let trained = || {
        let key = "original_max_position_embeddings";
        let own = inner.optional_size(key, HUGE)?;
        let trained = if own.is_some() { own } else { json.optional_size(key, HUGE)?.or(context) };
        trained.ok_or_else(|| format!("rope of type `{kind}` without the training's length"))
    };
    let number = |key: &str, usual: f64| Ok::<_, String>(inner.number(key)?.unwrap_or(usual));
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => {
            let trained = context.ok_or("rope of type `dynamic` without `max_position_embeddings`")?;
            RopeScaling::DynamicNtk { factor: factor()?, trained }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low: number("low_freq_factor", 1.0)?,
            high: number("high_freq_factor", 4.0)?,
            trained: trained()?,
        },
        "yarn" => {
            let trained = trained()?;
            let factor = match (inner.number("factor")?, context) {
                (None, Some(context)) => context as f64 / trained as f64,
                _ => factor()?,
            };
            let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
            let magnitude = match (
                inner.number("attention_factor")?,
                inner.number("mscale")?.filter(|scale| *scale != 0.0),
                inner.number("mscale_all_dim")?.filter(|scale| *scale != 0.0),
            ) {
                (Some(magnitude), ..) => magnitude,
                (None, Some(one), Some(all)) => scale(one) / scale(all),
                _ => RopeScaling::yarn_magnitude(factor),
            };
            RopeScaling::Yarn {
                factor,
                trained,
                fast: number("beta_fast", 32.0)?,
                slow: number("beta_slow", 1.0)?,
                truncate: inner.flag("truncate")?.unwrap_or(true),
                magnitude,
            }
        }
        other => return Err(format!("rope of type `{}` is not known", other.escape_debug())),
    };
    Ok(RopeConfig { dim, base, pairs: RopePairs::Halves, scaling })
}

/// Each layer's window.
fn windows(kind: &str, json: &Json<'_>, layers: usize) -> Result<Vec<Option<usize>>, String> {
    let window = json.optional_size("sliding_window", HUGE)?;
    let used = match kind {
        "mistral" => true,
        "qwen2" | "qwen3" => json.flag("use_sliding_window")?.unwrap_or(false),
        _ => false,
    };
    let Some(window) = window.filter(|_| used) else { return Ok(vec![None; layers]) };
    if let Some(types) = json.0.get("layer_types").filter(|types| !types.is_null()) {
        let types = types.as_array().filter(|types| types.len() == layers);
        let types = types.ok_or_else(|| format!("`layer_types` is not a list of {layers} layers"))?;
        let of = |of: &Value| match of.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => Err(format!("a layer of type {of} is not known")),
        };
        return types.iter().map(of).collect();
    }
    let first = match kind {
        "mistral" => 0,
        _ => json.optional_number_of("max_window_layers")?.unwrap_or(28),
    };
    Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect())
}

fn activation(json: &Json<'_>, key: &str, usual: &str) -> Result<Activation, String> {
    match json.text(key)?.unwrap_or(usual) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::GeluErf),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(format!("the activation `{}` is not known", other.escape_debug())),
    }
}

/// `eos_token_id`: a number or a list of them.
fn ends(json: &Json<'_>) -> Result<Vec<u32>, String> {
    let one = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| "`eos_token_id` is not a token".to_string())
    };
    match json.0.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(all)) => all.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

fn positive(key: &str, value: f64) -> Result<f64, String> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(format!("`{key}` is {value}"))
}

/// An object whose entries are looked up by name and kind. `null` is as good as absent.
struct Json<'a>(&'a Map<String, Value>);

impl<'a> Json<'a> {
    fn get<R>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<R>,
    ) -> Result<Option<R>, String> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| format!("`{key}` is not {what}")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        self.get(key, "a text", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        self.get(key, "a number", |value| value.as_f64().filter(|value| value.is_finite()))
    }

    fn object(&self, key: &str) -> Result<Option<Self>, String> {
        self.get(key, "an object", |value| value.as_object().map(Json))
    }

    /// A number from 0 on.
    fn optional_number_of(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key, "a whole number", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    /// A size from 1 to a limit.
    fn optional_size(&self, key: &str, limit: usize) -> Result<Option<usize>, String> {
        match self.optional_number_of(key)? {
            Some(size) if size == 0 || size > limit => {
                Err(format!("`{key}` is {size}; it may be from 1 to {limit}"))
            }
            size => Ok(size),
        }
    }

    fn size(&self, key: &str, limit: usize) -> Result<usize, String> {
        self.optional_size(key, limit)?.ok_or_else(|| format!("`{key}` is missing"))
    }
}
