//! The parts of a training step.

use super::{Part, Probe, kinds, with_blocks};
use crate::{
    comm::{Op, Transfer},
    device::{DType, Element, Meta},
    error::{Error, Result},
    models::{Decoder, DecoderConfig, DecoderEnds, Tokens},
    optim::{AdamW, grad_norm},
    parallel::{DropoutState, Layer, ResidualStream, VocabParallelCrossEntropy},
    plan::Machine,
    shard::Sequences,
    tensor::{Param, Random, Tensor},
    train::{Microbatch, PipelineEnds, Schedule},
};

/// The parts of a training step on one tensor-parallel rank.
#[derive(Clone, Debug)]
pub(in crate::plan) struct Training {
    /// Each kind of block.
    pub(in crate::plan) blocks: Vec<Block>,
    /// The embedding of a microbatch.
    pub(in crate::plan) input: Part,
    /// The head, the loss and their backward: of the first microbatch, and of a later one.
    pub(in crate::plan) loss: [Part; 2],
    /// The backward of the embedding: of the first microbatch, and of a later one.
    pub(in crate::plan) input_grad: [Part; 2],
    /// The parameters outside the blocks, of each position in a pipeline.
    only: Outside,
    first: Outside,
    middle: Outside,
    last: Outside,
    /// The bytes of a microbatch's residual stream.
    pub(in crate::plan) activation: u64,
    /// The number of elements of the table that both ends of a pipeline hold.
    pub(in crate::plan) tied: usize,
}

/// A kind of block.
#[derive(Clone, Debug)]
pub(in crate::plan) struct Block {
    /// A block that saves what its backward needs.
    pub(in crate::plan) plain: BlockPasses,
    /// A block that recomputes its forward.
    pub(in crate::plan) recomputed: BlockPasses,
    pub(in crate::plan) params: Params,
}

/// The passes of a block.
#[derive(Clone, Debug)]
pub(in crate::plan) struct BlockPasses {
    pub(in crate::plan) forward: Part,
    /// Of the first microbatch, which allocates the gradients, and of a later one.
    pub(in crate::plan) backward: [Part; 2],
}

/// Parameters and their update.
#[derive(Clone, Debug, Default)]
pub(in crate::plan) struct Params {
    /// The bytes of the weights.
    pub(in crate::plan) weights: u64,
    /// The number of elements of each parameter, in the order of the model's list.
    pub(in crate::plan) lengths: Vec<usize>,
    /// The gradients' contribution to the norm, without the collective.
    pub(in crate::plan) norm: Part,
    /// The optimizer's first step, which allocates its state.
    pub(in crate::plan) first_step: Part,
    /// A later step.
    pub(in crate::plan) step: Part,
}

/// The parameters of a rank outside its blocks.
#[derive(Clone, Debug, Default)]
pub(in crate::plan) struct Outside {
    /// Those before the blocks in the model's list.
    pub(in crate::plan) before: Params,
    /// Those after the blocks.
    pub(in crate::plan) after: Params,
}

/// The place of a rank in a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plan) enum Position {
    Only,
    First,
    Middle,
    Last,
}

impl Position {
    pub(in crate::plan) fn of(rank: usize, ranks: usize) -> Self {
        match (rank, rank + 1 == ranks) {
            (0, true) => Self::Only,
            (0, false) => Self::First,
            (_, true) => Self::Last,
            (_, false) => Self::Middle,
        }
    }
}

impl Training {
    /// Runs rank `rank` of `ranks` tensor-parallel ranks, with microbatches of `sequences`
    /// sequences of `tokens` tokens. `together` says whether one pipeline rank has both ends of the
    /// model, which then share a tied table.
    pub(in crate::plan) fn run<S: ResidualStream, T: Element>(
        model: &DecoderConfig,
        (rank, ranks): (usize, usize),
        (sequences, tokens): (usize, usize),
        dtype: DType,
        together: bool,
    ) -> Result<Self> {
        let rows = sequences.checked_mul(tokens).filter(|&rows| u32::try_from(rows).is_ok());
        let rows = rows.ok_or_else(|| {
            Error::invalid(
                "plan",
                format!("{sequences} sequences of {tokens} tokens are too many for a microbatch"),
            )
        })?;
        let start = DropoutState { step: 0, row: 0, sequence: 0 };
        let microbatch = Microbatch {
            sequences: Sequences::packed(vec![tokens; sequences]),
            dropout: (model.dropout > 0.0).then_some(start),
        };
        let ids = vec![0; rows];
        let probe = Probe::new(rank, ranks, dtype)?;
        let mut training: Option<Self> = None;
        for layer in kinds(model).0 {
            let load = |recomputed| {
                let config = with_blocks(model, layer, if together { 1 } else { 2 }, recomputed);
                Run::<S, T>::load(&probe, &config, together)
            };
            let (mut own, plain, params) = load(false)?.measure(&probe, &ids, &microbatch)?;
            let recomputed = load(true)?.measure_block(&probe, &microbatch)?;
            let block = Block { plain, recomputed, params };
            training = match training {
                None => {
                    own.blocks.push(block);
                    Some(own)
                }
                Some(mut all) => {
                    all.blocks.push(block);
                    Some(all)
                }
            };
        }
        training.ok_or_else(|| Error::invalid("plan", "the model has no blocks"))
    }

    /// Sets the seconds of all parts on a machine, with `ranks` ranks of which a tensor-parallel
    /// group has `tensor`.
    pub(in crate::plan) fn price(&mut self, machine: &Machine, ranks: usize, tensor: usize) -> Result<()> {
        let Self { blocks, input, loss, input_grad, only, first, middle: _, last, .. } = self;
        let mut parts = vec![input];
        parts.extend(loss);
        parts.extend(input_grad);
        let mut params = Vec::new();
        for Block { plain, recomputed, params: own } in blocks {
            for passes in [plain, recomputed] {
                parts.push(&mut passes.forward);
                parts.extend(&mut passes.backward);
            }
            params.push(own);
        }
        for outside in [only, first, last] {
            params.extend([&mut outside.before, &mut outside.after]);
        }
        for Params { norm, step, .. } in params {
            parts.extend([norm, step]);
        }
        parts.into_iter().try_for_each(|part| part.price(machine, ranks, tensor))
    }

    /// The seconds of a forward and a backward through the fastest kind of block.
    pub(in crate::plan) fn fastest_block(&self) -> f64 {
        let passes = self.blocks.iter().map(|block| &block.plain);
        let seconds = passes.map(|passes| passes.forward.time.total() + passes.backward[1].time.total());
        seconds.fold(f64::INFINITY, f64::min)
    }

    /// The exchange of a microbatch's residual stream between two stages.
    pub(in crate::plan) fn exchange(&self, dtype: DType) -> Transfer {
        Transfer { op: Op::Exchange, dtype, elements: self.activation as usize / dtype.size() }
    }

    /// The parameters outside the blocks at this position.
    pub(in crate::plan) fn outside(&self, position: Position) -> &Outside {
        match position {
            Position::Only => &self.only,
            Position::First => &self.first,
            Position::Middle => &self.middle,
            Position::Last => &self.last,
        }
    }
}

/// The models of a run: with both ends, or the two ranks of a pipeline.
struct Run<S: ResidualStream, T: Element> {
    first: Decoder<S, T, Meta>,
    last: Option<Decoder<S, T, Meta>>,
}

impl<S: ResidualStream, T: Element> Run<S, T> {
    fn load(probe: &Probe, config: &DecoderConfig, together: bool) -> Result<Self> {
        let source = Random::normal(1, 0.02);
        let schedule = Schedule::gpipe(if together { 1 } else { 2 }, 1);
        let load = |rank| Decoder::load_stages(&probe.group, &source, config, &schedule, rank);
        Ok(Self { first: load(0)?, last: if together { None } else { Some(load(1)?) } })
    }

    /// Runs the block for two microbatches.
    fn measure_block(&self, probe: &Probe, microbatch: &Microbatch) -> Result<BlockPasses> {
        let block = &self.first.chunks()[0];
        block.params().iter().for_each(|param| param.set_microbatches(2));
        let run = || {
            let rows = microbatch.sequences.rows();
            let shape = [S::local_rows(&probe.group, rows)?.len(), self.first.config().hidden()];
            let stream = || -> Result<_> {
                let x = S::of_local(&probe.group, rows, Tensor::<T, _>::zeros(&probe.device, shape)?)?;
                let x = x.with_sequences(microbatch.sequences.clone())?;
                Ok(match microbatch.dropout {
                    Some(dropout) => x.with_dropout_state(dropout),
                    None => x,
                })
            };
            let (x, dy) = (stream()?, stream()?);
            let ((_, saved), forward) = probe.run(|| block.forward(x))?;
            let (_, backward) = probe.run(|| block.backward(saved, dy))?;
            Ok::<_, Error>((forward, backward))
        };
        let ((forward, backward), (_, later)) = (run()?, run()?);
        Ok(BlockPasses { forward, backward: [backward, later] })
    }

    /// Runs a step of two microbatches. Returns the parts outside the blocks, and those of the
    /// block.
    fn measure(
        &self,
        probe: &Probe,
        ids: &[u32],
        microbatch: &Microbatch,
    ) -> Result<(Training, BlockPasses, Params)> {
        let (first, last) = (&self.first, self.last.as_ref().unwrap_or(&self.first));
        let block = &first.chunks()[0];
        let (head, tail) = (first.params(), last.params());
        head.iter().chain(&tail).for_each(|param| param.set_microbatches(2));
        let ends = |model| {
            let tokens = Tokens { ids, targets: ids };
            DecoderEnds::new(model, vec![tokens; 2], VocabParallelCrossEntropy::default(), Some(1.0))
        };
        let (mut begin, mut end) = (ends(first), ends(last));
        let mut activation = 0;
        let mut microbatch = |number| {
            let (x, input) = probe.run(|| begin.input(number, microbatch))?;
            activation = (x.local().len() * size_of::<T>()) as u64;
            let ((y, saved), forward) = probe.run(|| block.forward(x))?;
            let (dy, loss) = probe.run(|| end.loss(number, y))?;
            let dy = dy.ok_or_else(|| Error::internal("plan", "a loss without a gradient"))?;
            let (dx, backward) = probe.run(|| block.backward(saved, dy))?;
            let ((), input_grad) = probe.run(|| begin.input_grad(number, dx))?;
            Ok::<_, Error>((input, forward, loss, backward, input_grad))
        };
        let (input, forward, loss, backward, input_grad) = microbatch(0)?;
        let (_, _, later_loss, later_backward, later_input_grad) = microbatch(1)?;
        let passes = BlockPasses { forward, backward: [backward, later_backward] };

        let own = block.params();
        let is_own = |param: &Param<T, Meta>| own.iter().any(|other| other.is_same(param));
        // In the list of the last rank, the blocks are others than those measured.
        let blocks = |model: &Decoder<S, T, Meta>| model.chunks()[0].params();
        let of_last = blocks(last);
        let is_of_last = |param: &Param<T, Meta>| of_last.iter().any(|other| other.is_same(param));
        let (before, after) = around(&head, is_own);
        let outside = |before: &[_], after: &[_]| {
            Ok::<_, Error>(Outside {
                before: Params::measure(probe, before)?,
                after: Params::measure(probe, after)?,
            })
        };
        let at_first = outside(before, after)?;
        let [only, first, last] = if self.last.is_some() {
            let (before, after) = around(&tail, is_of_last);
            [Outside::default(), at_first, outside(before, after)?]
        } else {
            // The ends of a pipeline divide the parameters of an untied model.
            let first = Outside { before: at_first.before.clone(), after: Params::default() };
            let last = Outside { before: Params::default(), after: at_first.after.clone() };
            [at_first, first, last]
        };
        let training = Training {
            blocks: Vec::new(),
            input,
            loss: [loss, later_loss],
            input_grad: [input_grad, later_input_grad],
            only,
            first,
            middle: Outside::default(),
            last,
            activation,
            tied: self.first.tied().map_or(0, |table| table.shape().len()),
        };
        Ok((training, passes, Params::measure(probe, &own)?))
    }
}

/// The parameters before and after the blocks in a list.
fn around<T: Element>(
    params: &[Param<T, Meta>],
    in_block: impl Fn(&Param<T, Meta>) -> bool,
) -> (&[Param<T, Meta>], &[Param<T, Meta>]) {
    let start = params.iter().position(&in_block).unwrap_or(params.len());
    let end = params.iter().rposition(in_block).map_or(start, |last| last + 1);
    (&params[..start], &params[end..])
}

impl Params {
    fn measure<T: Element>(probe: &Probe, params: &[Param<T, Meta>]) -> Result<Self> {
        let lengths: Vec<_> = params.iter().map(|param| param.shape().len()).collect();
        if params.is_empty() {
            return Ok(Self::default());
        }
        let mut adamw = AdamW::default();
        let (_, mut norm) = probe.run(|| grad_norm(params, &[&probe.group]))?;
        norm.transfers.clear();
        let ((), first_step) = probe.run(|| adamw.step(params, 1e-3, 1.0))?;
        let ((), step) = probe.run(|| adamw.step(params, 1e-3, 1.0))?;
        let weights = (lengths.iter().sum::<usize>() * size_of::<T>()) as u64;
        Ok(Self { weights, lengths, norm, first_step, step })
    }
}
