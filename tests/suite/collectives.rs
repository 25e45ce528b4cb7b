//! Checks the table of layers in the documentation of `parallel`. The tests list each layer's
//! collectives by hand, and compare them with the plan of every rank, for 1 to 8 ranks.
//! [`run`](crate::support::run) checks that ranks with data make the planned collectives.

use crate::support::{Case, Pass, Spread, uneven};
use ndarray::Array2;
use shardwise::{
    Result,
    comm::{
        Group,
        Op::{self, AllGather, AllReduce, ReduceScatter},
        Transfer,
    },
    device::{DType, Element, Meta},
    kernels::{Activation, AttentionChoices, NormKind},
    parallel::{
        Activate, AddBias, Attention, AttentionConfig, Bias, BlockConfig, BoxLayer, ColumnLinear,
        ColumnParallelLinear, Columns, CopyTo, DTensor, Dropout, Gate, GatherFrom, GatherSequence, Layer,
        MlpNames, Normalize, ParallelMlp, PositionEmbedding, QkNorm, QkvLayout, Recompute, ReduceFrom,
        ReduceScatterSequence, ReplicatedLinear, Residual, ResidualStream, RowLinear, RowParallelLinear,
        ScatterSequence, ScatterTo, TransformerBlock, VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    shard::{Heads, Partition, Replicated, Sequences, Shard},
    tensor::{Arrays, Random, Weights},
};

type T = half::bf16;

const TOKENS: usize = 24;
const HIDDEN: usize = 16;
const WIDE: usize = 40;

/// A transfer in bf16.
fn of(op: Op, elements: usize) -> Transfer {
    Transfer { op, dtype: T::DTYPE, elements }
}

/// A transfer in the accumulator type of bf16.
fn wide(op: Op, elements: usize) -> Transfer {
    Transfer { op, dtype: DType::F32, elements }
}

/// The collective of entering a region, S → `Copied`. The backward of leaving a region makes it,
/// too.
fn enters<S: ResidualStream>(features: usize) -> Vec<Transfer> {
    S::SHARD_DIM.map(|_| of(AllGather, TOKENS * features)).into_iter().collect()
}

/// The collective of leaving a region, `Partial` → S. The backward of entering a region makes it,
/// too.
fn leaves<S: ResidualStream>(features: usize) -> Vec<Transfer> {
    vec![of(if S::SHARD_DIM.is_some() { ReduceScatter } else { AllReduce }, TOKENS * features)]
}

/// The all-reduce of a sum over tokens, in the accumulator type. Only an S that shards the tokens
/// needs it.
fn over_tokens<S: ResidualStream>(elements: usize) -> Vec<Transfer> {
    S::SHARD_DIM.map(|_| wide(AllReduce, elements)).into_iter().collect()
}

/// The input and output features, and the partition of each if the placement shards it.
struct Features {
    sizes: [usize; 2],
    partitions: [Option<Partition>; 2],
}

impl Features {
    fn new(inputs: usize, outputs: usize) -> Self {
        Self { sizes: [inputs, outputs], partitions: [None, None] }
    }
}

/// Compares a layer's collectives with its line of the table on every rank of a world.
fn check<L>(
    world: usize,
    features: &Features,
    layer: impl Fn(&Group<Meta>, &Weights<'_>) -> Result<L>,
    forward: &[Transfer],
    backward: &[Transfer],
) where
    L: Layer<T, Meta, In: Spread<Dual: Spread>, Out: Spread<Dual: Spread>>,
{
    let zeros = features.sizes.map(|features| Array2::zeros((TOKENS, features)));
    let (none, source) = (Arrays::default(), Random::normal(1, 0.1));
    let [x_partition, dy_partition] = features.partitions.clone();
    let case = Case { x_partition, dy_partition, ..Case::new(world, &zeros[0], &zeros[1], &none) };
    for rank in 0..world {
        let (group, record) = Group::planned(&Meta::new(), rank, world).unwrap();
        let layer = layer(&group, &Weights::new(&source)).unwrap();
        let moves = Pass::<L, T, Meta>::new(&case, &group, &record, &layer).unwrap().moves;
        let what = format!("{} on rank {rank} of {world}", std::any::type_name::<L>());
        assert_eq!(moves.forward, forward, "forward of {what}");
        assert_eq!(moves.backward, backward, "backward of {what}");
    }
}

#[test]
fn mappings_have_the_collectives_of_the_table() {
    let (same, all) = (Features::new(HIDDEN, HIDDEN), TOKENS * HIDDEN);
    for world in 1..=8 {
        let (reduce, gather, scatter) =
            ([of(AllReduce, all)], [of(AllGather, all)], [of(ReduceScatter, all)]);
        check(world, &same, |_, _| Ok(CopyTo), &[], &reduce);
        check(world, &same, |_, _| Ok(ReduceFrom), &reduce, &[]);
        check(world, &same, |_, _| Ok(ScatterTo::<1>::even()), &[], &gather);
        check(world, &same, |_, _| Ok(ScatterSequence::even()), &[], &gather);
        check(world, &same, |_, _| Ok(GatherFrom::<1>), &gather, &[]);
        check(world, &same, |_, _| Ok(GatherFrom::<0>), &gather, &[]);
        check(world, &same, |_, _| Ok(GatherSequence), &gather, &scatter);
        check(world, &same, |_, _| Ok(ReduceScatterSequence), &scatter, &gather);
        check(world, &same, |_, _| Ok(Activate::<Replicated>::new(Activation::Silu)), &[], &[]);
        check(world, &same, |_, _| Ok(Dropout::<Replicated>::new(0.5, 1, "d")), &[], &[]);
        let partition = Partition::even(WIDE, world);
        let gate =
            Features { sizes: [2 * WIDE, WIDE], partitions: [Some(partition.scaled(2)), Some(partition)] };
        check(world, &gate, |_, _| Ok(Gate::new(Activation::Silu)), &[], &[]);
        let router = |group: &Group<Meta>, weights: &Weights<'_>| {
            ReplicatedLinear::load(group, weights, (HIDDEN, WIDE), true)
        };
        check(world, &Features::new(HIDDEN, WIDE), router, &[], &[]);
    }
}

fn linear<S: ResidualStream + Spread>(world: usize) {
    let partition = uneven(world as u64, WIDE, world);
    let up = Features { sizes: [HIDDEN, WIDE], partitions: [None, Some(partition.clone())] };
    let down = Features { sizes: [WIDE, HIDDEN], partitions: [Some(partition.clone()), None] };
    let (enter, leave) = (enters::<S>(HIDDEN), leaves::<S>(HIDDEN));
    let columns = |group: &Group<Meta>| Columns::from_partition(group, partition.clone());
    check(
        world,
        &up,
        |group, weights| ColumnLinear::load(group, weights, HIDDEN, &columns(group)?, Bias::Add),
        &[],
        &[],
    );
    check(world, &down, |group, weights| RowLinear::load(group, weights, &partition, HIDDEN), &[], &[]);
    check(
        world,
        &up,
        |group, weights| {
            ColumnParallelLinear::<S, _, _>::load(group, weights, HIDDEN, &columns(group)?, Bias::Add)
        },
        &enter,
        &leave,
    );
    let biased = |group: &Group<Meta>, weights: &Weights<'_>| {
        RowParallelLinear::load(group, weights, &partition, HIDDEN, true)
    };
    check::<RowParallelLinear<S, _, _>>(
        world,
        &down,
        biased,
        &leave,
        &[over_tokens::<S>(HIDDEN), enter.clone()].concat(),
    );
}

#[test]
fn linear_layers_have_the_collectives_of_the_table() {
    for world in 1..=8 {
        linear::<Replicated>(world);
        linear::<Shard<0>>(world);
    }
}

/// Up to four ranks hold each of two key/value heads. The backward sums these heads' columns of dY
/// first, keys and values together.
#[test]
fn shared_heads_are_summed() {
    let (heads, kv_heads, dim) = (8, 2, 3);
    for world in 1..=8 {
        let plan = Heads::new(heads, kv_heads, dim, world).unwrap();
        let shared = (0..kv_heads).filter(|&head| plan.holders(head).len() > 1).count();
        let width = plan.qkv_features().total();
        let features = Features { sizes: [HIDDEN, width], partitions: [None, Some(plan.qkv_features())] };
        let sums = [of(AllReduce, TOKENS * 2 * shared * dim)];
        let backward = if shared > 0 { &sums[..] } else { &[] };
        check(
            world,
            &features,
            |group, weights| {
                let columns = Columns::qkv(group, &plan, &QkvLayout::separate("q", "k", "v"))?;
                ColumnLinear::load(group, weights, HIDDEN, &columns, Bias::None)
            },
            &[],
            backward,
        );
        let qk_norm = Some(QkNorm::new(1e-5, "q", "k"));
        let partitions = [Some(plan.qkv_features()), Some(plan.query_features())];
        let features = Features { sizes: [width, heads * dim], partitions };
        for (norm, backward) in [(None, vec![]), (qk_norm, vec![wide(AllReduce, 2 * dim)])] {
            let config = AttentionConfig::new(HIDDEN, heads)
                .with_choices(AttentionChoices::CAUSAL)
                .with_kv_heads(kv_heads)
                .with_head_dim(dim)
                .with_qk_norm(norm);
            let load =
                |group: &Group<Meta>, weights: &Weights<'_>| Attention::load(group, weights, &plan, &config);
            check(world, &features, load, &[], &backward);
        }
    }
}

fn stream<S: ResidualStream + Spread>(world: usize) {
    let same = Features::new(HIDDEN, HIDDEN);
    for (kind, vectors) in [(NormKind::LayerNorm { eps: 0.1 }, 2), (NormKind::RmsNorm { eps: 0.1 }, 1)] {
        check(
            world,
            &same,
            |group, weights| Normalize::<S, _, _>::load(group, weights, kind, HIDDEN),
            &[],
            &over_tokens::<S>(vectors * HIDDEN),
        );
    }
    let bias = |group: &Group<Meta>, weights: &Weights<'_>| AddBias::<S, _, _>::load(group, weights, HIDDEN);
    check(world, &same, bias, &[], &over_tokens::<S>(HIDDEN));
    check(
        world,
        &same,
        |group, weights| PositionEmbedding::<S, _, _>::load(group, weights, TOKENS, HIDDEN),
        &[],
        &over_tokens::<S>(TOKENS * HIDDEN),
    );
    let (enter, leave) = (enters::<S>(HIDDEN), leaves::<S>(HIDDEN));
    let mlp = |group: &Group<Meta>, weights: &Weights<'_>| {
        let (names, f) = (MlpNames::default(), Activation::Silu);
        ParallelMlp::<S, _, _>::load_gated(group, weights, &names, (HIDDEN, WIDE), f, false)
    };
    let both = [enter.clone(), leave.clone()].concat();
    check(world, &same, mlp, &both, &both);
    check(world, &same, |group, weights| Ok(Residual(mlp(group, weights)?)), &both, &both);
    check(world, &same, |group, weights| Ok(BoxLayer::new(mlp(group, weights)?)), &both, &both);
    check(world, &same, |group, weights| Ok(vec![mlp(group, weights)?]), &both, &both);
    let twice = [both.clone(), both.clone()].concat();
    check(world, &same, |group, weights| Ok(Recompute::new(mlp(group, weights)?)), &both, &twice);
    check(world, &same, |group, weights| Ok(Recompute::when(false, mlp(group, weights)?)), &both, &both);
    let config = BlockConfig::new(
        AttentionConfig::new(HIDDEN, 8).with_qkv_bias(true).with_out_bias(true),
        WIDE,
        Activation::GeluErf,
        NormKind::LayerNorm { eps: 0.1 },
    )
    .with_mlp_bias(true);
    // The backward of each half of a block makes these collectives: one for db of the half's second
    // layer, one each for entering and leaving the region, and one for dγ and dβ together.
    let half = [over_tokens::<S>(HIDDEN), both.clone(), over_tokens::<S>(2 * HIDDEN)].concat();
    check(
        world,
        &same,
        |group, weights| TransformerBlock::<S, _, _>::load(group, weights, &config),
        &twice,
        &[half.clone(), half].concat(),
    );
}

#[test]
fn layers_of_the_stream_have_the_collectives_of_the_table() {
    for world in 1..=8 {
        stream::<Replicated>(world);
        stream::<Shard<0>>(world);
    }
}

/// The embedding and the head of a language model, which take ids and targets.
fn ends<S: ResidualStream>(world: usize, rank: usize) -> Result<()> {
    let (group, record) = Group::planned(&Meta::new(), rank, world)?;
    let source = Random::normal(1, 0.1);
    let table = VocabParallelEmbedding::<S, T, _>::load(&group, &Weights::new(&source), WIDE, HIDDEN)?;
    let (x, rows) = table.forward(&[1; TOKENS], Sequences::one(TOKENS))?;
    assert_eq!(record.take(), leaves::<S>(HIDDEN));
    table.backward(&rows, x)?;
    assert_eq!(record.take(), enters::<S>(HIDDEN));
    let partition = group.even_partition(WIDE)?;
    let logits = shardwise::Tensor::zeros(group.device(), [TOKENS, partition.size(rank)])?;
    let loss = VocabParallelCrossEntropy::default();
    let (_, saved) =
        loss.forward(DTensor::<Shard<1>, T, _>::shard(&group, logits, &partition)?, &[1; TOKENS])?;
    assert_eq!(record.take(), [wide(AllReduce, TOKENS), wide(AllReduce, 3 * TOKENS)]);
    loss.backward(saved, 1.0)?;
    assert_eq!(record.take(), []);
    Ok(())
}

#[test]
fn the_ends_of_a_model_have_the_collectives_of_the_table() {
    for world in 1..=8 {
        for rank in 0..world {
            ends::<Replicated>(world, rank).unwrap();
            ends::<Shard<0>>(world, rank).unwrap();
        }
    }
}
