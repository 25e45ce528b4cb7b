//! A transformer block.

mod config;

pub use config::{BlockConfig, BlockNames, NormPlacement};

use super::{Layer, Normalize, ParallelAttention, ParallelMlp};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::Result,
    kernels::Backend,
    parallel::{Context, DTensor, Fits, ResidualStream},
    tensor::{Param, Weights},
};

/// Attention and a feed-forward layer, each with a residual sum and a normalization: S → S.
///
/// [`NormPlacement::Pre`] is `Residual(norm1.then(attention)).then(Residual(norm2.then(mlp)))`;
/// `Post` is `Residual(attention).then(norm1).then(Residual(mlp)).then(norm2)`.
///
/// Collectives: those of S entering and leaving, twice in the forward and twice in the backward.
/// The backward also makes the further all-reduces of [`ParallelAttention`]. With `S = Shard<0>`,
/// it also makes all-reduces of the gradients of the normalizations, and of the second bias of the
/// feed-forward layer.
///
/// ```
/// use shardwise::prelude::*;
///
/// let attention = AttentionConfig::new(12, 3).with_choices(AttentionChoices::CAUSAL);
/// let norm = NormKind::RmsNorm { eps: 1e-6 };
/// let config = BlockConfig::new(attention, 20, Activation::Silu, norm).with_gate(true);
/// let source = Random::normal(1, 0.5);
/// let outputs = |ranks| launch::threads(ranks, |world| {
///     let weights = Weights::new(&source);
///     let block = TransformerBlock::<Shard<0>, f64, _>::load(&world, &weights, &config)?;
///     let rows = Shard::<0>::local_rows(&world, 3)?.len();
///     let x = Shard::<0>::of_local(&world, 3, Tensor::full(world.device(), [rows, 12], 0.5)?)?;
///     block.forward(x)?.0.all_gather()?.into_local().to_vec()
/// });
/// assert!(outputs(1)?[0].iter().zip(&outputs(2)?[1]).all(|(a, b)| (a - b).abs() < 1e-12));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct TransformerBlock<S: ResidualStream, T: Element, B: Device, M = ParallelMlp<S, T, B>> {
    norm1: Normalize<S, T, B>,
    attention: ParallelAttention<S, T, B>,
    norm2: Normalize<S, T, B>,
    mlp: M,
    placement: NormPlacement,
}

impl<S: ResidualStream, T: Element, B: Backend, M: Layer<T, B, In = S>> TransformerBlock<S, T, B, M>
where
    M::Out: Fits<S>,
{
    /// Makes a block from its layers. `mlp` may be any layer S → S, such as a mixture of experts.
    pub fn new(
        placement: NormPlacement,
        (norm1, attention): (Normalize<S, T, B>, ParallelAttention<S, T, B>),
        (norm2, mlp): (Normalize<S, T, B>, M),
    ) -> Self {
        Self { norm1, attention, norm2, mlp, placement }
    }
}

impl<S: ResidualStream, T: Element, B: Backend> TransformerBlock<S, T, B> {
    /// Reads this rank's shard of a block.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer heads than ranks.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, config: &BlockConfig) -> Result<Self> {
        let (names, sizes) = (&config.names, (config.attention.hidden, config.ffn));
        let load = if config.gated { ParallelMlp::load_gated } else { ParallelMlp::load };
        let norm =
            |name: &str| Normalize::load(group, &weights.at(name), config.norm, config.attention.hidden);
        let attention = ParallelAttention::load(group, weights, &names.qkv, &names.out, &config.attention)?;
        let mlp = load(group, weights, &names.mlp, sizes, config.activation, config.mlp_bias)?;
        Ok(Self::new(config.placement, (norm(&names.norm1)?, attention), (norm(&names.norm2)?, mlp)))
    }
}

/// The saved values of each layer: first normalization, attention, second normalization,
/// feed-forward layer.
type Saved<S, T, B, M> = (
    <Normalize<S, T, B> as Layer<T, B>>::Saved,
    <ParallelAttention<S, T, B> as Layer<T, B>>::Saved,
    <Normalize<S, T, B> as Layer<T, B>>::Saved,
    <M as Layer<T, B>>::Saved,
);

impl<S, T, B, M> Layer<T, B> for TransformerBlock<S, T, B, M>
where
    S: ResidualStream,
    T: Element,
    B: Backend,
    M: Layer<T, B, In = S>,
    M::Out: Fits<S>,
{
    type In = S;
    type Out = S;
    type Saved = Saved<S, T, B, M>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        match self.placement {
            NormPlacement::Pre => {
                let (normed, norm1) = self.norm1.forward(x.clone())?;
                let (attended, attention) = self.attention.forward(normed)?;
                let h = attended.add(&x)?;
                let (normed, norm2) = self.norm2.forward(h.clone())?;
                let (fed, mlp) = self.mlp.forward(normed)?;
                Ok((M::Out::fit(fed).add(&h)?, (norm1, attention, norm2, mlp)))
            }
            NormPlacement::Post => {
                let (attended, attention) = self.attention.forward(x.clone())?;
                let (h, norm1) = self.norm1.forward(attended.add(&x)?)?;
                let (fed, mlp) = self.mlp.forward(h.clone())?;
                let (y, norm2) = self.norm2.forward(M::Out::fit(fed).add(&h)?)?;
                Ok((y, (norm1, attention, norm2, mlp)))
            }
        }
    }

    #[track_caller]
    fn backward(
        &self,
        (norm1, attention, norm2, mlp): Self::Saved,
        dy: DTensor<S, T, B>,
    ) -> Result<DTensor<S, T, B>> {
        match self.placement {
            NormPlacement::Pre => {
                let dfed = self.mlp.backward(mlp, M::Out::fit_grad(dy.clone()))?;
                let dh = self.norm2.backward(norm2, dfed)?.add(&dy)?;
                let dattended = self.attention.backward(attention, dh.clone())?;
                self.norm1.backward(norm1, dattended)?.add(&dh)
            }
            NormPlacement::Post => {
                let dsum = self.norm2.backward(norm2, dy)?;
                let dh = self.mlp.backward(mlp, M::Out::fit_grad(dsum.clone()))?.add(&dsum)?;
                let dsum = self.norm1.backward(norm1, dh)?;
                self.attention.backward(attention, dsum.clone())?.add(&dsum)
            }
        }
    }

    #[track_caller]
    fn infer(&self, x: DTensor<S, T, B>, context: &mut Context<'_, T, B>) -> Result<DTensor<S, T, B>> {
        match self.placement {
            NormPlacement::Pre => {
                let normed = self.norm1.infer(x.clone(), context)?;
                let h = self.attention.infer(normed, context)?.add(&x)?;
                drop(x);
                let normed = self.norm2.infer(h.clone(), context)?;
                M::Out::fit(self.mlp.infer(normed, context)?).add(&h)
            }
            NormPlacement::Post => {
                let attended = self.attention.infer(x.clone(), context)?.add(&x)?;
                drop(x);
                let h = self.norm1.infer(attended, context)?;
                let fed = M::Out::fit(self.mlp.infer(h.clone(), context)?).add(&h)?;
                drop(h);
                self.norm2.infer(fed, context)
            }
        }
    }

    fn params(&self) -> Vec<Param<T, B>> {
        let (norm1, attention) = (self.norm1.params(), self.attention.params());
        [norm1, attention, self.norm2.params(), self.mlp.params()].concat()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{
        device::Cpu,
        kernels::{Activation, AttentionChoices, NormKind, RopePairs},
        launch,
        ops::{RopeConfig, RopeScaling},
        parallel::{AttentionConfig, KvCache},
        shard::{Replicated, Shard},
        tensor::{COPIES, Random, Tensor},
    };

    type Block<S> = TransformerBlock<S, f32, Cpu>;

    fn block<S: ResidualStream>(group: &Group<Cpu>, placement: NormPlacement) -> Result<Block<S>> {
        let (pairs, scaling) = (RopePairs::Halves, RopeScaling::None);
        let rope = RopeConfig { dim: 4, base: 1e4, pairs, scaling };
        let attention = AttentionConfig::new(16, 4).with_kv_heads(2).with_choices(AttentionChoices::CAUSAL);
        let attention = attention.with_rope(rope).with_qkv_bias(true).with_out_bias(true);
        let norm = NormKind::LayerNorm { eps: 1e-5 };
        let config = BlockConfig::new(attention, 24, Activation::Silu, norm)
            .with_gate(true)
            .with_mlp_bias(true)
            .with_placement(placement);
        Block::load(group, &Weights::new(&Random::normal(1, 0.1)), &config)
    }

    fn input<S: ResidualStream>(group: &Group<Cpu>, tokens: usize) -> Result<DTensor<S, f32, Cpu>> {
        let rows = S::local_rows(group, tokens)?.len();
        S::of_local(group, tokens, Tensor::full(group.device(), [rows, 16], 0.5)?)
    }

    /// Counts the copies and the allocations of a warm step. A copy occurs if the step writes to a
    /// tensor that shares its memory with another tensor.
    fn warm(group: &Group<Cpu>, mut step: impl FnMut() -> Result<()>) -> Result<[usize; 2]> {
        for _ in 0..3 {
            step()?;
        }
        // After this barrier, no rank still reads the buffers of started collectives.
        group.barrier()?;
        let before = [COPIES.get(), group.device().made()];
        step()?;
        Ok([COPIES.get() - before[0], group.device().made() - before[1]])
    }

    fn step<S: ResidualStream>(group: &Group<Cpu>, placement: NormPlacement) -> Result<()> {
        let block = block::<S>(group, placement)?;
        let trained = warm(group, || {
            let (y, saved) = block.forward(input(group, 10)?)?;
            block.backward(saved, y)?;
            block.params().iter().for_each(Param::zero_grad);
            Ok(())
        })?;
        let inferred = warm(group, || {
            block.infer(input(group, 10)?, &mut Context::default())?;
            Ok(())
        })?;
        assert_eq!([trained, inferred], [[0; 2]; 2], "{placement:?}, copies and allocations");
        Ok(())
    }

    /// Rotation, biases, residual sums and all-reduces write into their input's memory.
    #[test]
    fn a_warm_step_copies_nothing_and_allocates_nothing() {
        for world in [1, 2, 3] {
            launch::threads(world, |group| {
                for placement in [NormPlacement::Pre, NormPlacement::Post] {
                    step::<Replicated>(&group, placement)?;
                    step::<Shard<0>>(&group, placement)?;
                }
                let block = block::<Replicated>(&group, NormPlacement::Pre)?;
                let mut cache = KvCache::new(1, 8)?;
                let decoded = warm(&group, || {
                    cache.truncate(0, 0)?;
                    let (sequences, mut step) = cache.step(&[0], &[3])?;
                    block.infer(input(&group, 3)?.with_sequences(sequences)?, &mut step)?;
                    step.finish()
                })?;
                assert_eq!(decoded, [0; 2], "decoding");
                Ok(())
            })
            .unwrap();
        }
    }
}
