//! Attention over a fused projection `[q | k | v]`.

use crate::{
    device::{Device, Element},
    error::{Result, same_shape, same_size},
    kernels::{AttentionSpec, Backend, CacheSpec, MatRef, QkvHeads},
    shard::Sequences,
    tensor::Tensor,
};

/// Returns the views of q, k and v in a fused projection.
fn split_qkv<'a, T: Element, B: Backend>(heads: &QkvHeads, qkv: &'a Tensor<T, B>) -> [MatRef<'a, T, B>; 3] {
    let (query, kv, mat) = (heads.query_width(), heads.kv_width(), qkv.mat());
    [mat.columns(0..query), mat.columns(query..query + kv), mat.columns(query + kv..query + 2 * kv)]
}

/// The tensors that the backward of attention needs.
#[derive(Debug)]
pub struct AttentionContext<T: Element, B: Device> {
    qkv: Tensor<T, B>,
    out: Tensor<T, B>,
    lse: Tensor<T::Acc, B>,
    sequences: Sequences,
}

/// Attention of every head, O = softmax(scale Q Kᵀ) V under the mask: see
/// [`crate::kernels::Attention`].
///
/// `qkv`: `[rows, (heads + 2 kv_heads) · head_dim]`; output: `[rows, heads · head_dim]`.
///
/// ```
/// use shardwise::{kernels::QkvHeads, prelude::*};
///
/// let choices = AttentionChoices::CAUSAL;
/// let heads = QkvHeads { kv_of_query: vec![0], kv_heads: 1, head_dim: 1, choices };
/// // Two tokens with v = 2 and v = 6. All q are 0, so all weights are equal.
/// let qkv = Tensor::<f32>::from_slice(&Cpu::new(), [2, 3], &[0.0, 5.0, 2.0, 0.0, 9.0, 6.0])?;
/// let (out, _) = ops::attention(&heads, &qkv, &Sequences::packed([2]))?;
/// assert_eq!(out.to_vec()?, [2.0, 4.0]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When sizes disagree.
pub fn attention<T: Element, B: Backend>(
    heads: &QkvHeads,
    qkv: &Tensor<T, B>,
    sequences: &Sequences,
) -> Result<(Tensor<T, B>, AttentionContext<T, B>)> {
    same_size(
        "attention",
        "columns of [q | k | v]",
        qkv.shape().cols(),
        "those of its heads",
        heads.width(),
    )?;
    let rows = qkv.shape().rows();
    let mut out = Tensor::empty(qkv.device(), [rows, heads.query_width()])?;
    let mut lse = Tensor::empty(qkv.device(), [rows, heads.kv_of_query.len()])?;
    let [q, k, v] = split_qkv(heads, qkv);
    let spec = AttentionSpec { heads, sequences };
    qkv.device().attention::<T>(&spec, q, k, v, out.mat_mut()?, lse.slice_mut()?)?;
    let context = AttentionContext { qkv: qkv.clone(), out: out.clone(), lse, sequences: sequences.clone() };
    Ok((out, context))
}

/// The gradient of `[q | k | v]`, with the shape of `qkv`.
///
/// # Errors
/// When shapes disagree.
pub fn attention_backward<T: Element, B: Backend>(
    heads: &QkvHeads,
    context: &AttentionContext<T, B>,
    dout: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    let AttentionContext { qkv, out, lse, sequences } = context;
    same_shape("attention backward", "the output", out.shape().dims(), "its gradient", dout.shape().dims())?;
    let mut dqkv = Tensor::empty(qkv.device(), qkv.shape())?;
    let [q, k, v] = split_qkv(heads, qkv);
    let spec = AttentionSpec { heads, sequences };
    let device = qkv.device();
    device.attention_backward::<T>(&spec, q, k, v, out.mat(), lse.slice(), dout.mat(), dqkv.mat_mut()?)?;
    Ok(dqkv)
}

/// The KV cache of one layer on one rank. Keys and values are tensors `[slots · kv_heads ·
/// capacity, head_dim]` with the layout of [`CacheSpec`].
#[derive(Debug)]
pub struct CachedKeys<T: Element, B: Device> {
    keys: Tensor<T, B>,
    values: Tensor<T, B>,
    kv_heads: usize,
    capacity: usize,
}

impl<T: Element, B: Backend> CachedKeys<T, B> {
    /// Allocates `capacity` positions in each of `slots` slots.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &B, heads: &QkvHeads, slots: usize, capacity: usize) -> Result<Self> {
        let (kv_heads, head_dim) = (heads.kv_heads, heads.head_dim);
        let room = || {
            let room = Tensor::zeros(device, [slots, kv_heads, capacity, head_dim])?;
            room.reshape([slots * kv_heads * capacity, head_dim])
        };
        Ok(Self { keys: room()?, values: room()?, kv_heads, capacity })
    }

    /// Whether the cache has the key/value heads and head width of `heads`.
    pub fn is_for(&self, heads: &QkvHeads) -> bool {
        self.kv_heads == heads.kv_heads && self.keys.shape().cols() == heads.head_dim
    }

    /// Copies the first `len` positions of one slot to another.
    ///
    /// # Errors
    /// When the device fails.
    pub fn copy(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        let device = self.keys.device().clone();
        let dim = self.keys.shape().cols();
        // Both slots are in the same tensor, which cannot be borrowed twice, so a temporary holds
        // the rows.
        let mut passing = Tensor::<T, B>::empty(&device, [len, dim])?;
        for all in [&mut self.keys, &mut self.values] {
            for head in 0..self.kv_heads {
                let rows = |slot: usize| {
                    let first = (slot * self.kv_heads + head) * self.capacity;
                    first..first + len
                };
                device.copy(all.mat().block(rows(from), 0..dim), passing.mat_mut()?)?;
                device.copy(passing.mat(), all.mat_mut()?.block(rows(to), 0..dim))?;
            }
        }
        Ok(())
    }
}

/// Appends the keys and values of new tokens to a cache. Each sequence is written to its slot,
/// beginning at its start position.
///
/// # Errors
/// When sizes disagree, or a sequence exceeds the capacity.
pub fn append_to_cache<T: Element, B: Backend>(
    heads: &QkvHeads,
    qkv: &Tensor<T, B>,
    sequences: &Sequences,
    slots: &[usize],
    cache: &mut CachedKeys<T, B>,
) -> Result<()> {
    const OP: &str = "append to cache";
    same_size(OP, "the number of slots", slots.len(), "that of sequences", sequences.len())?;
    same_size(OP, "rows of the sequences", sequences.rows(), "rows of [q | k | v]", qkv.shape().rows())?;
    same_size(OP, "key/value heads", heads.kv_heads, "those of the cache", cache.kv_heads)?;
    let spec = CacheSpec { slots, capacity: cache.capacity };
    let [_, k, v] = split_qkv(heads, qkv);
    let (keys, values) = (cache.keys.mat_mut()?, cache.values.mat_mut()?);
    qkv.device().append_cached(&AttentionSpec { heads, sequences }, &spec, k, v, keys, values)
}

/// Attention of the queries of new tokens to a cache that already holds the keys and values of
/// these tokens: see [`crate::kernels::Attention::attention_cached`].
///
/// # Errors
/// When sizes disagree.
pub fn attention_cached<T: Element, B: Backend>(
    heads: &QkvHeads,
    qkv: &Tensor<T, B>,
    sequences: &Sequences,
    slots: &[usize],
    cache: &CachedKeys<T, B>,
) -> Result<Tensor<T, B>> {
    let mut out = Tensor::empty(qkv.device(), [qkv.shape().rows(), heads.query_width()])?;
    let [q, _, _] = split_qkv(heads, qkv);
    let spec = CacheSpec { slots, capacity: cache.capacity };
    let (keys, values) = (cache.keys.mat(), cache.values.mat());
    qkv.device().attention_cached(
        &AttentionSpec { heads, sequences },
        &spec,
        q,
        keys,
        values,
        out.mat_mut()?,
    )?;
    Ok(out)
}
