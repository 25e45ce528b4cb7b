//! Overlapped collectives in chunks have the bits of unchunked ones, and run in the planned order.

use crate::{
    block::{self, RandomBlock},
    dev::{self, DTensor, Dev, Tensor, fresh, ranks},
    invariant::{same_bits, tried},
    support::{Case, Outcome, Spread, arrays, matrix, random, run, run_unplanned, uneven},
};
use half::bf16;
use ndarray::Array2;
use proptest::prelude::*;
use shardwise::{
    Error, LostReason, Result,
    comm::{Group, Overlap},
    device::Element,
    kernels::{Activation, Gemm},
    parallel::{
        Bias, ColumnLinear, ColumnParallelLinear, Columns, Layer, MeasuredOverlap, MlpNames, ParallelMlp,
        QkvLayout, ResidualStream, RowParallelLinear,
    },
    shard::{Heads, Partition, Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Random, Weights},
    trace::{Entry, chrome, snapshot},
};

/// Runs a feed-forward layer, which consists of a column and a row layer.
fn mlp<S: ResidualStream + Spread, T: Element>(
    case: &Case<'_>,
    hidden: usize,
    ffn: usize,
    gated: bool,
) -> Result<Outcome> {
    let (names, f) = (MlpNames::default(), Activation::Silu);
    let sizes = (hidden, ffn);
    if gated {
        run_unplanned!(T, case, |group, weights| {
            ParallelMlp::<S, T, Dev>::load_gated(group, weights, &names, sizes, f, true)
        })
    } else {
        run_unplanned!(T, case, |group, weights| {
            ParallelMlp::<S, T, Dev>::load(group, weights, &names, sizes, f, true)
        })
    }
}

fn mlp_weights(seed: u64, hidden: usize, ffn: usize) -> Arrays {
    arrays([
        ("gate.weight", random(seed, "gate", &[ffn, hidden])),
        ("gate.bias", random(seed, "gb", &[ffn])),
        ("up.weight", random(seed, "up", &[ffn, hidden])),
        ("up.bias", random(seed, "ub", &[ffn])),
        ("down.weight", random(seed, "down", &[hidden, ffn])),
        ("down.bias", random(seed, "db", &[hidden])),
    ])
}

/// Runs a case without chunks and in these numbers of chunks, and compares the bits. Returns the
/// outcome without chunks. `run!` compares the traffic with the plan.
fn agree(
    what: &str,
    case: &Case<'_>,
    chunks: &[usize],
    outcome: impl Fn(&Case<'_>) -> Result<Outcome>,
) -> Outcome {
    let with = |overlap| {
        let (x_partition, dy_partition) = (case.x_partition.clone(), case.dy_partition.clone());
        let case = Case { overlap, x_partition, dy_partition, sequences: case.sequences.clone(), ..*case };
        outcome(&case).unwrap_or_else(|error| panic!("{what}, {overlap:?}: {error}"))
    };
    let at_once = with(Overlap::Off);
    for &count in chunks {
        same_bits(&format!("{what} in {count} chunks"), &with(Overlap::Chunks(count)), &at_once);
    }
    at_once
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    world: usize,
    tokens: usize,
    hidden: usize,
    ffn: usize,
    gated: bool,
    reduction: Reduction,
    chunks: usize,
    even: bool,
    seed: u64,
}

fn mlps_agree<T: Element>(sizes: &Sizes) {
    let &Sizes { world, tokens, hidden, ffn, gated, reduction, chunks, even, seed } = sizes;
    let (x, dy) = (matrix(seed, "x", tokens, hidden), matrix(seed, "dy", tokens, hidden));
    let weights = mlp_weights(seed, hidden, ffn);
    let case = || Case { reduction, ..Case::new(world, &x, &dy, &weights) };
    let what = format!("{sizes:?} of {}", T::DTYPE);
    let whole = agree(&what, &case(), &[chunks], |case| mlp::<Replicated, T>(case, hidden, ffn, gated));
    // Any partition of the tokens, including ranks without any.
    let bounds = uneven(seed, tokens + world, world);
    let partition = Partition::from_sizes(bounds.sizes().map(|size| size - 1));
    let partition = (!even && reduction == Reduction::Fast).then_some(partition);
    let case = Case { x_partition: partition.clone(), dy_partition: partition, ..case() };
    let sharded = agree(&what, &case, &[chunks], |case| mlp::<Shard<0>, T>(case, hidden, ffn, gated));
    assert!(sharded.y == whole.y && sharded.dx == whole.dx, "{what}: the two streams");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24 / dev::FEWER, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sizes on 1 to 8 ranks, both residual streams, all element types and reductions. Some
    /// cases have fewer tokens than ranks, ranks without tokens, features of depth 1, or uneven
    /// shards.
    #[test]
    fn chunks_have_the_bits_of_the_whole(
        (world, tokens) in (1..=8usize, prop_oneof![0..20usize, 100..900usize]),
        (hidden, more) in (1..24usize, 0..40usize),
        (gated, even, blocks) in (any::<bool>(), any::<bool>(), prop::option::of(0..3usize)),
        (chunks, seed) in (1..6usize, any::<u64>()),
    ) {
        let reduction = blocks.map_or(Reduction::Fast, |more| Reduction::Invariant { blocks: world + more });
        let sizes = Sizes { world, tokens, hidden, ffn: world + 2 + more, gated, reduction, chunks, even, seed };
        mlps_agree::<f64>(&sizes);
        mlps_agree::<f32>(&sizes);
        mlps_agree::<bf16>(&sizes);
    }
}

/// Two ranks with one sub-tree each sum along the tree by one collective, which is started in
/// chunks.
#[test]
fn invariant_sums_of_two_ranks_go_in_chunks() {
    for blocks in [2, 4, 8] {
        for gated in [false, true] {
            let reduction = Reduction::Invariant { blocks };
            let sizes = Sizes {
                world: 2,
                tokens: 300,
                hidden: 12,
                ffn: 24,
                gated,
                reduction,
                chunks: 2,
                even: true,
                seed: 3,
            };
            mlps_agree::<f64>(&sizes);
            mlps_agree::<f32>(&sizes);
            mlps_agree::<bf16>(&sizes);
        }
    }
}

/// Transformer blocks with several sequences, whose attention splits groups of query heads.
#[test]
fn blocks_agree() {
    let sizes = RandomBlock {
        heads: 9,
        kv_heads: 3,
        head_dim: 4,
        hidden: 20,
        ffn: 33,
        gated: false,
        post: false,
        causal: true,
        seed: 5,
    };
    let sequences = Sequences::packed([60, 1, 139]);
    for sizes in [sizes, RandomBlock { gated: true, post: true, ..sizes }] {
        let (x, dy) = block::inputs(&sizes, &sequences);
        let weights = block::named(&sizes.weights());
        for world in tried(&[2, 5]) {
            for reduction in [Reduction::Fast, Reduction::Invariant { blocks: 8 }] {
                let case = Case { reduction, ..Case::new(world, &x, &dy, &weights) };
                let case = Case { sequences: sequences.clone(), ..case };
                let what = format!("{sizes:?} on {world}, {reduction:?}");
                agree(&what, &case, &[1, 3], |case| block::outcome::<Replicated, f32>(&sizes, case));
                agree(&what, &case, &[1, 3], |case| block::outcome::<Shard<0>, f32>(&sizes, case));
            }
        }
    }
}

fn separate<S: ResidualStream + Spread, T: Element>(case: &Case<'_>, heads: usize) -> Result<Outcome> {
    run_unplanned!(T, case, |group, weights| {
        let query = group.partition("attention", "query heads", heads, 1)?;
        let heads = Heads::with_partition(query, 2, 3)?;
        let layout = QkvLayout::separate("q", "k", "v");
        let load = |columns: &Columns| ColumnLinear::load(group, weights, 7, columns, Bias::Add);
        let layers =
            Columns::separate_qkv(group, &heads, &layout)?.iter().map(load).collect::<Result<_>>()?;
        ColumnParallelLinear::<S, T, Dev>::concat(layers)
    })
}

/// Three layers have one input. Two ranks hold the same key/value head.
#[test]
fn separate_layers_agree() {
    let (heads, world, tokens) = (4, 3, 410);
    let partition = Heads::new(heads, 2, 3, world).unwrap().qkv_features();
    let (x, dy) = (matrix(1, "x", tokens, 7), matrix(1, "dy", tokens, partition.total()));
    let weights = arrays([
        ("q.weight", random(1, "q", &[heads * 3, 7])),
        ("q.bias", random(1, "qb", &[heads * 3])),
        ("k.weight", random(1, "k", &[6, 7])),
        ("k.bias", random(1, "kb", &[6])),
        ("v.weight", random(1, "v", &[6, 7])),
        ("v.bias", random(1, "vb", &[6])),
    ]);
    let case = Case { dy_partition: Some(partition), ..Case::new(world, &x, &dy, &weights) };
    agree("separate layers", &case, &[1, 2], |case| separate::<Replicated, f32>(case, heads));
    agree("separate layers", &case, &[1, 2], |case| separate::<Shard<0>, f32>(case, heads));
}

/// Returns a rank's shard of a tensor of ones.
fn ones(group: &Group<Dev>, tokens: usize) -> Result<DTensor<Shard<0>>> {
    let own = <Shard<0> as ResidualStream>::local_rows(group, tokens)?.len();
    Shard::<0>::of_local(group, tokens, Tensor::full(group.device(), [own, 6], 1.0)?)
}

type Column = ColumnParallelLinear<Shard<0>, f32, Dev>;
type Row = RowParallelLinear<Shard<0>, f32, Dev>;

fn column_and_row(group: &Group<Dev>) -> Result<(Column, Row)> {
    let source = Random::normal(1, 0.1);
    let (weights, columns) = (Weights::new(&source), Columns::even(group, 10)?);
    let column = Column::load(group, &weights.at("up"), 6, &columns, Bias::None)?;
    Ok((column, Row::load(group, &weights.at("down"), columns.partition(), 6, false)?))
}

/// Returns the operations of a step in the order in which they began; `+` marks those that were
/// started.
fn order(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| format!("{}{}", entry.op, if entry.started { "+" } else { "" })).collect()
}

/// GEMMs run between the start of a collective and its wait, according to the records and the
/// timeline.
#[test]
fn products_run_between_starts_and_waits() {
    let splits = fresh().splits_exactly();
    let records = ranks(2).run(|world| {
        let group = world.with_overlap(Overlap::Chunks(2));
        let (column, row) = column_and_row(&group)?;
        let x = ones(&group, 512)?;
        let mut seen = snapshot().entries.len();
        let mut step = || {
            let entries = snapshot().entries.split_off(seen);
            seen += entries.len();
            order(&entries)
        };
        let (y, saved) = column.forward(x)?;
        // The product of the rank's own rows runs first, then those of the other rank's rows as
        // they arrive.
        let gather = ["all_gather+", "all_gather+", "gemm", "wait", "gemm", "wait", "gemm"];
        let gather_whole = ["all_gather+", "all_gather+", "wait", "wait", "gemm"];
        let want: &[&str] = if splits { &gather } else { &gather_whole };
        assert_eq!(step(), want);
        let (z, saved_row) = row.forward(y)?;
        let scatter = ["gemm", "reduce_scatter+", "gemm", "reduce_scatter+", "wait", "wait"];
        let scatter_whole = ["gemm", "reduce_scatter+", "reduce_scatter+", "wait", "wait"];
        let want: &[&str] = if splits { &scatter } else { &scatter_whole };
        assert_eq!(step(), want);
        let dy = row.backward(saved_row, z)?;
        // The product for dW needs all rows, so it runs last.
        let mut want: Vec<_> = if splits { gather.to_vec() } else { gather_whole.to_vec() };
        want.push("gemm");
        assert_eq!(step(), want);
        column.backward(saved, dy)?;
        // The product for dW runs while the rest of dX is reduced.
        let mut want: Vec<_> = if splits { scatter.to_vec() } else { scatter_whole.to_vec() };
        want.insert(want.len() - 2, "gemm");
        assert_eq!(step(), want);
        Ok(snapshot())
    });
    let line: serde_json::Value = serde_json::from_str(&chrome(&records.unwrap())).unwrap();
    let events = line["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        let of = |name: &str, phase: &str| -> Vec<f64> {
            let is = |e: &&serde_json::Value| e["name"] == name && e["tid"] == rank && e["ph"] == phase;
            events.iter().filter(is).map(|event| event["ts"].as_f64().unwrap()).collect()
        };
        let (begins, ends) = (of("all_gather", "b"), of("all_gather", "e"));
        assert_eq!((begins.len(), ends.len(), of("wait", "X").len()), (4, 4, 8));
        let overlaps = |begin: f64, end: f64| of("gemm", "X").iter().any(|at| begin <= *at && *at <= end);
        assert!(!splits || begins.into_iter().zip(ends).all(|(begin, end)| overlaps(begin, end)));
    }
}

/// A rank that is lost between two chunks is named on every other rank.
#[test]
fn a_rank_that_is_lost_between_chunks_is_named() {
    let outcomes = ranks(3).run_each(|world| {
        let group = world.with_overlap(Overlap::Chunks(3));
        if group.rank() < 2 {
            let (column, _) = column_and_row(&group)?;
            return column.forward(ones(&group, 6)?).map(drop);
        }
        // This rank joins only the layer's first chunk: one token each of ranks 0 and 1.
        let none = Tensor::<f32>::zeros(group.device(), [0, 6])?;
        group.start_all_gather(none, 0, &Partition::from_sizes([1, 1, 0]))?.wait().map(drop)
    });
    let outcomes = outcomes.unwrap();
    assert!(outcomes[2].is_ok(), "{:?}", outcomes[2]);
    for outcome in &outcomes[..2] {
        let lost = matches!(outcome, Err(Error::PeerLost { rank: 2, reason: LostReason::Left, .. }));
        assert!(lost, "{outcome:?}");
    }
}

/// Ranks with different chunks get a mismatch error.
#[test]
fn ranks_that_make_other_chunks_disagree() {
    let outcomes = ranks(2).run_each(|world| {
        let group = world.with_overlap(Overlap::Chunks(2 + world.rank()));
        let (column, _) = column_and_row(&group)?;
        column.forward(ones(&group, 8)?).map(drop)
    });
    for outcome in outcomes.unwrap() {
        assert!(matches!(outcome, Err(Error::Mismatch(_))), "{outcome:?}");
    }
}

/// A group that is split or recorded copies the overlap settings. A group of one rank has nothing
/// to overlap. Thread ranks do not overlap by default, because they do the work when they wait.
#[test]
fn chunks_are_chosen_by_the_group() {
    ranks(2)
        .run(|world| {
            assert_eq!((world.overlap(), world.chunks(1 << 20, 4096)), (Overlap::Off, None));
            let group = world.with_overlap(Overlap::Chunks(3));
            let (recorded, _) = group.recorded();
            let alone = group.split_all(group.rank() as u64)?;
            for other in [&recorded, &alone] {
                assert_eq!(other.overlap(), Overlap::Chunks(3));
            }
            assert_eq!(group.chunks(10, 4), Some(Partition::even(10, 3)));
            assert_eq!(group.chunks(2, 4), Some(Partition::even(2, 2)));
            assert_eq!((group.chunks(0, 4), alone.chunks(10, 4)), (None, None));
            assert_eq!(group.with_overlap(Overlap::Chunks(0)).chunks(10, 4), None);
            let from = |bytes| group.with_overlap(Overlap::From(bytes));
            assert_eq!((from(20).chunks(0, 4), from(21).chunks(10, 4)), (None, None));
            assert_eq!(from(20).chunks(10, 4), Some(Partition::even(10, 2)));
            assert_eq!((from(0).chunks(1, 4), from(0).chunks(3, 4)), (None, Some(Partition::even(3, 3))));
            assert_eq!(from(1).chunks(1000, 4), Some(Partition::even(1000, 4)));
            Ok(())
        })
        .unwrap();
}

/// Each rank measures, and the ranks agree on one result. Otherwise they would call different
/// collectives.
#[test]
fn ranks_agree_on_what_they_measured() {
    let measured = ranks(3).run(|world| {
        let sizes = (12, 24);
        let gathered = MeasuredOverlap::of::<Shard<0>, bf16, Dev>(&world, sizes, 800)?;
        let none = MeasuredOverlap::of::<Replicated, f64, Dev>(&world, sizes, 100)?;
        assert_eq!((none.overlap, none.times), (Overlap::Off, Vec::new()));
        Ok(gathered)
    });
    let measured = measured.unwrap();
    let tokens = measured[0].times.iter().map(|(tokens, ..)| *tokens);
    assert_eq!(tokens.collect::<Vec<_>>(), [192, 384, 768]);
    let least = [192, 384, 768].map(|tokens| Overlap::From(tokens * 12 * 2 / 2));
    assert!(measured[0].overlap == Overlap::Off || least.contains(&measured[0].overlap));
    assert!(measured.iter().all(|other| *other == measured[0]));
}

/// Chunked transfers match the plan with any partition of the tokens. Features of depth 1 are not
/// split.
#[test]
fn chunks_move_what_is_planned() {
    fn plan<S: ResidualStream + Spread>(case: &Case<'_>, [hidden, ffn]: [usize; 2]) {
        let (names, sizes, f) = (MlpNames::default(), (hidden, ffn), Activation::Silu);
        run!(f64, case, |group, weights| {
            ParallelMlp::<S, f64, Dev>::load(group, weights, &names, sizes, f, true)
        })
        .unwrap();
        run!(f64, case, |group, weights| {
            ParallelMlp::<S, f64, Dev>::load_gated(group, weights, &names, sizes, f, true)
        })
        .unwrap();
    }
    for &world in dev::WORLDS {
        let (tokens, hidden, ffn) = (60 + 37 * world, 5, world + 3);
        let (x, dy) = (matrix(1, "x", tokens, hidden), matrix(1, "dy", tokens, hidden));
        let weights = mlp_weights(1, hidden, ffn);
        let partition = uneven(world as u64, tokens, world);
        for (reduction, partition) in [
            (Reduction::Fast, Some(partition)),
            (Reduction::Fast, None),
            (Reduction::Invariant { blocks: 8 }, None),
        ] {
            for chunks in [1, 3] {
                let overlap = Overlap::Chunks(chunks);
                let case = Case { reduction, overlap, ..Case::new(world, &x, &dy, &weights) };
                plan::<Replicated>(&case, [hidden, ffn]);
                plan::<Shard<0>>(
                    &Case { x_partition: partition.clone(), dy_partition: partition.clone(), ..case },
                    [hidden, ffn],
                );
            }
        }
    }
}

/// Chunks keep the order of the rows. The weight is an identity matrix, of which each of the two
/// ranks holds one row.
#[test]
fn rows_keep_their_places() {
    let x = Array2::from_shape_fn((300, 2), |(row, col)| (row * 2 + col) as f64);
    let weights = arrays([("weight", ndarray::array![[1.0, 0.0], [0.0, 1.0]].into_dyn())]);
    let case = Case { overlap: Overlap::Chunks(2), ..Case::new(2, &x, &x, &weights) };
    let got = run!(f64, &case, |group, weights| {
        let columns = Columns::even(group, 2)?;
        ColumnParallelLinear::<Shard<0>, f64, Dev>::load(group, weights, 2, &columns, Bias::None)
    });
    let got = got.unwrap();
    assert_eq!((&got.y, &got.dx), (&x, &x));
}
