//! `Reduction::Invariant`: the same bits at every tensor-parallel size, in both residual streams,
//! and on every mesh of one batch.

use crate::{
    block::{self, RandomBlock},
    dev::{self, DTensor, Dev, Tensor, ranks},
    support::{
        Assembled, Case, Outcome, Spread, arrays, close, grads_close, integers, matrix, random, run_unplanned,
    },
    training::{
        batch,
        model::{Config, Gpt},
    },
};
use half::bf16;
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    comm::{DeviceMesh, Group, Op, Transfer},
    device::Element,
    kernels::{Activation, AttentionChoices, NormKind},
    optim::{AdamW, AdamWConfig, clip_scale, grad_norm},
    parallel::{
        Activate, AddBias, Attention, AttentionConfig, Bias, ColumnLinear, ColumnParallelLinear, Columns,
        CopyTo, Layer, Normalize, ParallelAttention, PositionEmbedding, QkNorm, QkvLayout, ReduceFrom,
        ResidualStream, RowLinear, RowParallelLinear, VocabParallelEmbedding,
    },
    reference,
    shard::{Axis, Heads, Mesh, Partition, Reduction, Replicated, Sequences, Shard, Tree},
    tensor::{Arrays, Random, Weights},
    train::{DataParallel, GradReduce, Schedule},
};
use std::collections::BTreeMap;

fn bits<D: ndarray::Dimension>(array: &ndarray::Array<f64, D>) -> Vec<u64> {
    array.iter().map(|value| value.to_bits()).collect()
}

/// Keeps the group sizes that slow tests use on this device, and always the last of `worlds`.
pub(crate) fn tried(worlds: &[usize]) -> impl Iterator<Item = usize> {
    let last = worlds.last();
    worlds.iter().filter(move |&world| dev::WORLDS.contains(world) || Some(world) == last).copied()
}

#[track_caller]
pub(crate) fn same_bits(what: &str, got: &Outcome, want: &Outcome) {
    // Wrong values would have equal bits too if all were NaN.
    let mut values = want.y.iter().chain(&want.dx).chain(want.grads.values().flatten());
    assert!(values.all(|value| value.is_finite()), "{what}: not finite");
    assert!(bits(&got.y) == bits(&want.y), "{what}: y");
    assert!(bits(&got.dx) == bits(&want.dx), "{what}: dx");
    assert_eq!(got.grads.keys().collect::<Vec<_>>(), want.grads.keys().collect::<Vec<_>>());
    for (name, want) in &want.grads {
        assert!(bits(&got.grads[name]) == bits(want), "{what}: the gradient of {name}");
    }
}

fn in_blocks<'a>(case: Case<'a>, blocks: usize) -> Case<'a> {
    Case { reduction: Reduction::Invariant { blocks }, ..case }
}

// Sums along the tree.

/// The transfers of a tree sum. Two ranks with one sub-tree each reduce by one collective.
/// Otherwise, small tensors are gathered from all sub-trees. For larger tensors, each rank sends
/// every other rank that rank's shard of its own sub-trees' sums. Then the shards of the total are
/// gathered, unless the result stays sharded.
fn tree_moves<T: Element>(
    (tree, rank): (&Tree, usize),
    [rows, cols]: [usize; 2],
    scatter: Option<&Partition>,
) -> Vec<Transfer> {
    let transfer = |op, elements| Transfer { op, dtype: T::Acc::DTYPE, elements };
    let (ranks, all, own) = (tree.ranks(), rows * cols, tree.nodes(rank).len());
    let nodes: usize = (0..ranks).map(|rank| tree.nodes(rank).len()).sum();
    let op = if scatter.is_some() { Op::ReduceScatter } else { Op::AllReduce };
    match ranks {
        1 => return Vec::new(),
        2 if nodes == 2 => return vec![transfer(op, all)],
        _ if nodes * all <= 4096 => return vec![transfer(Op::AllGather, nodes * all)],
        _ => {}
    }
    let part = |rank: usize| match scatter {
        Some(partition) => rows * partition.size(rank),
        None => Partition::even(all, ranks).size(rank),
    };
    let sent = (1..ranks).map(|step| own * part((rank + step) % ranks)).filter(|&sent| sent > 0);
    let mut moved: Vec<_> = sent.map(|sent| transfer(Op::Exchange, sent)).collect();
    if scatter.is_none() {
        moved.push(Transfer { op: Op::AllGather, dtype: T::DTYPE, elements: all });
    }
    moved
}

/// Sums `terms` over the leaves, whole and sharded. Checks that the transfers are those of
/// `tree_moves`. Returns the bits of the sum and of the first term.
fn tree_sums<T: Element>(leaves: usize, world: usize, terms: &[Array2<f64>]) -> (Vec<u64>, Vec<u64>) {
    let (rows, cols) = terms[0].dim();
    let parts = ranks(world).run(|world| {
        let (group, record) = world.recorded();
        let tree = Tree::new("test", "leaves", leaves, group.size())?;
        let own = || -> Result<Vec<Tensor<T::Acc>>> {
            let mut sum = shardwise::shard::TreeSum::new(leaves);
            for leaf in tree.owned(group.rank()) {
                let term = terms[leaf].mapv(T::Acc::from_f64);
                sum.push(shardwise::shard::Node::leaf(leaf), term, |left, right| {
                    left.zip_mut_with(&right, |left, right| *left += *right);
                    Ok(())
                })?;
            }
            sum.values().iter().map(|term| Tensor::from_array(group.device(), term)).collect()
        };
        record.take();
        let whole = group.tree_all_reduce::<T>(&tree, own()?)?;
        assert_eq!(record.take(), tree_moves::<T>((&tree, group.rank()), [rows, cols], None));
        // The last rank but one has all columns.
        let last = |rank| if rank + 2 == group.size() || group.size() == 1 { cols } else { 0 };
        let partitions = [
            group.even_partition(cols)?,
            Partition::from_sizes((0..group.size()).map(last).collect::<Vec<usize>>()),
        ];
        let mut parts = Vec::new();
        for partition in &partitions {
            let part = group.tree_reduce_scatter::<T>(&tree, own()?, 1, partition)?;
            assert_eq!(record.take(), tree_moves::<T>((&tree, group.rank()), [rows, cols], Some(partition)));
            parts.push(part.to_array()?.mapv(T::to_f64).into_dimensionality::<ndarray::Ix2>().unwrap());
        }
        Ok((whole.to_array()?.mapv(T::to_f64), parts))
    });
    let parts = parts.unwrap();
    let whole = bits(&parts[0].0);
    for (other, _) in &parts {
        assert_eq!(bits(other), whole, "all ranks have the same sum");
    }
    for at in 0..2 {
        let views: Vec<_> = parts.iter().map(|(_, parts)| parts[at].view()).collect();
        assert_eq!(
            bits(&ndarray::concatenate(ndarray::Axis(1), &views).unwrap()),
            whole,
            "the shards have the bits of the whole"
        );
    }
    (whole, bits(&terms[0]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any number of leaves on any number of ranks, small tensors (gathered) and larger ones
    /// (exchanged).
    #[test]
    fn tree_sums_have_the_same_bits(
        leaves in 1..14usize, rows in 1..5usize, cols in prop::sample::select(vec![1, 7, 300]), seed: u64,
    ) {
        let terms: Vec<_> = (0..leaves).map(|leaf| matrix(seed, &format!("{leaf}"), rows * 10, cols)).collect();
        let one = [tree_sums::<f32>(leaves, 1, &terms).0, tree_sums::<bf16>(leaves, 1, &terms).0];
        for world in 2..=leaves.min(8) {
            prop_assert!(tree_sums::<f32>(leaves, world, &terms).0 == one[0], "f32 on {world}");
            prop_assert!(tree_sums::<bf16>(leaves, world, &terms).0 == one[1], "bf16 on {world}");
        }
    }
}

// Layers.

fn blocks_agree<T: Element>(
    sizes: &RandomBlock,
    blocks: usize,
    worlds: &[usize],
    sequences: &Sequences,
) -> Outcome {
    let (x, dy) = block::inputs(sizes, sequences);
    let weights = block::named(&sizes.weights());
    let outcome = |world: usize, sequence: bool| {
        let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &weights) };
        let case = in_blocks(case, blocks);
        if sequence {
            block::outcome::<Shard<0>, T>(sizes, &case)
        } else {
            block::outcome::<Replicated, T>(sizes, &case)
        }
    };
    let one = outcome(1, false).unwrap();
    for world in tried(worlds) {
        for sequence in [false, true] {
            let got = outcome(world, sequence).unwrap_or_else(|error| panic!("{world} ranks: {error}"));
            let what = format!("{sizes:?} in {blocks} blocks of {}, {world} ranks, {sequence}", T::DTYPE);
            same_bits(&what, &got, &one);
        }
    }
    one
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Transformer blocks: multi-head and grouped-query attention, groups of query heads that cross
    /// block boundaries, plain and gated feed-forward layers, masks, few tokens and none on a rank,
    /// every world up to the number of blocks.
    #[test]
    fn blocks_have_the_same_bits(
        (kv_heads, group, blocks) in (1..=4usize, 1..=4usize, 1..=8usize),
        (head_dim, hidden, more) in (1..5usize, 2..20usize, 0..40usize),
        (gated, post, causal, masked) in (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        seed: u64,
    ) {
        let heads = kv_heads * group;
        let blocks = blocks.min(heads);
        let sizes = RandomBlock { heads, kv_heads, head_dim, hidden, ffn: blocks + more, gated, post, causal, seed };
        let sequences =
            if masked { Sequences::padded(&[2, 5, 1], 5).unwrap() } else { Sequences::packed([4, 1, 6]) };
        let worlds: Vec<_> = (1..=blocks).collect();
        blocks_agree::<f32>(&sizes, blocks, &worlds, &sequences);
        blocks_agree::<bf16>(&sizes, blocks, &worlds, &sequences);
        // In f64 the result is also compared with the reference.
        let got = blocks_agree::<f64>(&sizes, blocks, &worlds, &sequences);
        let ((x, dy), weights) = (block::inputs(&sizes, &sequences), sizes.weights());
        let ranges: Vec<_> = sequences.iter().collect();
        let want = reference::block_backward(&weights, &x, &ranges, sequences.valid(), &dy);
        close("y", &got.y.into_dyn(), &reference::block(&weights, &x, &ranges, sequences.valid()), 1e-12);
        close("dx", &got.dx.into_dyn(), &want.dx, 1e-12);
        grads_close(&got.grads, &want.weights.named(), 1e-12);
    }
}

/// The sizes are so large that GEMMs are blocked and tensors exchanged: 12 heads in 8 blocks on 1
/// to 8 ranks.
#[test]
fn larger_blocks_have_the_same_bits() {
    let sizes = RandomBlock {
        heads: 12,
        kv_heads: 4,
        head_dim: 8,
        hidden: 96,
        ffn: 300,
        gated: true,
        post: false,
        causal: true,
        seed: 1,
    };
    for tokens in [3, 70] {
        blocks_agree::<f32>(&sizes, 8, &[2, 3, 4, 5, 6, 7, 8], &Sequences::one(tokens));
        blocks_agree::<bf16>(&sizes, 8, &[2, 4, 7], &Sequences::one(tokens));
    }
    let plain = RandomBlock { kv_heads: 12, gated: false, ..sizes };
    blocks_agree::<f32>(&plain, 8, &[2, 3, 4, 5, 6, 7, 8], &Sequences::packed([40, 9]));
}

/// Without the invariant reduction the bits depend on the number of ranks, so the tests above can
/// detect a fault.
#[test]
fn fast_reductions_depend_on_the_number_of_ranks() {
    let sizes = RandomBlock {
        heads: 4,
        kv_heads: 4,
        head_dim: 8,
        hidden: 32,
        ffn: 64,
        gated: false,
        post: false,
        causal: true,
        seed: 1,
    };
    let (x, dy) = block::inputs(&sizes, &Sequences::one(9));
    let weights = block::named(&sizes.weights());
    let outcome =
        |world| block::outcome::<Replicated, f32>(&sizes, &Case::new(world, &x, &dy, &weights)).unwrap();
    assert!(bits(&outcome(1).y) != bits(&outcome(2).y));
}

/// Compares every number of ranks and both residual streams with one rank.
fn agree<T: Element>(
    what: &str,
    case: &Case<'_>,
    worlds: &[usize],
    outcome: impl Fn(&Case<'_>, bool) -> Result<Outcome>,
) {
    let on = |world, sequence| {
        let case =
            Case { world, sequences: case.sequences.clone(), x_partition: None, dy_partition: None, ..*case };
        outcome(&case, sequence).unwrap_or_else(|error| panic!("{what} on {world}: {error}"))
    };
    let one = on(1, false);
    for world in tried(worlds) {
        for sequence in [false, true] {
            let what = format!("{what}, {} on {world}, sequence parallel {sequence}", T::DTYPE);
            same_bits(&what, &on(world, sequence), &one);
        }
    }
}

/// The head has fewer classes than ranks, so some ranks hold none.
#[test]
fn small_heads_have_the_same_bits() {
    let (rows, hidden, classes) = (5, 7, 3);
    let (x, dy) = (matrix(1, "x", rows, hidden), matrix(1, "dy", rows, classes));
    let weights =
        arrays([("weight", random(1, "w", &[classes, hidden])), ("bias", random(1, "b", &[classes]))]);
    let on = |world| {
        let case = in_blocks(Case::new(world, &x, &dy, &weights), 8);
        run_unplanned!(f32, &case, |group, weights| {
            let columns = Columns::even(group, classes)?;
            ColumnParallelLinear::<Replicated, f32, Dev>::load(group, weights, hidden, &columns, Bias::Add)
        })
        .unwrap()
    };
    let want = on(1);
    for world in 2..=8 {
        same_bits(&format!("{world} ranks"), &on(world), &want);
    }
}

/// Runs a chain of unfused layers with its mappings.
fn chain<T: Element>(case: &Case<'_>) -> Result<Outcome> {
    run_unplanned!(T, case, |group, weights| {
        let columns = Columns::even(group, 23)?;
        let up = ColumnLinear::<T, Dev>::load(group, &weights.at("up"), 6, &columns, Bias::Add)?;
        let down = RowLinear::<T, Dev>::load(group, &weights.at("down"), columns.partition(), 6)?;
        let up = Layer::<T, Dev>::then(CopyTo, up);
        let act = Layer::<T, Dev>::then(up, Activate::new(Activation::GeluErf));
        Ok(Layer::<T, Dev>::then(Layer::<T, Dev>::then(act, down), ReduceFrom))
    })
}

#[test]
fn chains_of_mappings_have_the_same_bits() {
    let (x, dy) = (matrix(1, "x", 9, 6), matrix(1, "dy", 9, 6));
    let weights = arrays([
        ("up.weight", random(1, "up", &[23, 6])),
        ("up.bias", random(1, "ub", &[23])),
        ("down.weight", random(1, "down", &[6, 23])),
    ]);
    for blocks in [5, 8] {
        let case = in_blocks(Case::new(1, &x, &dy, &weights), blocks);
        let worlds: Vec<_> = (2..=blocks).collect();
        agree::<f32>("chain", &case, &worlds, |case, _| chain::<f32>(case));
        agree::<bf16>("chain", &case, &worlds, |case, _| chain::<bf16>(case));
        agree::<f64>("chain", &case, &worlds, |case, _| chain::<f64>(case));
    }
}

fn config(heads: usize, kv_heads: usize) -> AttentionConfig {
    let norm = QkNorm::new(1e-3, "qn", "kn");
    AttentionConfig::new(10, heads)
        .with_kv_heads(kv_heads)
        .with_head_dim(4)
        .with_choices(AttentionChoices::CAUSAL)
        .with_qk_norm(norm)
        .with_qkv_bias(true)
}

/// Runs attention with normalized heads. The projections are three layers if `separate`, otherwise
/// one merged layer.
fn attention<S: ResidualStream + Spread, T: Element>(
    case: &Case<'_>,
    config: &AttentionConfig,
    separate: bool,
) -> Result<Outcome> {
    let layout = QkvLayout::separate("q", "k", "v");
    if !separate {
        return run_unplanned!(T, case, |group, weights| {
            ParallelAttention::<S, T, Dev>::load(group, weights, &layout, "o", config)
        });
    }
    run_unplanned!(T, case, |group, weights| {
        let query = group.partition("attention", "query heads", config.heads, 1)?;
        let heads = Heads::with_partition(query, config.kv_heads, config.head_dim)?;
        let load = |columns: &Columns| ColumnLinear::load(group, weights, config.hidden, columns, Bias::Add);
        let layers =
            Columns::separate_qkv(group, &heads, &layout)?.iter().map(load).collect::<Result<_>>()?;
        let qkv = ColumnParallelLinear::<S, T, Dev>::concat(layers)?;
        let core = Attention::load(group, weights, &heads, config)?;
        let partition = heads.query_features();
        let out =
            RowParallelLinear::<S, T, Dev>::load(group, &weights.at("o"), &partition, config.hidden, false)?;
        Ok(Layer::<T, Dev>::then(Layer::<T, Dev>::then(qkv, core), out))
    })
}

/// The weights of [`attention`] for these sizes of queries, keys and a head.
fn attention_weights(query: usize, kv: usize, dim: usize, hidden: usize) -> Arrays {
    arrays([
        ("q.weight", random(1, "q", &[query, hidden])),
        ("q.bias", random(1, "qb", &[query])),
        ("k.weight", random(1, "k", &[kv, hidden])),
        ("k.bias", random(1, "kb", &[kv])),
        ("v.weight", random(1, "v", &[kv, hidden])),
        ("v.bias", random(1, "vb", &[kv])),
        ("o.weight", random(1, "o", &[hidden, query])),
        ("qn.weight", random(1, "qn", &[dim])),
        ("kn.weight", random(1, "kn", &[dim])),
    ])
}

/// Nine query and three key/value heads, in five and in nine blocks. With five blocks, the query
/// heads of one key/value head are in different blocks.
#[test]
fn normalized_heads_and_separate_layers_have_the_same_bits() {
    let (heads, kv, dim, hidden) = (9, 3, 4, 10);
    let (x, dy) = (matrix(1, "x", 7, hidden), matrix(1, "dy", 7, hidden));
    let weights = attention_weights(heads * dim, kv * dim, dim, hidden);
    let config = config(heads, kv);
    for (blocks, worlds) in [(5, vec![2, 3, 4, 5]), (9, vec![4, 8])] {
        let case = in_blocks(Case::new(1, &x, &dy, &weights), blocks);
        for separate in [false, true] {
            agree::<f32>("attention", &case, &worlds, |case, sequence| {
                if sequence {
                    attention::<Shard<0>, f32>(case, &config, separate)
                } else {
                    attention::<Replicated, f32>(case, &config, separate)
                }
            });
        }
        agree::<bf16>("attention", &case, &worlds, |case, sequence| {
            if sequence {
                attention::<Shard<0>, bf16>(case, &config, false)
            } else {
                attention::<Replicated, bf16>(case, &config, false)
            }
        });
    }
}

/// (Query heads, key/value heads, blocks). In the first three cases, two, three and all blocks
/// share a key/value head. In the other cases, blocks hold one such head and a range of another, or
/// whole heads between ranges of others.
const SHARED: [(usize, usize, usize); 7] =
    [(16, 4, 8), (12, 2, 6), (8, 1, 8), (6, 2, 4), (9, 3, 5), (10, 5, 3), (18, 9, 4)];

#[test]
fn shared_heads_have_the_same_bits_and_are_those_of_the_reference() {
    let (dim, hidden) = (4, 10);
    for (number, (heads, kv, blocks)) in SHARED.into_iter().enumerate() {
        // One case has so many tokens that sums are exchanged rather than gathered.
        for &tokens in if number == 3 { &[1, 7, 130][..] } else { &[7] } {
            let (x, dy) = (matrix(2, "x", tokens, hidden), matrix(2, "dy", tokens, hidden));
            let weights = attention_weights(heads * dim, kv * dim, dim, hidden);
            let config = config(heads, kv).with_qk_norm(None);
            let what = format!("{heads} heads, {kv} shared, in {blocks} blocks, {tokens} tokens");
            let case = in_blocks(Case::new(1, &x, &dy, &weights), blocks);
            let worlds: Vec<_> = (2..=blocks).collect();
            for separate in [false, true] {
                agree::<f32>(&what, &case, &worlds, |case, sequence| {
                    if sequence {
                        attention::<Shard<0>, f32>(case, &config, separate)
                    } else {
                        attention::<Replicated, f32>(case, &config, separate)
                    }
                });
                agree::<bf16>(&what, &case, &worlds, |case, sequence| {
                    if sequence {
                        attention::<Shard<0>, bf16>(case, &config, separate)
                    } else {
                        attention::<Replicated, bf16>(case, &config, separate)
                    }
                });
                let got = attention::<Replicated, f64>(&case, &config, separate).unwrap();
                is_the_reference(&got, &config, &case);
            }
        }
    }
}

/// Checks that [`attention`] without head norms equals the reference.
fn is_the_reference(got: &Outcome, config: &AttentionConfig, case: &Case<'_>) {
    let matrix = |name: &str| case.weights.0[name].clone().into_dimensionality().unwrap();
    let vector = |name: &str| Some(case.weights.0[name].clone().into_dimensionality().unwrap());
    let weights = reference::AttentionWeights {
        q: matrix("q.weight"),
        q_bias: vector("q.bias"),
        k: matrix("k.weight"),
        k_bias: vector("k.bias"),
        v: matrix("v.weight"),
        v_bias: vector("v.bias"),
        o: matrix("o.weight"),
        o_bias: None,
    };
    let spec = reference::AttentionSpec {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        causal: config.choices.causal,
        window: None,
        scale: 1.0 / (config.head_dim as f64).sqrt(),
    };
    let all: Vec<_> = case.sequences.iter().collect();
    close(
        "y",
        &got.y.clone().into_dyn(),
        &reference::self_attention(&spec, &weights, case.x, &all, None),
        1e-12,
    );
    let want = reference::self_attention_backward(&spec, &weights, case.x, &all, None, case.dy);
    close("dx", &got.dx.clone().into_dyn(), &want.dx, 1e-12);
    let (want, grad) = (want.weights, |name: &str| &got.grads[name]);
    close("q", grad("q.weight"), &want.q, 1e-12);
    close("k", grad("k.weight"), &want.k, 1e-12);
    close("v", grad("v.weight"), &want.v, 1e-12);
    close("o", grad("o.weight"), &want.o, 1e-12);
    close("q's bias", grad("q.bias"), &want.q_bias.unwrap(), 1e-12);
    // A constant added to all keys does not change the attention weights. So the gradient of k's
    // bias is rounding error, with as many terms as there are tokens.
    let tokens = case.x.nrows() as f64;
    close("k's bias", &(grad("k.bias") / tokens), &(want.k_bias.unwrap() / tokens), 1e-12);
    close("v's bias", grad("v.bias"), &want.v_bias.unwrap(), 1e-12);
}

/// Sums over ranks that share a head include the other ranks' zeros, which turns −0 into +0. A rank
/// that holds the head alone must give the same bits.
#[test]
fn sums_of_shared_heads_have_the_same_zeros() {
    let (dim, hidden) = (4, 10);
    for (heads, kv, blocks) in SHARED {
        let weights = attention_weights(heads * dim, kv * dim, dim, hidden);
        let outcome = |world: usize| {
            let tree = Tree::new("test", "blocks", blocks, world).unwrap();
            let query = tree.partition("test", "heads", heads, 1, false).unwrap();
            let heads = Heads::with_partition(query, kv, dim).unwrap();
            let partition = heads.qkv_features();
            let (x, dy) = (matrix(4, "x", 1, hidden), Array2::from_elem((1, partition.total()), -0.0));
            let case = Case { dy_partition: Some(partition), ..Case::new(world, &x, &dy, &weights) };
            let got = run_unplanned!(f32, &in_blocks(case, blocks), |group, weights| {
                let columns = Columns::qkv(group, &heads, &QkvLayout::separate("q", "k", "v"))?;
                ColumnParallelLinear::<Replicated, f32, Dev>::load(
                    group,
                    weights,
                    hidden,
                    &columns,
                    Bias::Add,
                )
            });
            // The order of y's columns depends on the number of ranks, so y is not compared.
            Outcome { y: Array2::zeros((0, 0)), ..got.unwrap() }
        };
        let one = outcome(1);
        for world in 2..=blocks {
            same_bits(
                &format!("{heads} heads, {kv} shared, in {blocks} blocks on {world} ranks"),
                &outcome(world),
                &one,
            );
        }
    }
}

/// A rank holds the weights of a head once, even if several of its blocks share the head. Norms
/// count these weights once over all ranks.
#[test]
fn shared_heads_are_held_once_and_counted_once() {
    let (dim, hidden) = (4, 10);
    for (heads, kv, blocks) in SHARED {
        let weights = attention_weights(heads * dim, kv * dim, dim, hidden);
        let config = config(heads, kv).with_qk_norm(None);
        let norm = |world: usize| {
            let norms = ranks(world).run(|world| {
                let group = world.with_reduction(Reduction::Invariant { blocks });
                let layout = QkvLayout::separate("q", "k", "v");
                let weights = Weights::new(&weights);
                let layer =
                    ParallelAttention::<Replicated, f32, Dev>::load(&group, &weights, &layout, "o", &config)?;
                let query = Heads::with_partition(group.partition("test", "heads", heads, 1)?, kv, dim)?;
                let (own, kv) = (query.query_range(group.rank()), query.kv_range(group.rank()));
                let rows: Vec<_> = layer.params().iter().map(|param| param.shape().dims()[0]).collect();
                assert_eq!(
                    rows,
                    [(own.len() + 2 * kv.len()) * dim; 2].into_iter().chain([hidden]).collect::<Vec<_>>()
                );
                let x = matrix(3, "x", 5, hidden).mapv(|x| x as f32);
                let x = DTensor::replicated(&group, Tensor::from_array(group.device(), &x)?)?;
                let (y, saved) = layer.forward(x)?;
                layer.backward(saved, y)?;
                grad_norm(&layer.params(), &[&group])
            });
            norms.unwrap()[0].to_bits()
        };
        let one = norm(1);
        for world in 2..=blocks {
            assert_eq!(norm(world), one, "{heads} heads, {kv} shared, in {blocks} blocks on {world} ranks");
        }
    }
}

/// Runs layers whose gradients are sums over tokens: positions, a normalization and a bias.
fn tokens<S: ResidualStream + Spread, T: Element>(case: &Case<'_>) -> Result<Outcome> {
    run_unplanned!(T, case, |group, weights| {
        let positions = PositionEmbedding::<S, T, Dev>::load(group, &weights.at("p"), 4, 6)?;
        let norm =
            Normalize::<S, T, Dev>::load(group, &weights.at("n"), NormKind::LayerNorm { eps: 1e-3 }, 6)?;
        let bias = AddBias::<S, T, Dev>::load(group, &weights.at("b"), 6)?;
        Ok(Layer::<T, Dev>::then(Layer::<T, Dev>::then(positions, norm), bias))
    })
}

#[test]
fn sums_over_tokens_have_the_same_bits() {
    let weights = arrays([
        ("p.weight", random(1, "p", &[4, 6])),
        ("n.weight", random(1, "n", &[6])),
        ("n.bias", random(1, "nb", &[6])),
        ("b.bias", random(1, "b", &[6])),
    ]);
    // The cases have fewer and more tokens than blocks.
    for rows in [5, 37] {
        let (x, dy) = (matrix(1, "x", rows, 6), matrix(1, "dy", rows, 6));
        let lengths = (0..rows).step_by(4).map(|start| 4.min(rows - start));
        let case = Case { sequences: Sequences::packed(lengths), ..Case::new(1, &x, &dy, &weights) };
        let case = in_blocks(case, 7);
        agree::<f32>("tokens", &case, &[2, 3, 5, 7], |case, sequence| {
            if sequence { tokens::<Shard<0>, f32>(case) } else { tokens::<Replicated, f32>(case) }
        });
    }
}

/// The vocabulary's weight has a −0. Adding the other ranks' zeros makes it +0.
#[test]
fn embeddings_have_the_same_bits() {
    let mut table = integers(1, "table", 9, 4);
    table[[3, 1]] = -0.0;
    let weights = arrays([("weight", table.into_dyn())]);
    let embedded = |world: usize| {
        let all = ranks(world).run(|world| {
            let world = world.with_reduction(Reduction::Invariant { blocks: 4 });
            let layer =
                VocabParallelEmbedding::<Replicated, f32, Dev>::load(&world, &Weights::new(&weights), 9, 4)?;
            let (y, _) = layer.forward(&[3, 1, 8, 3], Sequences::one(4))?;
            y.local().to_vec()
        });
        all.unwrap()[0].iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    for world in 2..=4 {
        assert_eq!(embedded(world), embedded(1));
    }
}

// Training.

/// The bits of the parameters after some steps, and of the losses and norms of each step.
#[derive(PartialEq)]
struct Trained {
    params: BTreeMap<String, Vec<u64>>,
    curve: Vec<(u64, u64)>,
}

/// Trains by AdamW with dropout, clipping and decay on a dp x tp mesh, with this many microbatches
/// per replica.
fn train<S: ResidualStream, T: Element>(
    config: &Config,
    [dp, tp, microbatches]: [usize; 3],
    blocks: usize,
    sequences: usize,
) -> Trained {
    let outcomes = ranks(dp * tp).run(|world| {
        let world = world.with_reduction(Reduction::Invariant { blocks });
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, tp)?)?;
        let source = Random::normal(3, 0.3);
        let schedule = Schedule::one_forward_one_backward(1, microbatches);
        let model = Gpt::<S, T, Dev>::load(&mesh, &source, config, schedule)?;
        let mut optimizer = AdamW::new(AdamWConfig::default().with_weight_decay(0.1));
        let mut curve = Vec::new();
        for step in 0..4 {
            let (loss, norm) = model.gradients(&batch(config, step, sequences), step, 1.0)?;
            optimizer.step(&model.params(), 1e-2, clip_scale(norm, 0.5)?)?;
            curve.push((loss.to_bits(), norm.to_bits()));
        }
        let mut params = Vec::new();
        for param in model.params() {
            let values: Vec<f64> = param.value()?.to_vec()?.into_iter().map(Element::to_f64).collect();
            params.push((param.regions().to_vec(), param.shape().dims().to_vec(), values));
        }
        Ok((mesh.group(Axis::Data).rank(), curve, params))
    });
    let outcomes = outcomes.unwrap_or_else(|error| panic!("dp {dp}, tp {tp}: {error}"));
    let mut whole = Assembled::default();
    let curve = outcomes[0].1.clone();
    for (replica, own, params) in outcomes {
        assert_eq!(own, curve, "every rank knows the same losses and norms");
        if replica == 0 {
            params.iter().for_each(|(regions, shape, values)| whole.add(regions, shape, values));
        }
    }
    let bits_of = |(name, array): (String, ArrayD<f64>)| (name, bits(&array));
    Trained { params: whole.finish().into_iter().map(bits_of).collect(), curve }
}

#[track_caller]
fn same_training(what: &str, got: &Trained, want: &Trained) {
    assert_eq!(got.curve, want.curve, "{what}: losses and norms");
    for (name, want) in &want.params {
        assert!(got.params[name] == *want, "{what}: {name}");
    }
}

const GPT: Config = Config {
    vocabulary: 19,
    context: 5,
    hidden: 16,
    heads: 8,
    ffn: 21,
    layers: 2,
    dropout: 0.2,
    recomputed: 2,
};

fn trains<T: Element>(worlds: &[usize]) {
    let one = train::<Replicated, T>(&GPT, [1, 1, 1], 8, 3);
    assert!(
        one.curve.iter().all(|(loss, norm)| f64::from_bits(*loss).is_finite() && f64::from_bits(*norm) > 0.5)
    );
    for tp in tried(worlds) {
        same_training(
            &format!("{} tp {tp}", T::DTYPE),
            &train::<Replicated, T>(&GPT, [1, tp, 1], 8, 3),
            &one,
        );
        same_training(&format!("{} sp {tp}", T::DTYPE), &train::<Shard<0>, T>(&GPT, [1, tp, 1], 8, 3), &one);
    }
}

#[test]
fn training_has_the_same_bits_at_every_size() {
    trains::<f32>(&[2, 3, 4, 5, 6, 7, 8]);
    trains::<bf16>(&[2, 5, 8]);
    trains::<f64>(&[3, 4]);
}

/// Meshes train on one batch in 4 and in 6 microbatches. On some meshes each replica computes whole
/// sub-trees of the sum, and on others it does not.
#[test]
fn meshes_of_the_same_batch_have_the_same_bits() {
    let meshes: [&[[usize; 3]]; 2] = [
        &[[1, 1, 4], [2, 1, 2], [4, 1, 1], [1, 3, 4], [2, 2, 2], [4, 2, 1]],
        &[[1, 1, 6], [2, 1, 3], [3, 1, 2], [6, 1, 1], [2, 2, 3], [3, 2, 2]],
    ];
    for meshes in meshes {
        // The microbatches are uneven, and one is empty.
        for sequences in [7, 3] {
            let one = train::<Replicated, f32>(&GPT, meshes[0], 4, sequences);
            for &mesh in &meshes[1..] {
                same_training(
                    &format!("{mesh:?}"),
                    &train::<Replicated, f32>(&GPT, mesh, 4, sequences),
                    &one,
                );
            }
            let mesh = meshes[meshes.len() - 1];
            same_training(&format!("sp {mesh:?}"), &train::<Shard<0>, f32>(&GPT, mesh, 4, sequences), &one);
        }
    }
}

// Errors of combinations that cannot be invariant.

fn refused(world: usize, blocks: usize, what: impl Fn(&Group<Dev>) -> Result<()> + Sync) -> String {
    let outcomes =
        ranks(world).run_each(|world| what(&world.with_reduction(Reduction::Invariant { blocks })));
    match outcomes.unwrap().swap_remove(0).unwrap_err() {
        error @ (Error::Unsupported { .. } | Error::Invalid { .. } | Error::TooManyRanks { .. }) => {
            error.to_string()
        }
        error => panic!("{error:?}"),
    }
}

/// A row linear layer of 6 inputs and 5 outputs.
fn row_of_columns(group: &Group<Dev>) -> Result<RowLinear<f32, Dev>> {
    let partition = group.partition("test", "features", 6, 1)?;
    RowLinear::load(group, &Weights::new(&Random::normal(1, 1.0)), &partition, 5)
}

/// With `Reduction::Fast` the sum of two partial sums is one partial sum, so one collective reduces
/// both.
#[test]
fn two_sums_are_reduced_as_one() {
    let sums = ranks(3).run(|world| {
        let (group, record) = world.recorded();
        let layer = row_of_columns(&group)?;
        let x = matrix(1, "x", 4, 6);
        let x = Tensor::from_array(group.device(), &x.mapv(|value| value as f32))?;
        let x = DTensor::replicated(&group, x)?.scatter::<1>(&group.partition("test", "features", 6, 1)?)?;
        let one = layer.forward(x.clone())?.0.all_reduce()?.into_local().to_vec()?;
        record.take();
        let two =
            layer.forward(x.clone())?.0.add(&layer.forward(x)?.0)?.all_reduce()?.into_local().to_vec()?;
        assert_eq!(record.take().len(), 1);
        Ok((one, two))
    });
    for (one, two) in sums.unwrap() {
        assert_eq!(one.iter().map(|value| 2.0 * value).collect::<Vec<_>>(), two);
    }
}

#[test]
fn what_cannot_be_invariant_is_refused() {
    let x = |group: &Group<Dev>| DTensor::replicated(group, Tensor::<f32>::zeros(group.device(), [4, 6])?);
    assert_eq!(
        refused(2, 4, |group| {
            DTensor::partial(group, Tensor::<f32>::zeros(group.device(), [4, 6])?)?.all_reduce().map(drop)
        }),
        "partial sum: not supported: an invariant reduction of a sum with one term per rank, not per canonical block: use the crate's linear layers, or `Reduction::Fast`"
    );
    assert_eq!(
        refused(2, 4, |group| {
            let layer = row_of_columns(group)?;
            let x = x(group)?.scatter::<1>(&group.partition("test", "features", 6, 1)?)?;
            let (a, b) = (layer.forward(x.clone())?.0, layer.forward(x)?.0);
            a.add(&b).map(drop)
        }),
        "add: not supported: two unreduced sums under an invariant reduction: reduce both first"
    );
    assert_eq!(
        refused(2, 4, |group| {
            // The ranks have the same number of heads, but the partition is not by blocks.
            let heads = Heads::new(8, 2, 2, 2)?;
            Columns::qkv(group, &heads, &QkvLayout::separate("q", "k", "v")).map(drop)
        }),
        "qkv linear: not supported: an invariant reduction needs features that are partitioned by canonical \
         blocks: use `Group::partition`"
    );
    let uneven = Partition::from_sizes([1, 3]);
    assert_eq!(
        refused(2, 4, |group| x(group)?.scatter::<0>(&uneven).map(drop)),
        "scatter: not supported: an invariant reduction partitions tokens by canonical blocks as [2, 2], not as [1, 3]"
    );
    assert_eq!(
        refused(2, 4, |group| Columns::from_partition(group, shardwise::shard::Partition::even(6, 2))
            .map(drop)),
        "column linear: not supported: an invariant reduction needs features that are partitioned by canonical \
         blocks: use `Group::partition`"
    );
    assert_eq!(
        refused(3, 2, |group| Columns::even(group, 6).map(drop)),
        "invariant reduction: 3 ranks cannot share 2 canonical blocks: each rank needs at least one"
    );
    assert_eq!(
        refused(2, 4, |group| group.partition("attention", "query heads", 1, 1).map(drop)),
        "attention: rank 0 of 2 owns none of the 1 query heads, which are divided into 4 canonical blocks"
    );
    assert_eq!(
        refused(2, 4, |group| {
            let source = Random::normal(1, 1.0);
            let heads = Heads::with_partition(group.partition("attention", "query heads", 4, 1)?, 1, 2)?;
            let columns = Columns::qkv(group, &heads, &QkvLayout::separate("q", "k", "v"))?;
            let weights = Weights::new(&source);
            ColumnLinear::<f32, Dev>::load(group, &weights, 6, &columns, Bias::Skip).map(drop)
        }),
        "column linear: not supported: `Bias::Skip` of key/value heads that several canonical blocks hold: the bias has \
         fewer elements than the output has columns"
    );
    let model = |group: &Group<Dev>| {
        Normalize::<Replicated, f32, Dev>::load(
            group,
            &Weights::new(&Random::normal(1, 1.0)),
            NormKind::RmsNorm { eps: 1e-5 },
            6,
        )
    };
    assert_eq!(
        refused(2, 4, |group| {
            let model = model(&Group::solo(group.device()))?;
            DataParallel::new(group, &model.params())?.begin(GradReduce::Mean { weight: 1.0 })
        }),
        "data parallel: not supported: a mean over replicas with an invariant reduction: use `GradReduce::Sum` and divide \
         the loss by the size of the whole batch"
    );
    // It is an error to run more backwards than the tree has leaves for them.
    assert_eq!(
        refused(2, 4, |group| {
            let alone = Group::solo(group.device()).with_reduction(group.reduction());
            let model = model(&alone)?;
            let _replicas = DataParallel::new(group, &model.params())?;
            for _ in 0..2 {
                let (y, saved) = model.forward(x(&alone)?)?;
                model.backward(saved, y)?;
            }
            Ok(())
        }),
        "gradient: not supported: a replica has added more than 1 terms to weight in a step: `set_microbatches` \
         sets the number of microbatches of an invariant reduction"
    );
    assert_eq!(
        refused(2, 4, |group| {
            let model = model(&Group::solo(group.device()))?;
            let (y, saved) = model.forward(x(&Group::solo(group.device()))?)?;
            model.backward(saved, y)?;
            grad_norm(&model.params(), &[group]).map(drop)
        }),
        "gradient norm: not supported: weight was not loaded by canonical blocks: it was loaded on another group, or its layer has no canonical blocks"
    );
}

/// A step may have fewer backwards than announced. Their gradients are still summed.
#[test]
fn a_step_may_end_early() {
    let outcomes = ranks(1).run(|world| {
        let world = world.with_reduction(Reduction::Invariant { blocks: 2 });
        let source = Random::normal(1, 1.0);
        let bias = AddBias::<Replicated, f32, Dev>::load(&world, &Weights::new(&source), 3)?;
        for param in bias.params() {
            param.set_microbatches(5);
        }
        for _ in 0..3 {
            bias.backward((), DTensor::replicated(&world, Tensor::full(world.device(), [2, 3], 1.0)?)?)?;
        }
        let norm = grad_norm(&bias.params(), &[&world])?;
        let mut grads = Vec::new();
        for param in bias.params() {
            grads.extend(param.grad().map(|grad| grad.to_vec()).transpose()?.unwrap_or_default());
        }
        Ok((norm, grads))
    });
    let (norm, grads) = outcomes.unwrap().swap_remove(0);
    assert_eq!(grads, [6.0; 3]);
    assert!((norm - 108f64.sqrt()).abs() < 1e-12);
}
