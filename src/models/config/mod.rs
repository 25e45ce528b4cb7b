//! Reads Hugging Face's `config.json`. The file is not trusted, so every number has a limit. A key
//! is either read, or ignored because it does not change the result (`ignored.rs`), or rejected by
//! an error that names it. There is a Rust file for each family. A missing key has the default of
//! transformers' class of that family.

mod bert;
mod gguf;
mod gpt2;
mod ignored;
mod json;
mod llama;
mod packing;
mod rope;

use crate::{
    device::DType,
    error::{Error, Result},
    kernels::{Activation, AttentionChoices},
    ops::RopeConfig,
    parallel::{AttentionConfig, BlockConfig},
    weights::{self, Packing},
};
use json::Json;
use serde_json::{Map, Value};
use std::{
    fs,
    io::{self, Read},
    path::Path,
};

/// The known values of `model_type`.
const KNOWN: [&str; 7] = ["llama", "mistral", "ministral", "qwen2", "qwen3", "gpt2", "bert"];

/// What [`ModelConfig::read`] expects.
const EXPECTED: &str = "a config.json: pass the folder of the model";

/// The largest size of a configuration, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The largest number of layers, of heads, and of features of a head.
const MANY: usize = 1 << 16;

/// The largest number of features, words and positions. The product of two such numbers does not
/// overflow.
const HUGE: usize = 1 << 28;

/// The configuration of a model of this crate.
// A program has one, so its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ModelConfig {
    /// A causal language model: [`super::Decoder`].
    Decoder(DecoderConfig),
    /// An encoder: [`super::Bert`].
    Bert(BertConfig),
}

/// The configuration of a [`super::Decoder`]. Llama, Mistral, Ministral, Qwen2, Qwen3 and GPT-2
/// differ only in these fields.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// The number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// The number of learned positions, if the model has a table of them.
    pub positions: Option<usize>,
    /// The longest sequence that the model was trained for, if that is known.
    pub context: Option<usize>,
    /// Whether the output head uses the embedding's table as its weight.
    pub tied: bool,
    /// The common configuration of all blocks. At least one entry of `layers` must have the choices
    /// and the rope of `block.attention`.
    pub block: BlockConfig,
    /// The options of each block, which replace those of `block`.
    pub layers: Vec<LayerChoices>,
    /// The probability of dropout on the embeddings. Only [`super::DecoderEnds`] applies it. It is
    /// 0 in every configuration read from a file.
    pub dropout: f64,
    /// The number of blocks, counted from the first, that save only their input and recompute their
    /// forward in the backward ([`Recompute`](crate::parallel::Recompute)). It is 0 in every
    /// configuration read from a file.
    pub recomputed: usize,
    /// The names of the tensors outside the blocks.
    pub names: DecoderNames,
    /// Whether the blocks' matrices are stored as `[in, out]` (GPT-2's `Conv1D`).
    pub transposed: bool,
    /// How the weights of the checkpoint are quantized (`quantization_config`), if they are. Such a
    /// checkpoint is read by [`Packed`](crate::weights::Packed).
    pub packing: Option<Packing>,
    /// The id whose lookup adds nothing to the embedding's gradient (`pad_token_id`), if there is
    /// one.
    pub padding: Option<u32>,
    /// The tokens that end a text, from `config.json` and `generation_config.json`.
    pub ends: Vec<u32>,
    /// The text of the configuration. A saved model gets this text with the `dtype` of its weights.
    /// It is empty if the configuration was not read from a file.
    pub json: String,
}

/// The options that may differ between the blocks of a decoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerChoices {
    /// The mask and the scale of the attention scores.
    pub attention: AttentionChoices,
    /// The rotary embedding of q and k, if there is one.
    pub rope: Option<RopeConfig>,
}

impl LayerChoices {
    /// Makes the options of a block.
    pub fn new(attention: AttentionChoices, rope: Option<RopeConfig>) -> Self {
        Self { attention, rope }
    }
}

impl DecoderConfig {
    /// Makes a decoder of `layers` equal blocks with a tied head and the default names, without
    /// learned positions, padding or tokens that end a text.
    ///
    /// ```
    /// use shardwise::{models::{Decoder, DecoderConfig}, prelude::*};
    ///
    /// let attention = AttentionConfig::new(8, 2).with_choices(AttentionChoices::CAUSAL);
    /// let norm = NormKind::RmsNorm { eps: 1e-6 };
    /// let block = BlockConfig::new(attention, 16, Activation::Silu, norm);
    /// let mut config = DecoderConfig::new(11, block, 2);
    /// config.positions = Some(4);
    /// let group = Group::solo(&Cpu::new());
    /// let model = Decoder::<Replicated, f32, _>::load(&group, &Random::normal(1, 0.1), &config)?;
    /// let logits = model.infer(&[3, 1, 4, 1], Sequences::one(4))?;
    /// assert_eq!(logits.shape().dims(), [4, 11]);
    /// assert!(model.infer(&[3, 1, 4, 1, 5], Sequences::one(5)).is_err()); // four positions
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn new(vocabulary: usize, block: BlockConfig, layers: usize) -> Self {
        let (attention, rope) = (block.attention.choices, block.attention.rope.clone());
        Self {
            vocabulary,
            positions: None,
            context: None,
            tied: true,
            block,
            layers: vec![LayerChoices { attention, rope }; layers],
            dropout: 0.0,
            recomputed: 0,
            names: DecoderNames::default(),
            transposed: false,
            packing: None,
            padding: None,
            ends: Vec::new(),
            json: String::new(),
        }
    }

    /// Returns the number of features of the residual stream.
    pub fn hidden(&self) -> usize {
        self.block.attention.hidden
    }

    /// Rejects choices in `block` that no layer has, because they would be ignored silently.
    pub(super) fn check_layers(&self) -> Result<()> {
        let AttentionConfig { choices, rope, .. } = &self.block.attention;
        let is_common = |layer: &LayerChoices| layer.attention == *choices && layer.rope == *rope;
        if self.layers.is_empty() || self.layers.iter().any(is_common) {
            return Ok(());
        }
        let reason = "no layer has the choices and the rope of `block.attention`: change `layers` too";
        Err(Error::invalid("decoder", reason))
    }

    /// Returns the configuration of a layer's block: the common configuration with the options of
    /// the layer.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn block(&self, layer: usize) -> BlockConfig {
        let mut block = self.block.clone();
        let LayerChoices { attention, rope } = &self.layers[layer];
        (block.attention.choices, block.attention.rope) = (*attention, rope.clone());
        block
    }
}

/// The names of the tensors outside the blocks of a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DecoderNames {
    /// The prefix of all names except the head's, in checkpoints of whole language models. In
    /// checkpoints of bare models, the names have no prefix.
    pub prefix: &'static str,
    /// The embedding.
    pub embedding: &'static str,
    /// The learned positions.
    pub positions: &'static str,
    /// The blocks, numbered from 0 under this name.
    pub blocks: &'static str,
    /// The last normalization.
    pub norm: &'static str,
    /// The head, if it is not tied.
    pub head: &'static str,
}

impl Default for DecoderNames {
    /// `embedding`, `positions`, `layers.0` and so on, `norm`, and `head`.
    fn default() -> Self {
        Self {
            prefix: "",
            embedding: "embedding",
            positions: "positions",
            blocks: "layers",
            norm: "norm",
            head: "head",
        }
    }
}

/// The configuration of a [`super::Bert`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BertConfig {
    /// The number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// The number of blocks.
    pub layers: usize,
    /// The number of learned positions.
    pub positions: usize,
    /// The number of token types.
    pub types: usize,
    /// The id whose lookup adds nothing to the embedding's gradient (`pad_token_id`), if there is
    /// one.
    pub padding: Option<u32>,
    /// The blocks.
    pub block: BlockConfig,
    /// The text of the configuration. A saved model gets this text with the `dtype` of its weights.
    /// It is empty if the configuration was not read from a file.
    pub json: String,
}

impl BertConfig {
    /// Makes an encoder of `layers` equal blocks, with tables of `positions` positions and `types`
    /// token types, without padding.
    pub fn new(
        vocabulary: usize,
        (positions, types): (usize, usize),
        block: BlockConfig,
        layers: usize,
    ) -> Self {
        Self { vocabulary, layers, positions, types, padding: None, block, json: String::new() }
    }
}

impl ModelConfig {
    /// Reads a configuration. `path` is the folder of a checkpoint, or its `config.json`. From a
    /// folder, also reads the tokens that end a text from `generation_config.json`, if that file
    /// exists. After an interrupted save, reads the configuration that belongs to the weights in
    /// the folder: see [`crate::weights::Save`].
    ///
    /// Ignores keys that do not change the result, and the probabilities of dropout: a model that
    /// is read from a file has no dropout, not even in training. Rejects unknown keys, because they
    /// may change the result.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read. [`Error::Config`] when a file is longer than 1
    /// MiB, is not a configuration, has an unknown key or value that may change the result, or
    /// describes a model that this crate does not have.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (config, generation) = if path.is_dir() {
            (weights::config(path), Some(path.join("generation_config.json")))
        } else {
            (path.into(), None)
        };
        let ends = match generation.filter(|path| path.exists()) {
            Some(path) => {
                let ends = |text: &str| Json::new("", &object(text)?).tokens("eos_token_id");
                ends(&text(&path, EXPECTED)?)
                    .map_err(|reason| Error::Config { path, reason })?
                    .unwrap_or_default()
            }
            None => Vec::new(),
        };
        Self::with_ends(&text(&config, EXPECTED)?, ends)
            .map_err(|reason| Error::Config { path: config, reason })
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// Returns a description of the first problem.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::with_ends(text, Vec::new())
    }

    /// Parses the text, and adds `more` to the tokens that end a text. If `more` is not empty and
    /// the text has no `eos_token_id`, drops the default of transformers' class.
    fn with_ends(text: &str, more: Vec<u32>) -> Result<Self, String> {
        let map = object(text)?;
        let kind = match map.get("model_type") {
            Some(kind) => kind.as_str().ok_or("`model_type` is not a string")?,
            None => return Err("`model_type` is missing".into()),
        };
        let json = Json::new(kind, &map);
        let mut model = match kind {
            "llama" | "mistral" | "ministral" | "qwen2" | "qwen3" => {
                Self::Decoder(llama::read(kind, &json, text)?)
            }
            "gpt2" => Self::Decoder(gpt2::read(&json, text)?),
            "bert" => Self::Bert(bert::read(&json, text)?),
            other => {
                let (other, known) = (other.escape_debug(), KNOWN.join(", "));
                return Err(format!("a model of type `{other}` is not known; known are {known}"));
            }
        };
        if let (Self::Decoder(config), false) = (&mut model, more.is_empty()) {
            if json.raw("eos_token_id").is_none() {
                config.ends.clear();
            }
            let new = more.into_iter().filter(|end| !config.ends.contains(end)).collect::<Vec<_>>();
            config.ends.extend(new);
        }
        Ok(model)
    }
}

/// Sets the element type of the stored weights in the text of a configuration, and removes
/// `quantization_config` unless the weights are quantized. Sets `torch_dtype`,
/// the older key, if the text has it. Sets `dtype` if the text has it, or has neither key. Returns
/// the text unchanged if the keys already name this type, or if the text is not a JSON object.
pub(super) fn stored_as(text: &str, dtype: DType, quantized: bool) -> String {
    let Ok(Value::Object(mut json)) = serde_json::from_str(text) else { return text.into() };
    let name = Value::from(match dtype {
        DType::F64 => "float64",
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
    });
    let older = json.contains_key("torch_dtype");
    let mut changed = !quantized && json.remove("quantization_config").is_some();
    for (key, is_used) in [("torch_dtype", older), ("dtype", !older || json.contains_key("dtype"))] {
        if is_used && json.get(key) != Some(&name) {
            json.insert(key.into(), name.clone());
            changed = true;
        }
    }
    if changed { format!("{:#}\n", Value::Object(json)) } else { text.into() }
}

/// Reads the text of a configuration, a file of at most 1 MiB. Errors say that the file is not
/// `expected`.
pub(crate) fn text(path: &Path, expected: &str) -> Result<String> {
    let io = |error: io::Error| Error::io(path, &error);
    let bad = |reason: String| Error::Config { path: path.into(), reason };
    // Checks the type before opening the file, because opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::no_file(path));
    }
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    let no_config = |what: &str| bad(format!("this is {what}, not {expected}"));
    if bytes.starts_with(b"GGUF") {
        return Err(no_config("a GGUF file"));
    }
    if bytes.len() as u64 > MAX_BYTES {
        return Err(no_config(&format!("a file of more than {MAX_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| no_config("a binary file"))
}

/// Parses a JSON object.
fn object(text: &str) -> Result<Map<String, Value>, String> {
    let value = serde_json::from_str(text).map_err(|error| {
        // Python writes NaN and infinities, which JSON does not have.
        let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
        let from = error.column().saturating_sub(2);
        let here = line.get(from..).unwrap_or_default().trim_start_matches([':', ' ', '[', ',']);
        let number = ["-Infinity", "Infinity", "NaN"].into_iter().find(|number| here.starts_with(number));
        number.map_or_else(|| error.to_string(), |number| format!("JSON has no {number}: {error}"))
    })?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err("the configuration is not a JSON object".into()),
    }
}

/// Checks the keys that all families have.
fn common(json: &Json<'_>, causal: bool, architectures: &[&str]) -> Result<(), String> {
    json.raw("model_type");
    // Other classes have other heads, and some compute attention differently.
    let known = |name: &Value| architectures.iter().any(|known| name == known);
    json.each("architectures", |value| value.as_array().is_some_and(|all| all.iter().all(known)))?;
    json.only("is_causal", causal)?;
    for key in ["add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"] {
        json.only(key, false)?;
    }
    json.only("pruned_heads", Map::new())
}

/// Reads how the weights are quantized.
fn packing(json: &Json<'_>) -> Result<Option<Packing>, String> {
    json.object("quantization_config")?.map(|json| packing::read(&json)).transpose()
}

/// Rejects sizes that no attention layer can have.
fn checked(block: BlockConfig) -> Result<BlockConfig, String> {
    let AttentionConfig { hidden, heads, kv_heads, head_dim, .. } = block.attention;
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} query heads are not a multiple of {kv_heads} key/value heads"));
    }
    if head_dim == 0 || head_dim > MANY || heads * head_dim > HUGE || block.ffn > HUGE {
        return Err(format!(
            "{heads} heads of {head_dim} features, or {} MLP features, are out of range",
            block.ffn
        ));
    }
    if block.attention.rope.is_none() && heads * head_dim != hidden {
        return Err(format!("{hidden} features are not a multiple of {heads} heads"));
    }
    Ok(block)
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

fn positive(key: &str, value: f64) -> Result<f64, String> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(format!("`{key}` is {value}"))
}

/// Reads `pad_token_id`: `null` means no padding, a missing key means `usual`. A negative id counts
/// from the end of the vocabulary, as in PyTorch.
fn padding(json: &Json<'_>, usual: Option<u32>) -> Result<Option<u32>, String> {
    let Some(value) = json.raw("pad_token_id") else { return Ok(usual) };
    if value.is_null() {
        return Ok(None);
    }
    let words = json.size("vocab_size", HUGE)?;
    let id = value.as_i64().ok_or("`pad_token_id` is not a whole number")?;
    let word = u32::try_from(if id < 0 { words as i64 + id } else { id });
    let word = word.ok().filter(|&word| (word as usize) < words);
    word.map(Some).ok_or_else(|| format!("`pad_token_id` is {id}, but the vocabulary has {words} words"))
}
