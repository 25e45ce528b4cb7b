//! A layer, tensor, gradient or check that gets the wrong group returns an error that names both
//! groups, and never wrong data. Messages that no rank receives are errors.

use crate::dev::{DTensor, Dev, Tensor, ranks};
use shardwise::{
    Error, Result,
    comm::{DeviceMesh, Group, ReduceOp},
    device::Element,
    kernels::{Activation, NormKind},
    optim::grad_norm,
    parallel::{
        AddBias, Attention, AttentionConfig, Bias, ColumnLinear, ColumnParallelLinear, Columns, Dropout,
        Gate, Layer, MlpNames, Normalize, ParallelAttention, ParallelMlp, PositionEmbedding, QkvLayout,
        RowLinear, RowParallelLinear, Sampler, VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    shard::{
        Axis, Copied, Heads, Mesh, Partition, Placement, Reduction, Replicated, Sequences, Shape, Shard,
    },
    tensor::{Param, ParamRegion, Random, Region, Role, Weights},
    train::{DataParallel, check_replicas},
};

/// Returns a rank's error message without the rank.
fn message(error: Error) -> String {
    match error {
        Error::RankFailed { source, .. } => source.to_string(),
        error => error.to_string(),
    }
}

/// Layers over a group of two ranks. Each layer runs forward and backward with a tensor over
/// another group.
struct Mixed<'a> {
    layers: &'a Group<Dev>,
    tensors: &'a Group<Dev>,
    outcomes: Vec<(&'static str, Result<()>)>,
}

impl Mixed<'_> {
    /// Records the outcome of a forward with a foreign input, and of a backward with a foreign
    /// gradient.
    fn layer<L: Layer<f64, Dev>>(
        &mut self,
        name: &'static str,
        make: impl Fn(&Group<Dev>) -> Result<L>,
        x: impl Fn(&Group<Dev>) -> Result<DTensor<L::In, f64>>,
        dy: impl Fn(&Group<Dev>) -> Result<DTensor<<L::Out as Placement>::Dual, f64>>,
    ) -> Result<()> {
        let layer = make(self.layers)?;
        self.outcomes.push((name, layer.forward(x(self.tensors)?).map(drop)));
        let saved = layer.forward(x(self.layers)?)?.1;
        self.outcomes.push((name, layer.backward(saved, dy(self.tensors)?).map(drop)));
        // Tensors over the same group are accepted, also if a recorded handle of the group created
        // them.
        let recorded = self.layers.recorded().0;
        let saved = layer.forward(x(&recorded)?)?.1;
        layer.backward(saved, dy(self.layers)?).map(drop)
    }
}

fn full(group: &Group<Dev>, shape: [usize; 2]) -> Result<Tensor<f64>> {
    Tensor::full(group.device(), shape, 1.0)
}

fn replicated(cols: usize) -> impl Fn(&Group<Dev>) -> Result<DTensor<Replicated, f64>> {
    move |group| DTensor::replicated(group, full(group, [4, cols])?)
}

fn copied(cols: usize) -> impl Fn(&Group<Dev>) -> Result<DTensor<Copied, f64>> {
    move |group| DTensor::copied(group, full(group, [4, cols])?)
}

/// Each of two ranks has `cols` features.
fn sharded(cols: usize) -> impl Fn(&Group<Dev>) -> Result<DTensor<Shard<1>, f64>> {
    move |group| {
        let partition = Partition::from_sizes(vec![cols; group.size()]);
        DTensor::shard(group, full(group, [4, cols])?, &partition)
    }
}

/// Every layer with a group gets tensors over two other groups: one of the same size and one of a
/// different size.
#[test]
fn a_layer_refuses_inputs_and_gradients_of_another_group() {
    let outcomes = ranks(4).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
        let (data, tensor) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor));
        let source = Random::normal(1, 0.1);
        let weights = Weights::new(&source);
        let mut all = Vec::new();
        for (layers, tensors) in [(tensor, &world), (tensor, data)] {
            let mut mixed = Mixed { layers, tensors, outcomes: Vec::new() };
            let even = Partition::even(4, 2);
            let columns = |group: &Group<Dev>| Columns::even(group, 4);
            let heads = |group: &Group<Dev>| Heads::new(2, 2, 2, group.size());
            let config = AttentionConfig::new(4, 2);
            let qkv = QkvLayout::separate("q", "k", "v");
            mixed.layer(
                "column linear",
                |group| ColumnLinear::load(group, &weights, 4, &columns(group)?, Bias::Add),
                copied(4),
                sharded(2),
            )?;
            mixed.layer(
                "column linear",
                |group| {
                    ColumnParallelLinear::<Replicated, _, _>::load(
                        group,
                        &weights,
                        4,
                        &columns(group)?,
                        Bias::Add,
                    )
                },
                replicated(4),
                sharded(2),
            )?;
            mixed.layer(
                "column linear",
                |group| {
                    let layer = |name: &str| {
                        ColumnLinear::load(group, &weights.at(name), 4, &columns(group)?, Bias::Add)
                    };
                    ColumnParallelLinear::<Replicated, _, _>::concat(vec![layer("a")?, layer("b")?])
                },
                replicated(4),
                sharded(4),
            )?;
            mixed.layer(
                "row linear",
                |group| RowLinear::load(group, &weights, &even, 4),
                sharded(2),
                copied(4),
            )?;
            mixed.layer(
                "row linear",
                |group| RowParallelLinear::<Replicated, _, _>::load(group, &weights, &even, 4, true),
                sharded(2),
                replicated(4),
            )?;
            mixed.layer(
                "column linear",
                |group| {
                    let (names, f) = (MlpNames::default(), Activation::Relu);
                    ParallelMlp::<Replicated, _, _>::load(group, &weights, &names, (4, 6), f, true)
                },
                replicated(4),
                replicated(4),
            )?;
            mixed.layer(
                "bias",
                |group| AddBias::<Replicated, _, _>::load(group, &weights, 4),
                replicated(4),
                replicated(4),
            )?;
            mixed.layer(
                "normalize",
                |group| {
                    Normalize::<Replicated, _, _>::load(group, &weights, NormKind::RmsNorm { eps: 1e-6 }, 4)
                },
                replicated(4),
                replicated(4),
            )?;
            mixed.layer(
                "attention",
                |group| Attention::load(group, &weights, &heads(group)?, &config),
                sharded(6),
                sharded(2),
            )?;
            mixed.layer(
                "column linear",
                |group| ParallelAttention::<Replicated, _, _>::load(group, &weights, &qkv, "o", &config),
                replicated(4),
                replicated(4),
            )?;
            mixed.layer(
                "position embedding",
                |group| PositionEmbedding::<Replicated, _, _>::load(group, &weights, 9, 4),
                replicated(4),
                replicated(4),
            )?;
            // The embedding is no `Layer`, because its ids have no group.
            let table = VocabParallelEmbedding::<Replicated, f64, Dev>::load(layers, &weights, 9, 4)?;
            let rows = table.forward(&[1, 2, 3, 8], Sequences::one(4))?.1;
            mixed.outcomes.push(("embedding", table.backward(&rows, replicated(4)(tensors)?)));
            let sum = replicated(4)(layers)?.add(&replicated(4)(tensors)?);
            mixed.outcomes.push(("add", sum.map(drop)));
            let messages: Vec<(String, String)> = mixed
                .outcomes
                .into_iter()
                .map(|(name, outcome)| (name.to_string(), outcome.expect_err(name).to_string()))
                .collect();
            all.push((format!("{layers:?}"), format!("{tensors:?}"), messages));
        }
        Ok(all)
    });
    for (layers, tensors, messages) in outcomes.unwrap().into_iter().flatten() {
        assert_eq!(messages.len(), 24);
        for (name, message) in messages {
            assert!(message.starts_with(&name) || message.starts_with("row linear"), "{name}: {message}");
            assert!(message.contains(&layers) && message.contains(&tensors), "{name}: {message}");
        }
    }
}

#[test]
fn the_ranks_of_a_mesh_are_distinguished_by_their_groups_names() {
    let names = ranks(8).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(2, 2, 2)?)?;
        let name = |axis| mesh.group(axis).name().to_string();
        let failed = mesh.group(Axis::Tensor).all_reduce(
            ReduceOp::Sum,
            &mut Tensor::<f32>::zeros(world.device(), [1 + mesh.group(Axis::Tensor).rank()])?,
        );
        assert!(failed.is_err());
        Ok([name(Axis::Data), name(Axis::Pipeline), name(Axis::Tensor)])
    });
    let names = names.unwrap();
    assert_eq!(names[0], ["world/dp0", "world/pp0", "world/tp0"]);
    assert_eq!(names[5], ["world/dp1", "world/pp3", "world/tp2"]);
    let lost = ranks(2).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        match world.rank() {
            0 => mesh.group(Axis::Tensor).barrier(),
            _ => Ok(()),
        }
    });
    assert!(message(lost.unwrap_err()).contains("of group `world/tp0`"));
}

/// All groups that consist of this one rank are interchangeable.
#[test]
fn groups_of_one_rank_are_the_same() {
    ranks(1)
        .run(|world| {
            let source = Random::normal(1, 0.1);
            let solo = Group::solo(world.device());
            let layer = AddBias::<Replicated, f64, Dev>::load(&solo, &Weights::new(&source), 4)?;
            layer.forward(replicated(4)(&world)?).map(drop)
        })
        .unwrap();
}

/// A layer rejects a tensor whose group has a different reduction, because the two reductions give
/// different bits.
#[test]
fn a_layer_refuses_a_tensor_with_another_reduction() {
    let failed = ranks(2).run(|world| {
        let source = Random::normal(1, 0.1);
        let invariant = world.with_reduction(Reduction::Invariant { blocks: 4 });
        let layer = AddBias::<Replicated, f64, Dev>::load(&invariant, &Weights::new(&source), 4)?;
        layer.forward(replicated(4)(&world)?).map(drop)
    });
    let failed = message(failed.unwrap_err());
    assert!(failed.contains("bias: ") && failed.contains("Fast") && failed.contains("Invariant"), "{failed}");
}

#[test]
fn layers_refuse_three_dimensions_and_say_what_to_reshape_to() {
    let failed = |what: &str, run: &(dyn Fn(&Group<Dev>) -> Result<()> + Sync)| {
        let failed = message(ranks(2).run(|group| run(&group)).unwrap_err());
        let want = "reshape it to [6, 4], and say which rows belong together by `with_sequences`";
        assert!(failed.starts_with(what) && failed.ends_with(want), "{what}: {failed}");
    };
    let cube =
        |group: &Group<Dev>| DTensor::replicated(group, Tensor::<f64>::full(group.device(), [2, 3, 4], 1.0)?);
    let half = |group: &Group<Dev>| {
        let part = Tensor::<f64>::full(group.device(), [2, 3, 4], 1.0)?;
        DTensor::<Shard<1>, f64>::shard(group, part, &Partition::from_sizes([3, 3]))
    };
    failed("bias: ", &|group| {
        AddBias::<Replicated, f64, Dev>::load(group, &Weights::new(&Random::normal(1, 0.1)), 4)?
            .forward(cube(group)?)
            .map(drop)
    });
    failed("normalize: ", &|group| {
        let kind = NormKind::RmsNorm { eps: 1e-6 };
        Normalize::<Replicated, f64, Dev>::load(group, &Weights::new(&Random::normal(1, 0.1)), kind, 4)?
            .forward(cube(group)?)
            .map(drop)
    });
    failed("column linear: ", &|group| {
        let (names, f) = (MlpNames::default(), Activation::Relu);
        ParallelMlp::<Replicated, f64, Dev>::load(
            group,
            &Weights::new(&Random::normal(1, 0.1)),
            &names,
            (4, 6),
            f,
            true,
        )?
        .forward(cube(group)?)
        .map(drop)
    });
    failed("position embedding: ", &|group| {
        let table = PositionEmbedding::<Replicated, f64, Dev>::load(
            group,
            &Weights::new(&Random::normal(1, 0.1)),
            9,
            4,
        )?;
        table.forward(cube(group)?).map(drop)
    });
    let wide = |what: &str, run: &(dyn Fn(&Group<Dev>) -> Result<()> + Sync)| {
        let failed = message(ranks(2).run(|group| run(&group)).unwrap_err());
        assert!(failed.starts_with(what) && failed.contains("shape [2, 6, 4]"), "{what}: {failed}");
    };
    wide("gate: ", &|group| Layer::<f64, Dev>::forward(&Gate::new(Activation::Silu), half(group)?).map(drop));
    wide("cross entropy: ", &|group| {
        VocabParallelCrossEntropy::default().forward(half(group)?, &[0; 12]).map(drop)
    });
    wide("sample: ", &|group| Sampler::greedy().sample(&half(group)?, &[0; 12]).map(drop));
    wide("row linear: ", &|group| {
        RowLinear::<f64, Dev>::load(group, &Weights::new(&Random::normal(1, 0.1)), &Partition::even(8, 2), 4)?
            .forward(half(group)?)
            .map(drop)
    });
    // Elementwise functions take tensors of any shape.
    ranks(2)
        .run(|group| {
            let dropout = Dropout::<Replicated>::new(0.5, 1, "d");
            Layer::<f64, Dev>::forward(&dropout, cube(&group)?).map(drop)
        })
        .unwrap();
}

type Mlp<T> = ParallelMlp<Replicated, T, Dev>;

fn mlp<T: Element>(group: &Group<Dev>) -> Result<Mlp<T>> {
    let source = Random::normal(1, 0.3);
    ParallelMlp::load(group, &Weights::new(&source), &MlpNames::default(), (4, 6), Activation::Relu, true)
}

fn with_gradients<T: Element>(group: &Group<Dev>) -> Result<Mlp<T>> {
    let mlp: Mlp<T> = mlp(group)?;
    for param in mlp.params() {
        param.add_grad(Tensor::full(group.device(), param.shape(), 1.0)?)?;
    }
    Ok(mlp)
}

#[test]
fn data_parallelism_over_the_tensor_parallel_axis_is_refused_and_changes_nothing() {
    let failed = ranks(4).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
        let params = mlp::<f64>(mesh.group(Axis::Tensor))?.params();
        let values = || {
            let mut all = Vec::new();
            for param in &params {
                all.extend(param.value()?.to_vec()?);
            }
            Ok::<_, Error>(all)
        };
        let before = values()?;
        let failed = DataParallel::new(mesh.group(Axis::Tensor), &params).map(drop).unwrap_err();
        assert_eq!(values()?, before);
        DataParallel::new(mesh.group(Axis::Data), &params)?;
        // One replica lacks one of the parameters.
        let mut fewer = params.clone();
        fewer.retain(|param| world.rank() > 0 || param.name() != "down.bias");
        let missing = DataParallel::new(mesh.group(Axis::Data), &fewer).map(drop);
        assert!(missing.is_err() == (mesh.group(Axis::Tensor).rank() == 0));
        Ok(failed.to_string())
    });
    for failed in failed.unwrap() {
        let failed = failed.unwrap();
        assert!(failed.contains("hold different regions of `up.weight`"), "{failed}");
        assert!(failed.contains("world/tp") && failed.contains("tensor-parallel group?"), "{failed}");
    }
}

#[test]
fn a_gradient_norm_over_missing_or_wrong_groups_is_refused() {
    for reduction in [Reduction::Fast, Reduction::Invariant { blocks: 2 }] {
        let norms = ranks(4).run(|world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
            let tensor = mesh.group(Axis::Tensor).with_reduction(reduction);
            let model = with_gradients::<f64>(&tensor)?;
            let norm = |groups: &[&Group<Dev>]| grad_norm(&model.params(), groups);
            let data = mesh.group(Axis::Data);
            Ok([
                norm(&[&tensor]),
                norm(&[]),
                norm(&[data]),
                norm(&[&tensor, data]),
                norm(&[&tensor, &tensor]),
            ]
            .map(|norm| norm.map_err(|error| error.to_string())))
        });
        for [right, none, wrong, both, twice] in norms.unwrap() {
            // 4 x 6 + 6 + 6 x 4 + 4 gradients of 1.
            assert!((right.unwrap() - 58_f64.sqrt()).abs() < 1e-12);
            let none = none.unwrap_err();
            assert!(none.contains("such as the rest of `up.weight`: pass all groups"), "{none}");
            // An invariant norm sums over each group once, even if the caller lists the group
            // twice.
            let twice = match reduction {
                Reduction::Fast => Some(twice.unwrap_err()),
                _ => None,
            };
            for error in [wrong, both].map(Result::unwrap_err).into_iter().chain(twice) {
                assert!(
                    error.contains("own the same regions of the model: is this the data-parallel"),
                    "{error}"
                );
            }
        }
    }
}

/// The shards are uneven and the heads are shared, at every number of ranks. Correct replicas pass,
/// and the norm is that of one rank.
#[test]
fn replicas_and_norms_of_shared_heads_are_right_at_every_size() {
    let norm = |world: usize| {
        let norms = ranks(world).run(|group| {
            let params = attention(&group)?.params();
            for param in &params {
                param.add_grad(Tensor::full(group.device(), param.shape(), 1.0)?)?;
            }
            check_replicas(&params, &group)?;
            grad_norm(&params, &[&group])
        });
        norms.unwrap()[0]
    };
    let one = norm(1);
    for world in 2..=7 {
        assert!((norm(world) - one).abs() < 1e-12, "{world} ranks");
    }
}

fn attention(group: &Group<Dev>) -> Result<ParallelAttention<Replicated, f64, Dev>> {
    let source = Random::normal(1, 0.3);
    let config =
        AttentionConfig::new(6, 8).with_kv_heads(2).with_head_dim(2).with_qkv_bias(true).with_out_bias(true);
    let layout = QkvLayout::separate("q", "k", "v");
    ParallelAttention::load(group, &Weights::new(&source), &layout, "o", &config)
}

#[test]
fn a_copy_of_a_shared_head_that_drifts_is_named() {
    let mut seen_at = Vec::new();
    for world in [2, 3, 5, 7] {
        for tensor in ["k.weight", "v.bias", "o.bias"] {
            let seen = ranks(world).run(|group| {
                let params = attention(&group)?.params();
                // Changes the last rank's copy of an element that a different rank owns.
                let mut hurt = false;
                for param in &params {
                    let is_copy = |own: &&ParamRegion| !own.owned && own.tensor == tensor;
                    let row = param.regions().iter().find(is_copy).map(|copy| copy.row);
                    if let (Some(row), true) = (row, group.rank() + 1 == group.size()) {
                        let (shape, mut values) = (param.shape(), param.value()?.to_vec()?);
                        values[row * shape.split_at(0).1] += 1e-9;
                        param.set(Tensor::from_slice(group.device(), shape, &values)?)?;
                        hurt = true;
                    }
                }
                Ok((hurt, check_replicas(&params, &group).map_err(|error| error.to_string())))
            });
            let seen = seen.unwrap();
            if !seen[world - 1].0 {
                // If the last rank starts at a head boundary, it shares no head with another rank.
                assert!(seen.iter().all(|(_, outcome)| outcome.is_ok()), "{world} ranks, {tensor}");
                continue;
            }
            seen_at.push((world, tensor));
            for (_, outcome) in seen {
                let drift = outcome.unwrap_err();
                let want = format!("rank {} of group `world` has drifted: its `{tensor}` differs", world - 1);
                assert!(drift.starts_with(&want), "{world} ranks, {tensor}: {drift}");
            }
        }
    }
    let heads = ["k.weight", "v.bias"];
    let shared = [3, 5, 7].into_iter().flat_map(|world| heads.map(|tensor| (world, tensor)));
    let biases = [2, 3, 5, 7].map(|world| (world, "o.bias"));
    let want: std::collections::BTreeSet<_> = shared.chain(biases).collect();
    assert_eq!(seen_at.into_iter().collect::<std::collections::BTreeSet<_>>(), want);
}

/// The regions overlap partially (no layer creates such regions), and one rank has no region.
#[test]
fn copies_are_compared_where_regions_overlap() {
    let drift = |hurt: Option<(usize, usize)>| {
        let outcomes = ranks(4).run(|group| {
            let rows = [0..5, 3..7, 0..0, 4..9][group.rank()].clone();
            let source = Random::normal(1, 0.3);
            let region = Region::whole([9, 2]).narrow(0, rows.clone());
            let param = Param::<f64, Dev>::load_region(
                group.device(),
                &Weights::new(&source),
                "w",
                Role::Weight,
                region,
                true,
            )?;
            if let Some((rank, row)) = hurt.filter(|(rank, _)| *rank == group.rank()) {
                let mut values = param.value()?.to_vec()?;
                values[(row - rows.start) * 2 + 1] += 1.0;
                assert!(rows.contains(&row), "{rank}");
                param.set(Tensor::from_slice(group.device(), [rows.len(), 2], &values)?)?;
            }
            Ok(check_replicas(&[param], &group).map_err(|error| error.to_string()))
        });
        outcomes.unwrap()
    };
    let says = |rank, other| {
        Err(format!("rank {rank} of group `world` has drifted: its `w` differs from rank {other}'s"))
    };
    assert_eq!(drift(None), vec![Ok(()); 4]);
    assert_eq!(drift(Some((0, 3))), vec![says(1, 0); 4]);
    assert_eq!(drift(Some((3, 4))), vec![says(3, 0); 4]);
    assert_eq!(drift(Some((3, 6))), vec![says(3, 1); 4]);
    // Only one rank holds this element, so no rank can detect the change.
    assert_eq!(drift(Some((3, 8))), vec![Ok(()); 4]);
    assert_eq!(drift(Some((0, 1))), vec![Ok(()); 4]);
}

#[test]
fn a_message_that_nobody_receives_is_an_error_at_the_next_meeting() {
    let meetings: [fn(&Group<Dev>) -> Result<()>; 3] = [
        |group| group.barrier(),
        |group| group.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::zeros(group.device(), [2])?),
        |group| group.split(Some(0), 0).map(drop),
    ];
    for (at, meeting) in meetings.into_iter().enumerate() {
        for world in [2, 3] {
            let outcomes = ranks(world).run_each(|group| {
                let x = Tensor::<f32>::zeros(group.device(), [3])?;
                // Rank 1 receives the first message, but not the second.
                match group.rank() {
                    0 => {
                        group.exchange(Some((1, &x)), None)?;
                        group.exchange(Some((1, &x)), None)?;
                    }
                    1 => drop(group.exchange::<f32>(None, Some((0, Shape::new(&[3]))))?),
                    _ => {}
                }
                meeting(&group)
            });
            for outcome in outcomes.unwrap() {
                let error = outcome.unwrap_err();
                assert!(matches!(error, Error::Mismatch(_)), "{error}");
                let error = error.to_string();
                assert!(
                    error.contains("rank 0 called") && error.contains("2 messages sent and 0 received"),
                    "{at}: {error}"
                );
                assert!(
                    error.contains("rank 1 called") && error.contains("0 messages sent and 1 received"),
                    "{at}: {error}"
                );
            }
        }
    }
}

#[test]
fn a_message_that_nobody_receives_is_an_error_at_the_end() {
    let outcomes = ranks(3).run_each(|world| {
        let group = world.split_all(u64::from(world.rank() == 0))?;
        let x = Tensor::<f32>::zeros(world.device(), [3, 2])?;
        if world.rank() == 1 {
            group.exchange(Some((1, &x)), None)?;
        }
        // The barrier is a call of `world`, not of the group in which the message was sent, so it
        // reports no error.
        world.barrier()?;
        Ok(world.rank())
    });
    let outcomes = outcomes.unwrap();
    assert_eq!(outcomes[..2], [Ok(0), Ok(1)]);
    let error = outcomes[2].clone().unwrap_err().to_string();
    assert!(
        error.starts_with("exchange: rank 2 never received a message of rank 1: f32 [3, 2], sent at "),
        "{error}"
    );
    // The failing rank's error is reported as the cause, not the unreceived message.
    let failed = ranks(2).run(|world| {
        if world.rank() == 0 {
            return world.exchange(Some((1, &Tensor::<f32>::zeros(world.device(), [3])?)), None).map(drop);
        }
        Err(Error::invalid("test", "failed"))
    });
    assert_eq!(message(failed.unwrap_err()), "test: failed");
}

#[test]
fn messages_across_groups_and_recorded_handles_are_counted_together() {
    ranks(2)
        .run(|world| {
            let x = Tensor::<f32>::zeros(world.device(), [3])?;
            let other = 1 - world.rank();
            world.exchange(Some((other, &x)), None)?;
            // The handle with a record counts messages together with `world`.
            world.recorded().0.exchange::<f32>(None, Some((other, Shape::new(&[3]))))?;
            world.barrier()
        })
        .unwrap();
}
