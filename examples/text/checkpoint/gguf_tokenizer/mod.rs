//! The tokenizer in the metadata of a GGUF file.

mod byte_level;
mod keys;
mod pieces;

use keys::Keys;
use serde_json::{Value, json};
use shardwise::weights::{Gguf, GgufValue};
use std::collections::BTreeMap;
use tokenizers::Tokenizer;

/// The type of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    /// Part of a text.
    Normal,
    /// The token of characters that have none.
    Unknown,
    /// A mark such as the end of a text. Decoded texts do not show it.
    Control,
    /// A text that is always one token.
    UserDefined,
    /// A token that the model does not use.
    Unused,
    /// A byte of a character that has no token.
    Byte,
}

impl TokenType {
    /// Returns the type of a number in `tokenizer.ggml.token_type`.
    pub fn of(number: i128) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether a text is split at this token before anything else.
    fn is_added(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }
}

/// How a text is split into tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Splitting {
    /// Byte-level BPE, as GPT-2's: merges of characters that stand for bytes.
    ByteLevel {
        /// The name of the expressions that split a text into words.
        pre: String,
        /// The merges in their order, each as "left right".
        merges: Vec<String>,
    },
    /// SentencePiece's BPE: merges the two adjacent tokens whose concatenation has the best score.
    Pieces {
        /// The score of each token.
        scores: Vec<f32>,
        /// Whether a space is put in front of a text.
        space: bool,
    },
}

/// The tokenizer in the metadata of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokenizer {
    /// The tokens in the order of their ids.
    pub tokens: Vec<String>,
    /// The type of each token.
    pub types: Vec<TokenType>,
    /// How a text is split into tokens.
    pub splitting: Splitting,
    /// The token in front of a text.
    pub begin: Option<u32>,
    /// The token behind a text.
    pub end: Option<u32>,
}

impl GgufTokenizer {
    /// Reads the keys `tokenizer.ggml.*`. Flags that a file leaves out are as in llama.cpp.
    ///
    /// # Errors
    /// A reason that names the key: it is absent, has another type, or a value that is not known.
    pub fn read(gguf: &Gguf) -> Result<Self, String> {
        let keys = Keys(gguf);
        let pre = keys.text("pre")?;
        let (splitting, begins) = match &*keys.text("model")?.ok_or_else(|| keys::absent("model"))? {
            "gpt2" => {
                let pre = pre.unwrap_or_else(|| "default".into());
                let begins = byte_level::begins(&pre);
                (Splitting::ByteLevel { pre, merges: keys.texts("merges")? }, begins)
            }
            "llama" => {
                let scores = keys.list("scores", |value| match value {
                    GgufValue::F32(score) => Some(score),
                    _ => None,
                })?;
                (Splitting::Pieces { scores, space: keys.flag("add_space_prefix")?.unwrap_or(true) }, true)
            }
            other => {
                return Err(format!("tokenizer.ggml.model: `{other}` is not known, only `gpt2` and `llama`"));
            }
        };
        Ok(Self {
            tokens: keys.texts("tokens")?,
            types: keys.list("token_type", |value| match value {
                GgufValue::Integer(number) => TokenType::of(number),
                _ => None,
            })?,
            splitting,
            begin: keys.outer("add_bos_token", begins, "bos_token_id")?,
            end: keys.outer("add_eos_token", false, "eos_token_id")?,
        })
    }

    /// Returns the tokenizer. A text is first split at unknown, control and user-defined tokens. A
    /// byte without a token is left out, as in llama.cpp.
    ///
    /// # Errors
    /// The reason: lists of different lengths, a token that occurs twice or does not exist, an
    /// unknown pre-tokenizer, or an order of merges that is not defined.
    pub fn build(&self) -> Result<Tokenizer, String> {
        let Self { tokens, types, .. } = self;
        self.check_length("token_type", types.len())?;
        let mut ids = BTreeMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(format!("tokenizer.ggml.tokens: the tokens {first} and {id} are both {token:?}"));
            }
        }
        let mut json = match &self.splitting {
            Splitting::ByteLevel { pre, merges } => byte_level::json(pre, merges)?,
            Splitting::Pieces { scores, space } => pieces::json(self, scores, *space, &ids)?,
        };
        let added = tokens.iter().zip(types).enumerate().filter(|(_, (_, kind))| kind.is_added());
        let added: Vec<Value> = added
            .map(|(id, (token, kind))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != TokenType::UserDefined})
            })
            .collect();
        json["version"] = "1.0".into();
        json["added_tokens"] = added.into();
        json["post_processor"] = self.post_processor()?;
        json["model"]["type"] = "BPE".into();
        json["model"]["vocab"] = json!(ids);
        Tokenizer::from_bytes(json.to_string()).map_err(|error| format!("tokenizer.ggml: {error}"))
    }

    /// Checks the length of a list with an entry for each token.
    fn check_length(&self, key: &str, length: usize) -> Result<(), String> {
        let tokens = self.tokens.len();
        match length == tokens {
            true => Ok(()),
            false => Err(format!("tokenizer.ggml.{key} has {length} entries, but there are {tokens} tokens")),
        }
    }

    /// Returns the description of the tokens in front of and behind a text.
    fn post_processor(&self) -> Result<Value, String> {
        let mut special = BTreeMap::new();
        let mut named = |id: Option<u32>, key: &str| {
            let Some(id) = id else { return Ok(None) };
            let Some(token) = self.tokens.get(id as usize) else {
                return Err(format!(
                    "tokenizer.ggml.{key} is {id}, but there are {} tokens",
                    self.tokens.len()
                ));
            };
            special.insert(token, json!({"id": token, "ids": [id], "tokens": [token]}));
            Ok(Some(json!({"SpecialToken": {"id": token, "type_id": 0}})))
        };
        let (begin, end) = (named(self.begin, "bos_token_id")?, named(self.end, "eos_token_id")?);
        let around = |texts: &[&str]| -> Vec<Value> {
            let texts = texts.iter().map(|text| json!({"Sequence": {"id": text, "type_id": 0}}));
            begin.clone().into_iter().chain(texts).chain(end.clone()).collect()
        };
        Ok(json!({
            "type": "TemplateProcessing", "single": around(&["A"]), "pair": around(&["A", "B"]),
            "special_tokens": special}))
    }
}
