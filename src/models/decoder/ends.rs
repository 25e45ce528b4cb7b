//! The input and the loss of a decoder in a pipeline.

use super::{Decoder, embeddings::EmbeddingsSaved};
use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    parallel::{Context, DTensor, Layer, ResidualStream, VocabParallelCrossEntropy},
    train::{Microbatch, PipelineEnds},
};

/// The two ends of a [`Decoder`] in a [`Pipeline`](crate::train::Pipeline): the embedding of ids
/// before the first stage, and the head and a cross entropy after the last stage.
///
/// The backward computes the gradient of `scale` times the sum of all tokens' losses. With a scale
/// of one over the number of tokens of the whole batch, this is the gradient of the mean loss.
/// Without a scale there is no backward and no dropout. In that case, run
/// [`Pipeline::evaluate`](crate::train::Pipeline::evaluate).
pub struct DecoderEnds<'a, S: ResidualStream, T: Element, B: Backend> {
    model: &'a Decoder<S, T, B>,
    tokens: Vec<Tokens<'a>>,
    loss: VocabParallelCrossEntropy,
    scale: Option<f64>,
    saved: Vec<Option<EmbeddingsSaved<S, T, B>>>,
    losses: Vec<f64>,
}

/// The ids and targets of a microbatch.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// One id per row.
    pub ids: &'a [u32],
    /// For each id, the id that follows.
    pub targets: &'a [u32],
}

impl<'a, S: ResidualStream, T: Element, B: Backend> DecoderEnds<'a, S, T, B> {
    /// Makes the ends for microbatches of these tokens. All ranks of a replica pass the same
    /// tokens.
    pub fn new(
        model: &'a Decoder<S, T, B>,
        tokens: Vec<Tokens<'a>>,
        loss: VocabParallelCrossEntropy,
        scale: Option<f64>,
    ) -> Self {
        let (saved, losses) = (tokens.iter().map(|_| None).collect(), vec![0.0; tokens.len()]);
        Self { model, tokens, loss, scale, saved, losses }
    }

    /// Returns the sum of the tokens' losses for each microbatch. The sums are 0 if this rank does
    /// not have the last stage.
    pub fn losses(&self) -> &[f64] {
        &self.losses
    }

    fn tokens(&self, microbatch: usize) -> Result<Tokens<'a>> {
        let count = self.tokens.len();
        let (what, of) = ("the number of the microbatch", "the number of microbatches with tokens");
        let missing = || Error::sizes("decoder", what, microbatch, of, count);
        self.tokens.get(microbatch).copied().ok_or_else(missing)
    }
}

impl<S: ResidualStream, T: Element, B: Backend> PipelineEnds<S, T, B> for DecoderEnds<'_, S, T, B> {
    #[track_caller]
    fn input(&mut self, number: usize, microbatch: &Microbatch) -> Result<DTensor<S, T, B>> {
        let Microbatch { sequences, dropout } = microbatch;
        self.model.check_context(sequences)?;
        let ids = self.tokens(number)?.ids;
        let (x, saved) =
            self.model.first()?.forward(ids, sequences.clone(), dropout.filter(|_| self.scale.is_some()))?;
        self.saved[number] = self.scale.map(|_| saved);
        Ok(x)
    }

    #[track_caller]
    fn input_grad(&mut self, number: usize, dx: DTensor<S, T, B>) -> Result<()> {
        let missing = || Error::internal("decoder", "the gradient of a microbatch without saved embeddings");
        let saved = self.saved.get_mut(number).and_then(Option::take).ok_or_else(missing)?;
        self.model.first()?.backward(saved, dx)
    }

    #[track_caller]
    fn loss(&mut self, number: usize, y: DTensor<S, T, B>) -> Result<Option<DTensor<S, T, B>>> {
        let (head, targets) = (self.model.last()?, self.tokens(number)?.targets);
        let Some(scale) = self.scale else {
            let logits = head.infer(y, &mut Context::default())?;
            self.losses[number] = self.loss.forward(logits, targets)?.0.sum()?;
            return Ok(None);
        };
        let (logits, saved) = head.forward(y)?;
        let (losses, of_loss) = self.loss.forward(logits, targets)?;
        self.losses[number] = losses.sum()?;
        head.backward(saved, self.loss.backward(of_loss, scale)?).map(Some)
    }
}
