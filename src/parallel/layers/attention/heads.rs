//! Attention of each rank's heads, without projections.

use super::config::{AttentionConfig, QkNorm};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Backend, NormKind, QkvHeads},
    ops::{self, AttentionContext, Rotary},
    parallel::{
        Context, DTensor, Layer,
        sums::{Sums, add_rows},
    },
    shard::{Heads, Partition, Sequences, Shard},
    tensor::{Param, Region, Role, Tensor, Weights},
};
use std::ops::Range;

/// O = softmax(scale · Q Kᵀ + mask) V for each of this rank's heads: Shard<1> → Shard<1>.
///
/// Input: the output of a projection that was loaded with
/// [`Columns::qkv`](crate::parallel::Columns::qkv). Rank r holds `[qᵣ | kᵣ | vᵣ]`. Output:
/// `[tokens, query_heads · head_dim]`, sharded by query heads.
///
/// A token attends only to tokens of its sequence ([`DTensor::with_sequences`]), and not to
/// padding. With a causal mask it does not attend to later tokens, and with a window it attends
/// only to the tokens in its window. Before the attention, the layer normalizes every head of q and
/// k if [`QkNorm`] is configured. Then it rotates these heads by their position if a rotary
/// embedding is configured ([`crate::kernels::Rope`]).
///
/// Collectives: the forward makes none. With [`QkNorm`], the backward makes an all-reduce of the
/// gradients of the two γ, because each rank computes only the terms of its own heads. Without
/// [`QkNorm`], the backward makes none.
///
/// Memory is linear in the sequence length: see [`crate::kernels::Attention`].
#[derive(Debug)]
pub struct Attention<T: Element, B: Device> {
    sums: Sums<B>,
    heads: QkvHeads,
    qkv_partition: Partition,
    query_partition: Partition,
    rotary: Option<Rotary>,
    norms: Option<HeadNorms<T, B>>,
    /// For each leaf, the range of its heads of q and the range of its heads of k. A leaf is this
    /// rank, or one of its canonical blocks.
    leaf_heads: Vec<[Range<usize>; 2]>,
}

#[derive(Debug)]
struct HeadNorms<T: Element, B: Device> {
    kind: NormKind,
    q: Param<T, B>,
    k: Param<T, B>,
}

/// The values that the forward of [`Attention`] saves for its backward.
#[derive(Debug)]
pub struct AttentionSaved<T: Element, B: Device> {
    context: AttentionContext<T, B>,
    sequences: Sequences,
    norms: Option<NormSaved<T, B>>,
}

/// `[q | k | v]` before the normalization of heads, and the statistics of q's and k's heads.
#[derive(Debug)]
struct NormSaved<T: Element, B: Device> {
    qkv: Tensor<T, B>,
    q: Tensor<T::Acc, B>,
    k: Tensor<T::Acc, B>,
}

impl<T: Element, B: Backend> Attention<T, B> {
    /// Makes the attention of this rank's heads. Reads the weights of the head normalizations, if
    /// there are any.
    ///
    /// # Errors
    /// When the heads were partitioned for another group, the rotary embedding does not fit the
    /// size of a head, or a tensor is missing or has another shape.
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
            Ok(sums.replicated(Param::load_region(device, &weights, "weight", Role::Scale, region, owned)?))
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
        let mut end = 0;
        let leaf_heads =
            heads.query_ranges(rank).into_iter().zip(heads.kv_ranges(rank)).map(|(query, kv)| {
                end += kv.len();
                [query.start - first..query.end - first, end - kv.len()..end]
            });
        let leaf_heads = leaf_heads.collect();
        Ok(Self {
            sums,
            heads: own,
            qkv_partition: heads.qkv_features(),
            query_partition: heads.query_features(),
            rotary,
            norms,
            leaf_heads,
        })
    }

    /// Returns the columns of q, of k, and of v.
    fn qkv_columns(&self) -> [Range<usize>; 3] {
        let (query, width) = (self.heads.query_width(), self.heads.width());
        let keys = query + self.heads.kv_heads * self.heads.head_dim;
        [0..query, query..keys, keys..width]
    }

    /// Normalizes and rotates the heads of q and k in `[q | k | v]`. The rotation writes into the
    /// tensor's memory, unless another tensor shares it. The normalization makes a new tensor.
    fn prepare(
        &self,
        x: DTensor<Shard<1>, T, B>,
    ) -> Result<(DTensor<Shard<1>, T, B>, Option<NormSaved<T, B>>)> {
        x.check("attention", self.sums.group())?;
        let (have, want) = (x.shape().cols(), self.qkv_partition.total());
        same_size("attention", "features of [q | k | v] on all ranks", have, "those of the heads", want)?;
        let [q, k, v] = self.qkv_columns();
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
        x.with_features(out, self.query_partition.total(), Some(self.query_partition.clone()))
    }
}

/// Rejects tokens of a cached step if attention did not get the step's context, because these
/// tokens could not attend to the cached tokens.
fn check_uncached(sequences: &Sequences) -> Result<()> {
    if !sequences.are_cached() {
        return Ok(());
    }
    let reason = "the tokens belong to a step of a cache, but attention did not get the step's context: a layer that contains \
                  other layers must call their `infer` in its own `infer`";
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
        let [q, k, v] = self.qkv_columns();
        if let Some(rotary) = &self.rotary {
            rotary.turn(&mut dx, q.start..k.end, &saved.sequences, true)?;
        }
        if let (Some(norms), Some(context)) = (&self.norms, &saved.norms) {
            let _site = norms.q.site().enter();
            let (device, dim, dy) = (dx.device().clone(), self.heads.head_dim, dx);
            dx = Tensor::empty(&device, dy.shape())?;
            let NormSaved { qkv, q: q_stats, k: k_stats } = context;
            let of = [(q, q_stats, norms.q.value()?), (k, k_stats, norms.k.value()?)];
            let (leaf_heads, params) = (&self.leaf_heads, [&norms.q, &norms.k]);
            // One row of sums for each sample, if their gradients are kept.
            let groups: Vec<_> = match params.iter().any(|param| param.keeps_terms()) {
                true => saved.sequences.iter().collect(),
                false => std::iter::once(0..dy.shape().rows()).collect(),
            };
            let grads = self.sums.total::<T::Acc>([groups.len(), 2 * dim], |leaf, grads| {
                for (at, (columns, stats, gamma)) in of.iter().enumerate() {
                    for (group, rows) in groups.iter().enumerate() {
                        let (x, heads) = ((qkv, *stats), (columns.start, leaf_heads[leaf][at].clone()));
                        let rows = rows.clone();
                        let grad =
                            ops::normalize_heads_backward(norms.kind, x, gamma, heads, rows, &dy, &mut dx)?;
                        let to = grads.mat_mut()?.block(group..group + 1, at * dim..(at + 1) * dim);
                        device.copy(grad.mat(), to)?;
                    }
                }
                Ok(())
            })?;
            copy_columns(&dy, v, &mut dx)?;
            add_rows(&params, &grads)?;
        }
        Ok(dy.with_features(dx, self.qkv_partition.total(), Some(self.qkv_partition.clone())))
    }

    fn params(&self) -> Vec<Param<T, B>> {
        self.norms.iter().flat_map(|norms| [norms.q.clone(), norms.k.clone()]).collect()
    }
}
