//! Causal language models.

use super::{DecoderConfig, DecoderNames, config, unread::refuse_unread};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::Backend,
    ops::{RopeConfig, RopeScaling},
    parallel::{
        Bias, BlockConfig, ColumnParallelLinear, Columns, DTensor, KvCache, Layer, Normalize,
        PositionEmbedding, Stream, TransformerBlock, VocabParallelEmbedding,
    },
    shard::{Replicated, Sequences, Shard},
    tensor::{Param, Role, Tensor, WeightSource, Weights},
    weights::{Save, Transposed},
};
use std::path::Path;

/// The ends of names that old checkpoints have for what is no parameter: frequencies and masks.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// A causal language model: logits = head(norm(blocks(embedding(ids)))), with learned positions added where the model has
/// them. Llama, Mistral, Qwen2, Qwen3 and GPT-2, by [`DecoderConfig`].
///
/// * Ids: the same on every rank. Logits: [`Shard<1>`], `[tokens, vocabulary]`, cut over the ranks as evenly as words
///   allow, never gathered.
/// * Collectives forward: S leaving for the embedding, two entering and two leaving a block, S entering for the head.
/// * Trains ([`Decoder::forward`], [`Decoder::backward`]), with either stream; generates ([`Decoder::step`]) with
///   `Replicated`.
#[derive(Debug)]
pub struct Decoder<S: Stream, T: Element, B: Device> {
    group: Group<B>,
    config: DecoderConfig,
    embedding: VocabParallelEmbedding<S, T, B>,
    positions: Option<PositionEmbedding<S, T, B>>,
    blocks: Vec<TransformerBlock<S, T, B>>,
    norm: Normalize<S, T, B>,
    head: ColumnParallelLinear<S, T, B>,
}

/// What the backward of a [`Decoder`] needs.
pub struct DecoderSaved<S: Stream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: Option<Vec<u32>>,
    blocks: Vec<<TransformerBlock<S, T, B> as Layer<T, B>>::Saved>,
    norm: <Normalize<S, T, B> as Layer<T, B>>::Saved,
    head: Tensor<T, B>,
}

impl<S: Stream, T: Element, B: Backend> Decoder<S, T, B> {
    /// Reads this rank's part of a checkpoint of a language model, or of the bare model without its head.
    ///
    /// A tied model may come with a head, if that is the embedding's table once more. Collectives:
    /// an all-reduce of one element where that is so.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the source has tensors of the model that
    /// nothing has read or a head that is not the tied table (each names them), there are fewer
    /// heads, features or words than ranks, or a collective fails.
    #[track_caller]
    pub fn load(group: &Group<B>, source: &dyn WeightSource, config: &DecoderConfig) -> Result<Self> {
        let in_block = format!(".{}.", config.names.blocks);
        let stored_transposed = |name: &str| config.transposed && is_in(name, &in_block);
        let source = Transposed::new(source, stored_transposed);
        let weights = Weights::new(&source);
        let DecoderNames { prefix, embedding, positions, blocks, norm, head } = config.names;
        let bare = source.contains(&format!("{embedding}.weight"));
        let model = if bare { weights.clone() } else { weights.at(prefix) };
        let roots = match bare {
            true => vec![embedding, positions, blocks, norm, head],
            false => vec![prefix, head],
        };
        let head_name = weights.at(head).name("weight");
        let other_head = config.tied && source.contains(&head_name);
        let (vocabulary, hidden) = (config.vocabulary, config.block.attention.hidden);
        let embedding = VocabParallelEmbedding::load(group, &model.at(embedding), vocabulary, hidden)?
            .with_padding(config.padding)?;
        if other_head {
            refuse_another_head(group, &source, &head_name, &embedding)?;
        }
        let positions = match config.positions {
            Some(count) => Some(PositionEmbedding::load(group, &model.at(positions), count, hidden)?),
            None => None,
        };
        same_size("decoder", "the number of windows", config.windows.len(), "that of layers", config.layers)?;
        let block = |layer: usize| {
            let mut block: BlockConfig = config.block.clone();
            block.attention.window = config.windows[layer];
            let load = if block.names.mlp.gate.is_empty() {
                TransformerBlock::load
            } else {
                TransformerBlock::load_gated
            };
            load(group, &model.at(blocks).at(&layer.to_string()), &block)
        };
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        let norm = Normalize::load(group, &model.at(norm), config.block.norm, hidden)?;
        let head = match config.tied {
            true => embedding.tied_head(),
            false => {
                let columns = Columns::even(group, vocabulary)?;
                ColumnParallelLinear::load(group, &weights.at(head), hidden, &columns, Bias::None)?
            }
        };
        let model =
            Self { group: group.clone(), config: config.clone(), embedding, positions, blocks, norm, head };
        let harmless = |name: &str| {
            BUFFERS.iter().any(|buffer| name.ends_with(buffer)) || (other_head && name == head_name)
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

    fn check_context(&self, sequences: &Sequences) -> Result<()> {
        let Some(positions) = self.config.positions else { return Ok(()) };
        check_positions("decoder", sequences, positions)
    }

    /// The logits of the tokens that follow each of `ids`, which make up these sequences, and what the backward needs.
    ///
    /// # Errors
    /// When an id is beyond the vocabulary, sizes disagree, or a collective fails.
    pub fn forward(
        &self,
        ids: &[u32],
        sequences: Sequences,
    ) -> Result<(DTensor<Shard<1>, T, B>, DecoderSaved<S, T, B>)> {
        self.check_context(&sequences)?;
        let (mut x, rows) = self.embedding.forward(ids, sequences)?;
        let mut positions = None;
        if let Some(table) = &self.positions {
            let (y, rows) = table.forward(&x)?;
            (x, positions) = (y, Some(rows));
        }
        let (x, blocks) = self.blocks.forward(&x)?;
        let (x, norm) = self.norm.forward(&x)?;
        let (logits, head) = self.head.forward(&x)?;
        Ok((logits, DecoderSaved { rows, positions, blocks, norm, head }))
    }

    /// Adds to the gradients of all parameters, from the gradient of the logits.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    pub fn backward(&self, saved: DecoderSaved<S, T, B>, dlogits: &DTensor<Shard<1>, T, B>) -> Result<()> {
        let dx = self.head.backward(saved.head, dlogits)?;
        let dx = self.norm.backward(saved.norm, &dx)?;
        let mut dx = self.blocks.backward(saved.blocks, &dx)?;
        if let (Some(table), Some(rows)) = (&self.positions, saved.positions) {
            dx = table.backward(rows, &dx)?;
        }
        self.embedding.backward(&saved.rows, &dx)
    }

    /// The parameters, in the same order on every rank; a tied table once.
    pub fn params(&self) -> Vec<Param<T, B>> {
        let positions = self.positions.as_ref().map_or(Vec::new(), Layer::params);
        let head = if self.config.tied { Vec::new() } else { self.head.params() };
        [self.embedding.params(), positions, self.blocks.params(), self.norm.params(), head].concat()
    }

    /// Saves the model to a folder, to be read here and by transformers: `config.json`, whose
    /// `dtype` is that of the weights, and `model.safetensors`, or several files with an index.
    /// Every rank calls it, and the first one writes. An older checkpoint there is replaced whole
    /// or not at all: see [`Save`].
    ///
    /// # Errors
    /// As [`Save::write`].
    #[track_caller]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
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

/// Refuses a head that is not the embedding's table, to which the configuration ties it. Each rank
/// compares its own rows; one that differs, or cannot be read, is an error on all.
#[track_caller]
fn refuse_another_head<S: Stream, T: Element, B: Backend>(
    group: &Group<B>,
    source: &dyn WeightSource,
    head: &str,
    embedding: &VocabParallelEmbedding<S, T, B>,
) -> Result<()> {
    let (mut table, mut same) = (String::new(), true);
    let compared = embedding.params().iter().try_for_each(|param| {
        let own = param.value()?.to_vec()?;
        let width = param.shape().cols();
        for piece in param.pieces().iter() {
            source.check(head, &piece.region)?;
            let mut other = vec![T::default(); piece.region.extent().len()];
            source.read(head, Role::Weight, &piece.region, T::any_mut(other.as_mut_slice()))?;
            let equal =
                |(a, b): (&T, &T)| a.to_f64() == b.to_f64() || (a.to_f64().is_nan() && b.to_f64().is_nan());
            same &= own[piece.row * width..].iter().zip(&other).all(equal);
            table.clone_from(&piece.tensor);
        }
        Ok(())
    });
    let differs = f64::from(u8::from(compared.is_err() || !same));
    let mut differs = Tensor::<f64, B>::full(group.device(), [1], differs)?;
    group.all_reduce(ReduceOp::Max, &mut differs)?;
    compared?;
    if differs.to_vec()?[0] == 0.0 {
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
    /// the first.
    fn check_dynamic(&self, sequences: &Sequences) -> Result<()> {
        let Some(RopeConfig { scaling: RopeScaling::DynamicNtk { trained, .. }, .. }) =
            self.config.block.attention.rope
        else {
            return Ok(());
        };
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

    /// An empty cache for `slots` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<KvCache<T, B>> {
        let layers = self.blocks.iter().map(|block| block.cache(slots, capacity)).collect::<Result<_>>()?;
        KvCache::new(layers, slots, capacity)
    }

    /// Appends tokens to slots of the cache, `counts[i]` of `ids` to slot `slots[i]`, and gives the logits of what follows
    /// the last token of each: `[slots.len(), vocabulary]`.
    ///
    /// A long prompt may come in several steps, so that the memory of one is bounded; the result is the same up to
    /// rounding.
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
        let sequences = cache.step(slots, counts)?;
        self.check_context(&sequences)?;
        self.check_dynamic(&sequences)?;
        same_size("decoder", "layers of the cache", cache.layers_mut().len(), "blocks", self.blocks.len())?;
        let (mut x, _) = self.embedding.forward(ids, sequences.clone())?;
        if let Some(table) = &self.positions {
            x = table.forward(&x)?.0;
        }
        for (block, layer) in self.blocks.iter().zip(cache.layers_mut()) {
            x = block.forward_cached(&x, layer, slots)?;
        }
        // The last tokens are all that is asked for.
        if counts.iter().any(|&count| count > 1) {
            let last: Vec<u32> = sequences.iter().map(|rows| rows.end as u32 - 1).collect();
            x = DTensor::replicated(&self.group, x.local().rows(&last)?)?;
        }
        let logits = self.head.forward(&self.norm.forward(&x)?.0)?.0;
        cache.advance(slots, counts)?;
        Ok(logits)
    }
}
