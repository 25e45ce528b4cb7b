//! The embeddings of a decoder.

use super::super::DecoderConfig;
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::Backend,
    parallel::{
        Context, DTensor, Dropout, DropoutState, Layer, PositionEmbedding, ResidualStream,
        VocabParallelEmbedding,
    },
    shard::Sequences,
    tensor::{Param, Weights},
};

/// x = dropout(E\[ids\] + P\[positions\]): ids → S. Without learned positions, there is no P.
#[derive(Debug)]
pub(super) struct Embeddings<S: ResidualStream, T: Element, B: Device> {
    pub(super) words: VocabParallelEmbedding<S, T, B>,
    positions: Option<PositionEmbedding<S, T, B>>,
    dropout: Dropout<S>,
}

/// The values that the forward of [`Embeddings`] saves for its backward.
pub(super) struct EmbeddingsSaved<S: ResidualStream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: Option<Vec<u32>>,
    dropout: <Dropout<S> as Layer<T, B>>::Saved,
}

impl<S: ResidualStream, T: Element, B: Backend> Embeddings<S, T, B> {
    pub(super) fn load(group: &Group<B>, weights: &Weights<'_>, config: &DecoderConfig) -> Result<Self> {
        let (names, hidden) = (&config.names, config.hidden());
        let words = weights.at(names.embedding);
        let words = VocabParallelEmbedding::load(group, &words, config.vocabulary, hidden)?;
        let table = |rows| PositionEmbedding::load(group, &weights.at(names.positions), rows, hidden);
        Ok(Self {
            words: words.with_padding(config.padding)?,
            positions: config.positions.map(table).transpose()?,
            dropout: Dropout::new(config.dropout, 0, "embedding"),
        })
    }

    pub(super) fn forward(
        &self,
        ids: &[u32],
        sequences: Sequences,
        dropout: Option<DropoutState>,
    ) -> Result<(DTensor<S, T, B>, EmbeddingsSaved<S, T, B>)> {
        let (mut x, rows) = self.words.forward(ids, sequences)?;
        if let Some(dropout) = dropout {
            x = x.with_dropout_state(dropout);
        }
        let mut positions = None;
        if let Some(table) = &self.positions {
            let (y, saved) = table.forward(x)?;
            (x, positions) = (y, Some(saved));
        }
        let (x, dropout) = self.dropout.forward(x)?;
        Ok((x, EmbeddingsSaved { rows, positions, dropout }))
    }

    pub(super) fn infer(
        &self,
        ids: &[u32],
        sequences: Sequences,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<S, T, B>> {
        let (x, _) = self.words.forward(ids, sequences)?;
        match &self.positions {
            Some(table) => table.infer(x, context),
            None => Ok(x),
        }
    }

    pub(super) fn backward(&self, saved: EmbeddingsSaved<S, T, B>, dx: DTensor<S, T, B>) -> Result<()> {
        let mut dx = self.dropout.backward(saved.dropout, dx)?;
        if let (Some(table), Some(rows)) = (&self.positions, saved.positions) {
            dx = table.backward(rows, dx)?;
        }
        self.words.backward(&saved.rows, dx)
    }

    /// Returns the table of words, then the table of positions if there is one.
    pub(super) fn params(&self) -> Vec<Param<T, B>> {
        let positions = self.positions.iter().flat_map(Layer::params);
        self.words.params().into_iter().chain(positions).collect()
    }
}
