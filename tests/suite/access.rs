//! Roles: no collective, gather or save sends a weight to a rank that may not see it.

use crate::{
    claims::Claims,
    dev::{DTensor, Dev, Tensor, ranks},
    support::say,
};
use shardwise::{
    Error, Result,
    comm::{DeviceMesh, Group, Op, ReduceOp, TransferLog},
    ops,
    optim::{AdamW, AdamWConfig},
    parallel::{Bias, ColumnLinear, Columns, Layer},
    security::{
        Role::{Aggregator, Checkpointer, Trainer},
        Roles,
    },
    shard::{Axis, Mesh, Partition, Replicated, Shard, Tree},
    tensor::{Param, Random, Region, Role, Weights},
    train::DataParallel,
    weights::{self, Checkpoint},
};
use std::{cell::Cell, path::Path, rc::Rc, time::Duration};

const WORLD: usize = 3;
/// The number of [`copies`].
const COPIES: usize = 9;

/// This rank's shard of a weight: two rows of two elements, which name the rank.
fn weight(group: &Group<Dev>) -> Result<Param<f32, Dev>> {
    let source = Random::normal(group.rank() as u64, 1.0);
    let whole = Region::whole([2, 2]);
    Param::load_region(group.device(), &Weights::new(&source), "w", Role::Weight, whole, true)
}

/// The ways to copy a parameter's elements on its device.
fn copies(param: &Param<f32, Dev>) -> Result<Vec<(&'static str, Tensor)>> {
    let value = param.value()?;
    let zeros = Tensor::zeros(value.device(), [1, 2])?;
    let again = Param::<f32, Dev>::load_region(
        value.device(),
        &Weights::new(&Random::normal(9, 1.0)),
        "again",
        Role::Weight,
        Region::whole([2, 2]),
        true,
    )?;
    again.set(Tensor::full(value.device(), [2, 2], 1.0)?)?;
    Ok(vec![
        ("value", value.clone()),
        ("reshape", value.clone().reshape([1, 4])?.reshape([2, 2])?),
        ("convert", value.convert::<f64>()?.convert()?),
        ("into element", value.clone().into_element::<f64>()?.into_element()?),
        ("the same element", value.clone().into_element()?),
        ("slice and concat", ops::concat(&[&zeros, &ops::slice(&value, 0, 1..2)?], 0)?),
        ("a value that was set", again.value()?),
        ("rows", value.rows(&[1, 0])?),
        ("written", {
            let mut copy = value.clone();
            copy.slice_mut()?;
            copy
        }),
    ])
}

type Send = fn(&Group<Dev>, Tensor) -> Result<()>;

/// The public functions that send the elements of a tensor to every rank.
fn collectives() -> Vec<(&'static str, Send)> {
    /// The partition of all ranks' shards along dimension 0 or 1.
    fn shards() -> Partition {
        Partition::even(2 * WORLD, WORLD)
    }
    /// A sum with one term for each rank.
    fn tree() -> Result<Tree> {
        Tree::new("sum", "terms", WORLD, WORLD)
    }
    /// A whole dimension of 2, of which the last rank has nothing.
    fn halves() -> Partition {
        Partition::from_sizes([1, 1, 0])
    }
    vec![
        ("all_reduce", |group, mut x| group.all_reduce(ReduceOp::Sum, &mut x)),
        ("max", |group, mut x| group.all_reduce(ReduceOp::Max, &mut x)),
        ("all_gather", |group, x| group.all_gather(&x, 0, &shards()).map(drop)),
        ("all_gather of columns", |group, x| group.all_gather(&x, 1, &shards()).map(drop)),
        ("reduce_scatter", |group, x| group.reduce_scatter(ReduceOp::Sum, &x, 0, &halves()).map(drop)),
        ("broadcast from 0", |group, mut x| group.broadcast(0, &mut x)),
        ("broadcast from 2", |group, mut x| group.broadcast(2, &mut x)),
        ("exchange", |group, x| {
            let (next, previous) = ((group.rank() + 1) % WORLD, (group.rank() + WORLD - 1) % WORLD);
            group.exchange(Some((next, &x)), Some((previous, x.shape()))).map(drop)
        }),
        ("start_all_reduce", |group, x| group.start_all_reduce(ReduceOp::Sum, x)?.wait().map(drop)),
        ("start_all_gather", |group, x| group.start_all_gather(x, 0, &shards())?.wait().map(drop)),
        ("start_reduce_scatter", |group, x| {
            group.start_reduce_scatter(ReduceOp::Sum, x, 0, &halves())?.wait().map(drop)
        }),
        ("DTensor::all_gather", |group, x| {
            DTensor::<Shard<1>>::shard(group, x, &shards())?.all_gather().map(drop)
        }),
        ("DTensor::enter", |group, x| DTensor::<Shard<0>>::shard(group, x, &shards())?.enter().map(drop)),
        ("DTensor::broadcast", |group, x| DTensor::broadcast(group, 0, x).map(drop)),
        ("Partial::all_reduce", |group, x| DTensor::partial(group, x)?.all_reduce().map(drop)),
        ("Partial::leave", |group, x| DTensor::partial(group, x)?.leave::<Replicated>().map(drop)),
        ("Partial::start_all_reduce", |group, x| {
            DTensor::partial(group, x)?.start_all_reduce()?.wait().map(drop)
        }),
        ("tree_all_reduce", |group, x| group.tree_all_reduce::<f32>(&tree()?, vec![x]).map(drop)),
        ("tree_all_reduce by exchanges", |group, x| {
            let x = ops::concat(&vec![&x; 1024], 0)?;
            group.tree_all_reduce::<f32>(&tree()?, vec![x]).map(drop)
        }),
        ("tree_reduce_scatter", |group, x| {
            group.tree_reduce_scatter::<f32>(&tree()?, vec![x], 0, &halves()).map(drop)
        }),
        ("recorded", |group, mut x| group.recorded().0.all_reduce(ReduceOp::Sum, &mut x)),
        ("a subgroup", |group, mut x| group.split_all(0)?.all_reduce(ReduceOp::Sum, &mut x)),
    ]
}

#[test]
fn no_collective_sends_a_weight_to_a_trainer() {
    let mut refused = 0;
    // With one trainer among three ranks, every rank is refused: the results would reach it.
    for roles in [[Checkpointer, Trainer, Aggregator], [Trainer; WORLD]] {
        for (name, send) in collectives() {
            for at in 0..COPIES {
                let job = ranks(WORLD).roles(roles);
                let outcomes = job.run_each(|group| {
                    let (_, x) = copies(&weight(&group)?)?.swap_remove(at);
                    assert!(x.is_weight());
                    send(&group, x)
                });
                for (rank, outcome) in outcomes.unwrap().into_iter().enumerate() {
                    // A rank sends to the next one only, which may be one that may see it.
                    if name == "exchange" && roles[(rank + 1) % WORLD] != Trainer {
                        continue;
                    }
                    // A broadcast from rank 2 also reaches rank 1, the trainer.
                    let Err(Error::NotPermitted { role, .. }) = outcome else {
                        panic!("{name} {at} rank {rank}: {outcome:?}")
                    };
                    assert_eq!(role, "trainer");
                    refused += 1;
                }
            }
        }
    }
    // Of the exchanges with the first roles, only rank 0 sends to a trainer.
    assert_eq!(refused, collectives().len() * COPIES * 2 * WORLD - 2 * COPIES);
}

/// The same calls succeed if every rank may see weights, if there are no roles, and with a tensor
/// that is no weight.
#[test]
fn what_is_permitted_is_sent() {
    let mut tried = 0;
    for (name, send) in collectives() {
        let all = ranks(WORLD).roles([Checkpointer, Aggregator, Checkpointer]);
        let weights = |group: Group<Dev>| send(&group, weight(&group)?.value()?);
        all.run(weights).unwrap_or_else(|error| panic!("{name}: {error}"));
        let trainers = ranks(WORLD).roles([Trainer; WORLD]);
        let plain = |group: Group<Dev>| {
            let x = Tensor::full(group.device(), [2, 2], 1.0)?;
            assert!(!x.is_weight());
            send(&group, x)
        };
        trainers.run(plain).unwrap_or_else(|error| panic!("{name}: {error}"));
        tried += 2;
    }
    assert_eq!(tried, 2 * collectives().len());
    // Any rank may send a weight to a rank that may see it, and a group of one rank sends nothing.
    let job = ranks(2).roles([Trainer, Checkpointer]);
    let received = job.run(|group| {
        let own = weight(&group)?.value()?;
        group.split_all(group.rank() as u64)?.all_reduce(ReduceOp::Sum, &mut own.clone())?;
        if group.rank() == 0 {
            group.exchange(Some((1, &own)), None)?;
            group.broadcast(0, &mut own.clone())?;
            return own.to_vec();
        }
        let x = group.exchange(None, Some((0, own.shape())))?;
        let mut y = Tensor::<f32>::zeros(group.device(), [2, 2])?;
        group.broadcast(0, &mut y)?;
        assert_eq!(y.to_vec()?, x.as_ref().unwrap().to_vec()?);
        x.unwrap().to_vec()
    });
    let received = received.unwrap();
    assert_eq!(received[0], received[1]);
}

/// Ranks that may see weights of each other gather one. Its copy is a weight too.
#[test]
fn what_is_gathered_is_a_weight() {
    let outcomes = ranks(WORLD).roles([Checkpointer, Checkpointer, Trainer]).run_each(|group| {
        let pair = group.split_all(u64::from(group.rank() == 2))?;
        let own = weight(&group)?.value()?;
        let (size, partition) = (pair.size(), Partition::even(2 * pair.size(), pair.size()));
        let mut results = vec![
            pair.all_gather(&own, 0, &partition)?,
            pair.start_all_gather(own.clone(), 0, &partition)?.wait()?,
            pair.start_all_reduce(ReduceOp::Sum, own.clone())?.wait()?,
            pair.reduce_scatter(ReduceOp::Sum, &own, 0, &Partition::even(2, size))?,
            pair.tree_all_reduce::<f32>(&Tree::new("sum", "terms", size, size)?, vec![own.clone()])?,
        ];
        let mut refused = 0;
        for result in &mut results {
            let outcome = group.broadcast(0, result);
            assert!(matches!(outcome, Err(Error::NotPermitted { .. })), "{outcome:?}");
            refused += 1;
        }
        Ok(refused)
    });
    assert_eq!(outcomes.unwrap(), [const { Ok(5) }; WORLD]);
}

/// A layer's outputs, products and lookups are no weights, so that trainers can compute.
#[test]
fn what_operators_compute_is_no_weight() {
    let outcomes = ranks(1).roles([Trainer]).run(|group| {
        let w = weight(&group)?;
        let x = Tensor::full(group.device(), [2, 2], 1.0)?;
        assert!(!ops::linear(&x, &w.value()?, None, None)?.0.is_weight());
        assert!(!w.rows(&[0])?.is_weight());
        assert!(!ops::add(ops::slice(&w.value()?, 0, 0..2)?, &x)?.is_weight());
        Ok(())
    });
    outcomes.unwrap();
}

/// If only one rank passes a weight, the others do not wait for it forever.
#[test]
fn ranks_that_pass_no_weight_get_an_error_too() {
    let job = ranks(2).roles([Checkpointer, Trainer]);
    let outcomes = job.run_each(|group| {
        let mut x = Tensor::full(group.device(), [2, 2], 1.0)?;
        if group.rank() == 0 {
            x = weight(&group)?.value()?;
        }
        group.all_reduce(ReduceOp::Sum, &mut x)
    });
    let outcomes = outcomes.unwrap();
    assert!(matches!(outcomes[0], Err(Error::NotPermitted { op: "all_reduce", .. })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Err(Error::PeerLost { rank: 0, .. })), "{outcomes:?}");
}

/// Rank 1, a trainer, runs a program that ignores its role. The other ranks refuse, so that rank 1
/// gets nothing of theirs.
#[test]
fn a_rank_that_ignores_its_role_gets_no_weight() {
    /// The group on rank `liar`, which counts the elements that it receives.
    fn lies(group: &Group<Dev>, liar: usize) -> (Group<Dev>, Rc<Cell<usize>>) {
        let (inner, received) = (group.communicator(), Rc::new(Cell::new(0)));
        if group.rank() != liar {
            return (group.clone(), received);
        }
        let claims =
            Claims { roles: Some(Roles::UNRESTRICTED), received: Rc::clone(&received), ..Claims::of(inner) };
        (Group::new(Rc::new(claims), group.device()), received)
    }
    let brief = || ranks(WORLD).roles([Checkpointer, Trainer, Trainer]).deadline(Duration::from_secs(5));
    let mut tried = 0;
    for (name, send) in collectives() {
        let outcomes = brief().run_each(|group| send(&lies(&group, 1).0, weight(&group)?.value()?));
        let outcomes = outcomes.unwrap();
        assert!(outcomes[1].is_err(), "{name}: {outcomes:?}");
        // In the ring of exchanges, rank 2 sends to rank 0, which may see it.
        let honest = if name == "exchange" { 0..1 } else { 0..3 };
        for rank in honest.filter(|rank| *rank != 1) {
            assert!(matches!(outcomes[rank], Err(Error::NotPermitted { .. })), "{name}: {outcomes:?}");
        }
        tried += 1;
    }
    assert_eq!(tried, collectives().len());
    // Rank 0, a trainer, takes itself for the writer of a save. Rank 2 does not send to it.
    let folder = tempfile::tempdir().unwrap();
    let job = ranks(WORLD).roles([Trainer, Checkpointer, Trainer]).deadline(Duration::from_secs(5));
    let outcomes = job.run_each(|group| {
        let (own, received) = lies(&group, 0);
        let (own, log) = own.recorded();
        let layer = layer(&group)?;
        let outcome = weights::save(&own, &layer.params(), folder.path().join("saved"));
        if group.rank() == 0 {
            assert_eq!(received.get(), 0, "rank 0 has received elements");
        }
        Ok((outcome, sent(&log)))
    });
    let outcomes: Vec<_> = outcomes.unwrap().into_iter().map(Result::unwrap).collect();
    assert!(outcomes.iter().all(|(outcome, _)| outcome.is_err()), "{outcomes:?}");
    // Rank 1, the writer, has nothing to send, and what rank 2 sends, it sends to rank 1.
    assert_eq!((outcomes[1].1, outcomes[2].1 % 10), (0, 0), "{outcomes:?}");
    assert!(!folder.path().join("saved/model.safetensors").exists());
}

/// Seven output features over the ranks of a group.
pub(crate) fn layer(group: &Group<Dev>) -> Result<ColumnLinear<f32, Dev>> {
    let source = Random::normal(5, 0.5);
    ColumnLinear::load(group, &Weights::new(&source).at("fc"), 4, &Columns::even(group, 7)?, Bias::Add)
}

/// The number of elements that this rank has sent in exchanges.
fn sent(log: &TransferLog) -> usize {
    log.take().iter().filter(|moved| moved.op == Op::Exchange).map(|moved| moved.elements).sum()
}

fn saved_by(roles: &[shardwise::security::Role], folder: &Path) -> Vec<Result<usize>> {
    let outcomes = ranks(roles.len()).roles(roles.to_vec()).run_each(|group| {
        let (own, log) = group.recorded();
        let layer = layer(&group)?;
        weights::save(&own, &layer.params(), folder)?;
        Ok(sent(&log))
    });
    outcomes.unwrap()
}

#[test]
fn a_save_sends_shards_only_to_a_rank_that_may_see_them() {
    let want = tempfile::tempdir().unwrap();
    saved_by(&[Checkpointer], want.path()).into_iter().for_each(|outcome| assert_eq!(outcome, Ok(0)));
    let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    let mut writers = 0;
    for roles in [
        vec![Trainer, Checkpointer],
        vec![Checkpointer, Trainer, Trainer],
        vec![Trainer, Trainer, Aggregator],
        vec![Trainer, Checkpointer, Checkpointer, Trainer, Trainer],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let moved: Vec<_> = saved_by(&roles, folder.path()).into_iter().map(Result::unwrap).collect();
        assert!(bytes(folder.path()) == bytes(want.path()), "{roles:?}");
        let writer = roles.iter().position(|role| role.sees_weights()).unwrap();
        // Of 7 x 4 weights and 7 biases, each rank but the writer sends its own once.
        let own = |rank: usize| 5 * Partition::even(7, roles.len()).size(rank);
        for (rank, moved) in moved.into_iter().enumerate() {
            assert_eq!(moved, if rank == writer { 0 } else { own(rank) }, "{roles:?} {rank}");
        }
        writers += 1;
    }
    assert_eq!(writers, 4);
    let folder = tempfile::tempdir().unwrap();
    for outcome in saved_by(&[Trainer; 3], folder.path()) {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::NotPermitted { op: "save", role: "trainer", .. }), "{error}");
        say(&error.to_string());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Replicas hold the same shards, so data parallelism needs no role. States of an optimizer are
/// saved as weights are.
#[test]
fn trainers_train_on_a_mesh_and_the_checkpointer_saves() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let roles = [Trainer, Checkpointer, Trainer, Trainer];
    let run = |roles: Option<[shardwise::security::Role; 4]>, folder: &Path| {
        let job = ranks(4);
        let job = roles.map_or(job.clone(), |roles| job.roles(roles));
        job.run(|world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
            let layer = layer(mesh.group(Axis::Tensor))?;
            let params = layer.params();
            let replicas = DataParallel::new(mesh.group(Axis::Data), &params)?;
            let mut optimizer = AdamW::new(AdamWConfig::default());
            replicas.begin(shardwise::train::GradReduce::Sum)?;
            for param in &params {
                param.add_grad(Tensor::full(world.device(), param.shape(), 0.5)?)?;
            }
            replicas.finish()?;
            optimizer.step(&params, 0.01, 1.0)?;
            // The first replica: ranks 0 and 1.
            if mesh.group(Axis::Data).rank() == 0 {
                weights::save(mesh.group(Axis::Tensor), &params, folder.join("model"))?;
                weights::save(mesh.group(Axis::Tensor), &optimizer.state()?, folder.join("state"))?;
            }
            Ok(())
        })
    };
    run(Some(roles), &folder.join("roles")).unwrap();
    run(None, &folder.join("none")).unwrap();
    for part in ["model", "state"] {
        let [one, other] =
            ["roles", "none"].map(|of| std::fs::read(folder.join(of).join(part).join("model.safetensors")));
        assert!(one.unwrap() == other.unwrap(), "{part}");
        assert!(Checkpoint::open(folder.join("roles").join(part)).unwrap().names().count() > 1);
    }
}
