//! Attention whose heads are cut over the ranks.

use super::{
    Bias, Chain, ColumnParallelLinear, Columns, DTensor, Layer, QkvLayout, RowParallelLinear, Stream, Traffic,
};
use crate::{
    comm::Group,
    device::Element,
    error::{Result, same_size},
    kernels::Backend,
    ops::{self, AttentionContext, QkvHeads},
    shard::{Heads, Partition, Shape, Shard},
    tensor::Weights,
};

/// Scaled dot-product attention of each rank's heads: Shard<1> → Shard<1>. No collectives.
///
/// The input is what a projection loaded with [`Columns::qkv`] gives: rank r holds `[qᵣ | kᵣ | vᵣ]`. The output is
/// `[tokens, query_heads · head_dim]`, cut by query heads. Tokens attend within their sequence
/// ([`DTensor::with_sequences`]), not to padding, and with `causal` not to later ones.
///
/// Memory is linear in the sequence length: see [`crate::kernels::Attention`].
#[derive(Clone, Debug)]
pub struct Attention {
    heads: QkvHeads,
    qkv_cut: Partition,
    query_cut: Partition,
}

impl Attention {
    /// The attention of rank `rank`'s heads, with scores multiplied by 1 / √head_dim.
    pub fn new(heads: &Heads, rank: usize, causal: bool) -> Self {
        let own = QkvHeads {
            kv_of_query: heads.kv_of_query(rank),
            kv_heads: heads.kv_range(rank).len(),
            head_dim: heads.head_dim(),
            scale: 1.0 / (heads.head_dim() as f64).sqrt(),
            causal,
        };
        Self { heads: own, qkv_cut: heads.qkv_features(), query_cut: heads.query_features() }
    }
}

impl<T: Element, B: Backend> Layer<T, B> for Attention {
    type In = Shard<1>;
    type Out = Shard<1>;
    type Saved = AttentionContext<T, B>;

    fn forward(&self, x: &DTensor<Shard<1>, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        let (have, want) = (x.shape().cols(), self.qkv_cut.total());
        same_size("attention", "features of [q | k | v] on all ranks", have, "those of the heads", want)?;
        let (out, context) = ops::attention(&self.heads, x.local(), x.sequences())?;
        Ok((x.derive(out, self.query_cut.total(), Some(self.query_cut.clone())), context))
    }

    fn backward(
        &mut self,
        context: Self::Saved,
        dy: &DTensor<Shard<1>, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let dx = ops::attention_backward(&self.heads, &context, dy.local())?;
        Ok(dy.derive(dx, self.qkv_cut.total(), Some(self.qkv_cut.clone())))
    }

    fn traffic(&self, x: Shape) -> (Traffic, Shape) {
        (Traffic::default(), x.with(x.rank() - 1, self.query_cut.total()))
    }
}

/// Multi-head, grouped-query or multi-query self-attention with its projections: S → S.
///
/// `[q | k | v]` = X Wqkvᵀ + b (column-parallel, by heads), attention of each rank's heads, Y = O Woᵀ + b (row-parallel).
pub type ParallelAttention<S, T, B> =
    Chain<Chain<ColumnParallelLinear<S, T, B>, Attention>, RowParallelLinear<S, T, B>>;

/// The sizes of a [`ParallelAttention`].
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// The features of the residual stream.
    pub hidden: usize,
    /// The number of query heads.
    pub heads: usize,
    /// The number of key/value heads; `heads` must be a multiple of it.
    pub kv_heads: usize,
    /// The features of one head.
    pub head_dim: usize,
    /// Whether a token sees only itself and those before it.
    pub causal: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
}

impl<S: Stream, T: Element, B: Backend> ParallelAttention<S, T, B> {
    /// Reads this rank's part of an attention layer. `layout` says where q, k and v are; `out` names the output projection.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or there are fewer query heads than ranks.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        layout: &QkvLayout,
        out: &str,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let heads = Heads::new(config.heads, config.kv_heads, config.head_dim, group.size())?;
        let columns = Columns::qkv(group, &heads, layout)?;
        let bias = if config.qkv_bias { Bias::Add } else { Bias::None };
        let qkv = ColumnParallelLinear::load(group, weights, config.hidden, &columns, bias)?;
        let cut = heads.query_features();
        let out = RowParallelLinear::load(group, &weights.at(out), &cut, config.hidden, config.out_bias)?;
        let core = Attention::new(&heads, group.rank(), config.causal);
        Ok(Layer::<T, B>::then(Layer::<T, B>::then(qkv, core), out))
    }
}
