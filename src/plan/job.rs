//! What is planned: a model, its element type, and training or serving.

use crate::{device::DType, models::DecoderConfig};

/// A model and the work that is planned for it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Job {
    /// The model. Its `recomputed` is ignored, because a plan chooses it.
    pub model: DecoderConfig,
    /// The element type of weights and activations: f32, bf16 or f16.
    pub dtype: DType,
    /// Training or serving.
    pub goal: Goal,
}

/// The work that is planned for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Goal {
    /// Training steps with AdamW. A step runs forward and backward for `batch` sequences of
    /// `tokens` tokens, reduces the gradients, clips them by their norm, and updates the weights.
    Train {
        /// The number of sequences of a step, over all replicas.
        batch: usize,
        /// The number of tokens of each sequence.
        tokens: usize,
    },
    /// Generation. `batch` sequences are generated at the same time, each of at most `context`
    /// tokens.
    Serve {
        /// The number of sequences, over all replicas.
        batch: usize,
        /// The largest number of tokens of a sequence, prompt and generated text together.
        context: usize,
    },
}

impl Job {
    /// Plans training steps of `batch` sequences of `tokens` tokens.
    pub fn train(model: DecoderConfig, dtype: DType, batch: usize, tokens: usize) -> Self {
        Self { model, dtype, goal: Goal::Train { batch, tokens } }
    }

    /// Plans generation of `batch` sequences of at most `context` tokens.
    pub fn serve(model: DecoderConfig, dtype: DType, batch: usize, context: usize) -> Self {
        Self { model, dtype, goal: Goal::Serve { batch, context } }
    }
}
