//! The collectives of the norms, and of a backward that keeps terms.

use super::{Batch, BoxModel, Load, of_layer};
use crate::{
    dev::{Dev, ranks},
    support::Spread,
};
use half::bf16;
use shardwise::{
    Result,
    comm::{Group, Op, Transfer},
    device::{DType, Element},
    kernels::{Activation, AttentionChoices, NormKind},
    optim::sample_norms,
    parallel::{
        AddBias, AttentionConfig, BlockConfig, Normalize, ParallelAttention, ParallelMlp, PositionEmbedding,
        QkNorm, QkvLayout, ResidualStream, TransformerBlock,
    },
    shard::{Reduction, Replicated, Sequences, Shard, Tree},
    tensor::{Random, Weights},
};

const HIDDEN: usize = 8;
const SAMPLES: usize = 4;
const TOKENS: usize = 11;

fn batch() -> Batch {
    Batch::random(&Sequences::packed([3, 1, 5, 2]), 9, [HIDDEN; 2])
}

fn block<S: ResidualStream + Spread, T: Element>(group: &Group<Dev>) -> Result<BoxModel<T>> {
    let source = Random::normal(1, 0.5);
    let attention = AttentionConfig::new(HIDDEN, 4)
        .with_kv_heads(2)
        .with_head_dim(2)
        .with_choices(AttentionChoices::CAUSAL)
        .with_qk_norm(QkNorm::new(1e-3, "qn", "kn"))
        .with_qkv_bias(true)
        .with_out_bias(true);
    let norm = NormKind::LayerNorm { eps: 0.1 };
    let config = BlockConfig::new(attention, 9, Activation::Silu, norm).with_mlp_bias(true);
    Ok(of_layer(TransformerBlock::<S, T, Dev>::load(group, &Weights::new(&source), &config)?))
}

/// One all-gather of f64: for each sample one number for each block and one more for each rank, and
/// two more for each rank.
#[test]
fn norms_take_one_all_gather() {
    for (world, blocks) in [(1, None), (2, None), (3, None), (1, Some(4)), (2, Some(4)), (3, Some(4))] {
        let outcomes = ranks(world).run(|world| {
            let reduction = blocks.map_or(Reduction::Fast, |blocks| Reduction::Invariant { blocks });
            let (group, record) = world.with_reduction(reduction).recorded();
            let model = block::<Shard<0>, f32>(&group)?;
            let params = model.params();
            params.iter().for_each(|param| param.keep_terms(true));
            model.pass(&group, &batch())?;
            record.take();
            sample_norms(&params, &[&group], SAMPLES)?;
            let one = record.take();
            params.iter().try_for_each(|param| param.add_kept(&[1.0; SAMPLES]))?;
            assert_eq!(record.take(), [], "adding the terms");
            Ok(one)
        });
        let leaves = blocks.map_or(0, |blocks| {
            let tree = Tree::new("test", "blocks", blocks, world).unwrap();
            (0..world).map(|rank| tree.owned(rank).len()).sum::<usize>()
        });
        let elements = SAMPLES * (leaves + world) + 2 * world;
        let want = Transfer { op: Op::AllGather, dtype: DType::F64, elements };
        for moves in outcomes.unwrap() {
            assert_eq!(moves, [want], "{world} ranks, {blocks:?} blocks");
        }
    }
}

/// Returns the transfers of an ordinary backward, and of one that keeps terms. The transfers of the
/// forward are equal.
fn moves(load: Load<'_, bf16>, world: usize) -> Vec<[Vec<Transfer>; 2]> {
    let outcomes = ranks(world).run(|world| {
        let (group, record) = world.recorded();
        let model = load(&group)?;
        let mut moves = [Vec::new(), Vec::new()];
        for (kept, moves) in moves.iter_mut().enumerate() {
            model.params().iter().for_each(|param| param.keep_terms(kept == 1));
            record.take();
            model.pass(&group, &batch())?;
            *moves = record.take();
        }
        Ok(moves)
    });
    outcomes.unwrap()
}

/// In the accumulator type: the sums over tokens of vectors. Keeping terms makes one for each
/// sample.
fn wide(transfer: &Transfer) -> bool {
    transfer.dtype == DType::F32 && transfer.op == Op::AllReduce
}

/// Compares the transfers of both kinds of backward: the same, but sums over tokens have one vector
/// for each sample. `sums` are their sizes without kept terms.
fn check(what: &str, load: Load<'_, bf16>, sums: &[usize]) {
    for world in [2, 3] {
        for [plain, kept] in moves(load, world) {
            let what = format!("{what} on {world}");
            let got: Vec<_> = plain.iter().filter(|moved| wide(moved)).map(|moved| moved.elements).collect();
            assert_eq!(got, sums, "{what}: sums over tokens");
            let each = |moved: &Transfer| match wide(moved) {
                true => Transfer { elements: moved.elements * SAMPLES, ..*moved },
                false => *moved,
            };
            assert_eq!(kept, plain.iter().map(each).collect::<Vec<_>>(), "{what}");
        }
    }
}

fn layers<S: ResidualStream + Spread>() {
    let source = Random::normal(1, 0.5);
    // Without sequence parallelism, every rank sums over all tokens.
    let of = |sizes: &[usize]| if S::SHARD_DIM.is_some() { sizes.to_vec() } else { Vec::new() };
    let norm = |kind| {
        move |group: &Group<Dev>| {
            let source = Random::normal(1, 0.5);
            Ok(of_layer(Normalize::<S, bf16, Dev>::load(group, &Weights::new(&source), kind, HIDDEN)?))
        }
    };
    check("layer norm", &norm(NormKind::LayerNorm { eps: 0.1 }), &of(&[2 * HIDDEN]));
    check("rms norm", &norm(NormKind::RmsNorm { eps: 0.1 }), &of(&[HIDDEN]));
    let bias: Load<'_, bf16> =
        &|group| Ok(of_layer(AddBias::<S, bf16, Dev>::load(group, &Weights::new(&source), HIDDEN)?));
    check("bias", bias, &of(&[HIDDEN]));
    for gated in [false, true] {
        let mlp: Load<'_, bf16> = &|group| {
            let (weights, names, f) = (Weights::new(&source), Default::default(), Activation::Silu);
            Ok(of_layer(match gated {
                true => {
                    ParallelMlp::<S, bf16, Dev>::load_gated(group, &weights, &names, (HIDDEN, 9), f, true)?
                }
                false => ParallelMlp::<S, bf16, Dev>::load(group, &weights, &names, (HIDDEN, 9), f, true)?,
            }))
        };
        check("mlp", mlp, &of(&[HIDDEN]));
    }
    // The sum of head norms is over heads, with either stream.
    let attention: Load<'_, bf16> = &|group| {
        let config = AttentionConfig::new(HIDDEN, 4)
            .with_kv_heads(2)
            .with_head_dim(2)
            .with_qk_norm(QkNorm::new(1e-3, "qn", "kn"))
            .with_out_bias(false);
        let (weights, layout) = (Weights::new(&source), QkvLayout::separate("q", "k", "v"));
        Ok(of_layer(ParallelAttention::<S, bf16, Dev>::load(group, &weights, &layout, "o", &config)?))
    };
    check("attention", attention, &[2 * 2]);
    let mut sums = of(&[HIDDEN, 2 * HIDDEN, HIDDEN]);
    sums.push(2 * 2);
    sums.extend(of(&[2 * HIDDEN]));
    check("block", &|group| block::<S, bf16>(group), &sums);
}

#[test]
fn a_backward_that_keeps_terms_has_the_derived_collectives() {
    layers::<Replicated>();
    layers::<Shard<0>>();
    // Positions gather the tokens' gradients, rather than sum a table for each sample.
    let source = Random::normal(1, 0.5);
    let whole: Load<'_, bf16> = &|group| {
        let weights = Weights::new(&source);
        Ok(of_layer(PositionEmbedding::<Replicated, bf16, Dev>::load(group, &weights, 6, HIDDEN)?))
    };
    let sharded: Load<'_, bf16> = &|group| {
        let weights = Weights::new(&source);
        Ok(of_layer(PositionEmbedding::<Shard<0>, bf16, Dev>::load(group, &weights, 6, HIDDEN)?))
    };
    check("positions", whole, &[]);
    for [plain, kept] in moves(sharded, 3) {
        assert_eq!(plain, [Transfer { op: Op::AllReduce, dtype: DType::F32, elements: 6 * HIDDEN }]);
        assert_eq!(kept, [Transfer { op: Op::AllGather, dtype: bf16::DTYPE, elements: TOKENS * HIDDEN }]);
    }
}
