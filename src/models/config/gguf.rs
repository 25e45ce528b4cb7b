//! Reads the configuration of a model from the metadata of a GGUF file: writes the `config.json`
//! that transformers' model would have, and parses it.

use super::{HUGE, ModelConfig, positive};
use crate::{
    device::AnyMut,
    error::{Error, Result},
    kernels::RopePairs,
    ops::{RopeConfig, RopeScaling},
    tensor::{Region, Role, WeightSource},
    weights::{Gguf, GgufValue, ROPE_DIVISORS},
};
use serde_json::{Map, Value, json};
use std::{cell::RefCell, collections::BTreeSet};

/// The known architectures.
const KNOWN: [&str; 4] = ["llama", "qwen2", "qwen3", "gpt2"];

/// Keys of an architecture that do not change the logits.
const IGNORED: [&str; 4] = ["vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type"];

/// Keys of an architecture that have to be absent or 0.
const ZERO: [&str; 7] = [
    "attention.sliding_window",
    "attention.max_alibi_bias",
    "attention.clamp_kqv",
    "expert_count",
    "expert_used_count",
    "expert_shared_count",
    "nextn_predict_layers",
];

/// Keys of an architecture that have to be absent or 1.
const ONE: [&str; 3] = ["logit_scale", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"];

/// The keys of the tokens that end a text.
const ENDS: [&str; 2] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];

/// The largest relative difference of divisors of rotary frequencies, which converters compute in
/// f32.
const SAME_DIVISOR: f64 = 1e-4;

impl ModelConfig {
    /// Reads the configuration of a model from the metadata of a GGUF file. The known architectures
    /// are `llama`, `qwen2`, `qwen3` and `gpt2`. Load the model from the same [`Gguf`].
    ///
    /// * The vocabulary is the number of rows of the embedding. The head is tied if the file has no
    ///   `output.weight`.
    /// * The tokens that end a text are `tokenizer.ggml.eos_token_id` and
    ///   `tokenizer.ggml.eot_token_id`.
    /// * The divisors in `rope_freqs.weight` are recognized as Llama 3's scaling.
    /// * A model of `gpt2` cannot be saved with a `config.json`, because the file's matrices are
    ///   `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Config`] when the architecture is not known, a key is missing, or a key of the
    /// architecture is not known or has a value that is not known, because it may change the
    /// result; [`Error::TensorElement`] when a tensor has a type that cannot be read;
    /// [`Error::Checkpoint`] and [`Error::Io`] when the file cannot be read.
    pub fn of_gguf(gguf: &Gguf) -> Result<Self> {
        let keys = Keys { gguf, asked: RefCell::default() };
        let architecture = gguf.architecture();
        if !KNOWN.contains(&architecture) {
            let (name, known) = (architecture.escape_debug(), KNOWN.join(", "));
            return Err(keys.bad(format!("the architecture `{name}` is not known; known are {known}")));
        }
        if let Some(kind) = gguf.get("general.type")?
            && kind.text() != Some("model")
        {
            return Err(keys.bad("`general.type` is not `model`".into()));
        }
        // A type that cannot be read is an error before any rank takes memory.
        for name in gguf.names() {
            gguf.check(name, &Region::whole(gguf.shape(name)?))?;
        }
        let map = if architecture == "gpt2" { keys.gpt2()? } else { keys.llama()? };
        keys.finish()?;
        let mut model = Self::parse(&Value::Object(map).to_string()).map_err(|reason| keys.bad(reason))?;
        if let (Self::Decoder(config), "gpt2") = (&mut model, architecture) {
            config.transposed = false;
            config.json.clear();
        }
        Ok(model)
    }
}

/// The metadata of a file, and the keys of its architecture that were read.
struct Keys<'a> {
    gguf: &'a Gguf,
    asked: RefCell<BTreeSet<String>>,
}

impl Keys<'_> {
    fn bad(&self, reason: String) -> Error {
        Error::Config { path: self.gguf.path().into(), reason }
    }

    /// Returns the full name of a key of the architecture.
    fn key(&self, key: &str) -> String {
        let key = format!("{}.{key}", self.gguf.architecture());
        self.asked.borrow_mut().insert(key.clone());
        key
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        let Some(number) = self.gguf.layer_number(&key)? else { return Ok(None) };
        match usize::try_from(number) {
            Ok(size) if (1..=HUGE).contains(&size) => Ok(Some(size)),
            _ => Err(self.bad(format!("`{key}` is {number}; it may be from 1 to {HUGE}"))),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let missing = || self.bad(format!("`{}` is missing", self.key(key)));
        self.optional_size(key)?.ok_or_else(missing)
    }

    /// Reads a number. An f32 becomes the shortest decimal that rounds to it, as the converter has
    /// read it from a `config.json`.
    fn number(&self, key: &str) -> Result<Option<f64>> {
        let key = self.key(key);
        let number = match self.gguf.get(&key)? {
            None => return Ok(None),
            Some(GgufValue::F32(number)) => number.to_string().parse().ok(),
            Some(GgufValue::F64(number)) => Some(number),
            Some(GgufValue::Integer(number)) => Some(number as f64),
            Some(_) => None,
        };
        match number.filter(|number: &f64| number.is_finite()) {
            None => Err(self.bad(format!("`{key}` is not a finite number"))),
            number => Ok(number),
        }
    }

    fn needed_number(&self, key: &str) -> Result<f64> {
        let missing = || self.bad(format!("`{}` is missing", self.key(key)));
        self.number(key)?.ok_or_else(missing)
    }

    /// Returns an error if the key has a value other than `known`.
    fn only(&self, key: &str, known: f64) -> Result<()> {
        match self.number(key)? {
            Some(number) if number != known => Err(self.not_known(&self.key(key), &number.to_string())),
            _ => Ok(()),
        }
    }

    /// Rejects keys of the architecture that were not read.
    fn finish(&self) -> Result<()> {
        ZERO.iter().try_for_each(|key| self.only(key, 0.0))?;
        ONE.iter().try_for_each(|key| self.only(key, 1.0))?;
        if self.gguf.get(&self.key("attention.causal"))?.is_some_and(|causal| causal != GgufValue::Bool(true))
        {
            return Err(self.not_known(&self.key("attention.causal"), "a value other than true"));
        }
        let prefix = format!("{}.", self.gguf.architecture());
        let asked = self.asked.borrow();
        let unknown = self.gguf.keys().find(|key| {
            key.strip_prefix(&prefix).is_some_and(|rest| !IGNORED.contains(&rest)) && !asked.contains(*key)
        });
        match unknown {
            None => Ok(()),
            Some(key) => {
                let value = match self.gguf.get(key)? {
                    Some(GgufValue::Integer(number)) => number.to_string(),
                    Some(GgufValue::F32(number)) => number.to_string(),
                    Some(GgufValue::F64(number)) => number.to_string(),
                    Some(GgufValue::Bool(flag)) => flag.to_string(),
                    Some(GgufValue::String(_)) => "a text".into(),
                    _ => "a list".into(),
                };
                Err(self.not_known(key, &value))
            }
        }
    }

    fn not_known(&self, key: &str, value: &str) -> Error {
        self.bad(format!(
            "`{}`: {value} is not known for a model of type {}: it may change the result",
            key.escape_debug(),
            self.gguf.architecture()
        ))
    }

    /// Makes the entries that all families have. `embedding` is Hugging Face's name of the table.
    fn common(&self, embedding: &str) -> Result<Map<String, Value>> {
        let &[words, _] = self.gguf.shape(embedding)? else {
            return Err(self.bad(format!("`{embedding}` is not a matrix")));
        };
        let mut ends = Vec::new();
        for key in ENDS {
            match self.gguf.get(key)? {
                None => {}
                Some(GgufValue::Integer(id)) if u32::try_from(id).is_ok() => ends.push(id as u32),
                Some(_) => return Err(self.bad(format!("`{key}` is not a token"))),
            }
        }
        ends.dedup();
        let mut map = Map::new();
        map.insert("model_type".into(), self.gguf.architecture().into());
        map.insert("vocab_size".into(), words.into());
        map.insert("tie_word_embeddings".into(), (!self.gguf.contains("lm_head.weight")).into());
        map.insert("eos_token_id".into(), ends.into());
        Ok(map)
    }

    fn llama(&self) -> Result<Map<String, Value>> {
        let mut map = self.common("model.embed_tokens.weight")?;
        let (hidden, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let kv_heads = self.optional_size("attention.head_count_kv")?.unwrap_or(heads);
        let head_dim = match self.optional_size("attention.key_length")? {
            Some(dim) => dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.bad(format!("{hidden} features are not a multiple of {heads} heads"))),
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            self.only(key, head_dim as f64)?;
        }
        let has = |part: &str| self.gguf.contains(&format!("model.layers.0.{part}_proj.bias"));
        let kind = self.gguf.architecture();
        for (key, bias) in [("attention_bias", "self_attn.q"), ("mlp_bias", "mlp.gate")] {
            // Qwen2 always has biases of q, k and v, which its configuration does not name.
            if has(bias) && (kind, key) != ("qwen2", "attention_bias") {
                map.insert(key.into(), true.into());
            }
        }
        let sizes = [
            ("hidden_size", hidden),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("num_hidden_layers", self.size("block_count")?),
            ("intermediate_size", self.size("feed_forward_length")?),
            ("max_position_embeddings", self.size("context_length")?),
        ];
        sizes.into_iter().for_each(|(key, size)| _ = map.insert(key.into(), size.into()));
        map.insert("rms_norm_eps".into(), self.needed_number("attention.layer_norm_rms_epsilon")?.into());
        map.insert("rope_parameters".into(), self.rope(head_dim)?);
        Ok(map)
    }

    fn gpt2(&self) -> Result<Map<String, Value>> {
        let mut map = self.common("transformer.wte.weight")?;
        let heads = self.size("attention.head_count")?;
        self.only("attention.head_count_kv", heads as f64)?;
        if self.gguf.contains(ROPE_DIVISORS) {
            return Err(self.bad(format!("`{ROPE_DIVISORS}` is not known for a model of type gpt2")));
        }
        let sizes = [
            ("n_embd", self.size("embedding_length")?),
            ("n_head", heads),
            ("n_layer", self.size("block_count")?),
            ("n_inner", self.size("feed_forward_length")?),
            ("n_positions", self.size("context_length")?),
        ];
        sizes.into_iter().for_each(|(key, size)| _ = map.insert(key.into(), size.into()));
        map.insert("layer_norm_epsilon".into(), self.needed_number("attention.layer_norm_epsilon")?.into());
        Ok(map)
    }

    /// Makes the `rope_parameters`. A factor without a type is linear, as for llama.cpp.
    fn rope(&self, head_dim: usize) -> Result<Value> {
        let base = self.number("rope.freq_base")?.unwrap_or(10000.0);
        let base = positive("rope.freq_base", base).map_err(|reason| self.bad(reason))?;
        let key = self.key("rope.scaling.type");
        let kind = match self.gguf.get(&key)? {
            None => None,
            Some(GgufValue::String(kind)) => Some(kind),
            Some(_) => return Err(self.bad(format!("`{key}` is not a text"))),
        };
        let older = self.number("rope.scale_linear")?;
        let factor = self.number("rope.scaling.factor")?.or(older).filter(|factor| *factor != 0.0);
        let trained = self.optional_size("rope.scaling.original_context_length")?;
        let fast = self.number("rope.scaling.yarn_beta_fast")?;
        let slow = self.number("rope.scaling.yarn_beta_slow")?;
        let scaled = match (kind.as_deref(), factor) {
            (Some("none"), _) | (None | Some("linear"), None) => None,
            (None | Some("linear"), Some(factor)) => Some(json!({"rope_type": "linear", "factor": factor})),
            (Some("yarn"), Some(factor)) => {
                let (fast, slow) = (fast.unwrap_or(32.0), slow.unwrap_or(1.0));
                let mut yarn =
                    json!({"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow});
                if let Some(trained) = trained {
                    yarn["original_max_position_embeddings"] = trained.into();
                }
                Some(yarn)
            }
            (Some("yarn"), None) => return Err(self.bad("rope of type `yarn` without a factor".into())),
            (Some(other), _) => return Err(self.not_known(&key, &format!("`{}`", other.escape_debug()))),
        };
        let divided =
            self.gguf.contains(ROPE_DIVISORS).then(|| self.llama3(head_dim, base, trained)).transpose()?;
        let mut rope = match (scaled, divided.flatten()) {
            (Some(_), Some(_)) => {
                return Err(
                    self.bad(format!("both `{key}` and `{ROPE_DIVISORS}` scale the rotary frequencies"))
                );
            }
            (Some(scaling), None) | (None, Some(scaling)) => scaling,
            (None, None) => json!({"rope_type": "default"}),
        };
        rope["rope_theta"] = base.into();
        Ok(rope)
    }

    /// Finds the parameters of Llama 3's scaling from the divisors of the frequencies. Returns
    /// `None` if all divisors are 1.
    fn llama3(&self, head_dim: usize, base: f64, trained: Option<usize>) -> Result<Option<Value>> {
        let mut found = vec![0.0_f64; head_dim / 2];
        let region = Region::whole([found.len()]);
        self.gguf.read(ROPE_DIVISORS, Role::Weight, &region, AnyMut::F64(found.as_mut_slice()))?;
        if found.iter().all(|divisor| *divisor == 1.0) {
            return Ok(None);
        }
        let frequencies =
            |scaling| RopeConfig { dim: head_dim, base, pairs: RopePairs::Halves, scaling }.frequencies(1);
        let plain = frequencies(RopeScaling::None);
        let (low, high) = (1.0, 4.0);
        let difference = |factor: f64, trained: usize| {
            let scaled = frequencies(RopeScaling::Llama3 { factor, low, high, trained });
            let divisors = plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled);
            let off = divisors.zip(&found).map(|(divisor, found)| (found / divisor - 1.0).abs());
            off.fold(0.0, |most: f64, off| if off > most || off.is_nan() { off } else { most })
        };
        // The published models were trained with 8192 positions and have the factors 8 and 32.
        let lengths = [Some(8192), trained].into_iter().flatten().chain((4..=20).map(|bits| 1 << bits));
        let candidates = lengths.flat_map(|trained| {
            [8.0, 32.0, 2.0, 4.0, 16.0, 64.0].into_iter().map(move |factor| (factor, trained))
        });
        let best = candidates
            .map(|(factor, trained)| (difference(factor, trained), factor, trained))
            .filter(|(off, ..)| *off <= SAME_DIVISOR)
            .min_by(|(one, ..), (other, ..)| one.total_cmp(other));
        let Some((_, factor, trained)) = best else {
            return Err(self.bad(format!("the divisors in `{ROPE_DIVISORS}` are not Llama 3's scaling")));
        };
        Ok(Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": trained,
        })))
    }
}
