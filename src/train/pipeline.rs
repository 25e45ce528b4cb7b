//! Runs a pipeline schedule over the stages of a model.

use super::schedule::{Action, Compute, Message, Pass, Schedule};
use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::{Error, Result, Site, same_size},
    kernels::Backend,
    parallel::{Context, DTensor, DropoutState, Layer, ResidualStream},
    shard::{Reduction, Sequences, Shape},
    tensor::{Param, Tensor},
};
use std::collections::HashMap;

/// The data of a microbatch that every rank of the pipeline needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Microbatch {
    /// The sequences of its tokens.
    pub sequences: Sequences,
    /// The microbatch's position in the training run, from which dropout draws its masks. `None`
    /// without dropout.
    pub dropout: Option<DropoutState>,
}

impl Microbatch {
    /// Returns a microbatch of `rows` rows: one sequence, no dropout.
    pub fn rows(rows: usize) -> Self {
        Self { sequences: Sequences::one(rows), dropout: None }
    }
}

/// The two ends of a pipelined model: the input of the first stage and the loss of the last one.
pub trait PipelineEnds<S: ResidualStream, T: Element, B: Backend> {
    /// Returns the input of the first stage for microbatch `number`. Only the first rank calls it.
    ///
    /// # Errors
    /// Those of the implementation; [`Pipeline::run`] returns them.
    fn input(&mut self, number: usize, microbatch: &Microbatch) -> Result<DTensor<S, T, B>>;

    /// Receives the gradient of the loss with respect to the input of microbatch number
    /// `microbatch`. Only the first rank calls it.
    ///
    /// # Errors
    /// Those of the implementation; [`Pipeline::run`] returns them.
    fn input_grad(&mut self, microbatch: usize, dx: DTensor<S, T, B>) -> Result<()>;

    /// Is called after the backward of chunk `chunk` of this rank for microbatch number
    /// `microbatch`. Private training clips the gradients of the chunk here. Does nothing by
    /// default.
    ///
    /// # Errors
    /// Those of the implementation; [`Pipeline::run`] returns them.
    fn after_backward(&mut self, chunk: usize, microbatch: usize) -> Result<()> {
        let _ = (chunk, microbatch);
        Ok(())
    }

    /// Receives the output of the last stage. Returns the gradient of the loss with respect to that
    /// output, or `None` in an evaluation. Only the last rank calls it.
    ///
    /// # Errors
    /// Those of the implementation; [`Pipeline::run`] returns them.
    fn loss(&mut self, microbatch: usize, y: DTensor<S, T, B>) -> Result<Option<DTensor<S, T, B>>>;
}

/// Pipeline parallelism: a model whose layers are distributed over the ranks of a group.
///
/// Each rank of the pipeline group holds `chunks` layers (usually [`Vec`]s of layers) and runs
/// microbatches through them in the order of a [`Schedule`]. The layers of a stage may be tensor
/// parallel over `tensor`. Each rank of `tensor` exchanges its shard with the rank that has the
/// same number in the tensor-parallel group of the neighbouring stage.
///
/// Collectives: exchanges between neighbours, one activation and one gradient for each microbatch
/// and stage boundary.
pub struct Pipeline<B: Backend> {
    group: Group<B>,
    tensor: Group<B>,
    schedule: Schedule,
    actions: Vec<Action>,
    /// The features of each stage's input.
    widths: Vec<usize>,
    /// The group of the first and the last rank.
    ends: Option<Group<B>>,
}

impl<B: Backend> Pipeline<B> {
    /// Makes a pipeline over `group`, whose stages exchange tensors of `width` features. Every rank
    /// of the group has to call `new`, because `new` splits the group.
    ///
    /// # Errors
    /// When the schedule has another number of ranks than the group or cannot be run; when a group
    /// of several ranks has an invariant reduction; when a collective fails.
    #[track_caller]
    pub fn new(group: &Group<B>, tensor: &Group<B>, schedule: Schedule, width: usize) -> Result<Self> {
        let widths = vec![width; schedule.stages()];
        Self::with_widths(group, tensor, schedule, widths)
    }

    /// As [`Pipeline::new`], with the number of features of each stage's input. Every rank has to
    /// pass the same numbers.
    ///
    /// # Errors
    /// As [`Pipeline::new`], and when the numbers of widths and stages differ.
    #[track_caller]
    pub fn with_widths(
        group: &Group<B>,
        tensor: &Group<B>,
        schedule: Schedule,
        widths: Vec<usize>,
    ) -> Result<Self> {
        const OP: &str = "pipeline";
        let rank = group.rank();
        same_size(OP, "the ranks of the schedule", schedule.ranks(), "the ranks of the group", group.size())?;
        same_size(OP, "the number of widths", widths.len(), "that of stages", schedule.stages())?;
        if group.size() > 1 && group.reduction() != Reduction::Fast {
            let reason = "sums over the stages (norms, tied tables) depend on the number of stages: give the pipeline's group `Reduction::Fast`";
            return Err(Error::Unsupported { op: OP, reason: reason.into() });
        }
        let actions = schedule.actions()?.swap_remove(rank);
        let at_end = rank == 0 || rank + 1 == group.size();
        let ends = group.split(at_end.then_some(0), 0)?;
        Ok(Self { group: group.clone(), tensor: tensor.clone(), schedule, actions, widths, ends })
    }

    /// Whether this rank has the first stage.
    pub fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    /// Whether this rank has the last stage.
    pub fn is_last(&self) -> bool {
        self.group.rank() + 1 == self.group.size()
    }

    /// Returns the schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Sums the gradients of a parameter that the first and the last rank both hold (a tied
    /// embedding). Both ranks receive the sum. Other ranks need not call this.
    ///
    /// A rank without a gradient contributes zeros. If neither rank has a gradient, neither has one
    /// afterwards. Call this after [`DataParallel::finish`](super::DataParallel::finish), because
    /// `finish` would overwrite the sum.
    ///
    /// Collectives: two all-reduces over the two ranks, of one number and of the gradient.
    ///
    /// # Errors
    /// When terms of an invariant reduction are missing or not summed over the replicas yet; when a
    /// collective fails.
    #[track_caller]
    pub fn sum_tied<T: Element>(&self, param: &Param<T, B>) -> Result<()> {
        let (Some(ends), false) = (&self.ends, self.is_first() && self.is_last()) else { return Ok(()) };
        const NONE: f64 = 0.0;
        const SOME: f64 = 1.0;
        const INCOMPLETE: f64 = 2.0;
        let _site = Site::here().enter();
        let complete = param.check_complete("tied parameter");
        let own = match (&complete, param.grad()) {
            (Err(_), _) => INCOMPLETE,
            (Ok(()), Some(_)) => SOME,
            (Ok(()), None) => NONE,
        };
        let state = ends.all_reduce_host(ReduceOp::Max, &[own])?[0];
        complete?;
        if state == INCOMPLETE {
            let reason = format!("terms of {} are not summed over its replicas yet", param.name());
            return Err(Error::invalid("tied parameter", reason));
        }
        if state == NONE {
            return Ok(());
        }
        let mut grad = match param.take_grad() {
            Some(grad) => grad,
            None => Tensor::zeros(ends.device(), param.shape())?,
        };
        let reduced = ends.all_reduce(ReduceOp::Sum, &mut grad);
        param.set_grad(grad)?;
        reduced
    }

    /// Runs all microbatches forward and backward, and adds their gradients to the parameters'
    /// gradients.
    ///
    /// # Errors
    /// When the number of microbatches or chunks differs from the schedule's; when a layer, `ends`
    /// or a collective fails.
    #[track_caller]
    pub fn run<S: ResidualStream, T: Element, L: Layer<T, B, In = S, Out = S>>(
        &self,
        chunks: &[L],
        microbatches: &[Microbatch],
        ends: &mut impl PipelineEnds<S, T, B>,
    ) -> Result<()> {
        let mut run = Run::new(self, chunks, microbatches)?;
        for action in &self.actions {
            match *action {
                Action::Exchange { send, receive } => run.exchange(send, receive)?,
                Action::Compute(compute) => match compute.pass {
                    Pass::Forward => run.forward(compute, &chunks[compute.chunk], ends, true)?,
                    Pass::Backward => run.backward(compute, &chunks[compute.chunk], ends)?,
                },
            }
        }
        Ok(())
    }

    /// Runs all microbatches forward only, in the order of the schedule.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    #[track_caller]
    pub fn evaluate<S: ResidualStream, T: Element, L: Layer<T, B, In = S, Out = S>>(
        &self,
        chunks: &[L],
        microbatches: &[Microbatch],
        ends: &mut impl PipelineEnds<S, T, B>,
    ) -> Result<()> {
        let mut run = Run::new(self, chunks, microbatches)?;
        let forward = |message: &Message| message.pass == Pass::Forward;
        for action in &self.actions {
            match *action {
                Action::Exchange { send, receive } => {
                    let (send, receive) = (send.filter(forward), receive.filter(forward));
                    if send.is_some() || receive.is_some() {
                        run.exchange(send, receive)?;
                    }
                }
                Action::Compute(compute) if compute.pass == Pass::Forward => {
                    run.forward(compute, &chunks[compute.chunk], ends, false)?;
                }
                Action::Compute(_) => {}
            }
        }
        Ok(())
    }
}

/// The tensors of a step in progress.
struct Run<'a, S: ResidualStream, T: Element, B: Backend, L: Layer<T, B, In = S, Out = S>> {
    pipeline: &'a Pipeline<B>,
    microbatches: &'a [Microbatch],
    /// Activations and gradients to be used or sent, by pass, receiving stage and microbatch.
    tensors: HashMap<(Pass, usize, usize), DTensor<S, T, B>>,
    /// The layers' saved tensors, by chunk and microbatch.
    saved: HashMap<(usize, usize), L::Saved>,
}

impl<'a, S: ResidualStream, T: Element, B: Backend, L: Layer<T, B, In = S, Out = S>> Run<'a, S, T, B, L> {
    fn new(pipeline: &'a Pipeline<B>, chunks: &[L], microbatches: &'a [Microbatch]) -> Result<Self> {
        const OP: &str = "pipeline";
        let (schedule, given) = (&pipeline.schedule, microbatches.len());
        same_size(OP, "the chunks given", chunks.len(), "those of the schedule", schedule.chunks())?;
        same_size(OP, "the microbatches given", given, "those of the schedule", schedule.microbatches())?;
        Ok(Self { pipeline, microbatches, tensors: HashMap::new(), saved: HashMap::new() })
    }

    fn take(&mut self, pass: Pass, stage: usize, microbatch: usize) -> Result<DTensor<S, T, B>> {
        let missing = || {
            let reason = format!("stage {stage} lacks the tensor of microbatch {microbatch} for {pass:?}");
            Error::internal("pipeline", reason)
        };
        self.tensors.remove(&(pass, stage, microbatch)).ok_or_else(missing)
    }

    #[track_caller]
    fn exchange(&mut self, send: Option<Message>, receive: Option<Message>) -> Result<()> {
        let Pipeline { group, tensor, widths, .. } = self.pipeline;
        let outgoing = match send {
            Some(message) => {
                Some((message.peer, self.take(message.pass, message.stage, message.microbatch)?))
            }
            None => None,
        };
        let incoming = receive.map(|message| -> Result<_> {
            // An activation has the shape of the receiving stage's input. A gradient has the shape
            // of the receiving stage's output.
            let boundary = match message.pass {
                Pass::Forward => message.stage,
                Pass::Backward => message.stage + 1,
            };
            let tokens = self.microbatches[message.microbatch].sequences.rows();
            Ok((message, tokens, Shape::from([S::local_rows(tensor, tokens)?.len(), widths[boundary]])))
        });
        let incoming = incoming.transpose()?;
        let arrived = group.exchange(
            outgoing.as_ref().map(|(peer, x)| (*peer, x.local())),
            incoming.map(|(message, _, shape)| (message.peer, shape)),
        )?;
        if let (Some(local), Some((message, tokens, _))) = (arrived, incoming) {
            let Microbatch { sequences, dropout } = &self.microbatches[message.microbatch];
            let mut x = S::of_local(tensor, tokens, local)?.with_sequences(sequences.clone())?;
            if let Some(dropout) = dropout {
                x = x.with_dropout_state(*dropout);
            }
            self.tensors.insert((message.pass, message.stage, message.microbatch), x);
        }
        Ok(())
    }

    #[track_caller]
    fn forward(
        &mut self,
        compute: Compute,
        layer: &L,
        ends: &mut impl PipelineEnds<S, T, B>,
        train: bool,
    ) -> Result<()> {
        let Compute { pass, chunk, microbatch } = compute;
        let schedule = &self.pipeline.schedule;
        let stage = schedule.stage(self.pipeline.group.rank(), chunk);
        let x = match stage {
            0 => ends.input(microbatch, &self.microbatches[microbatch])?,
            _ => self.take(pass, stage, microbatch)?,
        };
        let y = if train {
            let (y, saved) = layer.forward(x)?;
            self.saved.insert((chunk, microbatch), saved);
            y
        } else {
            layer.infer(x, &mut Context::default())?
        };
        if stage + 1 < schedule.stages() {
            let (have, want) = (y.shape().cols(), self.pipeline.widths[stage + 1]);
            same_size(
                "pipeline",
                "the features of a stage's output",
                have,
                "those of the next stage's input",
                want,
            )?;
            self.tensors.insert((pass, stage + 1, microbatch), y);
            return Ok(());
        }
        // On the last stage, the gradient of the loss is the input of the backward.
        match ends.loss(microbatch, y)? {
            Some(dy) => {
                self.tensors.insert((Pass::Backward, stage, microbatch), dy);
            }
            None if train => return Err(Error::invalid("pipeline", "`loss` returned no gradient")),
            None => {}
        }
        Ok(())
    }

    #[track_caller]
    fn backward(&mut self, compute: Compute, layer: &L, ends: &mut impl PipelineEnds<S, T, B>) -> Result<()> {
        let Compute { pass, chunk, microbatch } = compute;
        let stage = self.pipeline.schedule.stage(self.pipeline.group.rank(), chunk);
        let dy = self.take(pass, stage, microbatch)?;
        let missing = || Error::invalid("pipeline", "a backward without its forward");
        let saved = self.saved.remove(&(chunk, microbatch)).ok_or_else(missing)?;
        let dx = layer.backward(saved, dy)?;
        ends.after_backward(chunk, microbatch)?;
        match stage.checked_sub(1) {
            None => ends.input_grad(microbatch, dx),
            Some(before) => {
                self.tensors.insert((pass, before, microbatch), dx);
                Ok(())
            }
        }
    }
}
