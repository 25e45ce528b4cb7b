//! Causal language models.

mod embeddings;
mod ends;

pub use ends::{DecoderEnds, Tokens};

use super::{DecoderConfig, LayerChoices, config, unread::refuse_unread};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result},
    kernels::Backend,
    ops::{RopeConfig, RopeScaling},
    parallel::{
        Bias, Chain, ColumnParallelLinear, Columns, Context, DTensor, KvCache, Layer, Normalize, Recompute,
        ResidualStream, TransformerBlock, VocabParallelEmbedding,
    },
    shard::{Partition, Replicated, Sequences, Shard},
    tensor::{Param, Role, WeightSource, Weights},
    train::Schedule,
    weights::{Save, Transposed},
};
use embeddings::{Embeddings, EmbeddingsSaved};
use std::{ops::Range, path::Path};

/// The ends of names that old checkpoints have for what is no parameter: frequencies and masks.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// A causal language model: logits = head(norm(blocks(embedding(ids)))), with learned positions
/// added where the model has them. Llama, Mistral, Qwen2, Qwen3 and GPT-2, by [`DecoderConfig`].
///
/// * Ids: the same on every rank. Logits: [`Shard<1>`], `[tokens, vocabulary]`, cut over the ranks
///   as evenly as words allow, never gathered.
/// * Collectives forward: S leaving for the embedding, two entering and two leaving a block, S
///   entering for the head.
/// * Trains ([`Decoder::forward`], [`Decoder::backward`]), with either stream; generates
///   ([`Decoder::step`]) with `Replicated`.
/// * [`Decoder::load_stages`] reads the stages of one rank of a pipeline; [`DecoderEnds`] runs them
///   in a [`Pipeline`](crate::train::Pipeline).
#[derive(Debug)]
pub struct Decoder<S: ResidualStream, T: Element, B: Device> {
    group: Group<B>,
    config: DecoderConfig,
    /// On the rank of the first stage.
    embeddings: Option<Embeddings<S, T, B>>,
    /// The blocks of each of this rank's stages.
    chunks: Vec<Blocks<S, T, B>>,
    /// On the rank of the last stage.
    head: Option<Head<S, T, B>>,
}

type Blocks<S, T, B> = Vec<Recompute<TransformerBlock<S, T, B>>>;
type Head<S, T, B> = Chain<Normalize<S, T, B>, ColumnParallelLinear<S, T, B>>;
type HeadSaved<S, T, B> = <Head<S, T, B> as Layer<T, B>>::Saved;

/// What the backward of a [`Decoder`] needs.
pub struct DecoderSaved<S: ResidualStream, T: Element, B: Backend> {
    embeddings: EmbeddingsSaved<S, T, B>,
    chunks: <Vec<Blocks<S, T, B>> as Layer<T, B>>::Saved,
    head: HeadSaved<S, T, B>,
}

impl<S: ResidualStream, T: Element, B: Backend> Decoder<S, T, B> {
    /// Reads this rank's part of a checkpoint of a language model, or of the bare model without its
    /// head.
    ///
    /// A tied model may come with a head, if that is the embedding's table once more. Collectives:
    /// an all-reduce of one element where that is so.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the source has tensors of the model that
    /// nothing has read or a head that is not the tied table (each names them), no layer has the
    /// choices of the configuration's `block`, there are fewer heads or words than ranks,
    /// or a collective fails.
    #[track_caller]
    pub fn load(group: &Group<B>, source: &dyn WeightSource, config: &DecoderConfig) -> Result<Self> {
        Self::load_stages(group, source, config, &Schedule::gpipe(1, 1), 0)
    }

    /// Reads this rank's part of the stages that rank `pipeline_rank` of a pipeline holds. Blocks
    /// are dealt to the stages as evenly as their number allows. The first rank also holds the
    /// embeddings, the last one the final normalization and the head.
    ///
    /// Where a tied model has its two ends on different ranks, each holds the table, the last one
    /// as a copy that is not saved. Give [`Decoder::tied`] to
    /// [`Pipeline::sum_tied`](crate::train::Pipeline::sum_tied) once a step: after the last
    /// backward, and before norms and the optimizer.
    ///
    /// # Errors
    /// As [`Decoder::load`], and when the pipeline has no such rank, no chunks, or more stages than
    /// blocks.
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
            return Err(Error::invalid("decoder", "a schedule without ranks, or whose ranks hold no chunk"));
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
        let cut = Partition::even(layers, stages);
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
        let ranges = (0..schedule.chunks()).map(|chunk| cut.range(schedule.stage(rank, chunk)));
        let ranges: Vec<_> = ranges.collect();
        let chunks = ranges.iter().map(|range| range.clone().map(block).collect()).collect::<Result<_>>()?;
        let head = match rank + 1 == ranks {
            true => {
                let table = embeddings.as_ref().map(|embeddings| &embeddings.words);
                Some(load_head(group, (&weights, &model), config, table)?)
            }
            false => None,
        };
        let head_name = weights.at(names.head).name("weight");
        let roots: Vec<String> = match bare {
            true => [names.embedding, names.positions, names.blocks, names.norm, names.head]
                .map(|name| model.name(name))
                .into(),
            false => vec![names.prefix.into(), names.head.into()],
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
        // Random numbers have a tensor of every name.
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

    /// What the model is.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The ranks that share the model.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    /// The blocks of each of this rank's stages: what [`Pipeline`](crate::train::Pipeline) runs.
    pub fn chunks(&self) -> &[impl Layer<T, B, In = S, Out = S> + use<S, T, B>] {
        &self.chunks
    }

    /// The weight that the embedding and the head share, where this rank holds either.
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

    /// The logits of the tokens that follow each of `ids`, which make up these sequences, and what
    /// the backward needs.
    ///
    /// # Errors
    /// When an id is beyond the vocabulary, sizes disagree, another rank holds an end of the model,
    /// the configuration has dropout (only [`DecoderEnds`] draws masks), or a collective fails.
    pub fn forward(
        &self,
        ids: &[u32],
        sequences: Sequences,
    ) -> Result<(DTensor<Shard<1>, T, B>, DecoderSaved<S, T, B>)> {
        let (first, last) = (self.first()?, self.last()?);
        self.check_context(&sequences)?;
        if self.config.dropout != 0.0 {
            let reason =
                "the configuration has dropout, which a forward does not draw: train by `DecoderEnds`";
            return Err(Error::invalid("decoder", reason));
        }
        let (x, embeddings) = first.forward(ids, sequences, None)?;
        let (x, chunks) = self.chunks.forward(x)?;
        let (logits, head) = last.forward(x)?;
        Ok((logits, DecoderSaved { embeddings, chunks, head }))
    }

    /// Adds to the gradients of all parameters, from the gradient of the logits.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    pub fn backward(&self, saved: DecoderSaved<S, T, B>, dlogits: DTensor<Shard<1>, T, B>) -> Result<()> {
        let dx = self.last()?.backward(saved.head, dlogits)?;
        let dx = self.chunks.backward(saved.chunks, dx)?;
        self.first()?.backward(saved.embeddings, dx)
    }

    /// The logits of [`Decoder::forward`] where no backward follows. Drops nothing.
    ///
    /// # Errors
    /// As there, but for dropout.
    pub fn infer(&self, ids: &[u32], sequences: Sequences) -> Result<DTensor<Shard<1>, T, B>> {
        let (first, last) = (self.first()?, self.last()?);
        self.check_context(&sequences)?;
        let mut context = Context::default();
        let x = first.infer(ids, sequences, &mut context)?;
        let x = self.chunks.infer(x, &mut context)?;
        last.infer(x, &mut context)
    }

    /// The parameters of this rank's stages, in the same order on every rank that shares them; a
    /// tied table once.
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

    /// Saves the model to a folder, to be read here and by transformers: `config.json`, whose
    /// `dtype` is that of the weights, and `model.safetensors`, or several files with an index.
    /// Every rank calls it, and the first one writes. An older checkpoint there is replaced whole
    /// or not at all: see [`Save`].
    ///
    /// # Errors
    /// As [`Save::write`]. When another rank holds an end of the model, or its configuration was
    /// not read from a file: [`weights::save`](crate::weights::save) saves the weights of either.
    #[track_caller]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.first()?;
        self.last()?;
        if self.config.json.is_empty() {
            let reason =
                "the configuration was not read from a `config.json`: save the weights by `weights::save`";
            return Err(Error::invalid("decoder", reason));
        }
        let json = config::stored_as(&self.config.json, T::DTYPE);
        let in_block = format!(".{}.", self.config.names.blocks);
        let transposed = self.config.transposed;
        let stored_transposed = |name: &str| transposed && is_in(name, &in_block);
        Save::new(folder).config(json).transposed(stored_transposed).write(&self.group, &self.params())
    }
}

/// Every row of the sequences has a learned position.
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

/// What the other ranks of a pipeline read of a checkpoint.
struct Others {
    /// What the names of all blocks begin with, before their numbers.
    blocks: String,
    layers: usize,
    /// The blocks of this rank.
    own: Vec<Range<usize>>,
    /// The ends of the model that this rank does not hold.
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

/// The last normalization and the head: the table's, a copy of it where another rank has the table,
/// or a weight of its own.
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

/// Refuses a head that is not the embedding's table, to which the configuration ties it. Each rank
/// compares its own rows; one that differs, or cannot be read, is an error on all.
#[track_caller]
fn refuse_another_head<T: Element, B: Backend>(
    group: &Group<B>,
    source: &dyn WeightSource,
    head: &str,
    param: &Param<T, B>,
) -> Result<()> {
    let (mut table, mut same) = (String::new(), true);
    let mut compare = || {
        if !B::HAS_VALUES {
            return Ok(());
        }
        let own = param.value()?.to_vec()?;
        let width = param.shape().cols();
        for part in param.regions().iter() {
            source.check(head, &part.region)?;
            let mut other = vec![T::default(); part.region.extent().len()];
            source.read(head, Role::Weight, &part.region, T::any_mut(other.as_mut_slice()))?;
            let equal =
                |(a, b): (&T, &T)| a.to_f64() == b.to_f64() || (a.to_f64().is_nan() && b.to_f64().is_nan());
            same &= own[part.row * width..].iter().zip(&other).all(equal);
            table.clone_from(&part.tensor);
        }
        Ok(())
    };
    let compared = compare();
    let differs = f64::from(u8::from(compared.is_err() || !same));
    let differs = group.all_reduce_host(ReduceOp::Max, &[differs])?[0];
    compared?;
    if differs == 0.0 {
        return Ok(());
    }
    let reason = format!(
        "the head is tied to the embedding, but `{head}` is not `{table}`; to use it, set `tie_word_embeddings` to false in \
         config.json"
    );
    Err(Error::invalid("decoder", reason))
}

/// Whether a name has a part such as `.h.`, at its beginning too.
fn is_in(name: &str, part: &str) -> bool {
    name.contains(part) || name.starts_with(&part[1..])
}

impl<T: Element, B: Backend> Decoder<Replicated, T, B> {
    /// Refuses the second part of a prompt that should have been computed by other frequencies than
    /// the first, in any layer.
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
                     where RoPE is scaled by dynamic NTK, a prompt has to come in one step"
                );
                return Err(Error::invalid("decoder", reason));
            }
        }
        Ok(())
    }

    /// An empty cache for `slots` sequences of up to `capacity` tokens. The first step allocates
    /// the memory of keys and values.
    ///
    /// # Errors
    /// When there is no memory left for a number a slot.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<KvCache<T, B>> {
        KvCache::new(slots, capacity)
    }

    /// Appends tokens to slots of the cache, `counts[i]` of `ids` to slot `slots[i]`, and gives the
    /// logits of what follows the last token of each: `[slots.len(), vocabulary]`.
    ///
    /// A long prompt may come in several steps, so that the memory of one is bounded; the result is
    /// the same up to rounding.
    ///
    /// With [`RopeScaling::DynamicNtk`] that holds up to the trained length. Beyond it, a step
    /// computes by the frequencies of the length that it reaches, and keys and values of earlier
    /// steps stay as they were made, as in transformers with a cache. So a prompt that is longer
    /// has to come in one step; then the text goes on token by token.
    ///
    /// # Errors
    /// When a slot gets no token, tokens do not fit, an id is beyond the vocabulary, several tokens
    /// continue a text beyond the trained length of dynamic NTK scaling, or a collective fails. The
    /// cache is then as before.
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
        // The last tokens are all that is asked for.
        if counts.iter().any(|&count| count > 1) {
            let last: Vec<u32> = sequences.iter().map(|rows| rows.end as u32 - 1).collect();
            x = DTensor::replicated(&self.group, x.local().rows(&last)?)?;
        }
        let logits = last.infer(x, &mut step)?;
        step.finish()?;
        Ok(logits)
    }
}
