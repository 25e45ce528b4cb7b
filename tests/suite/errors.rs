//! Bad input returns an error that names the operator and the values that disagree.

use crate::dev::{Dev, ranks};
use crate::support::{Case, arrays, matrix, random, run};
use ndarray::ArrayD;
use shardwise::{
    Error, Result, Tensor,
    comm::Group,
    device::{Cpu, Device},
    kernels::{MatRef, NormKind},
    parallel::{
        AttentionConfig, Bias, ColumnLinear, ColumnParallelLinear, Columns, CopyTo, DTensor, Layer,
        Normalize, ParallelAttention, QkvLayout, ResidualStream, RowLinear, RowParallelLinear,
        VocabParallelCrossEntropy,
    },
    shard::{Heads, Partition, Reduction, Replicated, Sequences, Shape, Shard},
    tensor::{Arrays, Param, Random, Region, Role, Weights},
};

/// Returns the error message of `build` on `world` ranks.
fn failure<R: Send>(world: usize, build: impl Fn(&Group<Cpu>, &Weights<'_>) -> Result<R> + Sync) -> String {
    let weights = arrays([("weight", random(1, "w", &[6, 4])), ("bias", random(1, "b", &[6]))]);
    let failed = ranks(world).run(|group| build(&group, &Weights::new(&weights)).map(|_| ()));
    match failed.unwrap_err() {
        Error::RankFailed { source, .. } => source.to_string(),
        other => panic!("{other}"),
    }
}

fn attention(heads: usize, kv_heads: usize) -> AttentionConfig {
    AttentionConfig::new(4, heads).with_kv_heads(kv_heads).with_head_dim(2)
}

#[test]
fn loading() {
    let columns = |outputs: usize, inputs: usize| {
        move |group: &Group<Cpu>, weights: &Weights<'_>| {
            let columns = Columns::even(group, outputs)?;
            ColumnLinear::<f64, Cpu>::load(group, weights, inputs, &columns, Bias::Add).map(|_| ())
        }
    };
    assert_eq!(
        failure(2, columns(6, 5)),
        "tensor `weight` has shape [6, 4] in the given arrays, but the layer needs [6, 5]"
    );
    assert_eq!(
        failure(2, |group, weights| {
            RowLinear::<f64, Cpu>::load(group, &weights.at("fc"), &Partition::even(4, 2), 6).map(|_| ())
        }),
        "tensor `fc.weight` is not in the given arrays; did you mean `weight`?"
    );
    assert_eq!(
        failure(2, |group, weights| {
            RowLinear::<f64, Cpu>::load(group, weights, &Partition::even(4, 3), 6).map(|_| ())
        }),
        "row linear: the number of shards is 3, but the number of ranks is 2"
    );
    let layer = |config: AttentionConfig, layout: QkvLayout| {
        move |group: &Group<Cpu>, weights: &Weights<'_>| {
            ParallelAttention::<Replicated, f64, Cpu>::load(group, weights, &layout, "o", &config).map(|_| ())
        }
    };
    let separate = || QkvLayout::separate("q", "k", "v");
    assert_eq!(
        failure(5, layer(attention(4, 2), separate())),
        "attention: 5 ranks cannot share 4 query heads: each rank needs at least one"
    );
    assert_eq!(
        failure(1, layer(attention(5, 2), separate())),
        "attention: 5 query heads are not a multiple of 2 key/value heads"
    );
    assert_eq!(
        failure(1, layer(attention(4, 2), QkvLayout::PerHead("qkv".into()))),
        "qkv linear: the per-head layout has one key/value head per query head, not 2 for 4"
    );
    assert_eq!(
        failure(2, |group, _| Columns::qkv(group, &Heads::new(4, 2, 2, 4)?, &separate()).map(|_| ())),
        "qkv linear: the ranks of the heads is 4, but the ranks of the group is 2"
    );
}

#[test]
fn running() {
    let x = |group: &Group<Cpu>, rows: usize, cols: usize| {
        DTensor::replicated(group, Tensor::<f64>::zeros(group.device(), [rows, cols])?)
    };
    let column = |group: &Group<Cpu>, weights: &Weights<'_>| {
        ColumnParallelLinear::<Replicated, f64, Cpu>::load(
            group,
            weights,
            4,
            &Columns::even(group, 6)?,
            Bias::Add,
        )
    };
    assert_eq!(
        failure(2, |group, weights| column(group, weights)?.forward(x(group, 3, 5)?).map(|_| ())),
        "linear: columns of x is 5, but columns of w is 4"
    );
    assert_eq!(
        failure(2, |group, weights| {
            let layer = column(group, weights)?;
            let (_, saved) = layer.forward(x(group, 3, 4)?)?;
            let dy = x(group, 2, 6)?.scatter(&Partition::even(6, 2))?;
            layer.backward(saved, dy).map(|_| ())
        }),
        "column linear backward: rows of dy is 2, but rows of x is 3"
    );
    assert_eq!(
        failure(2, |group, weights| {
            let partition = Partition::even(4, 2);
            let row = RowParallelLinear::<Replicated, f64, Cpu>::load(group, weights, &partition, 6, true)?;
            let x = x(group, 3, 4)?.scatter::<1>(&Partition::from_sizes([1, 3]))?;
            row.forward(x).map(|_| ())
        }),
        "row linear: the input's features are partitioned as [1, 3], but the weight's columns as [2, 2]"
    );
    assert_eq!(
        failure(1, |group, _| x(group, 3, 4)?.with_sequences(Sequences::packed([1, 1])).map(|_| ())),
        "sequences: rows of the sequences is 2, but rows of the tensor is 3"
    );
    assert_eq!(
        failure(2, |group, _| x(group, 3, 4)?.scatter::<0>(&Partition::even(4, 2)).map(|_| ())),
        "scatter: the size of the partition is 4, but that of the dimension is 3"
    );
    assert_eq!(
        failure(2, |group, _| {
            let part = Tensor::<f64>::zeros(group.device(), [3, 3])?;
            DTensor::<Shard<1>, _, _>::shard(group, part, &Partition::even(5, 2)).map(|_| ())
        }),
        "shard: the size of this rank's shard is 3, but its size in the partition is 2"
    );
    assert_eq!(
        failure(2, |group, _| x(group, 3, 4)?.add(&x(group, 4, 3)?).map(|_| ())),
        "add: a has shape [3, 4], but b has shape [4, 3]"
    );
}

/// If tensors differ in shape, every rank gets the error before any data moves.
#[test]
fn ranks_with_different_shapes() {
    let outcomes = ranks(3).run_each(|group| {
        let rows = if group.rank() == 1 { 4 } else { 3 };
        let dy = DTensor::partial(&group, Tensor::<f32>::zeros(group.device(), [rows, 2])?)?;
        Layer::<f32, Cpu>::backward(&CopyTo, (), dy).map(|_| ())
    });
    for outcome in outcomes.unwrap() {
        let Err(Error::Mismatch(mismatch)) = outcome else { panic!("{outcome:?}") };
        assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, 1));
        assert!(mismatch.left.contains("all_reduce(sum, f32 [3, 2]"), "{}", mismatch.left);
        assert!(mismatch.right.contains("[4, 2]"), "{}", mismatch.right);
    }
}

/// With `Bias::Skip` the caller adds the bias and its gradient.
#[test]
fn a_skipped_bias_is_left_to_the_caller() {
    let (x, dy) = (matrix(1, "x", 3, 4), matrix(1, "dy", 3, 6));
    let weights = arrays([("weight", random(1, "w", &[6, 4])), ("bias", random(1, "b", &[6]))]);
    let loaded = |mode| {
        let case = Case::new(2, &x, &dy, &weights);
        run!(f64, &case, |group, weights| {
            let columns = Columns::even(group, 6)?;
            let layer =
                ColumnParallelLinear::<Replicated, f64, Dev>::load(group, weights, 4, &columns, mode)?;
            assert_eq!(layer.bias().is_some(), mode != Bias::None);
            Ok(layer)
        })
    };
    let (without, with) = (loaded(Bias::None).unwrap(), loaded(Bias::Add).unwrap());
    assert_ne!(without.y, with.y);
    // `run` requires a gradient for every parameter, so it reports that the skipped bias has none.
    let error = loaded(Bias::Skip).err().unwrap().to_string();
    assert_eq!(error, "rank 0: test: bias has no gradient");
    let skipped = ranks(2).run(|group| {
        let columns = Columns::even(&group, 6)?;
        let weights = Weights::new(&weights);
        let layer =
            ColumnParallelLinear::<Replicated, f64, Cpu>::load(&group, &weights, 4, &columns, Bias::Skip)?;
        let x = DTensor::replicated(&group, Tensor::from_array(group.device(), &x)?)?;
        layer.forward(x)?.0.into_local().to_array()
    });
    let skipped = skipped.unwrap();
    let views: Vec<_> = skipped.iter().map(|part| part.view()).collect();
    assert_eq!(ndarray::concatenate(ndarray::Axis(1), &views).unwrap(), without.y.into_dyn());
}

/// Initial weights do not depend on the number of ranks.
#[test]
fn random_weights_are_the_same_at_every_size() {
    let source = Random::normal(5, 0.02);
    let sums = |world| {
        let parts = ranks(world).run(|group| {
            let heads = Heads::new(6, 2, 3, group.size())?;
            let columns = Columns::qkv(&group, &heads, &QkvLayout::separate("q", "k", "v"))?;
            let layer =
                ColumnLinear::<f64, Cpu>::load(&group, &Weights::new(&source), 4, &columns, Bias::Add)?;
            let values = |param: Param<f64, Cpu>| {
                Ok((param.regions().to_vec(), param.shape().dims().to_vec(), param.value()?.to_vec()?))
            };
            layer.params().into_iter().map(values).collect::<Result<Vec<_>>>()
        });
        let mut whole = crate::support::Assembled::default();
        for (regions, shape, values) in parts.unwrap().into_iter().flatten() {
            whole.add(&regions, &shape, &values);
        }
        Arrays(whole.finish()).0
    };
    let one = sums(1);
    assert_eq!(
        one.keys().map(String::as_str).collect::<Vec<_>>(),
        ["k.bias", "k.weight", "q.bias", "q.weight", "v.bias", "v.weight"]
    );
    for world in 2..=6 {
        assert_eq!(sums(world), one, "{world} ranks");
    }
}

/// Sizes whose product exceeds `usize`: 2³² · 2³² wraps to 0.
#[test]
fn sizes_whose_product_cannot_be_counted_are_errors() {
    const HALF: usize = 1 << 32;
    let cpu = Cpu::new();
    for shape in
        [vec![HALF, HALF], vec![HALF, HALF, 2], vec![2, usize::MAX], vec![HALF, HALF, 0], vec![0, HALF, HALF]]
    {
        let dims = shape.as_slice();
        for error in [
            Tensor::<f32>::empty(&cpu, dims).unwrap_err(),
            Tensor::<f32>::zeros(&cpu, dims).unwrap_err(),
            Tensor::<f64>::full(&cpu, dims, 1.0).unwrap_err(),
            Tensor::<f32>::from_slice(&cpu, dims, &[]).unwrap_err(),
            Tensor::<f32>::empty(&cpu, [0]).unwrap().reshape(dims).unwrap_err(),
        ] {
            let wanted = format!("a tensor of shape {shape:?} has more elements than can be counted");
            assert!(error.to_string().ends_with(&wanted), "{error}");
        }
        let weights = Random::normal(1, 1.0);
        let weights = Weights::new(&weights);
        let loaded = Param::<f32, Cpu>::load(&cpu, &weights, "w", Role::Weight, dims, vec![]);
        assert!(loaded.is_err(), "{shape:?}");
        let whole = Region::whole(dims);
        assert!(
            Param::<f32, Cpu>::load_region(&cpu, &weights, "w", Role::Weight, whole.clone(), true).is_err()
        );
        // The region is a small part of a tensor that has more elements than `usize` can count.
        let ranges =
            dims.iter().enumerate().fold(whole, |region, (dim, &size)| region.narrow(dim, 0..size.min(1)));
        assert!(Param::<f32, Cpu>::load_region(&cpu, &weights, "w", Role::Weight, ranges, true).is_err());
    }
    assert_eq!((Shape::new(&[HALF, HALF]).len(), Shape::new(&[HALF, HALF, 0]).len()), (usize::MAX, 0));
    assert_eq!(Shape::new(&[HALF, HALF, HALF]).rows(), usize::MAX);
    assert_eq!(Shape::new(&[HALF, HALF, 3, HALF,][..]).split_at(2), (usize::MAX, HALF));
    // Partitions and sequences of such sizes saturate at `usize::MAX`.
    assert_eq!(Partition::from_sizes([3, usize::MAX, 2]).range(2), usize::MAX..usize::MAX);
    assert_eq!(Partition::even(5, 2).scaled(usize::MAX).range(0), 0..usize::MAX);
    assert_eq!(Partition::by_unit("test", "units", 5, usize::MAX, 2).unwrap().total(), usize::MAX);
    assert_eq!(Sequences::packed([3, usize::MAX, 2]).rows(), usize::MAX);
    let blocks = shardwise::shard::blocks(usize::MAX, 1, 4);
    assert!(blocks.sizes().all(|size| size.abs_diff(1 << 62) <= 1), "{blocks:?}");
    assert!(Sequences::padded(&[1], 1 << 60).is_err() && Sequences::padded(&[0, 0], usize::MAX).is_err());
    // A block without elements is empty, even if its offset is beyond any memory.
    let none: [f32; 0] = [];
    let view = MatRef::<f32, Cpu>::strided(&none, 3, 0, usize::MAX, 1).unwrap();
    assert_eq!(view.block(2..3, 0..0).rows(), 1);
}

/// A collective gets a partition whose number of elements wraps to 0. It returns an error, so that
/// no rank reads freed memory.
#[test]
fn a_partition_that_cannot_be_counted_is_an_error_on_every_rank() {
    const PART: usize = 1 << 62;
    for started in [false, true] {
        ranks(2)
            .run(|group| {
                let partition = Partition::from_sizes([20_000, PART]);
                let rows = 4;
                let own = match group.rank() {
                    0 => Tensor::<f64>::zeros(group.device(), [rows, 20_000])?,
                    _ => {
                        let own = Tensor::<f64>::zeros(group.device(), [rows, PART]).map(drop);
                        assert!(own.unwrap_err().to_string().contains("[4, 4611686018427387904]"));
                        return Ok(());
                    }
                };
                let error = if started {
                    group.start_all_gather(own, 1, &partition).map(drop)
                } else {
                    group.all_gather(&own, 1, &partition).map(drop)
                };
                let error = error.unwrap_err().to_string();
                assert!(
                    error.contains("all_gather") && error.contains("[4, 4611686018427407904]"),
                    "{error}"
                );
                Ok(())
            })
            .unwrap();
    }
}

/// Creating a tensor that does not fit into memory returns an error with the number of elements,
/// and the rank continues.
#[test]
fn memory_that_cannot_be_had_is_an_error() {
    const MANY: usize = 1 << 50;
    let cpu = Cpu::new();
    for len in [MANY, 1 << 60, usize::MAX / 8, usize::MAX] {
        let error = Tensor::<f32>::zeros(&cpu, [len]).unwrap_err().to_string();
        assert_eq!(error, format!("memory: no room for {len} elements of 4 bytes"));
        assert!(Tensor::<half::bf16>::empty(&cpu, [len]).is_err());
        let weights = Random::normal(1, 1.0);
        let whole = Region::whole([len]);
        let weights = Weights::new(&weights);
        assert!(Param::<f32, Cpu>::load_region(&cpu, &weights, "w", Role::Weight, whole, true).is_err());
    }
    assert_eq!(cpu.memory().live, 0);
    let x = Tensor::<f32>::full(&cpu, [3], 2.0).unwrap();
    assert_eq!(x.to_vec().unwrap(), [2.0; 3]);
}

/// Checks that every rank rejects the call by itself, even a rank that does not hold the faulty
/// shard. Such a rank would otherwise wait in a collective.
fn refused_everywhere(what: &str, world: usize, act: impl Fn(&Group<Cpu>) -> Result<()> + Sync) -> String {
    let outcomes = ranks(world).run_each(|group| act(&group)).unwrap().into_iter();
    let messages: Vec<String> = outcomes
        .enumerate()
        .map(|(rank, outcome)| match outcome {
            Err(error) if !error.is_consequence() => {
                error.to_string().replace(&format!("rank {rank} of"), "a rank of")
            }
            other => panic!("{what}: {other:?}"),
        })
        .collect();
    assert!(messages.iter().all(|message| *message == messages[0]), "{what}: {messages:?}");
    messages[0].clone()
}

#[test]
fn what_only_some_ranks_hold_is_refused_on_all() {
    let zeros = |group: &Group<Cpu>, rows, cols| Tensor::<f64>::zeros(group.device(), [rows, cols]);
    let random = Random::normal(1, 0.1);
    let weights = || Weights::new(&random);
    let five = Reduction::Invariant { blocks: 5 };

    // Three tokens on four ranks: one rank has none.
    for reduction in [Reduction::Fast, five] {
        let message = refused_everywhere("norm", 4, |group| {
            let group = &group.with_reduction(reduction);
            let kind = NormKind::RmsNorm { eps: 1e-5 };
            let norm = Normalize::<Shard<0>, f64, Cpu>::load(group, &weights(), kind, 6)?;
            let rows = Shard::<0>::local_rows(group, 3)?.len();
            let input = |cols| Shard::<0>::of_local(group, 3, zeros(group, rows, cols)?);
            let (_, saved) = norm.forward(input(6)?)?;
            norm.backward(saved, input(7)?).map(drop)
        });
        assert_eq!(message, "normalize backward: features of dy is 7, but those of the layer is 6");
    }

    // The first rank holds all classes.
    let message = refused_everywhere("cross entropy", 2, |group| {
        let classes = if group.rank() == 0 { 3 } else { 0 };
        let logits = DTensor::shard(group, zeros(group, 2, classes)?, &Partition::from_sizes([3, 0]))?;
        VocabParallelCrossEntropy::default().forward(logits, &[0, 3]).map(drop)
    });
    assert_eq!(message, "cross entropy: target 3 is none of the 3 classes");

    // Six query heads use two key/value heads on four ranks. The second rank holds both key/value
    // heads.
    let qkv = |group: &Group<Cpu>, heads: &Heads| {
        let columns = Columns::qkv(group, heads, &QkvLayout::separate("q", "k", "v"))?;
        ColumnLinear::<f64, Cpu>::load(group, &weights(), 4, &columns, Bias::None)
    };
    let message = refused_everywhere("a gradient with another partition", 4, |group| {
        let layer = qkv(group, &Heads::new(6, 2, 1, 4)?)?;
        let (y, saved) = layer.forward(DTensor::copied(group, zeros(group, 3, 4)?)?)?;
        let sizes: Vec<usize> = y.partition().unwrap().sizes().collect();
        // The first two ranks have the expected number of columns.
        let other = Partition::from_sizes([sizes[0], sizes[1], sizes[2] + 1, sizes[3] - 1]);
        let part = zeros(group, 3, other.size(group.rank()))?;
        layer.backward(saved, DTensor::shard(group, part, &other)?).map(drop)
    });
    assert!(
        message.starts_with("column linear backward: the gradient's features are partitioned as ["),
        "{message}"
    );

    // The first of four ranks has two of the five blocks. A partition without blocks would give it
    // the same heads, but it must reject the call like the other ranks.
    let message = refused_everywhere("heads without blocks", 4, |group| {
        qkv(&group.with_reduction(five), &Heads::new(6, 2, 1, 4)?).map(drop)
    });
    assert!(
        message.starts_with("qkv linear: not supported: an invariant reduction needs features"),
        "{message}"
    );
    let message = refused_everywhere("heads in blocks", 2, |group| {
        let query = group.with_reduction(five).partition("test", "heads", 6, 1)?;
        qkv(group, &Heads::with_partition(query, 2, 1)?).map(drop)
    });
    assert_eq!(
        message,
        "qkv linear: not supported: heads that are partitioned by canonical blocks need a group with an invariant reduction"
    );
    let message = refused_everywhere("columns of another reduction", 2, |group| {
        let columns = Columns::even(&group.with_reduction(five), 6)?;
        ColumnLinear::<f64, Cpu>::load(group, &weights(), 4, &columns, Bias::None).map(drop)
    });
    assert_eq!(
        message,
        "column linear: the columns were made for reduction Invariant { blocks: 5 }, but the layer's group has Fast"
    );
    let message = refused_everywhere("layers of two reductions", 2, |group| {
        let layer = |group: &Group<Cpu>| {
            let columns = Columns::even(group, 6)?;
            ColumnLinear::<f64, Cpu>::load(group, &weights(), 4, &columns, Bias::None)
        };
        let layers = vec![layer(group)?, layer(&group.with_reduction(five))?];
        ColumnParallelLinear::<Replicated, f64, Cpu>::concat(layers).map(drop)
    });
    assert!(message.starts_with("concatenated linear: a layer is spread over"), "{message}");
}

/// `Debug` prints the sentence of `Display`, because a `main` that returns an error prints it by
/// `Debug`.
#[test]
fn errors_read_alike_in_debug() {
    let error = Error::Invalid { op: "gate", reason: "no columns".into() };
    assert_eq!(format!("{error:?}"), error.to_string());
    let failed = ranks(2).run(|group| group.broadcast_bytes(2, b"").map(|_| ())).unwrap_err();
    assert_eq!(format!("{failed:?}"), failed.to_string());
}

/// Arrays of any element type are a weight source. Each number is rounded once to the parameter's
/// element type.
#[test]
fn arrays_of_any_element_are_read() {
    let numbers = [1.0 + 2f32.powi(-8) + 2f32.powi(-20), -0.0, 3.5, f32::MAX];
    let array = ArrayD::from_shape_vec(vec![2, 2], numbers.to_vec()).unwrap();
    let source = Arrays([("weight".to_string(), array.clone())].into());
    let region = Region::whole([2, 2]);
    let load = |cpu: &Cpu| {
        Param::<f32, Cpu>::load_region(
            cpu,
            &Weights::new(&source),
            "weight",
            Role::Weight,
            region.clone(),
            true,
        )
    };
    let same = load(&Cpu::poisoned()).unwrap().value().unwrap();
    assert_eq!(same.as_array(), array.view());
    let narrow = Param::<half::bf16, Cpu>::load_region(
        &Cpu::poisoned(),
        &Weights::new(&source),
        "weight",
        Role::Weight,
        region.clone(),
        true,
    );
    let want = numbers.map(half::bf16::from_f32);
    assert_eq!(narrow.unwrap().value().unwrap().slice(), want);
    let missing = Param::<f32, Cpu>::load_region(
        &Cpu::new(),
        &Weights::new(&source),
        "weigth",
        Role::Weight,
        region,
        true,
    );
    assert_eq!(
        missing.unwrap_err().to_string(),
        "tensor `weigth` is not in the given arrays; did you mean `weight`?"
    );
}
