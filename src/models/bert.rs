//! BERT's encoder.

use super::{BertConfig, config, decoder::check_positions, unread::refuse_unread};
use crate::{
    comm::Group,
    device::{AnyMut, Cpu, Device, Element},
    error::{Result, same_size},
    kernels::Backend,
    parallel::{
        Context, DTensor, Layer, Normalize, PositionEmbedding, ResidualStream, TransformerBlock,
        VocabParallelEmbedding,
    },
    shard::Sequences,
    tensor::{Param, Region, Role, WeightSource, Weights},
    weights::Save,
};
use std::path::Path;

/// BERT's encoder: the normalized sum of three embeddings (words, positions, token types), then post-norm blocks
/// (Devlin et al., 2019). Gives the hidden states of all tokens, held as the stream; no pooler.
#[derive(Debug)]
pub struct Bert<S: ResidualStream, T: Element, B: Device> {
    group: Group<B>,
    config: BertConfig,
    words: VocabParallelEmbedding<S, T, B>,
    positions: PositionEmbedding<S, T, B>,
    types: PositionEmbedding<S, T, B>,
    norm: Normalize<S, T, B>,
    blocks: Vec<TransformerBlock<S, T, B>>,
}

/// What the backward of a [`Bert`] needs.
pub struct BertSaved<S: ResidualStream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: Vec<u32>,
    types: Vec<u32>,
    norm: <Normalize<S, T, B> as Layer<T, B>>::Saved,
    blocks: Vec<<TransformerBlock<S, T, B> as Layer<T, B>>::Saved>,
}

/// The embeddings of tokens; the rows of words, of positions and of types; and what their
/// normalization saved.
type Embedded<S, T, B> =
    (DTensor<S, T, B>, Vec<u32>, [Vec<u32>; 2], <Normalize<S, T, B> as Layer<T, B>>::Saved);

impl<S: ResidualStream, T: Element, B: Backend> Bert<S, T, B> {
    /// Reads this rank's part of a checkpoint, whose names may begin with `bert.`. A `LayerNorm`
    /// may have `gamma` and `beta`, as in the first checkpoints, in place of `weight` and `bias`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the source has tensors of the embeddings or
    /// the encoder that nothing has read, or there are fewer heads or words than ranks.
    pub fn load(group: &Group<B>, source: &dyn WeightSource, config: &BertConfig) -> Result<Self> {
        let source = &Renamed(source);
        let weights = Weights::new(source);
        let bare = source.contains("embeddings.word_embeddings.weight");
        let weights = if bare { weights } else { weights.at("bert") };
        let (embeddings, hidden) = (weights.at("embeddings"), config.block.attention.hidden);
        let table = |name: &str, rows| PositionEmbedding::load(group, &embeddings.at(name), rows, hidden);
        let words = embeddings.at("word_embeddings");
        let layers = weights.at("encoder").at("layer");
        let block =
            |layer: usize| TransformerBlock::load(group, &layers.at(&layer.to_string()), &config.block);
        let model = Self {
            words: VocabParallelEmbedding::load(group, &words, config.vocabulary, hidden)?
                .with_padding(config.padding)?,
            positions: table("position_embeddings", config.positions)?,
            types: table("token_type_embeddings", config.types)?,
            norm: Normalize::load(group, &embeddings.at("LayerNorm"), config.block.norm, hidden)?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            group: group.clone(),
            config: config.clone(),
        };
        let roots = ["embeddings", "encoder"].map(|root| weights.name(root));
        let harmless = |name: &str| name.ends_with("embeddings.position_ids");
        refuse_unread("bert", source, &model.params(), &roots, harmless)?;
        Ok(model)
    }

    /// What the model is.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The hidden states of tokens that make up these sequences, and what the backward needs. `types` has one type a
    /// token; all are of type 0 if not given.
    ///
    /// # Errors
    /// When an id, a type or a position is beyond its table, sizes disagree, or a collective fails.
    pub fn forward(
        &self,
        ids: &[u32],
        types: Option<&[u32]>,
        sequences: Sequences,
    ) -> Result<(DTensor<S, T, B>, BertSaved<S, T, B>)> {
        let (x, rows, [positions, types], norm) = self.embedded(ids, types, sequences)?;
        let (x, blocks) = self.blocks.forward(x)?;
        Ok((x, BertSaved { rows, positions, types, norm, blocks }))
    }

    /// The input of the first block, and what the backward of the embeddings needs.
    fn embedded(
        &self,
        ids: &[u32],
        types: Option<&[u32]>,
        sequences: Sequences,
    ) -> Result<Embedded<S, T, B>> {
        if let Some(types) = types {
            same_size("bert", "the number of token types", types.len(), "that of ids", ids.len())?;
        }
        check_positions("bert", &sequences, self.config.positions)?;
        let (x, rows) = self.words.forward(ids, sequences)?;
        let (x, positions) = self.positions.forward(x)?;
        let type_of = |at: usize| types.map_or(0, |types| types[at]);
        let (x, types) = self.types.add_rows(x, (0..ids.len()).map(type_of))?;
        let (x, norm) = self.norm.forward(x)?;
        Ok((x, rows, [positions, types], norm))
    }

    /// The hidden states of [`Bert::forward`] where no backward follows.
    ///
    /// # Errors
    /// As there.
    pub fn infer(
        &self,
        ids: &[u32],
        types: Option<&[u32]>,
        sequences: Sequences,
    ) -> Result<DTensor<S, T, B>> {
        let (x, ..) = self.embedded(ids, types, sequences)?;
        self.blocks.infer(x, &mut Context::default())
    }

    /// Adds to the gradients of all parameters, from the gradient of the hidden states.
    ///
    /// # Errors
    /// When sizes disagree, or a collective fails.
    pub fn backward(&self, saved: BertSaved<S, T, B>, dy: DTensor<S, T, B>) -> Result<()> {
        let dx = self.blocks.backward(saved.blocks, dy)?;
        let dx = self.norm.backward(saved.norm, dx)?;
        let dx = self.types.backward(saved.types, dx)?;
        let dx = self.positions.backward(saved.positions, dx)?;
        self.words.backward(&saved.rows, dx)
    }

    /// The parameters, in the same order on every rank.
    pub fn params(&self) -> Vec<Param<T, B>> {
        let tables = [self.words.params(), self.positions.params(), self.types.params()].concat();
        [tables, self.norm.params(), self.blocks.params()].concat()
    }

    /// Saves the model to a folder, without a pooler: see [`super::Decoder::save`].
    ///
    /// # Errors
    /// As [`Save::write`].
    #[track_caller]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let json = config::stored_as(&self.config.json, T::DTYPE);
        Save::new(folder).config(json).write(&self.group, &self.params())
    }
}

/// A source whose `LayerNorm`s may have the names that BERT's first checkpoints have; the names of
/// today are asked for.
struct Renamed<'a>(&'a dyn WeightSource);

/// The name of today and the first one.
const NAMES: [(&str, &str); 2] =
    [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

impl Renamed<'_> {
    /// A tensor's name in the source.
    fn stored(&self, name: &str) -> String {
        let first = |(today, first): (&str, &str)| Some(format!("{}{first}", name.strip_suffix(today)?));
        let stored = NAMES.into_iter().find_map(first).filter(|first| self.0.contains(first));
        stored.filter(|_| !self.0.contains(name)).unwrap_or_else(|| name.into())
    }
}

impl WeightSource for Renamed<'_> {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        self.0.read(&self.stored(name), role, region, out)
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        self.0.check(&self.stored(name), region)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(&self.stored(name))
    }

    fn names(&self) -> Option<Vec<String>> {
        let today = |name: String| {
            let today = |(today, first): (&str, &str)| Some(format!("{}{today}", name.strip_suffix(first)?));
            let today = NAMES.into_iter().find_map(today).filter(|today| self.stored(today) == name);
            today.unwrap_or(name)
        };
        Some(self.0.names()?.into_iter().map(today).collect())
    }
}
