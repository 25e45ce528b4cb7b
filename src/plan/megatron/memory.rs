//! The memory of the most loaded rank.

use super::{Family, Model, Recompute, Run};
use crate::{error::Result, plan::Memory};

impl Model {
    /// The parameters of a layer.
    ///
    /// * GPT: 2h² (1 + g/a) + 2hf, biases of h (3 + 2g/a) + f and norms of 4h, which is 12h² + 13h
    ///   for f = 4h and g = a;
    /// * Llama: 2h² (1 + g/a) + 3hf + 2h.
    pub fn layer_parameters(&self) -> f64 {
        let [h, f] = [self.hidden, self.ffn].map(|size| size as f64);
        let matrices = h * (self.qkv() + h + self.up() + f);
        match self.family {
            Family::Gpt => matrices + (self.qkv() + h + f + h) + 4.0 * h,
            Family::Llama => matrices + 2.0 * h,
        }
    }

    /// The parameters of the model: L layers, the last norm, Vh of the embedding, Vh of a head that
    /// is not tied, and sh of learned positions.
    pub fn parameters(&self) -> f64 {
        let heads = if self.tied { 0.0 } else { self.embedding() };
        self.layers as f64 * self.layer_parameters() + self.first() + self.norm() + heads
    }

    /// The parameters of the embedding's table.
    fn embedding(&self) -> f64 {
        self.vocabulary as f64 * self.hidden as f64
    }

    /// The parameters before the first layer.
    fn first(&self) -> f64 {
        let positions = match self.family {
            Family::Gpt => self.sequence as f64 * self.hidden as f64,
            Family::Llama => 0.0,
        };
        self.embedding() + positions
    }

    /// The parameters of the last norm.
    fn norm(&self) -> f64 {
        self.hidden as f64 * if self.family == Family::Gpt { 2.0 } else { 1.0 }
    }
}

impl Run {
    /// The parameters of the most loaded rank: L/p layers and an end of the model, divided by t.
    /// The first and the last stage both hold a table of Vh. As in Megatron-LM's estimate, norms
    /// and biases are divided by t too, although every rank holds them.
    ///
    /// # Errors
    /// When the run does not divide the model.
    pub fn parameters(&self, model: &Model) -> Result<f64> {
        self.check(model)?;
        let ends = match self.pipeline {
            1 => model.parameters() - model.layers as f64 * model.layer_parameters(),
            _ => model.first().max(model.embedding() + model.norm()),
        };
        let layers = model.layers as f64 / self.pipeline as f64;
        Ok((layers * model.layer_parameters() + ends) / self.tensor as f64)
    }

    /// The memory of the most loaded rank in mixed precision: bytes for each of its parameters, and
    /// the activations of the microbatches that are in flight on the first pipeline rank.
    ///
    /// * parameters: 2 of the weight, 4 of the gradient, 12 of Adam in f32 (weight, mean,
    ///   variance), or 12/d with the distributed optimizer;
    /// * layers: [`Run::layer_activations`] · L · (1 + (p − 1) / (p v)) for an interleaved
    ///   schedule, [`Run::layer_activations`] · L · min(1, m/p) otherwise;
    /// * the embedding: (8 s b + s b h) for each microbatch in flight (ids and dropout);
    /// * the head, if p = 1: 4 s b h + 4 s b V (the inputs of the norm and the head, and the logits
    ///   in f32);
    /// * transients: with full recomputation, the activations of the layer that is recomputed.
    ///
    /// Terms in h of the embedding and the head are divided by t with sequence parallelism, and
    /// terms in V always are. Sources: Korthikanti et al., 2022 (arXiv 2205.05198), section 4;
    /// Megatron-LM, `theoretical_memory_usage.py`.
    ///
    /// # Errors
    /// When the run does not divide the model.
    pub fn memory(&self, model: &Model) -> Result<Memory> {
        let parameters = self.parameters(model)?;
        let [t, p, d, v] = [self.tensor, self.pipeline, self.data, self.chunks].map(|size| size as f64);
        let [h, s, b] = [model.hidden, model.sequence, self.sequences].map(|size| size as f64);
        let in_flight = match self.chunks {
            1 => (self.microbatches(model)? as f64 / p).min(1.0),
            _ => 1.0 + (p - 1.0) / (p * v),
        };
        let shards = self.token_shards();
        let dropout = if model.family == Family::Gpt { s * b * h } else { 0.0 };
        let embedding = p * (8.0 * s * b + dropout) / shards;
        let head = match self.pipeline {
            1 => 4.0 * s * b * (h / shards + model.vocabulary as f64 / t),
            _ => 0.0,
        };
        let layers = model.layers as f64 * self.layer_activations(model)?;
        let transients = match self.recompute {
            Recompute::Full => Self { recompute: Recompute::None, ..*self }.layer_activations(model)?,
            Recompute::None | Recompute::Selective => 0.0,
        };
        let state = if self.distributed_optimizer { 12.0 / d } else { 12.0 };
        let bytes = |value: f64| value.ceil() as u64;
        Ok(Memory {
            weights: bytes(2.0 * parameters),
            gradients: bytes(4.0 * parameters),
            optimizer: bytes(state * parameters),
            activations: bytes((layers + embedding) * in_flight + head),
            transients: bytes(transients),
            ..Memory::default()
        })
    }

    /// The bytes that a layer saves for its backward, for one microbatch on one rank. With t' = t
    /// for sequence parallelism, and t' = 1 without it:
    ///
    /// * GPT: s b (10 h / t' + (4h (1 + g/a) + 4f) / t) + 5 a s² b / t, which for t = 1, f = 4h and
    ///   g = a is s b h (34 + 5 a s / h);
    /// * Llama: s b (8 h / t' + (12 h + 8 f) / t) + 5 a s² b / t;
    /// * without the term in s² for selective recomputation and for fused attention;
    /// * 2 s b h / t' for full recomputation.
    ///
    /// Source: Korthikanti et al., 2022 (arXiv 2205.05198), table 2. The form for Llama counts what
    /// fused norms and gates save.
    ///
    /// # Errors
    /// When the run does not divide the model.
    pub fn layer_activations(&self, model: &Model) -> Result<f64> {
        self.check(model)?;
        let [h, f, a, s] = [model.hidden, model.ffn, model.heads, model.sequence].map(|size| size as f64);
        let (b, t) = (self.sequences as f64, self.tensor as f64);
        let shards = self.token_shards();
        let groups = model.kv_heads as f64 / a;
        let scores = match self.recompute {
            Recompute::Full => return Ok(2.0 * s * b * h / shards),
            Recompute::None if !self.flash_attention => 5.0 * a * s * s * b / t,
            Recompute::None | Recompute::Selective => 0.0,
        };
        let (whole, sharded) = match model.family {
            Family::Gpt => (10.0 * h, 4.0 * h * (1.0 + groups) + 4.0 * f),
            Family::Llama => (8.0 * h, 12.0 * h + 8.0 * f),
        };
        Ok(s * b * (whole / shards + sharded / t) + scores)
    }
}
