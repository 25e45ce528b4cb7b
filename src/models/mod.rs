//! Whole models, which load and save Hugging Face checkpoints. The checkpoint's `config.json`
//! determines how the layers are composed.
//!
//! | `model_type` | model |
//! |---|---|
//! | `llama`, `mistral`, `ministral`, `qwen2`, `qwen3`, `gpt2` | [`Decoder`] |
//! | `bert` | [`Bert`] |
//!
//! ```no_run
//! use shardwise::{models::{Decoder, ModelConfig}, prelude::*, weights::Checkpoint};
//!
//! let ModelConfig::Decoder(config) = ModelConfig::read("a/folder")? else {
//!     panic!("not a language model")
//! };
//! let checkpoint = Checkpoint::open("a/folder")?;
//! let texts = launch::threads(2, |world| {
//!     let model = Decoder::<Replicated, f32, _>::load(&world, &checkpoint, &config)?;
//!     let (mut cache, sampler) = (model.cache(1, 100)?, Sampler::greedy());
//!     let mut tokens = vec![1, 403, 407];
//!     let mut logits = model.step(&tokens, &[0], &[3], &mut cache)?;
//!     for _ in 0..10 {
//!         let next = sampler.sample(&logits, &[tokens.len() as u64])?[0];
//!         tokens.push(next);
//!         logits = model.step(&[next], &[0], &[1], &mut cache)?;
//!     }
//!     Ok(tokens)
//! })?;
//! assert_eq!(texts[0], texts[1]);
//! # Ok::<(), shardwise::Error>(())
//! ```

mod bert;
mod config;
mod decoder;
mod unread;

pub use bert::{Bert, BertSaved};
#[cfg(feature = "plan")]
pub(crate) use config::text as config_text;
pub use config::{BertConfig, DecoderConfig, DecoderNames, LayerChoices, ModelConfig};
pub use decoder::{Decoder, DecoderEnds, DecoderSaved, Tokens};
