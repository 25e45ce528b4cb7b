//! Attention whose heads are cut over the ranks.

use super::{
    Bias, Chain, ColumnParallelLinear, Columns, Context, DTensor, Layer, QkvLayout, ResidualStream,
    RowParallelLinear, sums::Sums,
};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{AttentionChoices, Backend, NormKind, QkvHeads},
    ops::{self, AttentionContext, RopeConfig, Rotary},
    shard::{Heads, Partition, Sequences, Shard},
    tensor::{Param, Region, Role, Tensor, Weights},
};
use std::ops::Range;

/// Scaled dot-product attention of each rank's heads: Shard<1> → Shard<1>.
///
/// The input is what a projection loaded with [`Columns::qkv`] gives: rank r holds `[qᵣ | kᵣ | vᵣ]`. The output is
/// `[tokens, query_heads · head_dim]`, cut by query heads. Tokens attend within their sequence
/// ([`DTensor::with_sequences`]), not to padding, with `causal` not to later ones, and with a window only to the last
/// ones. Before that, in this order and where the configuration says so, every head of q and k is normalized
/// ([`QkNorm`]) and turned by its position ([`crate::kernels::Rope`]).
///
/// Collectives: forward none; backward none, or with [`QkNorm`] an all-reduce of the gradients of the two γ: each rank
/// sees its own heads only, and heads that several ranks hold have their gradients in parts.
///
/// Memory is linear in the sequence length: see [`crate::kernels::Attention`].
#[derive(Debug)]
pub struct Attention<T: Element, B: Device> {
    sums: Sums<B>,
    heads: QkvHeads,
    qkv_cut: Partition,
    query_cut: Partition,
    rotary: Option<Rotary>,
    norms: Option<HeadNorms<T, B>>,
    /// The heads of q and of k that belong together: this rank's, or those of each of its canonical blocks.
    holding: Vec<[Range<usize>; 2]>,
}

/// RMSNorm of every head of q, and of k, over the head's features, each with one γ `[head_dim]` for all heads (Qwen3;
/// Henry et al., 2020).
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// The name of q's normalization, relative to the layer.
    pub q: String,
    /// The name of k's.
    pub k: String,
}

#[derive(Debug)]
struct HeadNorms<T: Element, B: Device> {
    kind: NormKind,
    q: Param<T, B>,
    k: Param<T, B>,
}

/// What the backward of [`Attention`] needs.
#[derive(Debug)]
pub struct AttentionSaved<T: Element, B: Device> {
    context: AttentionContext<T, B>,
    sequences: Sequences,
    norms: Option<NormSaved<T, B>>,
}

/// `[q | k | v]` before the normalization of heads, and the statistics of q's and k's.
#[derive(Debug)]
struct NormSaved<T: Element, B: Device> {
    qkv: Tensor<T, B>,
    q: Tensor<T::Acc, B>,
    k: Tensor<T::Acc, B>,
}

impl<T: Element, B: Backend> Attention<T, B> {
    /// The attention of this rank's heads. Reads the weights of the head normalizations, if there
    /// are any.
    ///
    /// # Errors
    /// When the heads were cut for another group, the rotary embedding does not fit them, or a
    /// tensor is missing or has another shape.
    pub fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        heads: &Heads,
        config: &AttentionConfig,
    ) -> Result<Self> {
        let (rank, sums) = (group.rank(), Sums::of(group)?);
        same_size(
            "attention",
            "the ranks of the heads",
            heads.ranks(),
            "the ranks of the group",
            group.size(),
        )?;
        sums.check_heads("attention", heads)?;
        let own = QkvHeads {
            kv_of_query: heads.kv_of_query(rank),
            kv_heads: heads.local_kv_heads(rank).len(),
            head_dim: heads.head_dim(),
            choices: config.choices,
        };
        let rotary = config.rope.as_ref().map(|rope| Rotary::new(rope, own.head_dim)).transpose()?;
        let gamma = |name: &str| -> Result<Param<T, B>> {
            let region = Region::whole([own.head_dim]);
            let (device, weights, owned) = (group.device(), weights.at(name), rank == 0);
            Ok(sums.whole(Param::load_region(device, &weights, "weight", Role::Scale, region, owned)?))
        };
        let norms = match &config.qk_norm {
            Some(QkNorm { eps, q, k }) => {
                let kind = NormKind::RmsNorm { eps: *eps };
                kind.check()?;
                Some(HeadNorms { kind, q: gamma(q)?, k: gamma(k)? })
            }
            None => None,
        };
        let first = heads.query_range(rank).start;
        let mut held = 0;
        let holding = heads.query_ranges(rank).into_iter().zip(heads.kv_ranges(rank)).map(|(query, kv)| {
            held += kv.len();
            [query.start - first..query.end - first, held - kv.len()..held]
        });
        let holding = holding.collect();
        Ok(Self {
            sums,
            heads: own,
            qkv_cut: heads.qkv_features(),
            query_cut: heads.query_features(),
            rotary,
            norms,
            holding,
        })
    }

    /// The columns of q, of k, and of v.
    fn parts(&self) -> [Range<usize>; 3] {
        let (query, width) = (self.heads.query_width(), self.heads.width());
        let keys = query + self.heads.kv_heads * self.heads.head_dim;
        [0..query, query..keys, keys..width]
    }

    /// `[q | k | v]` with the heads of q and k normalized and turned: in its own memory, where
    /// nothing else uses that.
    fn prepare(
        &self,
        x: DTensor<Shard<1>, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Option<NormSaved<T, B>>)> {
        x.check("attention", self.sums.group())?;
        let (have, want) = (x.shape().cols(), self.qkv_cut.total());
        same_size("attention", "features of [q | k | v] on all ranks", have, "those of the heads", want)?;
        let [q, k, v] = self.parts();
        let (sequences, mut saved) = (x.sequences().clone(), None);
        let x = x.map_local(|mut qkv| {
            if let Some(norms) = &self.norms {
                let mut normed = Tensor::empty(qkv.device(), qkv.shape())?;
                let (kind, q_gamma, k_gamma) = (norms.kind, norms.q.value()?, norms.k.value()?);
                let q = ops::normalize_heads(kind, &qkv, &q_gamma, q.clone(), &mut normed)?;
                let k = ops::normalize_heads(kind, &qkv, &k_gamma, k.clone(), &mut normed)?;
                copy_columns(&qkv, v, &mut normed)?;
                saved = Some(NormSaved { qkv, q, k });
                qkv = normed;
            }
            if let Some(rotary) = &self.rotary {
                rotary.turn(&mut qkv, q.start..k.end, &sequences, false)?;
            }
            Ok(qkv)
        })?;
        Ok((x, saved))
    }

    fn output(&self, x: &DTensor<Shard<1>, T, B>, out: Tensor<T, B>) -> DTensor<Shard<1>, T, B> {
        x.derive(out, self.query_cut.total(), Some(self.query_cut.clone()))
    }
}

/// Refuses tokens of a cache's step without its context: they would not see what came before.
fn check_uncached(sequences: &Sequences) -> Result<()> {
    if !sequences.are_cached() {
        return Ok(());
    }
    let reason = "the tokens belong to a step of a cache, but its context is not here: a layer that holds others calls \
                  `infer` of each in its own `infer`";
    Err(Error::invalid("attention", reason))
}

fn copy_columns<T: Element, B: Backend>(
    from: &Tensor<T, B>,
    columns: Range<usize>,
    to: &mut Tensor<T, B>,
) -> Result<()> {
    from.device().copy(from.mat().columns(columns.clone()), to.mat_mut()?.columns(columns))
}

impl<T: Element, B: Backend> Layer<T, B> for Attention<T, B> {
    type In = Shard<1>;
    type Out = Shard<1>;
    type Saved = AttentionSaved<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<Shard<1>, T, B>) -> Result<(DTensor<Shard<1>, T, B>, Self::Saved)> {
        let (x, norms) = self.prepare(x)?;
        check_uncached(x.sequences())?;
        let (out, context) = ops::attention(&self.heads, x.local(), x.sequences())?;
        let saved = AttentionSaved { context, sequences: x.sequences().clone(), norms };
        Ok((self.output(&x, out), saved))
    }

    #[track_caller]
    fn infer(
        &self,
        x: DTensor<Shard<1>, T, B>,
        context: &mut Context<'_, T, B>,
    ) -> Result<DTensor<Shard<1>, T, B>> {
        let (x, _) = self.prepare(x)?;
        let out = match context.attend(&self.heads, x.local(), x.sequences())? {
            Some(out) => out,
            None => {
                check_uncached(x.sequences())?;
                ops::attention(&self.heads, x.local(), x.sequences())?.0
            }
        };
        Ok(self.output(&x, out))
    }

    #[track_caller]
    fn backward(&self, saved: Self::Saved, dy: DTensor<Shard<1>, T, B>) -> Result<DTensor<Shard<1>, T, B>> {
        dy.check("attention backward", self.sums.group())?;
        let mut dx = ops::attention_backward(&self.heads, &saved.context, dy.local())?;
        let [q, k, v] = self.parts();
        if let Some(rotary) = &self.rotary {
            rotary.turn(&mut dx, q.start..k.end, &saved.sequences, true)?;
        }
        if let (Some(norms), Some(context)) = (&self.norms, &saved.norms) {
            let _site = norms.q.site().enter();
            let (device, dim, dy) = (dx.device().clone(), self.heads.head_dim, dx);
            dx = Tensor::empty(&device, dy.shape())?;
            let NormSaved { qkv, q: q_stats, k: k_stats } = context;
            let of = [(q, q_stats, norms.q.value()?), (k, k_stats, norms.k.value()?)];
            let holding = &self.holding;
            let grads = self.sums.total::<T::Acc>([2, dim], |leaf, grads| {
                for (row, (columns, stats, gamma)) in of.iter().enumerate() {
                    let (x, heads) = ((qkv, *stats), holding[leaf][row].clone());
                    let first = columns.start;
                    let grad =
                        ops::normalize_heads_backward(norms.kind, x, gamma, (first, heads), &dy, &mut dx)?;
                    device.copy(grad.mat(), grads.mat_mut()?.block(row..row + 1, 0..dim))?;
                }
                Ok(())
            })?;
            copy_columns(&dy, v, &mut dx)?;
            for (row, param) in [&norms.q, &norms.k].into_iter().enumerate() {
                let mut grad = Tensor::<T::Acc, B>::empty(&device, [dim])?;
                device.copy(grads.mat().block(row..row + 1, 0..dim), grad.mat_mut()?)?;
                param.add_grad(grad)?;
            }
        }
        Ok(dy.derive(dx, self.qkv_cut.total(), Some(self.qkv_cut.clone())))
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.norms.iter().flat_map(|norms| [norms.q.clone(), norms.k.clone()]).collect()
    }
}

/// Multi-head, grouped-query or multi-query self-attention with its projections: S → S.
///
/// `[q | k | v]` = X Wqkvᵀ + b (column-parallel, by heads), attention of each rank's heads, Y = O Woᵀ + b (row-parallel).
pub type ParallelAttention<S, T, B> =
    Chain<Chain<ColumnParallelLinear<S, T, B>, Attention<T, B>>, RowParallelLinear<S, T, B>>;

/// The sizes and choices of a [`ParallelAttention`].
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
    /// What a token sees, and the scale of scores.
    pub choices: AttentionChoices,
    /// How q and k are turned by their positions, if they are.
    pub rope: Option<RopeConfig>,
    /// How the heads of q and k are normalized, if they are.
    pub qk_norm: Option<QkNorm>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
}

impl AttentionConfig {
    /// Attention over `hidden` features by `heads` heads of `hidden / heads` features, each with its own keys and values,
    /// that sees everything: no mask, no positions, no biases.
    pub fn new(hidden: usize, heads: usize) -> Self {
        Self {
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden.checked_div(heads).unwrap_or(0),
            choices: AttentionChoices::default(),
            rope: None,
            qk_norm: None,
            qkv_bias: false,
            out_bias: false,
        }
    }
}

impl<S: ResidualStream, T: Element, B: Backend> ParallelAttention<S, T, B> {
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
        let query = group.partition("attention", "query heads", config.heads, 1)?;
        let heads = Heads::with_partition(query, config.kv_heads, config.head_dim)?;
        let columns = Columns::qkv(group, &heads, layout)?;
        let bias = if config.qkv_bias { Bias::Add } else { Bias::None };
        let qkv = ColumnParallelLinear::load(group, weights, config.hidden, &columns, bias)?;
        let core = Attention::load(group, weights, &heads, config)?;
        let cut = heads.query_features();
        let out = RowParallelLinear::load(group, &weights.at(out), &cut, config.hidden, config.out_bias)?;
        Ok(Chain(Chain(qkv, core), out))
    }
}
