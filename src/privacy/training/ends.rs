//! Clipping in a pipeline.

use super::{Samples, Step};
use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    parallel::{DTensor, ResidualStream},
    train::{Microbatch, Pipeline, PipelineEnds},
};

/// The ends of a pipeline that clip each part's gradients directly after the part's backward of
/// each microbatch. They wrap the ends of the ordinary training, such as
/// [`DecoderEnds`](crate::models::DecoderEnds).
///
/// A rank's parts ([`Private::new`](super::Private::new)) are one for each of its chunks, in order,
/// and on the last stage one more for the head, whose backward runs in [`PipelineEnds::loss`]. The
/// first stage's part also has the parameters whose backward runs in [`PipelineEnds::input_grad`].
/// [`Decoder::parts`](crate::models::Decoder::parts) lists them.
pub struct PrivateEnds<'a, 'p, T: Element, B: Backend, E> {
    ends: &'a mut E,
    step: &'a mut Step<'p, T, B>,
    samples: &'a [Samples],
    chunks: usize,
    is_first: bool,
}

impl<'a, 'p, T: Element, B: Backend, E> PrivateEnds<'a, 'p, T, B, E> {
    /// Wraps the ends of a pipeline, for one step. `samples` has those of each microbatch of the
    /// schedule. Batches differ in size, so fill the microbatches with padding
    /// ([`Samples::padded`]), or make a schedule for each step.
    pub fn new(
        pipeline: &Pipeline<B>,
        ends: &'a mut E,
        step: &'a mut Step<'p, T, B>,
        samples: &'a [Samples],
    ) -> Self {
        let chunks = pipeline.schedule().chunks();
        Self { ends, step, samples, chunks, is_first: pipeline.is_first() }
    }

    #[track_caller]
    fn clip(&mut self, part: usize, microbatch: usize) -> Result<()> {
        let missing = || {
            let (what, of) = ("the number of the microbatch", "the number of microbatches with samples");
            Error::sizes(super::OP, what, microbatch, of, self.samples.len())
        };
        let samples = *self.samples.get(microbatch).ok_or_else(missing)?;
        self.step.clip_part(part, samples).map(drop)
    }
}

impl<S, T, B, E> PipelineEnds<S, T, B> for PrivateEnds<'_, '_, T, B, E>
where
    S: ResidualStream,
    T: Element,
    B: Backend,
    E: PipelineEnds<S, T, B>,
{
    #[track_caller]
    fn input(&mut self, number: usize, microbatch: &Microbatch) -> Result<DTensor<S, T, B>> {
        self.ends.input(number, microbatch)
    }

    #[track_caller]
    fn input_grad(&mut self, microbatch: usize, dx: DTensor<S, T, B>) -> Result<()> {
        self.ends.input_grad(microbatch, dx)?;
        self.clip(0, microbatch)
    }

    #[track_caller]
    fn after_backward(&mut self, chunk: usize, microbatch: usize) -> Result<()> {
        self.ends.after_backward(chunk, microbatch)?;
        // The backward of the first stage ends in `input_grad`.
        if self.is_first && chunk == 0 { Ok(()) } else { self.clip(chunk, microbatch) }
    }

    #[track_caller]
    fn loss(&mut self, microbatch: usize, y: DTensor<S, T, B>) -> Result<Option<DTensor<S, T, B>>> {
        let dy = self.ends.loss(microbatch, y)?;
        if dy.is_some() && self.step.parts() > self.chunks {
            self.clip(self.chunks, microbatch)?;
        }
        Ok(dy)
    }
}
