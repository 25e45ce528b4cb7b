//! Attention whose heads are sharded over the ranks, and its projections.

mod config;
mod heads;

pub use {
    config::{AttentionConfig, QkNorm},
    heads::{Attention, AttentionSaved},
};

use super::{Bias, Chain, ColumnParallelLinear, Columns, QkvLayout, RowParallelLinear};
use crate::{
    comm::Group, device::Element, error::Result, kernels::Backend, parallel::ResidualStream, shard::Heads,
    tensor::Weights,
};

/// Multi-head, grouped-query or multi-query self-attention with its projections: S → S.
///
/// `[q | k | v]` = X Wqkvᵀ + b is column-parallel, sharded by heads. O is the [`Attention`] of each
/// rank's heads. Y = O Woᵀ + b is row-parallel. Collectives: those of S entering and leaving. The
/// backward also makes those of [`Attention`] and of the output bias, and an all-reduce for
/// key/value heads that several ranks hold.
///
/// ```
/// use shardwise::prelude::*;
///
/// let source = Random::normal(1, 0.5);
/// let config = AttentionConfig::new(12, 3).with_choices(AttentionChoices::CAUSAL);
/// let layout = QkvLayout::separate("q", "k", "v");
/// type Attention = ParallelAttention<Replicated, f64, Cpu>;
/// let outputs = |ranks| launch::threads(ranks, |world| {
///     let weights = Weights::new(&source); // three heads on one or on two ranks
///     let layer = Attention::load(&world, &weights, &layout, "o", &config)?;
///     let x = Tensor::from_slice(world.device(), [2, 12], &[[0.5; 12], [2.0; 12]].concat())?;
///     layer.forward(DTensor::replicated(&world, x)?)?.0.into_local().to_vec()
/// });
/// let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
/// assert!(outputs(1)?[0].iter().zip(&outputs(2)?[1]).all(near));
/// # Ok::<(), shardwise::Error>(())
/// ```
pub type ParallelAttention<S, T, B> =
    Chain<Chain<ColumnParallelLinear<S, T, B>, Attention<T, B>>, RowParallelLinear<S, T, B>>;

impl<S: ResidualStream, T: Element, B: Backend> ParallelAttention<S, T, B> {
    /// Reads this rank's shard of an attention layer. `layout` names the tensors of q, k and v, and
    /// `out` names the output projection.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, there are fewer query heads than ranks, or
    /// the number of query heads is not a multiple of the number of key/value heads.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        layout: &QkvLayout,
        out: &str,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let query = group.partition("attention", "query heads", config.heads, 1)?;
        let heads = Heads::with_partition(query, config.kv_heads, config.head_dim)?;
        let columns = Columns::qkv(group, &heads, layout)?;
        let bias = if config.qkv_bias { Bias::Add } else { Bias::None };
        let qkv = ColumnParallelLinear::load(group, weights, config.hidden, &columns, bias)?;
        let core = Attention::load(group, weights, &heads, config)?;
        let inputs = heads.query_features();
        let out = RowParallelLinear::load(group, &weights.at(out), &inputs, config.hidden, config.out_bias)?;
        Ok(Chain(Chain(qkv, core), out))
    }
}
