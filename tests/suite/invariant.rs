//! `Reduction::Invariant`: the same bits at every tensor-parallel size, in both streams, and on every mesh of one batch.

use crate::{
    block::{self, Draw},
    support::{Assembled, Case, Outcome, Spread, arrays, close, grads_close, integers, matrix, random, ranks, run},
    training::{batch, model::{Config, Gpt}},
};
use half::bf16;
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result, Tensor,
    comm::{DeviceMesh, Group},
    device::{Cpu, Element},
    kernels::{Activation, NormKind},
    optim::{AdamW, AdamWConfig, clip_scale, grad_norm},
    parallel::{
        AddBias, AttentionConfig, Bias, ColumnLinear, ColumnParallelLinear, Columns, CopyTo, DTensor,
        ForkedColumnLinear, Layer, MlpNames, Normalize, ParallelAttention, ParallelMlp, PositionEmbedding,
        QkNorm, QkvLayout, ReduceFrom, RowLinear, RowParallelLinear, Stream,
    },
    reference,
    shard::{Axis, Heads, Mesh, Reduction, Replicated, Sequences, Shard, Tree},
    tensor::{Arrays, Random, Weights},
    train::{DataParallel, GradReduce, Schedule},
};
use std::collections::BTreeMap;

fn bits<D: ndarray::Dimension>(array: &ndarray::Array<f64, D>) -> Vec<u64> {
    array.iter().map(|value| value.to_bits()).collect()
}

#[track_caller]
fn same_bits(what: &str, got: &Outcome, want: &Outcome) {
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

/// What the ranks get of Σ over leaves of `terms`, whole and in parts, and that it is what is declared.
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
        assert_eq!(record.take(), group.tree_transfers::<T>(&tree, [rows, cols].into(), None));
        // All columns to the last rank but one.
        let last = |rank| if rank + 2 == group.size() || group.size() == 1 { cols } else { 0 };
        let cuts = [group.even_cut(cols)?, shardwise::shard::Partition::from_sizes((0..group.size()).map(last))];
        let mut parts = Vec::new();
        for cut in &cuts {
            let part = group.tree_reduce_scatter::<T>(&tree, own()?, 1, cut)?;
            let declared = group.tree_transfers::<T>(&tree, [rows, cols].into(), Some((1, cut)));
            assert_eq!(record.take(), declared);
            parts.push(part.to_array()?.mapv(T::to_f64).into_dimensionality::<ndarray::Ix2>().unwrap());
        }
        Ok((whole.to_array()?.mapv(T::to_f64), parts))
    });
    let parts = parts.unwrap();
    let whole = bits(&parts[0].0);
    for (other, _) in &parts {
        assert_eq!(bits(other), whole, "all ranks have the same");
    }
    for at in 0..2 {
        let views: Vec<_> = parts.iter().map(|(_, parts)| parts[at].view()).collect();
        assert_eq!(bits(&ndarray::concatenate(ndarray::Axis(1), &views).unwrap()), whole, "the parts are the whole");
    }
    (whole, bits(&terms[0]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any number of leaves on any number of ranks, small tensors (gathered) and larger ones (exchanged).
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

/// A layer on 1 to 8 ranks and in both streams: the bits of one rank.
fn layers_agree<T: Element>(
    what: &str,
    case: &dyn Fn(usize) -> Case<'static>,
    worlds: &[usize],
    outcome: impl Fn(&Case<'_>, bool) -> Result<Outcome>,
) -> Outcome {
    let one = outcome(&case(1), false).unwrap();
    for &world in worlds {
        for sequence in [false, true] {
            let got = outcome(&case(world), sequence).unwrap();
            same_bits(&format!("{what}, {}, {world} ranks, sequence parallel {sequence}", T::DTYPE), &got, &one);
        }
    }
    one
}

fn blocks_agree<T: Element>(draw: &Draw, blocks: usize, worlds: &[usize], sequences: &Sequences) -> Outcome {
    let (x, dy) = block::inputs(draw, sequences);
    let weights = block::named(&draw.weights());
    let outcome = |world: usize, sequence: bool| {
        let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &weights) };
        let case = in_blocks(case, blocks);
        match sequence {
            false => block::outcome::<Replicated, T>(draw, &case),
            true => block::outcome::<Shard<0>, T>(draw, &case),
        }
    };
    let one = outcome(1, false).unwrap();
    for &world in worlds {
        for sequence in [false, true] {
            let got = outcome(world, sequence).unwrap_or_else(|error| panic!("{world} ranks: {error}"));
            let what = format!("{draw:?} in {blocks} blocks of {}, {world} ranks, {sequence}", T::DTYPE);
            same_bits(&what, &got, &one);
        }
    }
    one
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Transformer blocks: multi-head and grouped-query attention, groups of query heads across blocks' boundaries, plain
    /// and gated feed-forward layers, masks, few tokens and none on a rank, every world up to the number of blocks.
    #[test]
    fn blocks_have_the_same_bits(
        (kv_heads, group, blocks) in (1..=4usize, 1..=4usize, 1..=8usize),
        (head_dim, hidden, more) in (1..5usize, 2..20usize, 0..40usize),
        (gated, post, causal, masked) in (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        seed: u64,
    ) {
        let heads = kv_heads * group;
        let blocks = blocks.min(heads);
        let draw = Draw { heads, kv_heads, head_dim, hidden, ffn: blocks + more, gated, post, causal, seed };
        let sequences = match masked {
            true => Sequences::padded(&[2, 5, 1], 5).unwrap(),
            false => Sequences::packed([4, 1, 6]),
        };
        let worlds: Vec<_> = (1..=blocks).collect();
        blocks_agree::<f32>(&draw, blocks, &worlds, &sequences);
        blocks_agree::<bf16>(&draw, blocks, &worlds, &sequences);
        // And f64, which is what the reference computes.
        let got = blocks_agree::<f64>(&draw, blocks, &worlds, &sequences);
        let ((x, dy), weights) = (block::inputs(&draw, &sequences), draw.weights());
        let ranges: Vec<_> = sequences.iter().collect();
        let want = reference::block_backward(&weights, &x, &ranges, sequences.valid(), &dy);
        close("y", &got.y.into_dyn(), &reference::block(&weights, &x, &ranges, sequences.valid()), 1e-12);
        close("dx", &got.dx.into_dyn(), &want.dx, 1e-12);
        grads_close(&got.grads, &want.weights.named(), 1e-12);
    }
}

/// Sizes at which GEMMs are blocked and tensors exchanged: 12 heads in 8 blocks on 1 to 8 ranks.
#[test]
fn larger_blocks_have_the_same_bits() {
    let draw = Draw {
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
        blocks_agree::<f32>(&draw, 8, &[2, 3, 4, 5, 6, 7, 8], &Sequences::one(tokens));
        blocks_agree::<bf16>(&draw, 8, &[2, 4, 7], &Sequences::one(tokens));
    }
    let plain = Draw { kv_heads: 12, gated: false, ..draw };
    blocks_agree::<f32>(&plain, 8, &[2, 3, 4, 5, 6, 7, 8], &Sequences::packed([40, 9]));
}
