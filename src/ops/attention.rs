//! Attention over a fused projection `[q | k | v]`.

use crate::{
    device::{Device, Element},
    error::{Result, same_shape, same_size},
    kernels::{AttentionSpec, Backend, MatRef},
    shard::Sequences,
    tensor::Tensor,
};

/// The heads in the columns of a `[q | k | v]` tensor, and how they attend.
#[derive(Clone, Debug, PartialEq)]
pub struct QkvHeads {
    /// For each query head, the key/value head that it uses.
    pub kv_of_query: Vec<usize>,
    /// The number of key/value heads.
    pub kv_heads: usize,
    /// The features of one head.
    pub head_dim: usize,
    /// What scores are multiplied with, usually 1 / √head_dim.
    pub scale: f64,
    /// Whether a token sees only itself and those before it.
    pub causal: bool,
}

impl QkvHeads {
    /// The number of columns of q.
    pub fn query_width(&self) -> usize {
        self.kv_of_query.len() * self.head_dim
    }

    /// The number of columns of `[q | k | v]`.
    pub fn width(&self) -> usize {
        self.query_width() + 2 * self.kv_heads * self.head_dim
    }

    fn spec<'a>(&'a self, sequences: &'a Sequences) -> AttentionSpec<'a> {
        AttentionSpec {
            kv_of_query: &self.kv_of_query,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            causal: self.causal,
            sequences,
        }
    }

    fn parts<'a, T: Element, B: Backend>(&self, qkv: &'a Tensor<T, B>) -> [MatRef<'a, T, B>; 3] {
        let (query, kv) = (self.query_width(), self.kv_heads * self.head_dim);
        let mat = qkv.mat();
        [mat.columns(0..query), mat.columns(query..query + kv), mat.columns(query + kv..query + 2 * kv)]
    }
}

/// What the backward of attention needs.
#[derive(Debug)]
pub struct AttentionContext<T: Element, B: Device> {
    qkv: Tensor<T, B>,
    out: Tensor<T, B>,
    lse: Tensor<T::Acc, B>,
    sequences: Sequences,
}

/// Attention of every head: see [`crate::kernels::Attention`].
///
/// `qkv`: `[rows, (heads + 2 kv_heads) · head_dim]`; the result: `[rows, heads · head_dim]`.
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
    let [q, k, v] = heads.parts(qkv);
    let spec = heads.spec(sequences);
    qkv.device().attention::<T>(&spec, q, k, v, out.mat_mut()?, lse.slice_mut()?)?;
    let context = AttentionContext { qkv: qkv.clone(), out: out.clone(), lse, sequences: sequences.clone() };
    Ok((out, context))
}

/// The gradient of `[q | k | v]`.
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
    let [q, k, v] = heads.parts(qkv);
    let spec = heads.spec(sequences);
    let device = qkv.device();
    device.attention_backward::<T>(&spec, q, k, v, out.mat(), lse.slice(), dout.mat(), dqkv.mat_mut()?)?;
    Ok(dqkv)
}
