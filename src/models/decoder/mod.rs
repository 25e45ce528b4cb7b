//! Causal language models.

mod embeddings;
mod ends;
mod tied;

pub use ends::{DecoderEnds, Tokens};

use super::{DecoderConfig, LayerChoices, config, unread::refuse_unread};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result},
    kernels::Backend,
    ops::{RopeConfig, RopeScaling},
    parallel::{
        Bias, Chain, ColumnParallelLinear, Columns, Context, DTensor, KvCache, Layer, Normalize, Recompute,
        ResidualStream, TransformerBlock, VocabParallelEmbedding,
    },
    shard::{Partition, Replicated, Sequences, Shard},
    tensor::{Param, WeightSource, Weights},
    train::Schedule,
    weights::{Packed, Save, Transposed},
};
use embeddings::{Embeddings, EmbeddingsSaved};
use std::{ops::Range, path::Path};
use tied::refuse_another_head;

/// Name suffixes of buffers in old checkpoints. They are frequencies and masks, not parameters.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// logits = head(norm(blocks(embedding(ids)))): a causal language model. The embedding adds learned
/// positions if the model has them. [`DecoderConfig`] selects Llama, Mistral, Ministral, Qwen2,
/// Qwen3 or GPT-2.
///
/// * Ids: the same on every rank. Logits: [`Shard<1>`], `[tokens, vocabulary]`, with the partition
///   of [`Columns::even`]. The ranks never gather them.
/// * Collectives of the forward: S leaving once for the embedding, S entering and S leaving twice
///   per block, S entering once for the head.
/// * Training ([`Decoder::forward`], [`Decoder::backward`]) works with either residual stream,
///   generation ([`Decoder::step`]) only with `Replicated`.
/// * [`Decoder::load_stages`] reads the stages of one rank of a pipeline. [`DecoderEnds`] gives a
///   [`Pipeline`](crate::train::Pipeline) its input and its loss.
#[derive(Debug)]
pub struct Decoder<S: ResidualStream, T: Element, B: Device> {
    group: Group<B>,
    config: DecoderConfig,
    /// The embeddings, if this rank has the first stage.
    embeddings: Option<Embeddings<S, T, B>>,
    /// The blocks of each of this rank's stages.
    chunks: Vec<Blocks<S, T, B>>,
    /// The last normalization and the head, if this rank has the last stage.
    head: Option<Head<S, T, B>>,
}

type Blocks<S, T, B> = Vec<Recompute<TransformerBlock<S, T, B>>>;
type Head<S, T, B> = Chain<Normalize<S, T, B>, ColumnParallelLinear<S, T, B>>;
type HeadSaved<S, T, B> = <Head<S, T, B> as Layer<T, B>>::Saved;

/// The values that the forward of a [`Decoder`] saves for its backward.
pub struct DecoderSaved<S: ResidualStream, T: Element, B: Backend> {
    embeddings: EmbeddingsSaved<S, T, B>,
    chunks: <Vec<Blocks<S, T, B>> as Layer<T, B>>::Saved,
    head: HeadSaved<S, T, B>,
}

impl<S: ResidualStream, T: Element, B: Backend> Decoder<S, T, B> {
    /// Reads this rank's shard of a checkpoint of a language model, or of the bare model without
    /// its head.
    ///
    /// The checkpoint of a tied model may contain a head. Then an all-reduce of one element checks
    /// that the head equals the embedding's table on every rank.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the source has tensors of the model that no
    /// parameter has read (the error names them), the head of a tied model differs from the table,
    /// no layer has the choices of the configuration's `block`, there are more ranks than heads or
    /// than tokens in the vocabulary, or a collective fails.
    #[track_caller]
    pub fn load(group: &Group<B>, source: &dyn WeightSource, config: &DecoderConfig) -> Result<Self> {
        Self::load_stages(group, source, config, &Schedule::gpipe(1, 1), 0)
    }

    /// Reads this rank's shard of the stages that rank `pipeline_rank` of a pipeline runs. The
    /// blocks are divided over the stages as evenly as possible. The first pipeline rank also has
    /// the embeddings, and the last one the final normalization and the head.
    ///
    /// If the two ends of a tied model are on different pipeline ranks, both have the table. The
    /// table of the last pipeline rank is a copy, which saves leave out. Pass [`Decoder::tied`] to
    /// [`Pipeline::sum_tied`](crate::train::Pipeline::sum_tied) once per step: after the last
    /// backward, before gradient norms and the optimizer.
    ///
    /// # Errors
    /// As [`Decoder::load`], and when the pipeline has no such rank, has no chunks, or has more
    /// stages than blocks.
    #[track_caller]
    pub fn load_stages(
        group: &Group<B>,
        source: &dyn WeightSource,
        config: &DecoderConfig,
        schedule: &Schedule,
        pipeline_rank: usize,
    ) -> Result<Self> {
        let (rank, ranks, stages) = (pipeline_rank, schedule.ranks(), schedule.stages());
        config.check_layers()?;
        if stages == 0 {
            return Err(Error::invalid("decoder", "the schedule has no ranks, or its ranks have no chunks"));
        }
        if rank >= ranks {
            return Err(Error::sizes(
                "decoder",
                "the rank in the pipeline",
                rank,
                "the number of ranks",
                ranks,
            ));
        }
        let layers = config.layers.len();
        if stages > 1 && layers < stages {
            return Err(Error::sizes("decoder", "the number of blocks", layers, "that of stages", stages));
        }
        let of_stages = Partition::even(layers, stages);
        let in_block = format!(".{}.", config.names.blocks);
        let stored_transposed = |name: &str| config.transposed && is_in(name, &in_block);
        let source = Transposed::new(source, stored_transposed);
        let weights = Weights::new(&source);
        let names = &config.names;
        let bare = names.prefix.is_empty() || source.contains(&format!("{}.weight", names.embedding));
        let model = if bare { weights.clone() } else { weights.at(names.prefix) };
        let embeddings = match rank {
            0 => Some(Embeddings::load(group, &model, config)?),
            _ => None,
        };
        let block = |layer: usize| {
            let weights = model.at(names.blocks).at(&layer.to_string());
            let block = TransformerBlock::load(group, &weights, &config.block(layer))?;
            Ok(Recompute::when(layer < config.recomputed, block))
        };
        let ranges = (0..schedule.chunks()).map(|chunk| of_stages.range(schedule.stage(rank, chunk)));
        let ranges: Vec<_> = ranges.collect();
        let chunks = ranges.iter().map(|range| range.clone().map(block).collect()).collect::<Result<_>>()?;
        let head = if rank + 1 == ranks {
            let table = embeddings.as_ref().map(|embeddings| &embeddings.words);
            Some(load_head(group, (&weights, &model), config, table)?)
        } else {
            None
        };
        let head_name = weights.at(names.head).name("weight");
        let roots: Vec<String> = if bare {
            let roots = [names.embedding, names.positions, names.blocks, names.norm, names.head];
            roots.map(|name| model.name(name)).into()
        } else {
            vec![names.prefix.into(), names.head.into()]
        };
        let others = Others {
            blocks: format!("{}.", model.name(names.blocks)),
            layers,
            own: ranges,
            ends: [
                (rank != 0, names.embedding),
                (rank != 0, names.positions),
                (rank + 1 != ranks, names.norm),
            ]
            .into_iter()
            .map(|(elsewhere, name)| (elsewhere, model.name(name)))
            .chain([(rank + 1 != ranks, weights.name(names.head))])
            .filter_map(|(elsewhere, name)| elsewhere.then_some(name))
            .collect(),
        };
        let model = Self { group: group.clone(), config: config.clone(), embeddings, chunks, head };
        // A source of random weights contains every name, so a head counts only if the source lists
        // its names.
        let other_head = config.tied && source.names().is_some() && source.contains(&head_name);
        if let (true, Some(table)) = (other_head, model.tied()) {
            refuse_another_head(group, &source, &head_name, &table)?;
        }
        let harmless = |name: &str| {
            BUFFERS.iter().any(|buffer| name.ends_with(buffer))
                || (other_head && name == head_name)
                || others.have(name)
        };
        refuse_unread("decoder", &source, &model.params(), &roots, harmless)?;
        Ok(model)
    }

    /// Returns the configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Returns the group whose ranks share the model.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    /// Returns the blocks of each of this rank's stages, for [`Pipeline`](crate::train::Pipeline).
    pub fn chunks(&self) -> &[impl Layer<T, B, In = S, Out = S> + use<S, T, B>] {
        &self.chunks
    }

    /// Returns the weight that the embedding and the head share; `None` if they share none, or this
    /// rank has neither.
    pub fn tied(&self) -> Option<Param<T, B>> {
        if !self.config.tied {
            return None;
        }
        match (&self.embeddings, &self.head) {
            (Some(embeddings), _) => embeddings.words.params().pop(),
            (None, Some(Chain(_, head))) => Some(head.weight().clone()),
            (None, None) => None,
        }
    }

    fn check_context(&self, sequences: &Sequences) -> Result<()> {
        let Some(positions) = self.config.positions else { return Ok(()) };
        check_positions("decoder", sequences, positions)
    }

    fn first(&self) -> Result<&Embeddings<S, T, B>> {
        self.embeddings.as_ref().ok_or_else(|| elsewhere("first"))
    }

    fn last(&self) -> Result<&Head<S, T, B>> {
        self.head.as_ref().ok_or_else(|| elsewhere("last"))
    }

    /// Computes the logits of the token after each id, and the saved values for the backward. The
    /// ids form these sequences.
    ///
    /// # Errors
    /// When an id is beyond the vocabulary or a position beyond its table, sizes disagree, this
    /// rank lacks an end of the model, the configuration has dropout (only [`DecoderEnds`] draws
    /// masks), or a collective fails.
    pub fn forward(
        &self,
        ids: &[u32],
        sequences: Sequences,
    ) -> Result<(DTensor<Shard<1>, T, B>, DecoderSaved<S, T, B>)> {
        let (first, last) = (self.first()?, self.last()?);
        self.check_context(&sequences)?;
        if self.config.dropout != 0.0 {
            let reason =
                "the configuration has dropout, but `forward` draws no masks: train by `DecoderEnds`";
            return Err(Error::invalid("decoder", reason));
        }
        let (x, embeddings) = first.forward(ids, sequences, None)?;
        let (x, chunks) = self.chunks.forward(x)?;
        let (logits, head) = last.forward(x)?;
        Ok((logits, DecoderSaved { embeddings, chunks, head }))
    }

    /// Adds to the gradients of all parameters. `dlogits` is the gradient of the logits.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    pub fn backward(&self, saved: DecoderSaved<S, T, B>, dlogits: DTensor<Shard<1>, T, B>) -> Result<()> {
        let dx = self.last()?.backward(saved.head, dlogits)?;
        let dx = self.chunks.backward(saved.chunks, dx)?;
        self.first()?.backward(saved.embeddings, dx)
    }

    /// Computes the logits of [`Decoder::forward`] without dropout, and without saving anything for
    /// a backward.
    ///
    /// # Errors
    /// As [`Decoder::forward`], except for dropout.
    pub fn infer(&self, ids: &[u32], sequences: Sequences) -> Result<DTensor<Shard<1>, T, B>> {
        let (first, last) = (self.first()?, self.last()?);
        self.check_context(&sequences)?;
        let mut context = Context::default();
        let x = first.infer(ids, sequences, &mut context)?;
        let x = self.chunks.infer(x, &mut context)?;
        last.infer(x, &mut context)
    }

    /// Returns the parameters of this rank's stages, in the same order on every rank that shares
    /// these stages. Lists a tied table once.
    pub fn params(&self) -> Vec<Param<T, B>> {
        let mut params = match &self.embeddings {
            Some(embeddings) => embeddings.params(),
            None => self.tied().into_iter().collect(),
        };
        params.extend(self.chunks.params());
        if let Some(Chain(norm, head)) = &self.head {
            params.extend(norm.params());
            params.extend(if self.config.tied { Vec::new() } else { head.params() });
        }
        params
    }

    /// Returns the parameters of each of this rank's stages, of which the first also has the
    /// embeddings'; and last those of the head, if this rank has the last stage. So a tied table of
    /// a rank that has both ends is in two parts.
    pub fn parts(&self) -> Vec<Vec<Param<T, B>>> {
        let mut parts: Vec<_> = self.chunks.iter().map(Layer::params).collect();
        if let (Some(embeddings), Some(first)) = (&self.embeddings, parts.first_mut()) {
            first.splice(0..0, embeddings.params());
        }
        parts.extend(self.head.as_ref().map(Layer::params));
        parts
    }

    /// Saves the model to a folder that this crate and transformers can read. Writes `config.json`,
    /// with the `dtype` of the weights, and `model.safetensors`, or several such files with an
    /// index. Every rank must call this; one rank writes. An older checkpoint in the folder
    /// is replaced completely or not at all: see [`Save`].
    ///
    /// # Errors
    /// As [`Save::write`]. Also when this rank lacks an end of the model, or the configuration was
    /// not read from a file. Then use [`weights::save`](crate::weights::save).
    #[track_caller]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_to(folder.as_ref(), None)
    }

    /// Saves a model that was loaded from a quantized checkpoint, as [`Decoder::save`]. The
    /// quantized matrices are copied from the checkpoint, byte by byte: see [`Save::packed`].
    ///
    /// # Errors
    /// As [`Decoder::save`]. Also when the source is dequantized.
    #[track_caller]
    pub fn save_packed(&self, folder: impl AsRef<Path>, source: &Packed) -> Result<()> {
        if source.is_dequantized() {
            let reason = "the source is dequantized: `Decoder::save` writes a model that is not quantized";
            return Err(Error::invalid("save", reason));
        }
        self.save_to(folder.as_ref(), Some(source))
    }

    #[track_caller]
    fn save_to(&self, folder: &Path, source: Option<&Packed>) -> Result<()> {
        self.first()?;
        self.last()?;
        if self.config.json.is_empty() {
            let reason =
                "the configuration was not read from a `config.json`: save the weights by `weights::save`";
            return Err(Error::invalid("decoder", reason));
        }
        let json = config::stored_as(&self.config.json, T::DTYPE, source.is_some());
        let in_block = format!(".{}.", self.config.names.blocks);
        let transposed = self.config.transposed;
        let stored_transposed = |name: &str| transposed && is_in(name, &in_block);
        let save = Save::new(folder).config(json).transposed(stored_transposed);
        let save = match source {
            Some(source) => save.packed(source),
            None => save,
        };
        save.write(&self.group, &self.params())
    }
}

/// Checks that every row of the sequences has a learned position.
pub(super) fn check_positions(op: &'static str, sequences: &Sequences, positions: usize) -> Result<()> {
    match (0..sequences.len()).find(|&at| sequences.end(at) > positions) {
        Some(at) => {
            let what = format!("the end of sequence {at}");
            Err(Error::sizes(op, what, sequences.end(at), "the number of learned positions", positions))
        }
        None => Ok(()),
    }
}

fn elsewhere(end: &str) -> Error {
    let reason = format!("this rank does not hold the {end} stage of the model: run it by a `Pipeline`");
    Error::invalid("decoder", reason)
}

/// The tensors of a checkpoint that other ranks of a pipeline read.
struct Others {
    /// The prefix of the names of all blocks, before their numbers.
    blocks: String,
    layers: usize,
    /// The blocks of this rank.
    own: Vec<Range<usize>>,
    /// The names of the tensors at the ends of the model that this rank does not have.
    ends: Vec<String>,
}

impl Others {
    fn have(&self, name: &str) -> bool {
        if let Some(rest) = name.strip_prefix(&self.blocks) {
            let number = rest.split('.').next().and_then(|number| number.parse::<usize>().ok());
            let is_own = |layer: usize| self.own.iter().any(|range| range.contains(&layer));
            return number.is_some_and(|layer| layer < self.layers && !is_own(layer));
        }
        let tensor = name.strip_suffix(".weight").or(name.strip_suffix(".bias"));
        tensor.is_some_and(|tensor| self.ends.iter().any(|end| end == tensor))
    }
}

/// Loads the last normalization and the head. The head's weight is the embedding's table, a copy of
/// the table if another rank has it, or a separate weight.
fn load_head<S: ResidualStream, T: Element, B: Backend>(
    group: &Group<B>,
    (weights, model): (&Weights<'_>, &Weights<'_>),
    config: &DecoderConfig,
    table: Option<&VocabParallelEmbedding<S, T, B>>,
) -> Result<Head<S, T, B>> {
    let (names, hidden) = (&config.names, config.hidden());
    let norm = Normalize::load(group, &model.at(names.norm), config.block.norm, hidden)?;
    let load = |weights: &Weights<'_>| {
        let columns = Columns::even(group, config.vocabulary)?;
        ColumnParallelLinear::load(group, weights, hidden, &columns, Bias::None)
    };
    let head = match (config.tied, table) {
        (true, Some(table)) => table.tied_head(),
        (true, None) => {
            let copy = load(&model.at(names.embedding))?;
            copy.weight().disown();
            copy
        }
        (false, _) => load(&weights.at(names.head))?,
    };
    Ok(Chain(norm, head))
}

/// Whether a name contains a path such as `.h.`, or begins with the path without its first dot.
fn is_in(name: &str, path: &str) -> bool {
    name.contains(path) || name.starts_with(&path[1..])
}

impl<T: Element, B: Backend> Decoder<Replicated, T, B> {
    /// Rejects a step that continues a prompt if a layer would rotate the new tokens by other
    /// frequencies than the beginning of the prompt.
    fn check_dynamic(&self, sequences: &Sequences) -> Result<()> {
        let dynamic = |layer: &LayerChoices| match layer.rope {
            Some(RopeConfig { scaling: RopeScaling::DynamicNtk { trained, .. }, .. }) => Some(trained),
            _ => None,
        };
        let Some(trained) = self.config.layers.iter().filter_map(dynamic).min() else { return Ok(()) };
        for (at, rows) in sequences.iter().enumerate() {
            let (start, count) = (sequences.start(at), rows.len());
            let end = start + count;
            if start > 0 && count > 1 && end > trained {
                let reason = format!(
                    "{count} tokens after {start} of sequence {at} end at {end}, beyond the trained length of {trained}: \
                     with dynamic NTK scaling of RoPE, pass a prompt in one step"
                );
                return Err(Error::invalid("decoder", reason));
            }
        }
        Ok(())
    }

    /// Makes an empty cache for `slots` sequences of up to `capacity` tokens. The first step
    /// allocates the memory of keys and values.
    ///
    /// # Errors
    /// When there is no memory for the lengths of the slots.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<KvCache<T, B>> {
        KvCache::new(slots, capacity)
    }

    /// Appends the tokens `ids` to slots of the cache: `counts[i]` tokens to slot `slots[i]`.
    /// Returns the logits of the next token of each slot: `[slots.len(), vocabulary]`.
    ///
    /// The caller may split a long prompt over several steps to bound the memory of a step (chunked
    /// prefill). The result is the same up to rounding.
    ///
    /// With [`RopeScaling::DynamicNtk`], the results of a split prompt are the same only up to the
    /// trained length. Beyond that length, a step uses the frequencies of the length that the step
    /// reaches. Like transformers with a cache, a step does not rotate cached keys again. A prompt
    /// that exceeds the trained length must therefore come in one step. Later steps then append one
    /// token each.
    ///
    /// # Errors
    /// When a slot gets no token, tokens exceed the capacity or the learned positions, an id is
    /// beyond the vocabulary, several tokens continue a text beyond the trained length of dynamic
    /// NTK scaling, this rank lacks an end of the model, or a collective fails. The cached tokens
    /// are then unchanged.
    pub fn step(
        &self,
        ids: &[u32],
        slots: &[usize],
        counts: &[usize],
        cache: &mut KvCache<T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        if let Some(at) = counts.iter().position(|&count| count == 0) {
            return Err(Error::invalid("decoder", format!("sequence {at} of a step has no tokens")));
        }
        let (first, last) = (self.first()?, self.last()?);
        let (sequences, mut step) = cache.step(slots, counts)?;
        self.check_context(&sequences)?;
        self.check_dynamic(&sequences)?;
        let x = first.infer(ids, sequences.clone(), &mut step)?;
        let mut x = self.chunks.infer(x, &mut step)?;
        // Only the last tokens need logits.
        if counts.iter().any(|&count| count > 1) {
            let last: Vec<u32> = sequences.iter().map(|rows| rows.end as u32 - 1).collect();
            x = DTensor::replicated(&self.group, x.local().rows(&last)?)?;
        }
        let logits = last.infer(x, &mut step)?;
        step.finish()?;
        Ok(logits)
    }
}
