//! Causal language models.

use super::{DecoderConfig, DecoderNames, config};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::Backend,
    ops,
    parallel::{
        Bias, BlockConfig, ColumnParallelLinear, Columns, DTensor, FeedForward, KvCache, Layer, Normalize,
        PositionEmbedding, Stream, TransformerBlock, VocabParallelEmbedding,
    },
    shard::{Replicated, Sequences, Shard},
    tensor::{Param, Tensor, WeightSource, Weights},
    weights::{Save, Transposed},
};
use std::path::Path;

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
    blocks: Vec<Block<S, T, B>>,
    norm: Normalize<S, T, B>,
    head: Option<ColumnParallelLinear<S, T, B>>,
}

type Block<S, T, B> = TransformerBlock<S, FeedForward<S, T, B>, T, B>;

/// What the backward of a [`Decoder`] needs.
pub struct DecoderSaved<S: Stream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: Option<Vec<u32>>,
    blocks: Vec<<Block<S, T, B> as Layer<T, B>>::Saved>,
    norm: <Normalize<S, T, B> as Layer<T, B>>::Saved,
    head: Tensor<T, B>,
}

impl<S: Stream, T: Element, B: Backend> Decoder<S, T, B> {
    /// Reads this rank's part of a checkpoint of a language model, or of the bare model without its head.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer heads, features or words than ranks.
    pub fn load(group: &Group<B>, source: &dyn WeightSource, config: &DecoderConfig) -> Result<Self> {
        let in_block = format!(".{}.", config.names.blocks);
        let stored_transposed = |name: &str| config.transposed && is_in(name, &in_block);
        let source = Transposed::new(source, stored_transposed);
        let weights = Weights::new(&source);
        let DecoderNames { prefix, embedding, positions, blocks, norm, head } = config.names;
        let bare = source.contains(&format!("{embedding}.weight"));
        let model = if bare { weights.clone() } else { weights.at(prefix) };
        let (vocabulary, hidden) = (config.vocabulary, config.block.attention.hidden);
        let mut embedding = VocabParallelEmbedding::load(group, &model.at(embedding), vocabulary, hidden)?;
        let positions = match config.positions {
            Some(count) => Some(PositionEmbedding::load(group, &model.at(positions), count, hidden)?),
            None => None,
        };
        same_size("decoder", "the number of windows", config.windows.len(), "that of layers", config.layers)?;
        let block = |layer: usize| {
            let mut block: BlockConfig = config.block.clone();
            block.attention.window = config.windows[layer];
            Block::load_any(group, &model.at(blocks).at(&layer.to_string()), &block)
        };
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        let norm = Normalize::load(group, &model.at(norm), config.block.norm, hidden)?;
        let head = match config.tied {
            true => {
                embedding.visit(&mut |table| {
                    table.set_uses(2);
                    Ok(())
                })?;
                None
            }
            false => {
                let columns = Columns::even(group, vocabulary)?;
                Some(ColumnParallelLinear::load(group, &weights.at(head), hidden, &columns, Bias::None)?)
            }
        };
        Ok(Self { group: group.clone(), config: config.clone(), embedding, positions, blocks, norm, head })
    }

    /// What the model is.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The ranks that share the model.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    fn head(&self) -> &ColumnParallelLinear<S, T, B> {
        self.head.as_ref().unwrap_or_else(|| self.embedding.head())
    }

    fn check_context(&self, sequences: &Sequences) -> Result<()> {
        let Some(positions) = self.config.positions else { return Ok(()) };
        for (at, rows) in sequences.iter().enumerate() {
            let end = sequences.start(at) + rows.len();
            if end > positions {
                let what = format!("the end of sequence {at}");
                return Err(Error::sizes("decoder", what, end, "the learned positions", positions));
            }
        }
        Ok(())
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
        let (logits, head) = self.head().forward(&x)?;
        Ok((logits, DecoderSaved { rows, positions, blocks, norm, head }))
    }

    /// Adds to the gradients of all parameters, from the gradient of the logits.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    pub fn backward(
        &mut self,
        saved: DecoderSaved<S, T, B>,
        dlogits: &DTensor<Shard<1>, T, B>,
    ) -> Result<()> {
        let head = self.head.as_mut().unwrap_or_else(|| self.embedding.head_mut());
        let dx = head.backward(saved.head, dlogits)?;
        let dx = self.norm.backward(saved.norm, &dx)?;
        let mut dx = self.blocks.backward(saved.blocks, &dx)?;
        if let (Some(table), Some(rows)) = (&mut self.positions, saved.positions) {
            dx = table.backward(rows, &dx)?;
        }
        self.embedding.backward(&saved.rows, &dx)
    }

    /// Calls `f` on every parameter, in the same order on every rank; on a tied table once.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()> {
        self.embedding.visit(f)?;
        if let Some(positions) = &mut self.positions {
            positions.visit(f)?;
        }
        self.blocks.visit(f)?;
        self.norm.visit(f)?;
        self.head.as_mut().map_or(Ok(()), |head| head.visit(f))
    }

    /// Saves the model to a folder, to be read here and by transformers: `config.json`, whose
    /// `dtype` is that of the weights, and `model.safetensors`, or several files with an index.
    /// Every rank calls it, and the first one writes. An older checkpoint there is replaced whole
    /// or not at all: see [`Save`].
    ///
    /// # Errors
    /// As [`Save::write`].
    pub fn save(&mut self, folder: impl AsRef<Path>) -> Result<()> {
        let (group, json) = (self.group.clone(), config::stored_as(&self.config.json, T::DTYPE));
        let in_block = format!(".{}.", self.config.names.blocks);
        let transposed = self.config.transposed;
        let stored_transposed = |name: &str| transposed && is_in(name, &in_block);
        Save::new(folder).config(json).transposed(stored_transposed).write(&group, |f| self.visit(f))
    }
}

/// Whether a name has a part such as `.h.`, at its beginning too.
fn is_in(name: &str, part: &str) -> bool {
    name.contains(part) || name.starts_with(&part[1..])
}

impl<T: Element, B: Backend> Decoder<Replicated, T, B> {
    /// An empty cache for `slots` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<KvCache<T, B>> {
        let layers = self.blocks.iter().map(|block| block.cache(slots, capacity)).collect::<Result<_>>()?;
        Ok(KvCache::new(layers, slots, capacity))
    }

    /// Appends tokens to slots of the cache, `counts[i]` of `ids` to slot `slots[i]`, and gives the logits of what follows
    /// the last token of each: `[slots.len(), vocabulary]`.
    ///
    /// A long prompt may come in several steps, so that the memory of one is bounded; the result is the same up to
    /// rounding.
    ///
    /// # Errors
    /// When a slot gets no token, tokens do not fit, an id is beyond the vocabulary, or a collective fails. The cache is
    /// then as before.
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
            x = DTensor::replicated(&self.group, ops::embedding(x.local(), &last)?)?;
        }
        let logits = self.head().forward(&self.norm.forward(&x)?.0)?.0;
        cache.advance(slots, counts)?;
        Ok(logits)
    }
}
