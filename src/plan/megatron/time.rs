//! The time of a training step.

use super::{Family, Model, OP, Recompute, Run};
use crate::{
    comm::{Op, Transfer},
    device::{DType, Work, WorkKind},
    error::{Error, Result},
    plan::{Exposed, Machine},
};

/// The predicted seconds of a training step, and what they consist of on the slowest pipeline rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// The whole step: the sum of the other fields.
    pub seconds: f64,
    /// Kernels of the layers and of the head.
    pub compute: f64,
    /// Communication. None of it is taken to be hidden.
    pub exposed: Exposed,
    /// Waiting for the pipeline to fill and to drain.
    pub bubble: f64,
    /// The optimizer's update.
    pub optimizer: f64,
}

impl Run {
    /// Predicts the seconds of a training step:
    ///
    /// m (stage + head) + (p − 1) / v · stage + reduction + update,
    ///
    /// where a stage is a microbatch's forward and backward through the L/p layers of a rank, with
    /// their collectives and the exchanges with the neighbours.
    ///
    /// * Products ([`Machine::kernel`]): 4 of a layer and 2 of attention's scores, forward once,
    ///   backward twice. Fused attention has 2 forward and 5 backward in one kernel each.
    /// * Passes over memory, forward + backward, each of a 2-byte tensor: norms 2 + 3, residual
    ///   additions 3 + 3 (with dropout 3.5 + 5.5), both twice, of s b h / t'; GELU 2 + 3 or the
    ///   gate 3 + 5, of s b f / t; rotary positions 2 + 2, of q and k; softmax 2 + 3 and dropout
    ///   2.5 + 2.5, of a b s² / t. Adding a weight's gradient to its accumulator in f32 moves 10
    ///   bytes.
    /// * Recomputation repeats attention's scores (selective) or the forward (full).
    /// * Tensor parallelism: all-reduces of s b h, 2 forward, 2 backward, 2 in a repeated forward,
    ///   and one each for the embedding and the head. Sequence parallelism makes an all-gather and
    ///   a reduce-scatter of each, which take as long.
    /// * Pipeline: v messages of s b h / t each way, and without sequence parallelism an all-gather
    ///   of each within the tensor-parallel group (arXiv 2104.04473, section 4.1).
    /// * Reduction: an all-reduce over the d replicas of 2 bytes for each parameter of the rank.
    /// * Update: the 18 bytes of each parameter are read and written.
    ///
    /// Collectives take the seconds of [`Machine::seconds`].
    ///
    /// # Errors
    /// When the run does not divide the model, when the machine is invalid or has no rate for bf16,
    /// and when the seconds are not finite.
    pub fn step(&self, model: &Model, machine: &Machine) -> Result<Step> {
        let parameters = self.parameters(model)?;
        machine.check()?;
        let on = On { run: self, model, machine };
        let layer = on.layer()?;
        let layers = model.layers as f64 / self.pipeline as f64;
        let microbatches = self.microbatches(model)? as f64;
        let (repeated, reduces) = match self.recompute {
            Recompute::None => (0.0, 4.0),
            Recompute::Selective => (layer.scores, 4.0),
            Recompute::Full => (layer.forward, 6.0),
        };
        let compute = layers * (layer.forward + layer.backward + repeated);
        let reduce = 2.0 * on.gather(on.tokens() * model.hidden as f64, self.tensor, 1);
        let exchange = 2.0 * self.chunks as f64 * on.exchange();
        let stage = compute + layers * reduces * reduce + exchange;
        let ends = if self.pipeline == 1 { 2.0 } else { 1.0 };
        let exposed = Exposed {
            tensor: microbatches * (layers * reduces + ends) * reduce,
            data: 2.0 * on.gather(parameters, self.data, self.tensor),
            pipeline: microbatches * exchange,
        };
        let state = if self.distributed_optimizer { self.data as f64 } else { 1.0 };
        let compute = microbatches * (compute + on.head()?);
        let bubble = (self.pipeline - 1) as f64 / self.chunks as f64 * stage;
        let optimizer = on.passes(&[(18.0, parameters / state)])?;
        let communication = exposed.tensor + exposed.data + exposed.pipeline;
        let seconds = compute + communication + bubble + optimizer;
        if !seconds.is_finite() {
            let reason = format!("the step takes {seconds} s: the sizes are too large");
            return Err(Error::invalid(OP, reason));
        }
        Ok(Step { seconds, compute, exposed, bubble, optimizer })
    }
}

/// The seconds of a layer's kernels for a microbatch on one rank.
struct Layer {
    forward: f64,
    backward: f64,
    /// The part of `forward` between q, k, v and attention's output.
    scores: f64,
}

/// A run of a model on a machine.
struct On<'a> {
    run: &'a Run,
    model: &'a Model,
    machine: &'a Machine,
}

/// The element type of weights, activations and messages.
const DTYPE: DType = DType::BF16;

impl On<'_> {
    fn tokens(&self) -> f64 {
        self.model.sequence as f64 * self.run.sequences as f64
    }

    fn kernel(&self, kind: WorkKind, flops: f64, bytes: f64) -> Result<f64> {
        let work = Work { kind, dtype: DTYPE, flops: flops as u64, bytes: bytes as u64 };
        self.machine.kernel(&work, self.run.ranks())
    }

    /// A product of `[m, k]` and `[k, n]`.
    fn product(&self, m: f64, n: f64, k: f64) -> Result<f64> {
        self.kernel(WorkKind::Product, 2.0 * m * n * k, 2.0 * (m * k + k * n + m * n))
    }

    /// Kernels that read or write a number of tensors of so many elements.
    fn passes(&self, kernels: &[(f64, f64)]) -> Result<f64> {
        let seconds =
            |(tensors, elements): &(f64, f64)| self.kernel(WorkKind::Other, 0.0, 2.0 * tensors * elements);
        kernels.iter().map(seconds).sum()
    }

    fn layer(&self) -> Result<Layer> {
        let Self { run, model, .. } = *self;
        let [h, f, t] = [model.hidden, model.ffn, run.tensor].map(|size| size as f64);
        let tokens = self.tokens();
        let products = self.product(tokens, model.qkv() / t, h)?
            + self.product(tokens, h, h / t)?
            + self.product(tokens, model.up() / t, h)?
            + self.product(tokens, h, f / t)?;
        let scores = self.scores()?;
        let stream = tokens * h / run.token_shards();
        let inner = tokens * f / t;
        let turned = tokens * (model.qkv() + h) / 2.0 / t;
        // In units of a 2-byte tensor: the gradient is read, the accumulator read and written.
        let accumulated = (5.0, model.layer_parameters() / t);
        let (forward, backward) = match model.family {
            Family::Gpt => (
                self.passes(&[(2.0, stream), (3.5, stream), (2.0, stream), (3.5, stream), (2.0, inner)])?,
                2.0 * self.passes(&[(3.0, stream), (2.5, stream), (3.0, stream)])?
                    + self.passes(&[(3.0, inner), accumulated])?,
            ),
            Family::Llama => (
                2.0 * self.passes(&[(2.0, stream), (3.0, stream)])?
                    + self.passes(&[(2.0, turned), (3.0, inner)])?,
                2.0 * self.passes(&[(3.0, stream), (3.0, stream)])?
                    + self.passes(&[(2.0, turned), (5.0, inner), accumulated])?,
            ),
        };
        Ok(Layer {
            forward: products + scores.0 + forward,
            backward: 2.0 * products + scores.1 + backward,
            scores: scores.0,
        })
    }

    /// Attention without its projections, forward and backward.
    fn scores(&self) -> Result<(f64, f64)> {
        let Self { run, model, .. } = *self;
        let [h, a, s, t] = [model.hidden, model.heads, model.sequence, run.tensor].map(|size| size as f64);
        let flops = 2.0 * self.tokens() * s * h / t;
        let features = self.tokens() * h / t;
        if run.flash_attention {
            // q, k, v and the output; backward also their gradients.
            let forward = self.kernel(WorkKind::Attention, 2.0 * flops, 2.0 * 4.0 * features)?;
            return Ok((forward, self.kernel(WorkKind::Attention, 5.0 * flops, 2.0 * 8.0 * features)?));
        }
        let scores = a * self.tokens() * s / t;
        let product = self.kernel(WorkKind::Attention, flops, 2.0 * (2.0 * features + scores))?;
        let dropout = match model.family {
            Family::Gpt => self.passes(&[(2.5, scores)])?,
            Family::Llama => 0.0,
        };
        let forward = 2.0 * product + self.passes(&[(2.0, scores)])? + dropout;
        Ok((forward, 4.0 * product + self.passes(&[(3.0, scores)])? + dropout))
    }

    /// The head's three products, and the loss, which passes over the logits in f32 four times.
    fn head(&self) -> Result<f64> {
        let columns = self.model.vocabulary as f64 / self.run.tensor as f64;
        let product = self.product(self.tokens(), columns, self.model.hidden as f64)?;
        Ok(3.0 * product + self.passes(&[(8.0, self.tokens() * columns)])?)
    }

    /// An all-gather or a reduce-scatter of n ranks, `stride` ranks apart. An all-reduce takes
    /// twice as long.
    fn gather(&self, elements: f64, ranks: usize, stride: usize) -> f64 {
        let transfer = Transfer { op: Op::AllGather, dtype: DTYPE, elements: elements as usize };
        self.machine.seconds(&transfer, ranks, stride)
    }

    /// A message between neighbouring stages.
    fn exchange(&self) -> f64 {
        let (run, elements) = (self.run, self.tokens() * self.model.hidden as f64);
        if run.pipeline == 1 {
            return 0.0;
        }
        let sent = (elements / run.tensor as f64) as usize;
        let sent = Transfer { op: Op::Exchange, dtype: DTYPE, elements: sent };
        let seconds = self.machine.seconds(&sent, 2, run.tensor.saturating_mul(run.data));
        let gathered = if run.sequence_parallel { 0.0 } else { self.gather(elements, run.tensor, 1) };
        seconds + gathered
    }
}
