//! A block of Llama.

use crate::{
    data::{Repeated, to_host},
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::{Cpu, Cuda},
    kernels::{Activation, AttentionChoices, Backend, NormKind, Pointwise, RopePairs},
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig, DTensor, Layer, TransformerBlock},
    shard::Replicated,
    tensor::Weights,
};
use std::rc::Rc;

/// The sizes of a block.
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) ffn: usize,
}

impl Sizes {
    /// Returns the sizes of Llama 8B, or small sizes for a quick run.
    pub(crate) fn of(bench: &Bench) -> Self {
        let [hidden, heads, kv_heads, ffn] = bench.pick([64, 4, 2, 96], [4096, 32, 8, 14336]);
        Self { hidden, heads, kv_heads, ffn }
    }

    /// Returns the number of elements of the block's matrices.
    pub(crate) fn weights(&self) -> usize {
        let kv = self.kv_heads * self.hidden / self.heads;
        self.hidden * (2 * self.hidden + 2 * kv + 3 * self.ffn)
    }
}

type Block<B> = TransformerBlock<Replicated, bf16, B>;

/// Loads a block, with or without rotary embedding.
pub(crate) fn load<B: Backend>(
    group: &Group<B>,
    source: &Repeated,
    sizes: &Sizes,
    turned: bool,
) -> Result<Block<B>> {
    let Sizes { hidden, heads, kv_heads, ffn } = *sizes;
    let dim = hidden / heads;
    let rope = RopeConfig { dim, base: 500_000.0, pairs: RopePairs::Halves, scaling: RopeScaling::None };
    let config = BlockConfig::new(
        AttentionConfig::new(hidden, heads)
            .with_kv_heads(kv_heads)
            .with_choices(AttentionChoices::CAUSAL)
            .with_rope(turned.then_some(rope)),
        ffn,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true);
    Block::<B>::load(group, &Weights::new(source), &config)
}

/// Adds tolerances to expected values, because two computations in bf16 round differently.
pub(crate) fn close(want: &[f64]) -> Vec<(f64, f64)> {
    let square = want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64;
    want.iter().map(|&x| (x, 0.04 * square.sqrt() + 0.01 * x.abs())).collect()
}

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    bench.case("block", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let group = Group::solo(&cuda);
        let (sizes, tokens) = (Sizes::of(bench), bench.pick(32, 4096));
        let (hidden, source) = (sizes.hidden, data.weights(0.02));
        let block = load(&group, &source, &sizes, false)?;
        let x = data.fill::<bf16>([tokens, hidden], 1.0)?;
        let x = DTensor::<Replicated, _, _>::replicated(&group, x)?;
        // A causal mask hides half of the scores. The forward has one product per weight and two
        // products for attention. The backward has two per weight and five for attention.
        let weights = 2.0 * (tokens * sizes.weights()) as f64;
        let attention = 2.0 * (tokens * tokens * hidden) as f64;
        let forward = format!("block forward bf16 {tokens} tokens");
        let cost = Cost { bytes: 0.0, flops: weights + attention };
        bench.time(&forward, cost, |_| block.forward(x.clone()).map(drop))?;
        let dy = data.fill::<bf16>([tokens, hidden], 1.0)?;
        let dy = DTensor::<Replicated, _, _>::replicated(&group, dy)?;
        let both = format!("block forward and backward bf16 {tokens} tokens");
        let cost = Cost { bytes: 0.0, flops: 3.0 * weights + 3.5 * attention };
        let mut dx = None;
        bench.time(&both, cost, |_| {
            let (_, saved) = block.forward(x.clone())?;
            dx = Some(block.backward(saved, dy.clone())?);
            Ok(())
        })?;

        // The first tokens do not depend on later tokens, so compare them with the same block on
        // the CPU.
        let (y, _) = block.forward(x.clone())?;
        let count = 2;
        let host = Group::solo(&Cpu::new());
        let start = to_host(x.local().mat().block(0..count, 0..hidden), &cuda)?;
        let start: Vec<bf16> = start.into_iter().map(bf16::from_f64).collect();
        let start = Tensor::from_slice(host.device(), [count, hidden], &start)?;
        let there = load(&host, &source, &sizes, false)?;
        let (want, _) = there.forward(DTensor::<Replicated, _, _>::replicated(&host, start)?)?;
        let want: Vec<f64> = want.local().to_vec()?.into_iter().map(f64::from).collect();
        let got = to_host(y.local().mat().block(0..count, 0..hidden), &cuda)?;
        bench.expect(&forward, &got, &close(&want))?;

        // Checks dx by the difference of Σ y dy between two points on the line through x along dx.
        // The expected difference uses the points after their rounding to bf16.
        let Some(dx) = dx else { return Ok(()) };
        let along = |sign: f64| -> Result<(Tensor<bf16, Cuda>, f64)> {
            let mut moved = dx.local().convert::<bf16>()?;
            cuda.scale(sign * STEP, moved.mat_mut()?)?;
            cuda.accumulate(x.local().mat(), moved.mat_mut()?)?;
            let (y, _) = block.forward(DTensor::replicated(&group, moved.clone())?)?;
            Ok((moved, inner(y.local(), dy.local())?))
        };
        let ((up, above), (down, below)) = (along(1.0)?, along(-1.0)?);
        let want = inner(dx.local(), &up)? - inner(dx.local(), &down)?;
        bench.expect(&both, &[above - below], &[(want, 0.03 * want)])
    })
}

/// The distance of each point from x, as a factor of dx. The error of the difference is of third
/// order in this factor. At four times this factor the error is 6 %.
const STEP: f64 = 0.0078125;

fn inner(a: &Tensor<bf16, Cuda>, b: &Tensor<bf16, Cuda>) -> Result<f64> {
    Ok(a.to_vec()?.iter().zip(&b.to_vec()?).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
}
