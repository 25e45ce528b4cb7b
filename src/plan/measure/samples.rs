//! Samples of kernels, at sizes at which layers call them.

use crate::{
    device::{Element, Meta, WorkKind},
    error::Result,
    kernels::{
        Activation, AdamWStep, AttentionChoices, AttentionSpec, Backend, CacheSpec, DropoutMask, Epilogue,
        NormKind, QkvHeads, Targets,
    },
    rng::Philox,
    shard::Sequences,
    tensor::Tensor,
};

/// Kernels that are timed together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Sample {
    /// A copy of a few elements.
    Launch,
    /// The three products of a linear layer with s inputs and 2 s outputs, for 2 s tokens.
    Linear(usize),
    /// A linear layer for one token, which reads as many weights.
    Row(usize),
    /// Causal attention over so many tokens, forward and backward.
    Attention(usize),
    /// The attention of one token in each of eight sequences to a cache of so many tokens.
    Cached(usize),
    /// RMSNorm of so many elements, forward and backward.
    Norm(usize),
    /// GELU and the gate of SiLU, forward and backward.
    Activation(usize),
    /// The three kernels of cross entropy over so many logits.
    Loss(usize),
    /// Dropout.
    Dropout(usize),
    /// AdamW and the sum of squares.
    Update(usize),
    /// A copy, a sum, and a sum in place.
    Copies(usize),
}

/// The operations, bytes and kernels of a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct SampleWork {
    pub(super) flops: u64,
    pub(super) bytes: u64,
    pub(super) kernels: u64,
}

/// Products from 2¹⁵ to 2³⁷ FLOPs. A measurement ends with the first that takes too long.
pub(super) const PRODUCTS: [Sample; 16] = [
    Sample::Linear(16),
    Sample::Linear(32),
    Sample::Linear(48),
    Sample::Linear(64),
    Sample::Linear(96),
    Sample::Linear(128),
    Sample::Linear(192),
    Sample::Linear(256),
    Sample::Linear(384),
    Sample::Linear(512),
    Sample::Linear(768),
    Sample::Linear(1024),
    Sample::Linear(1536),
    Sample::Linear(2048),
    Sample::Linear(3072),
    Sample::Linear(4096),
];

pub(super) const ATTENTION: [Sample; 4] =
    [Sample::Attention(64), Sample::Attention(256), Sample::Attention(1024), Sample::Attention(4096)];

/// The numbers of elements of samples that are limited by memory.
const SIZES: [usize; 6] = [1 << 11, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24];

pub(super) const COPIES: [Sample; 6] = [
    Sample::Copies(SIZES[0]),
    Sample::Copies(SIZES[1]),
    Sample::Copies(SIZES[2]),
    Sample::Copies(SIZES[3]),
    Sample::Copies(SIZES[4]),
    Sample::Copies(SIZES[5]),
];

/// The samples of a family by a size.
type Of = fn(usize) -> Sample;

/// The families whose rates of memory are measured.
const OF_FAMILY: [(WorkKind, Of); 7] = [
    (WorkKind::Product, Sample::Row),
    (WorkKind::Attention, |elements| Sample::Cached(elements / SIZES[0])),
    (WorkKind::Norm, Sample::Norm),
    (WorkKind::Activation, Sample::Activation),
    (WorkKind::Loss, Sample::Loss),
    (WorkKind::Dropout, Sample::Dropout),
    (WorkKind::Update, Sample::Update),
];

/// The number of samples at one number of ranks: of three element types, and the launch.
pub(super) const COUNT: usize =
    3 * (PRODUCTS.len() + ATTENTION.len() + COPIES.len() + OF_FAMILY.len() * SIZES.len()) + 1;

/// The samples of each family.
pub(super) fn families() -> impl Iterator<Item = (WorkKind, [Sample; 6])> {
    OF_FAMILY.into_iter().map(|(family, of)| (family, SIZES.map(of)))
}

/// The number of columns of samples that are limited by memory.
const COLUMNS: usize = 512;
/// The heads of attention, and their features.
const HEADS: usize = 4;
const FEATURES: usize = 64;

impl Sample {
    /// What one run of the sample computes.
    pub(super) fn work<T: Element>(&self) -> Result<SampleWork> {
        let device = Meta::new();
        let mut work = SampleWork::default();
        self.run::<T, Meta>(&device, &mut |run| {
            device.take_work();
            run()?;
            for (kernel, runs) in device.take_work() {
                work.flops += kernel.flops * runs;
                work.bytes += kernel.bytes * runs;
                work.kernels += runs;
            }
            Ok(0.0)
        })?;
        Ok(work)
    }

    /// Allocates the operands and calls `time`, which calls the kernels any number of times.
    pub(super) fn run<T: Element, B: Backend>(
        &self,
        device: &B,
        time: &mut dyn FnMut(&mut dyn FnMut() -> Result<()>) -> Result<f64>,
    ) -> Result<f64> {
        match *self {
            Self::Launch => {
                let (x, mut y) = (tensor::<T, B>(device, 1, 16)?, tensor::<T, B>(device, 1, 16)?);
                time(&mut || device.copy(x.mat(), y.mat_mut()?))
            }
            Self::Linear(scale) => {
                let (tokens, inputs, outputs) = (2 * scale, scale, 2 * scale);
                let (x, w) =
                    (tensor::<T, B>(device, tokens, inputs)?, tensor::<T, B>(device, outputs, inputs)?);
                let (mut y, dy) =
                    (tensor(device, tokens, outputs)?, tensor::<T, B>(device, tokens, outputs)?);
                let (mut dx, mut dw) =
                    (tensor(device, tokens, inputs)?, tensor::<T::Acc, B>(device, outputs, inputs)?);
                time(&mut || {
                    let none = Epilogue { bias: None, activation: None };
                    device.linear(x.mat(), w.mat(), none, y.mat_mut()?)?;
                    device.linear_dx(dy.mat(), w.mat(), None, dx.mat_mut()?)?;
                    device.linear_dw(dy.mat(), x.mat(), 1.0, dw.mat_mut()?, None)
                })
            }
            Self::Row(weights) => {
                let outputs = (weights / COLUMNS).max(1);
                let (x, w) = (tensor::<T, B>(device, 1, COLUMNS)?, tensor::<T, B>(device, outputs, COLUMNS)?);
                let mut y = tensor(device, 1, outputs)?;
                time(&mut || {
                    let none = Epilogue { bias: None, activation: None };
                    device.linear(x.mat(), w.mat(), none, y.mat_mut()?)
                })
            }
            Self::Attention(tokens) => {
                let heads = heads();
                let sequences = Sequences::packed([tokens]);
                let spec = AttentionSpec { heads: &heads, sequences: &sequences };
                let features = HEADS * FEATURES;
                let (q, mut out) =
                    (tensor::<T, B>(device, tokens, features)?, tensor(device, tokens, features)?);
                let mut lse = tensor::<T::Acc, B>(device, tokens, HEADS)?;
                let mut dqkv = tensor(device, tokens, 3 * features)?;
                time(&mut || {
                    let [q, dout] = [q.mat(); 2];
                    device.attention(&spec, q, q, q, out.mat_mut()?, lse.slice_mut()?)?;
                    device.attention_backward(&spec, q, q, q, out.mat(), lse.slice(), dout, dqkv.mat_mut()?)
                })
            }
            Self::Cached(tokens) => {
                const SLOTS: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
                let heads = heads();
                let rows = SLOTS.len();
                let sequences = Sequences::packed([1; 8]).starting_at(&[tokens - 1; 8])?;
                let spec = AttentionSpec { heads: &heads, sequences: &sequences };
                let cache = CacheSpec { slots: &SLOTS, capacity: tokens };
                let kept = tensor::<T, B>(device, rows * HEADS * tokens, FEATURES)?;
                let q = tensor::<T, B>(device, rows, HEADS * FEATURES)?;
                let mut out = tensor(device, rows, HEADS * FEATURES)?;
                time(&mut || {
                    device.attention_cached(&spec, &cache, q.mat(), kept.mat(), kept.mat(), out.mat_mut()?)
                })
            }
            Self::Norm(len) => {
                let (rows, kind) = (len / COLUMNS, NormKind::RmsNorm { eps: 1e-5 });
                let (x, dy) =
                    (tensor::<T, B>(device, rows, COLUMNS)?, tensor::<T, B>(device, rows, COLUMNS)?);
                let (mut y, mut dx) = (tensor(device, rows, COLUMNS)?, tensor(device, rows, COLUMNS)?);
                let gamma = tensor::<T, B>(device, 1, COLUMNS)?;
                let mut stats = tensor::<T::Acc, B>(device, rows, 2)?;
                let mut dgamma = tensor::<T::Acc, B>(device, 1, COLUMNS)?;
                time(&mut || {
                    let gamma = gamma.slice();
                    device.normalize(kind, x.mat(), gamma, None, y.mat_mut()?, stats.slice_mut()?)?;
                    let (dx, dgamma) = (dx.mat_mut()?, dgamma.slice_mut()?);
                    device.normalize_backward(kind, x.mat(), gamma, stats.slice(), dy.mat(), dx, dgamma, None)
                })
            }
            Self::Activation(len) => {
                let rows = len / COLUMNS;
                let (x, up) =
                    (tensor::<T, B>(device, rows, COLUMNS)?, tensor::<T, B>(device, rows, COLUMNS)?);
                let mut y = tensor(device, rows, COLUMNS)?;
                let mut both = tensor(device, rows, 2 * COLUMNS)?;
                let (gelu, silu) = (Activation::GeluTanh, Activation::Silu);
                time(&mut || {
                    device.activate(gelu, x.mat(), y.mat_mut()?)?;
                    device.activate_backward(gelu, x.mat(), up.mat(), y.mat_mut()?)?;
                    device.gate(silu, x.mat(), up.mat(), y.mat_mut()?)?;
                    device.gate_backward(silu, x.mat(), up.mat(), x.mat(), both.mat_mut()?)
                })
            }
            Self::Loss(len) => {
                let rows = len / COLUMNS;
                let classes: Vec<u32> = (0..rows).map(|row| (row % COLUMNS) as u32).collect();
                let targets = Targets {
                    classes: &classes,
                    ignored: None,
                    count: COLUMNS,
                    first: 0,
                    on: 1.0,
                    off: 0.0,
                    z: 0.0,
                };
                let (x, mut dx) = (tensor::<T, B>(device, rows, COLUMNS)?, tensor(device, rows, COLUMNS)?);
                let (mut max, log) =
                    (tensor::<T::Acc, B>(device, 1, rows)?, tensor::<T::Acc, B>(device, 1, rows)?);
                let mut sums = tensor::<T::Acc, B>(device, rows, 3)?;
                time(&mut || {
                    device.row_max(x.mat(), max.slice_mut()?)?;
                    device.exp_sums(&targets, x.mat(), max.slice(), sums.slice_mut()?)?;
                    let dx = dx.mat_mut()?;
                    device.cross_entropy_backward(&targets, 1.0, x.mat(), max.slice(), log.slice(), dx)
                })
            }
            Self::Dropout(len) => {
                let rows = len / COLUMNS;
                let stream = Philox::stream(1, 1);
                let mask = DropoutMask { probability: 0.1, stream, row: 0, column: 0, width: COLUMNS };
                let (x, mut y) = (tensor::<T, B>(device, rows, COLUMNS)?, tensor(device, rows, COLUMNS)?);
                time(&mut || device.dropout(&mask, x.mat(), y.mat_mut()?))
            }
            Self::Update(len) => {
                let rows = len / COLUMNS;
                let step = AdamWStep {
                    lr: 1e-3,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay: 0.1,
                    step: 10,
                    grad_scale: 1.0,
                };
                let grad = tensor::<T::Acc, B>(device, rows, COLUMNS)?;
                let mut weight = tensor::<T, B>(device, 1, len)?;
                // f32 is its own master.
                let has_master = size_of::<T>() < size_of::<T::Acc>();
                let mut master = tensor::<T::Acc, B>(device, 1, if has_master { len } else { 0 })?;
                let (mut first, mut second) =
                    (tensor::<T::Acc, B>(device, 1, len)?, tensor::<T::Acc, B>(device, 1, len)?);
                let mut sums = tensor::<f64, B>(device, 1, rows)?;
                time(&mut || {
                    device.square_sums(grad.mat(), sums.slice_mut()?)?;
                    let master = if has_master { Some(master.slice_mut()?) } else { None };
                    let moments = [first.slice_mut()?, second.slice_mut()?];
                    device.adamw(&step, grad.slice(), weight.slice_mut()?, master, moments)
                })
            }
            Self::Copies(len) => {
                let rows = len / COLUMNS;
                let (x, mut y) =
                    (tensor::<T, B>(device, rows, COLUMNS)?, tensor::<T, B>(device, rows, COLUMNS)?);
                let mut z = tensor::<T, B>(device, rows, COLUMNS)?;
                time(&mut || {
                    device.copy(x.mat(), y.mat_mut()?)?;
                    device.add(x.mat(), y.mat(), z.mat_mut()?)?;
                    device.accumulate(x.mat(), y.mat_mut()?)
                })
            }
        }
    }
}

fn heads() -> QkvHeads {
    let choices = AttentionChoices::CAUSAL;
    QkvHeads { kv_of_query: (0..HEADS).collect(), kv_heads: HEADS, head_dim: FEATURES, choices }
}

/// A matrix of numbers in [−1, 1) that repeat. Equal numbers would let a GPU clock higher.
fn tensor<T: Element, B: Backend>(device: &B, rows: usize, cols: usize) -> Result<Tensor<T, B>> {
    const PERIOD: usize = 1021;
    if !B::HAS_VALUES {
        return Tensor::empty(device, [rows, cols]);
    }
    let pattern: Vec<T> =
        (0..PERIOD).map(|at| T::from_f64((at * 577 % PERIOD) as f64 / PERIOD as f64 * 2.0 - 1.0)).collect();
    let elements = pattern.iter().copied().cycle().take(rows * cols).collect();
    Tensor::from_vec(device, [rows, cols], elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_the_work_of_their_kernels() {
        let work = |sample: Sample| {
            let SampleWork { flops, bytes, kernels } = sample.work::<f32>().unwrap();
            (flops, bytes, kernels)
        };
        assert_eq!(work(Sample::Launch), (0, 4 * 32, 1));
        // Each product has 2 · 32 · 16 · 32 operations. Its operands have 512, 512 and 1024
        // elements, and the gradient of the weights is read as well.
        assert_eq!(work(Sample::Linear(16)), (3 * 32768, 4 * (3 * 2048 + 512), 3));
        assert_eq!(work(Sample::Copies(1024)), (0, 4 * 1024 * (2 + 3 + 3), 3));
        // 4 · 65 · 64 / 2 pairs of 64 features, and 2 + 5 products.
        assert_eq!(work(Sample::Attention(64)).0, 7 * 2 * 64 * 4 * 65 * 64 / 2);
        assert_eq!(work(Sample::Update(1024)).1, 4 * 1024 + 8 * 2 + 4 * 1024 * (1 + 2 * 3));
        // The sizes of a family ascend, so that rates by size can be made from them.
        for (family, samples) in families() {
            let sizes = samples.map(|sample| sample.work::<f32>().unwrap().bytes);
            assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]), "{family:?}: {sizes:?}");
        }
        for samples in [&PRODUCTS[..], &ATTENTION] {
            let sizes: Vec<_> = samples.iter().map(|sample| sample.work::<f32>().unwrap().flops).collect();
            assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]), "{sizes:?}");
        }
    }
}
