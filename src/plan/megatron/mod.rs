//! Closed forms for models that Megatron-LM trains: the memory of a rank and the time of a step.
//!
//! They plan a run without its source code, and are checked against published measurements. A
//! model of this crate has exact plans instead, because its own layers are executed without data.
//!
//! ```
//! use shardwise::plan::{Machine, megatron::{Model, Recompute, Run}};
//!
//! // GPT-3 175B on 64 GPUs.
//! let model = Model::gpt(12288, 96, 96, 51200, 2048);
//! let recompute = Recompute::Full;
//! let run = Run { tensor: 8, pipeline: 8, batch: 64, recompute, ..Run::default() };
//! let a100 = Machine::preset("a100-80g")?;
//! let (memory, step) = (run.memory(&model)?, run.step(&model, &a100)?);
//! assert!(memory.total() < a100.memory);
//! assert!((10.0..30.0).contains(&step.seconds));
//! # Ok::<(), shardwise::Error>(())
//! ```

mod memory;
mod time;

use crate::error::{Error, Result};
pub use time::Step;

const OP: &str = "megatron";

/// The family of a model: what a layer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// LayerNorm, biases, dropout, GELU and learned positions.
    Gpt,
    /// RMSNorm, no biases, no dropout, a gated MLP and rotary positions.
    Llama,
}

/// A decoder-only transformer. The symbols are those of the formulas of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// What a layer consists of.
    pub family: Family,
    /// The hidden size h.
    pub hidden: usize,
    /// The number of query heads a. A head has h / a features.
    pub heads: usize,
    /// The number of key/value heads g.
    pub kv_heads: usize,
    /// The intermediate size f of the MLP.
    pub ffn: usize,
    /// The number of layers L.
    pub layers: usize,
    /// The size V of the vocabulary, padded to a multiple of t.
    pub vocabulary: usize,
    /// The number s of tokens of a sequence.
    pub sequence: usize,
    /// Whether the output head uses the embedding's table as its weight.
    pub tied: bool,
}

/// What a layer recomputes in its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recompute {
    /// Nothing.
    None,
    /// The softmax and the dropout of attention and the products around them.
    Selective,
    /// All but the layer's input.
    Full,
}

/// How Megatron-LM divides a training step over t · p · d ranks. Tensor-parallel ranks are
/// neighbours, then data-parallel ranks, then pipeline ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number t of tensor-parallel ranks.
    pub tensor: usize,
    /// The number p of pipeline ranks.
    pub pipeline: usize,
    /// The number d of data-parallel ranks, context-parallel ranks included.
    pub data: usize,
    /// The number v of stages of a pipeline rank. More than one make an interleaved schedule.
    pub chunks: usize,
    /// The number b of sequences of a microbatch.
    pub sequences: usize,
    /// The number B of sequences of a step, over all replicas.
    pub batch: usize,
    /// What layers recompute.
    pub recompute: Recompute,
    /// Whether norms and dropout are sharded over tokens.
    pub sequence_parallel: bool,
    /// Whether the state of the optimizer is sharded over the data-parallel ranks.
    pub distributed_optimizer: bool,
    /// Whether attention is one kernel that does not write its scores to memory.
    pub flash_attention: bool,
}

impl Default for Run {
    /// A step of one sequence on one rank, without any option.
    fn default() -> Self {
        Self {
            tensor: 1,
            pipeline: 1,
            data: 1,
            chunks: 1,
            sequences: 1,
            batch: 1,
            recompute: Recompute::None,
            sequence_parallel: false,
            distributed_optimizer: false,
            flash_attention: false,
        }
    }
}

impl Model {
    /// A GPT: f = 4h, g = a, and a tied head.
    pub fn gpt(hidden: usize, heads: usize, layers: usize, vocabulary: usize, sequence: usize) -> Self {
        Self {
            family: Family::Gpt,
            hidden,
            heads,
            kv_heads: heads,
            ffn: hidden.saturating_mul(4),
            layers,
            vocabulary,
            sequence,
            tied: true,
        }
    }

    /// The width of q, k and v: h (1 + 2g/a).
    fn qkv(&self) -> f64 {
        self.hidden as f64 * (1.0 + 2.0 * self.kv_heads as f64 / self.heads as f64)
    }

    /// The width of the MLP's first product: f, or 2f for a gate and f.
    fn up(&self) -> f64 {
        self.ffn as f64 * if self.family == Family::Llama { 2.0 } else { 1.0 }
    }
}

impl Run {
    /// The number of ranks, t · p · d.
    pub fn ranks(&self) -> usize {
        self.tensor.saturating_mul(self.pipeline).saturating_mul(self.data)
    }

    /// The floating-point operations of a step over all ranks, with those that are recomputed:
    /// k L · 2 B s (w + 2 s h) + 6 B s h V, where w are the parameters of a layer's matrices, and k
    /// is 3, or 4 with full recomputation. Selective recomputation adds 4 L B s² h. For a GPT and
    /// k = 4 this is 96 B s L h² (1 + s / 6h + V / 16Lh).
    ///
    /// Source: Narayanan et al., 2021 (arXiv 2104.04473), section 5.
    ///
    /// # Errors
    /// When the run does not divide the model.
    pub fn flops(&self, model: &Model) -> Result<f64> {
        self.check(model)?;
        let [h, s] = [model.hidden, model.sequence].map(|size| size as f64);
        let tokens = self.batch as f64 * s;
        let matrices = h * (model.qkv() + h + model.up() + model.ffn as f64);
        let layer = 2.0 * tokens * (matrices + 2.0 * s * h);
        let layer = match self.recompute {
            Recompute::None => 3.0 * layer,
            Recompute::Selective => 3.0 * layer + 4.0 * tokens * s * h,
            Recompute::Full => 4.0 * layer,
        };
        let head = 6.0 * tokens * h * model.vocabulary as f64;
        Ok(model.layers as f64 * layer + head)
    }

    /// The number m of microbatches of a replica: B / (b d).
    ///
    /// # Errors
    /// When the run does not divide the model.
    pub fn microbatches(&self, model: &Model) -> Result<usize> {
        self.check(model)?;
        Ok(self.batch / self.sequences / self.data)
    }

    /// The number t' of ranks that share the tokens of norms and dropout.
    fn token_shards(&self) -> f64 {
        if self.sequence_parallel { self.tensor as f64 } else { 1.0 }
    }

    /// Checks what Megatron-LM requires: t divides a, p · v divides L, b · d divides B, and with
    /// several chunks p divides m.
    fn check(&self, model: &Model) -> Result<()> {
        let sizes = [
            ("hidden", model.hidden),
            ("heads", model.heads),
            ("kv_heads", model.kv_heads),
            ("ffn", model.ffn),
            ("layers", model.layers),
            ("vocabulary", model.vocabulary),
            ("sequence", model.sequence),
            ("tensor", self.tensor),
            ("pipeline", self.pipeline),
            ("data", self.data),
            ("chunks", self.chunks),
            ("sequences", self.sequences),
            ("batch", self.batch),
        ];
        if let Some((what, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::invalid(OP, format!("`{what}` is 0, but has to be positive")));
        }
        let stages = self.pipeline.saturating_mul(self.chunks);
        let replicas = self.sequences.saturating_mul(self.data);
        let divisors = [
            ("heads", model.heads, "tensor", self.tensor),
            ("layers", model.layers, "pipeline · chunks", stages),
            ("batch", self.batch, "sequences · data", replicas),
        ];
        for (what, size, by, divisor) in divisors {
            if !size.is_multiple_of(divisor) {
                let reason = format!("`{what}` is {size}, but has to be a multiple of {by} = {divisor}");
                return Err(Error::invalid(OP, reason));
            }
        }
        let microbatches = self.batch / replicas;
        if self.chunks > 1 && !microbatches.is_multiple_of(self.pipeline) {
            let reason = format!(
                "a replica has {microbatches} microbatches, but an interleaved schedule needs a multiple of \
                 pipeline = {}",
                self.pipeline
            );
            return Err(Error::invalid(OP, reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Machine;

    const GPT: Model = Model {
        family: Family::Gpt,
        hidden: 1024,
        heads: 16,
        kv_heads: 16,
        ffn: 4096,
        layers: 24,
        vocabulary: 51200,
        sequence: 1024,
        tied: true,
    };

    fn step(run: &Run) -> Step {
        run.step(&GPT, &Machine::preset("a100-80g").unwrap()).unwrap()
    }

    #[test]
    fn a_layer_of_a_gpt_has_12h2_13h_parameters() {
        assert_eq!(Model::gpt(1024, 16, 24, 51200, 1024), GPT);
        assert_eq!(GPT.layer_parameters(), (12 * 1024 * 1024 + 13 * 1024) as f64);
    }

    #[test]
    fn errors_name_the_numbers_that_disagree() {
        let one = Run::default();
        let cases = [
            (Run { tensor: 3, ..one }, "`heads` is 16, but has to be a multiple of tensor = 3"),
            (Run { pipeline: 5, ..one }, "`layers` is 24, but has to be a multiple of pipeline · chunks = 5"),
            (
                Run { data: 4, batch: 6, ..one },
                "`batch` is 6, but has to be a multiple of sequences · data = 4",
            ),
            (Run { sequences: 0, ..one }, "`sequences` is 0, but has to be positive"),
            (
                Run { pipeline: 2, chunks: 2, batch: 3, ..one },
                "a replica has 3 microbatches, but an interleaved schedule needs a multiple of pipeline = 2",
            ),
        ];
        for (run, want) in cases {
            assert_eq!(run.memory(&GPT).unwrap_err().to_string(), format!("megatron: {want}"));
        }
        let vast = Run { data: usize::MAX, sequences: 2, batch: usize::MAX - 1, ..one };
        assert!(vast.memory(&GPT).is_err());
    }

    #[test]
    fn a_step_is_the_sum_of_its_parts() {
        let run = Run { tensor: 2, pipeline: 4, data: 2, batch: 16, ..Run::default() };
        let Step { seconds, compute, exposed, bubble, optimizer } = step(&run);
        let parts = [compute, exposed.tensor, exposed.data, exposed.pipeline, bubble, optimizer];
        assert!(parts.iter().all(|part| *part > 0.0), "{parts:?}");
        assert!((parts.iter().sum::<f64>() - seconds).abs() < 1e-9 * seconds);
    }

    #[test]
    fn one_rank_has_no_communication() {
        let Step { exposed, bubble, .. } = step(&Run::default());
        assert_eq!([exposed.tensor, exposed.data, exposed.pipeline, bubble], [0.0; 4]);
    }

    #[test]
    fn recomputation_saves_memory_and_takes_time() {
        let runs = [Recompute::None, Recompute::Selective, Recompute::Full].map(|recompute| Run {
            recompute,
            batch: 4,
            ..Run::default()
        });
        for pair in runs.windows(2) {
            let saved = |run: &Run| run.memory(&GPT).unwrap().activations;
            assert!(saved(&pair[1]) < saved(&pair[0]));
            assert!(step(&pair[1]).seconds > step(&pair[0]).seconds);
        }
    }

    #[test]
    fn chunks_shrink_the_bubble_and_hold_more_activations() {
        let one = Run { pipeline: 4, batch: 8, ..Run::default() };
        let two = Run { chunks: 2, ..one };
        assert!(step(&two).bubble < step(&one).bubble);
        assert!(two.memory(&GPT).unwrap().activations > one.memory(&GPT).unwrap().activations);
    }
}
