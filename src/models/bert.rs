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

/// hidden = blocks(norm(words\[ids\] + positions + types)): BERT's encoder with post-norm blocks
/// (Devlin et al., 2019). The output is the hidden states of all tokens, with placement S. There is
/// no pooler.
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

/// The values that the forward of a [`Bert`] saves for its backward.
pub struct BertSaved<S: ResidualStream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: Vec<u32>,
    types: Vec<u32>,
    norm: <Normalize<S, T, B> as Layer<T, B>>::Saved,
    blocks: Vec<<TransformerBlock<S, T, B> as Layer<T, B>>::Saved>,
}

/// The embeddings of the tokens, then the saved values for the backward: the rows of the word
/// table, the rows of the position and type tables, and the values of the normalization.
type Embedded<S, T, B> =
    (DTensor<S, T, B>, Vec<u32>, [Vec<u32>; 2], <Normalize<S, T, B> as Layer<T, B>>::Saved);

impl<S: ResidualStream, T: Element, B: Backend> Bert<S, T, B> {
    /// Reads this rank's shard of a checkpoint. The names in the checkpoint may begin with `bert.`.
    /// Its `LayerNorm`s may have `gamma` and `beta` instead of `weight` and `bias`, as in the first
    /// BERT checkpoints.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the source has tensors of the embeddings or
    /// the encoder that no parameter has read, or there are more ranks than heads or than tokens in
    /// the vocabulary.
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

    /// Returns the configuration.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// Computes the hidden states of tokens that form these sequences, and the saved values for the
    /// backward. `types` has one type per token; with `None`, all tokens have type 0.
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

    /// Computes the input of the first block, and the saved values for the backward.
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

    /// Computes the hidden states of [`Bert::forward`] without saving anything for a backward.
    ///
    /// # Errors
    /// As [`Bert::forward`].
    pub fn infer(
        &self,
        ids: &[u32],
        types: Option<&[u32]>,
        sequences: Sequences,
    ) -> Result<DTensor<S, T, B>> {
        let (x, ..) = self.embedded(ids, types, sequences)?;
        self.blocks.infer(x, &mut Context::default())
    }

    /// Adds to the gradients of all parameters. `dy` is the gradient of the hidden states.
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

    /// Returns the parameters, in the same order on every rank.
    pub fn params(&self) -> Vec<Param<T, B>> {
        let tables = [self.words.params(), self.positions.params(), self.types.params()].concat();
        [tables, self.norm.params(), self.blocks.params()].concat()
    }

    /// Saves the model, without a pooler, to a folder: see [`super::Decoder::save`].
    ///
    /// # Errors
    /// As [`Save::write`].
    #[track_caller]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let json = config::stored_as(&self.config.json, T::DTYPE, false);
        Save::new(folder).config(json).write(&self.group, &self.params())
    }
}

/// Maps the present names of `LayerNorm` parameters to their names in a source. The first BERT
/// checkpoints have other names.
struct Renamed<'a>(&'a dyn WeightSource);

/// The present name and the name in the first checkpoints.
const NAMES: [(&str, &str); 2] =
    [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

impl Renamed<'_> {
    /// Returns a tensor's name in the source.
    fn stored(&self, name: &str) -> String {
        let old = |(present, old): (&str, &str)| Some(format!("{}{old}", name.strip_suffix(present)?));
        let stored = NAMES.into_iter().find_map(old).filter(|old| self.0.contains(old));
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
        let present = |name: String| {
            let present =
                |(present, old): (&str, &str)| Some(format!("{}{present}", name.strip_suffix(old)?));
            let present = NAMES.into_iter().find_map(present).filter(|present| self.stored(present) == name);
            present.unwrap_or(name)
        };
        Some(self.0.names()?.into_iter().map(present).collect())
    }
}
