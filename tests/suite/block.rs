//! Compares the transformer block with the reference: pre- and post-norm, plain and gated, both
//! residual streams, every number of ranks.

use crate::dev::Dev;
use crate::invariant::same_bits;
use crate::support::{Case, Spread, close, difference, grads_close, matrix, random, run, run_unplanned};
use ndarray::{Array1, Array2};
use proptest::prelude::*;
use shardwise::{
    Result,
    comm::Group,
    device::Element,
    kernels::{Activation, AttentionChoices, Backend, NormKind},
    parallel::{
        AttentionConfig, BlockConfig, BoxLayer, Layer, NormPlacement, Normalize, ParallelAttention,
        ParallelMlp, Residual, ResidualStream, TransformerBlock,
    },
    reference,
    shard::{Replicated, Sequences, Shard},
    tensor::{Arrays, Weights},
};

const EXACT: f64 = 1e-12;
/// The ε of the norms, so large that a norm amplifies rounding errors by at most 3. With 1e-5 and
/// two features each norm would amplify them by 300.
const EPS: f64 = 0.1;

/// A block's random sizes and options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RandomBlock {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) gated: bool,
    pub(crate) post: bool,
    pub(crate) causal: bool,
    pub(crate) seed: u64,
}

fn vector(seed: u64, name: &str, len: usize) -> Array1<f64> {
    random(seed, name, &[len]).into_dimensionality().unwrap()
}

impl RandomBlock {
    /// Returns the reference's weights. A gated block is like Llama's, with RMSNorm and without
    /// biases. Other blocks are like GPT-2's or BERT's.
    pub(crate) fn weights(&self) -> reference::BlockWeights {
        let &RandomBlock { heads, kv_heads, head_dim, hidden, ffn, gated, seed, .. } = self;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        // The weights are scaled, so that the attention scores stay moderate.
        let weight = |name: &str, rows, cols| matrix(seed, name, rows, cols) / (cols as f64).sqrt();
        let bias = |name: &str, len| (!gated).then(|| vector(seed, name, len));
        let norm = |gamma: &str, beta: &str| {
            let gamma = vector(seed, gamma, hidden);
            if gated {
                reference::Norm::RmsNorm { gamma, eps: EPS }
            } else {
                reference::Norm::LayerNorm { gamma, beta: vector(seed, beta, hidden), eps: EPS }
            }
        };
        let (up, down) = (weight("up", ffn, hidden), weight("down", hidden, ffn));
        reference::BlockWeights {
            spec: reference::AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                causal: self.causal,
                window: None,
                scale: 1.0 / (head_dim as f64).sqrt(),
            },
            attention: reference::AttentionWeights {
                q: weight("q", q, hidden),
                k: weight("k", kv, hidden),
                v: weight("v", kv, hidden),
                o: weight("o", hidden, q),
                q_bias: bias("qb", q),
                k_bias: bias("kb", kv),
                v_bias: bias("vb", kv),
                o_bias: bias("ob", hidden),
            },
            norm1: norm("g1", "b1"),
            norm2: norm("g2", "b2"),
            mlp: if gated {
                reference::Mlp::Gated {
                    weights: reference::GatedMlpWeights { gate: weight("gate", ffn, hidden), up, down },
                    act: reference::Activation::Silu,
                }
            } else {
                reference::Mlp::Plain {
                    weights: reference::MlpWeights {
                        up,
                        up_bias: bias("ub", ffn),
                        down,
                        down_bias: bias("db", hidden),
                    },
                    act: reference::Activation::GeluTanh,
                }
            },
            placement: if self.post { reference::NormPlacement::Post } else { reference::NormPlacement::Pre },
        }
    }

    fn config(&self) -> BlockConfig {
        let &RandomBlock { heads, kv_heads, head_dim, hidden, ffn, gated, causal, .. } = self;
        BlockConfig::new(
            AttentionConfig::new(hidden, heads)
                .with_kv_heads(kv_heads)
                .with_head_dim(head_dim)
                .with_choices(AttentionChoices { causal, ..AttentionChoices::default() })
                .with_qkv_bias(!gated)
                .with_out_bias(!gated),
            ffn,
            if gated { Activation::Silu } else { Activation::GeluTanh },
            if gated { NormKind::RmsNorm { eps: EPS } } else { NormKind::LayerNorm { eps: EPS } },
        )
        .with_gate(gated)
        .with_mlp_bias(!gated)
        .with_placement(if self.post { NormPlacement::Post } else { NormPlacement::Pre })
    }
}

pub(crate) fn outcome<S: ResidualStream + Spread, T: Element>(
    sizes: &RandomBlock,
    case: &Case<'_>,
) -> Result<crate::support::Outcome> {
    let config = sizes.config();
    run_unplanned!(T, case, |group, weights| TransformerBlock::<S, T, Dev>::load(group, weights, &config))
}

pub(crate) fn named(weights: &reference::BlockWeights) -> Arrays {
    Arrays(weights.named().into_iter().map(|(name, array)| (name.to_string(), array)).collect())
}

pub(crate) fn inputs(sizes: &RandomBlock, sequences: &Sequences) -> (Array2<f64>, Array2<f64>) {
    let rows = sequences.rows();
    (matrix(sizes.seed, "x", rows, sizes.hidden), matrix(sizes.seed, "dy", rows, sizes.hidden))
}

fn exact<S: ResidualStream + Spread>(sizes: &RandomBlock, world: usize, sequences: &Sequences) {
    let ((x, dy), weights) = (inputs(sizes, sequences), sizes.weights());
    let ranges: Vec<_> = sequences.iter().collect();
    let want_y = reference::block(&weights, &x, &ranges, sequences.valid());
    let want = reference::block_backward(&weights, &x, &ranges, sequences.valid(), &dy);
    let arrays = named(&weights);
    let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &arrays) };
    let config = sizes.config();
    let got =
        run!(f64, &case, |group, weights| TransformerBlock::<S, f64, Dev>::load(group, weights, &config));
    let got = got.unwrap();
    close("block", &got.y.into_dyn(), &want_y, EXACT);
    close("block dx", &got.dx.into_dyn(), &want.dx, EXACT);
    grads_close(&got.grads, &want.weights.named(), EXACT);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_equal_the_reference(
        (kv_heads, group, world) in (1..=3usize, 1..=3usize, 1..=8usize),
        (head_dim, hidden, more) in (1..4usize, 2..8usize, 0..6usize),
        (gated, post, causal, masked) in (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        seed: u64,
    ) {
        let heads = kv_heads * group;
        let world = world.min(heads);
        let sizes = RandomBlock { heads, kv_heads, head_dim, hidden, ffn: world + more, gated, post, causal, seed };
        let sequences =
            if masked { Sequences::padded(&[2, 5, 1], 5).unwrap() } else { Sequences::packed([4, 1, 6]) };
        exact::<Replicated>(&sizes, world, &sequences);
        exact::<Shard<0>>(&sizes, world, &sequences);
    }
}

const UNEVEN: RandomBlock = RandomBlock {
    heads: 9,
    kv_heads: 3,
    head_dim: 4,
    hidden: 10,
    ffn: 13,
    gated: true,
    post: false,
    causal: true,
    seed: 1,
};

/// Compares nine query and three key/value heads on every number of ranks up to eight.
#[test]
fn nine_heads_on_any_number_of_ranks() {
    for world in 1..=8 {
        exact::<Replicated>(&UNEVEN, world, &Sequences::packed([3, 4]));
        exact::<Shard<0>>(&UNEVEN, world, &Sequences::packed([3, 4]));
    }
}

/// A layer and the normalization before it.
type Normed<L, B> = (Normalize<Replicated, f64, B>, L);

/// Loads the layers of a block without a gate separately.
fn layers<B: Backend>(
    group: &Group<B>,
    weights: &Weights<'_>,
    config: &BlockConfig,
) -> Result<(Normed<ParallelAttention<Replicated, f64, B>, B>, Normed<ParallelMlp<Replicated, f64, B>, B>)> {
    let (names, sizes) = (&config.names, (config.attention.hidden, config.ffn));
    let norm = |name: &str| Normalize::load(group, &weights.at(name), config.norm, config.attention.hidden);
    let attention = ParallelAttention::load(group, weights, &names.qkv, &names.out, &config.attention)?;
    let mlp = ParallelMlp::load(group, weights, &names.mlp, sizes, config.activation, true)?;
    Ok(((norm("norm1")?, attention), (norm("norm2")?, mlp)))
}

/// Three ways to build a block give the same bits: loading it from a configuration, passing
/// separately loaded layers to `TransformerBlock::new`, and chaining `Residual` layers.
#[test]
fn blocks_are_their_layers() {
    let sequences = Sequences::packed([3, 4]);
    for (world, post) in [(1, false), (3, false), (3, true)] {
        let sizes = RandomBlock { gated: false, post, kv_heads: 9, ..UNEVEN };
        let ((x, dy), weights, config) = (inputs(&sizes, &sequences), sizes.weights(), sizes.config());
        let arrays = named(&weights);
        let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &arrays) };
        let loaded = run!(f64, &case, |group, weights| {
            TransformerBlock::<Replicated, f64, Dev>::load(group, weights, &config)
        });
        let made = run!(f64, &case, |group, weights| {
            let (first, second) = layers(group, weights, &config)?;
            Ok(TransformerBlock::new(config.placement, first, second))
        });
        same_bits("layers", &made.unwrap(), loaded.as_ref().unwrap());
        let composed = run!(f64, &case, |group, weights| {
            let ((norm1, attention), (norm2, mlp)) = layers(group, weights, &config)?;
            Ok(match config.placement {
                NormPlacement::Pre => {
                    BoxLayer::new(Residual(norm1.then(attention)).then(Residual(norm2.then(mlp))))
                }
                NormPlacement::Post => {
                    BoxLayer::new(Residual(attention).then(norm1).then(Residual(mlp)).then(norm2))
                }
                other => panic!("{other:?}"),
            })
        });
        same_bits("residuals", &composed.unwrap(), &loaded.unwrap());
    }
}

/// With more ranks than tokens, some ranks hold no token.
#[test]
fn more_ranks_than_tokens() {
    exact::<Shard<0>>(&UNEVEN, 5, &Sequences::one(2));
    exact::<Replicated>(&UNEVEN, 5, &Sequences::one(1));
}

/// In narrow element types a block's error, relative to the largest result, is a few roundings.
/// Every number passes through about ten roundings (projections, scores, weights, sums, norms).
/// Accumulators are f32, so the roundings add up like a random walk. 16 ε covers them, and another
/// factor of 2 covers the backward.
#[test]
fn narrow_elements_are_as_good_as_their_precision() {
    for (gated, post) in [(false, false), (true, false), (false, true)] {
        let sizes = RandomBlock { gated, post, hidden: 24, ffn: 40, ..UNEVEN };
        for world in [1, 2, 3, 8] {
            narrow::<f32>(&sizes, world);
            narrow::<half::bf16>(&sizes, world);
            narrow::<half::f16>(&sizes, world);
        }
    }
}

fn narrow<T: Element>(sizes: &RandomBlock, world: usize) {
    let sequences = Sequences::packed([5, 7]);
    let ((x, dy), weights) = (inputs(sizes, &sequences), sizes.weights());
    let ranges: Vec<_> = sequences.iter().collect();
    let want_y = reference::block(&weights, &x, &ranges, None);
    let want = reference::block_backward(&weights, &x, &ranges, None, &dy);
    let arrays = named(&weights);
    let case = Case { sequences, ..Case::new(world, &x, &dy, &arrays) };
    let got = outcome::<Replicated, T>(sizes, &case).unwrap();
    let bound = 16.0 * T::EPSILON;
    close("y", &got.y.into_dyn(), &want_y, bound);
    close("dx", &got.dx.into_dyn(), &want.dx, 2.0 * bound);
    for (name, want) in want.weights.named() {
        // A constant added to all keys does not change the attention weights. So the gradient of
        // k's bias is rounding error, with as many terms as there are tokens.
        let terms = if name.ends_with("k.bias") { x.nrows() as f64 } else { 1.0 };
        let error = difference(&got.grads[name], &want) / terms;
        assert!(error <= 2.0 * bound, "{name} in {} on {world}: {error:e}", T::DTYPE);
    }
}
