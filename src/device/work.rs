//! The log of a device without memory: which kernels it was asked to run.

use super::DType;

/// A kernel that a [`Meta`](super::Meta) device was asked to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Work {
    /// The family of the kernel.
    pub kind: WorkKind,
    /// The element type of its operands.
    pub dtype: DType,
    /// Its floating-point operations, as [`Meta::flops`](super::Meta::flops) counts them.
    pub flops: u64,
    /// The bytes of its operands, each read or written once. An operand that is updated in place is
    /// read and written, so its bytes count twice.
    ///
    /// Rows of a table or of a KV cache count only if the kernel uses them. Lists of indices do not
    /// count.
    pub bytes: u64,
}

/// The families of kernels that [`Work`] distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WorkKind {
    /// A matrix product.
    Product,
    /// Attention.
    Attention,
    /// A normalization.
    Norm,
    /// An activation function or a gate.
    Activation,
    /// A kernel of a loss, such as the exponentials of a softmax.
    Loss,
    /// Dropout.
    Dropout,
    /// A step of an optimizer, or a sum of squares for the gradient norm.
    Update,
    /// Any other kernel: copies, sums, rows of a table, rotary embeddings.
    Other,
}

impl WorkKind {
    /// The family's name, such as `norm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::Attention => "attention",
            Self::Norm => "norm",
            Self::Activation => "activation",
            Self::Loss => "loss",
            Self::Dropout => "dropout",
            Self::Update => "update",
            Self::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Element, Meta},
        error::Result,
        kernels::{
            Activation, AdamWStep, Attention, AttentionChoices, AttentionSpec, Batch, CacheSpec, Epilogue,
            Gather, Gemm, GemmTerm, MatMut, MatRef, NO_ROW, Norm, NormKind, QkvHeads, Update,
        },
        shard::Sequences,
        tensor::Tensor,
    };
    use half::bf16;
    use {DType::*, WorkKind::*};

    fn of<T: Element>(device: &Meta, rows: usize, cols: usize) -> Tensor<T, Meta> {
        Tensor::empty(device, [rows, cols]).unwrap()
    }

    /// The log of a call as `(kind, dtype, flops, bytes, runs)`.
    fn log(device: &Meta, call: impl FnOnce() -> Result<()>) -> Vec<(WorkKind, DType, u64, u64, u64)> {
        device.take_work();
        call().unwrap();
        let all = device.take_work().into_iter();
        all.map(|(work, runs)| (work.kind, work.dtype, work.flops, work.bytes, runs)).collect()
    }

    #[test]
    fn products_read_their_factors_and_write_their_result() {
        let device = Meta::new();
        let (a, b) = (of::<bf16>(&device, 5, 7), of::<bf16>(&device, 7, 11));
        let (mut c, mut sum) = (of::<bf16>(&device, 5, 11), of::<f32>(&device, 5, 11));
        let (factors, flops) = (2 * (5 * 7 + 7 * 11), 2 * 5 * 7 * 11);
        let got = log(&device, || device.gemm(1.0, a.mat(), b.mat(), 0.0, c.mat_mut()?));
        assert_eq!(got, [(Product, BF16, flops, factors + 2 * 55, 1)]);
        let got = log(&device, || device.gemm(1.0, a.mat(), b.mat(), 1.0, sum.mat_mut()?));
        assert_eq!(got, [(Product, BF16, flops, factors + 2 * 4 * 55, 1)], "C is read and written");

        // Three rows of A, each times the same B.
        let batch = Batch { count: 3, a: 7, b: 0, c: 11 };
        let row = MatRef::<bf16, Meta>::new(a.slice(), 1, 7).unwrap();
        let got = log(&device, || {
            let c = MatMut::<bf16, Meta>::new(c.slice_mut()?, 1, 11)?;
            device.gemm_batched(batch, 1.0, row, b.mat(), 0.0, c)
        });
        assert_eq!(got, [(Product, BF16, 3 * 2 * 7 * 11, 2 * (3 * 7 + 7 * 11 + 3 * 11), 1)]);

        let term = |merges| GemmTerm { products: vec![(a.mat(), b.mat())], merges };
        let got = log(&device, || device.gemm_tree(&[term(0), term(1)], sum.mat_mut()?));
        assert_eq!(got, [(Product, BF16, flops, factors + 4 * 55, 2)]);

        let none = of::<bf16>(&device, 0, 7);
        let mut c = of::<bf16>(&device, 0, 11);
        let got = log(&device, || device.gemm(1.0, none.mat(), b.mat(), 0.0, c.mat_mut()?));
        assert_eq!(got, []);
    }

    #[test]
    fn a_linear_operator_is_a_product_a_bias_and_an_activation() {
        let device = Meta::new();
        let (x, w, bias) = (of::<f32>(&device, 5, 7), of::<f32>(&device, 11, 7), of::<f32>(&device, 1, 11));
        let (mut pre, mut y) = (of::<f32>(&device, 5, 11), of::<f32>(&device, 5, 11));
        let got = log(&device, || {
            let activation = Some((Activation::Silu, pre.mat_mut()?));
            device.linear(x.mat(), w.mat(), Epilogue { bias: Some(bias.slice()), activation }, y.mat_mut()?)
        });
        let product = (Product, F32, 2 * 5 * 7 * 11, 4 * (35 + 77 + 55), 1);
        let added = (Other, F32, 0, 4 * (2 * 55 + 11), 1);
        let activated = (Activation, F32, 0, 4 * 2 * 55, 1);
        assert_eq!(got, [product, activated, added]);
    }

    #[test]
    fn norms_read_and_write_rows_vectors_and_statistics() {
        let device = Meta::new();
        let norm = |rows: usize| {
            let (x, gamma) = (of::<bf16>(&device, rows, 64), of::<bf16>(&device, 1, 64));
            let (mut y, mut stats) = (of::<bf16>(&device, rows, 64), of::<f32>(&device, rows, 2));
            let kind = NormKind::LayerNorm { eps: 1e-5 };
            log(&device, || {
                let beta = Some(gamma.slice());
                device.normalize(kind, x.mat(), gamma.slice(), beta, y.mat_mut()?, stats.slice_mut()?)
            })
        };
        // x and y, then γ and β, then the statistics.
        let bytes = 2 * (2 * 10 * 64) + 2 * (2 * 64) + 4 * (10 * 2);
        assert_eq!(norm(10), [(Norm, BF16, 0, bytes, 1)]);
        assert_eq!(norm(0), []);
    }

    #[test]
    fn attention_reads_the_visible_positions_of_a_cache() {
        let device = Meta::new();
        // 3 query heads and 2 key/value heads of 4 features; 2 and 3 rows.
        let choices = AttentionChoices::CAUSAL;
        let heads = QkvHeads { kv_of_query: vec![0, 0, 1], kv_heads: 2, head_dim: 4, choices };
        let sequences = Sequences::packed([2, 3]).starting_at(&[0, 6]).unwrap();
        let spec = AttentionSpec { heads: &heads, sequences: &sequences };
        let (q, k) = (of::<bf16>(&device, 5, 12), of::<bf16>(&device, 5, 8));
        let (mut out, mut lse) = (of::<bf16>(&device, 5, 12), of::<f32>(&device, 5, 3));
        let got = log(&device, || {
            device.attention(&spec, q.mat(), k.mat(), k.mat(), out.mat_mut()?, lse.slice_mut()?)
        });
        // 1 + 2 and 1 + 2 + 3 pairs for each of 3 heads. q, k, v, out, then lse.
        let bytes = 2 * (60 + 40 + 40 + 60) + 4 * 15;
        assert_eq!(got, [(Attention, BF16, 2 * 2 * 4 * 3 * 9, bytes, 1)]);

        let mut dqkv = of::<bf16>(&device, 5, 28);
        let got = log(&device, || {
            let (q, k) = (q.mat(), k.mat());
            device.attention_backward(&spec, q, k, k, q, lse.slice(), q, dqkv.mat_mut()?)
        });
        // q, k, v, out, dout, dqkv, then lse.
        let bytes = 2 * (60 + 40 + 40 + 60 + 60 + 140) + 4 * 15;
        assert_eq!(got, [(Attention, BF16, 5 * 2 * 4 * 3 * 9, bytes, 1)]);

        let cache = CacheSpec { slots: &[0, 1], capacity: 9 };
        let (mut keys, mut values) = (of::<bf16>(&device, 36, 4), of::<bf16>(&device, 36, 4));
        let got = log(&device, || {
            device.append_cached(&spec, &cache, k.mat(), k.mat(), keys.mat_mut()?, values.mat_mut()?)
        });
        assert_eq!(got, [(Other, BF16, 0, 2 * (2 * 40 + 2 * 40), 1)]);
        let got = log(&device, || {
            device.attention_cached(&spec, &cache, q.mat(), keys.mat(), values.mat(), out.mat_mut()?)
        });
        // The queries of the second sequence are at 6, 7 and 8, and attend to 7 + 8 + 9 keys.
        // Positions 0 and 1, and 0 to 8, of 2 heads are read.
        let bytes = 2 * (60 + 60 + 2 * (2 + 9) * 2 * 4);
        assert_eq!(got, [(Attention, BF16, 2 * 2 * 4 * 3 * (3 + 24), bytes, 1)]);
    }

    #[test]
    fn a_gather_reads_a_row_for_each_id() {
        let device = Meta::new();
        let (table, ids) = (of::<bf16>(&device, 1000, 64), [1, 999, NO_ROW, 1]);
        let (mut y, mut dtable) = (of::<bf16>(&device, 4, 64), of::<f32>(&device, 1000, 64));
        let got = log(&device, || device.gather(table.mat(), &ids, y.mat_mut()?));
        assert_eq!(got, [(Other, BF16, 0, 2 * 2 * 4 * 64, 1)]);
        // dy is read, and rows of the gradient are read and written.
        let got = log(&device, || device.scatter_add::<bf16>(&ids, y.mat(), dtable.mat_mut()?));
        assert_eq!(got, [(Other, BF16, 0, 2 * 4 * 64 + 2 * 4 * 4 * 64, 1)]);
    }

    #[test]
    fn an_update_reads_the_gradient_and_updates_weight_and_state() {
        let device = Meta::new();
        let step = AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 1,
            grad_scale: 1.0,
        };
        let (grad, mut weight) = (of::<f32>(&device, 1, 100), of::<bf16>(&device, 1, 100));
        let [mut master, mut first, mut second] = [0; 3].map(|_| of::<f32>(&device, 1, 100));
        let mut adamw = |master: Option<&mut Tensor<f32, Meta>>| {
            log(&device, || {
                let master = master.map(|master| master.slice_mut()).transpose()?;
                let moments = [first.slice_mut()?, second.slice_mut()?];
                device.adamw(&step, grad.slice(), weight.slice_mut()?, master, moments)
            })
        };
        // The gradient is read, the weight is written, master and moments are read and written.
        let bytes = 100 * (4 + 2 + 3 * 2 * 4);
        assert_eq!(adamw(Some(&mut master)), [(Update, BF16, 0, bytes, 1)]);
        let bytes = 100 * (4 + 2 * 2 + 2 * 2 * 4);
        assert_eq!(adamw(None), [(Update, BF16, 0, bytes, 1)]);
    }
}
