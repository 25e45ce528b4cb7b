//! Groups over NCCL: every collective, disagreements, and lost ranks.

use crate::{
    dev::{self, Dev, Tensor},
    disagree::DISAGREEMENTS,
    exact::{DTYPES, all_exact, all_in_flight, nan_wins, sums_in_rank_order, with_element},
};
use shardwise::{
    Error, LostReason, Result,
    comm::{
        Group, ReduceOp,
        nccl::{Options, Order},
    },
    device::{Cpu, Device, Element},
    launch::{Env, Threads},
    parallel::{Bias, ColumnLinear, Columns, Layer},
    shard::{Partition, Shape},
    tensor::{Random, Weights},
    trace::{Record, blame},
    weights::{self, Checkpoint},
};
use std::{
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(60);

fn ranks(world: usize) -> Threads {
    Threads::new(world).deadline(DEADLINE)
}

fn options(order: Order) -> Options {
    Options { order, deadline: DEADLINE, ..Options::default() }
}

/// NCCL's blocking and non-blocking mode.
const WAYS: [bool; 2] = [true, false];

#[test]
fn collectives_are_exact_in_every_world() {
    for world in dev::worlds(1..=8) {
        for (order, blocking) in
            [Order::Any, Order::Ranks].into_iter().flat_map(|order| WAYS.map(|way| (order, way)))
        {
            ranks(world)
                .run(|group| {
                    let options = Options { blocking, ..options(order) };
                    let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
                    all_exact(&nccl, false)?;
                    all_in_flight(&nccl)
                })
                .unwrap();
        }
    }
}

#[test]
fn sums_have_the_bits_of_thread_ranks_if_asked_for() {
    for world in dev::worlds([2, 3, 5]) {
        ranks(world)
            .run(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Ranks))?;
                DTYPES.iter().try_for_each(|dtype| with_element!(dtype, sums_in_rank_order(&nccl)))
            })
            .unwrap();
    }
}

#[test]
fn a_nan_is_never_dropped() {
    for world in dev::worlds(1..=3) {
        ranks(world)
            .run(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                DTYPES.iter().try_for_each(|dtype| with_element!(dtype, nan_wins(&nccl)))
            })
            .unwrap();
    }
}

type Act = fn(&Group<Dev>) -> Result<()>;

fn reduce<T: Element>(group: &Group<Dev>, op: ReduceOp, len: usize) -> Result<()> {
    let mut x = Tensor::<T>::full(group.device(), [len], 3.0)?;
    let result = group.all_reduce(op, &mut x);
    // The ranks find a disagreement before any data moves.
    if matches!(result, Err(Error::Mismatch(_))) {
        assert!(x.to_vec()?.iter().all(|value| value.to_f64() == 3.0), "the buffer has changed");
    }
    result
}

const ACTS: [Act; 8] = [
    |group| reduce::<f32>(group, ReduceOp::Sum, 6),
    |group| reduce::<f32>(group, ReduceOp::Max, 6),
    |group| reduce::<f64>(group, ReduceOp::Sum, 6),
    |group| reduce::<f32>(group, ReduceOp::Sum, 7),
    |group| group.barrier(),
    |group| group.broadcast(0, &mut Tensor::<f32>::zeros(group.device(), [6])?),
    |group| group.broadcast(1, &mut Tensor::<f32>::zeros(group.device(), [6])?),
    |group| {
        let partition = Partition::even(6, group.size());
        group
            .reduce_scatter(ReduceOp::Sum, &Tensor::<f32>::zeros(group.device(), [6])?, 0, &partition)
            .map(drop)
    },
];

#[test]
fn disagreement_is_the_same_error_on_every_rank() {
    let pairs = (0..ACTS.len()).flat_map(|a| (0..ACTS.len()).map(move |b| (a, b)));
    let pairs = pairs.filter(|(usual, other)| usual != other);
    for (world, (usual, other)) in
        dev::worlds([3]).flat_map(|world| pairs.clone().map(move |pair| (world, pair)))
    {
        let errors = ranks(world)
            .run(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                // All ranks make both calls first, so that their kinds are known.
                ACTS[usual](&nccl)?;
                ACTS[other](&nccl)?;
                let act = if group.rank() == 2 { ACTS[other] } else { ACTS[usual] };
                let error = act(&nccl).unwrap_err();
                assert_eq!(nccl.barrier().unwrap_err(), error, "a failed group repeats its first error");
                Ok(error)
            })
            .unwrap();
        assert!(matches!(errors[0], Error::Mismatch(_)), "{usual} and {other}: {}", errors[0]);
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    }
}

/// Ranks over NCCL detect the same disagreements as thread ranks. They detect a disagreement of
/// started calls at the start.
#[test]
fn every_disagreement_is_found() {
    for world in dev::worlds([2, 3]) {
        let odd = if world == 2 { 1 } else { 0 };
        let found = ranks(world)
            .run(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                let disagree =
                    |(usual, other, ..): &(crate::disagree::Act, crate::disagree::Act, &str, &str)| {
                        let part = nccl.split_all(0)?;
                        let act = if part.rank() == odd { other } else { usual };
                        let error = act(&part).unwrap_err();
                        assert_eq!(
                            part.barrier().unwrap_err(),
                            error,
                            "a failed group repeats its first error"
                        );
                        Ok(error)
                    };
                DISAGREEMENTS.iter().map(disagree).collect::<Result<Vec<_>>>()
            })
            .unwrap();
        assert!(found.iter().all(|errors| *errors == found[0]));
        for (case, error) in found[0].iter().enumerate() {
            let Error::Mismatch(mismatch) = error else { panic!("case {case}: {error}") };
            assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, odd.max(1)), "case {case}: {error}");
        }
    }
}

#[test]
fn an_unexpected_message_is_a_disagreement() {
    for world in dev::worlds([2]) {
        let errors = ranks(world)
            .run(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                let x = Tensor::<f32>::zeros(nccl.device(), [6])?;
                if group.rank() == 0 {
                    // No rank receives the message. The sender gets the error here or at its next
                    // call.
                    let sent = nccl.exchange(Some((1, &x)), None);
                    return Ok(sent.and_then(|_| nccl.barrier()).unwrap_err());
                }
                Ok(nccl.exchange::<f32>(None, Some((0, Shape::new(&[2, 3])))).unwrap_err())
            })
            .unwrap();
        assert!(matches!(errors[0], Error::Mismatch(_)), "{}", errors[0]);
        assert_eq!(errors[0], errors[1]);
    }
}

#[test]
fn a_lost_rank_is_an_error_on_every_other() {
    for world in dev::worlds(2..=4) {
        for lost in 0..world {
            for (way, act) in (0..3).flat_map(|way| ACTS.iter().take(5).map(move |act| (way, act))) {
                let outcomes = ranks(world)
                    .run_each(|group| {
                        let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                        act(&nccl)?;
                        if group.rank() == lost {
                            thread::sleep(Duration::from_millis(lost as u64));
                            match way {
                                0 => resume_unwind(Box::new("lost")),
                                1 => return Err(Error::Invalid { op: "test", reason: "fails".into() }),
                                _ => return Ok(None),
                            }
                        }
                        Ok(Some(act(&nccl).unwrap_err()))
                    })
                    .unwrap();
                for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != lost) {
                    // The rank may be lost while others are still in the first call, which then
                    // fails.
                    let error = outcome.unwrap_or_else(Some);
                    let Some(Error::PeerLost { rank: named, reason, .. }) = error else {
                        panic!("rank {rank} of {world}: {error:?}")
                    };
                    assert!(named == lost, "rank {rank} of {world} names {named}, not {lost} ({reason:?})");
                    assert!(way != 0 || reason == LostReason::Panicked);
                }
            }
        }
    }
}

/// The records of ranks over NCCL suffice to find the culprit.
#[test]
fn the_rank_that_broke_the_job_is_blamed() {
    let fates: [(Act, &str); 4] = [
        (|_| resume_unwind(Box::new("lost")), "it panicked, after all_reduce (max, f32 [3]"),
        (|_| Err(Error::Invalid { op: "test", reason: "fails".into() }), "it returned an error"),
        (|_| Ok(()), "it returned while others needed it, after all_reduce"),
        (|group| group.barrier(), "called something else than the others"),
    ];
    for world in dev::worlds([3]) {
        for (odd, (fate, words)) in (0..world).flat_map(|odd| fates.iter().map(move |fate| (odd, fate))) {
            let folder = tempfile::tempdir().unwrap();
            let outcomes = ranks(world).flight(folder.path()).run_each(|group| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                reduce::<f32>(&nccl, ReduceOp::Max, 3)?;
                if group.rank() == odd { fate(&nccl) } else { reduce::<f32>(&nccl, ReduceOp::Max, 8) }
            });
            assert!(outcomes.unwrap().iter().any(Result::is_err));
            let blame = blame(&Record::read_all([folder.path()]).unwrap());
            assert_eq!(blame.ranks, [odd], "{words}: {blame}");
            assert!(blame.reason.contains(words), "{words}: {blame}");
        }
    }
}

/// Runs ranks that communicate over sockets, as processes do. Such ranks compare a call at once
/// only if it is of a new kind.
fn processes<R: Send>(world: usize, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Vec<Result<R>> {
    processes_with(world, |_| (), rank)
}

/// Like [`processes`], with changed environments.
fn processes_with<R: Send>(
    world: usize,
    change: impl Fn(&mut Env) + Sync,
    rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    // NCCL sees one process, so the ranks' GPUs need access to each other's memory. Groups of
    // thread ranks open this access.
    let open = |group: Group<Cpu>| group.over_nccl(&dev::of_rank(&group)?, options(Order::Any)).map(drop);
    ranks(world).run(open).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    drop(listener);
    thread::scope(|scope| {
        let (rank, port, change) = (&rank, &port, &change);
        let start = |number: usize| {
            let variables = move |name: &str| match name {
                "RANK" | "LOCAL_RANK" => Some(number.to_string()),
                "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some(world.to_string()),
                "SHARDWISE_PORT" => Some(port.clone()),
                _ => None,
            };
            scope.spawn(move || {
                let mut env = Env::of(variables)?;
                change(&mut env);
                env.run(DEADLINE, rank)
            })
        };
        let started: Vec<_> = (0..world).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn processes_have_the_same_collectives() {
    for world in dev::worlds([1, 2, 3, 5]) {
        let outcomes = processes(world, |group| {
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
            all_in_flight(&nccl)?;
            all_in_flight(&nccl)
        });
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    }
}

/// The roles of the control group hold for NCCL too.
#[test]
fn weights_go_only_to_ranks_that_may_see_them() {
    use shardwise::security::Role::{Checkpointer, Trainer};
    for world in dev::worlds([2, 3]) {
        let folder = tempfile::tempdir().unwrap();
        let job = ranks(world).roles((0..world).map(|rank| if rank == 1 { Checkpointer } else { Trainer }));
        let run = job.run(|group| {
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
            let (source, columns) = (Random::normal(1, 0.5), Columns::even(&nccl, 5)?);
            let layer =
                ColumnLinear::<f32, Dev>::load(&nccl, &Weights::new(&source), 4, &columns, Bias::Add)?;
            let w = layer.params()[0].value()?;
            let outcomes = [
                nccl.all_gather(&w, 0, columns.partition()).map(drop),
                nccl.all_reduce(ReduceOp::Sum, &mut w.clone()),
                nccl.start_all_reduce(ReduceOp::Sum, w.clone()).and_then(|pending| pending.wait()).map(drop),
                nccl.split_all(0)?.broadcast(1, &mut w.clone()),
                group.staged(nccl.device()).all_reduce(ReduceOp::Sum, &mut w.clone()),
            ];
            for outcome in outcomes {
                let role = "trainer";
                assert!(
                    matches!(&outcome, Err(Error::NotPermitted { role: of, .. }) if *of == role),
                    "{outcome:?}"
                );
            }
            weights::save(&nccl, &layer.params(), folder.path())
        });
        run.unwrap();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 2);
    }
}

/// NCCL encrypts nothing, so a policy refuses it between machines, while what is staged over the
/// encrypted connections passes.
#[cfg(feature = "cli")]
#[test]
fn a_policy_refuses_nccl_between_machines() {
    use shardwise::security::{Channel, Identity, Member, Membership, Policy, PrivateKey, Reach, Role};
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (owner, keys) = (PrivateKey::generate().unwrap(), [(); 2].map(|()| PrivateKey::generate().unwrap()));
    let members = keys.iter().enumerate().map(|(rank, key)| {
        key.write(path(&format!("{rank}.pem"))).unwrap();
        Member::rank(rank, [Role::Trainer, Role::Checkpointer][rank], key.public().clone())
    });
    Membership::new("job", 0..=0, None, members).unwrap().write(path("membership.json"), &owner).unwrap();
    std::fs::write(path("owner.pub"), owner.public().to_pem()).unwrap();
    let over = |policy, local_world| {
        let change = |env: &mut Env| {
            let key = path(&format!("{}.pem", env.rank));
            let (membership, owner) = (path("membership.json"), path("owner.pub"));
            env.identity = Some(Identity::Key { key, membership, owner });
            (env.job, env.policy, env.local_world) = ("job".into(), policy, local_world);
        };
        processes_with(2, change, |group| {
            let device = dev::of_rank(&group)?;
            let staged = group.staged(&device);
            assert!(staged.communicator().channel().encrypted);
            reduce::<f32>(&staged, ReduceOp::Sum, 6)?;
            let nccl = group.over_nccl(&device, options(Order::Any))?;
            reduce::<f32>(&nccl, ReduceOp::Sum, 6)?;
            // Rank 0 relays what is staged, and is no checkpointer. NCCL has no relay.
            let columns = Columns::even(&nccl, 5)?;
            let source = Random::normal(1, 0.5);
            let layer =
                ColumnLinear::<f32, Dev>::load(&nccl, &Weights::new(&source), 4, &columns, Bias::Add)?;
            weights::save(&nccl, &layer.params(), path("saved"))?;
            assert!(Checkpoint::open(path("saved")).is_ok());
            let relayed = weights::save(&staged, &layer.params(), path("relayed"));
            assert!(matches!(relayed, Err(Error::NotPermitted { op: "save", .. })), "{relayed:?}");
            Ok(nccl.split_all(0)?.communicator().channel())
        })
    };
    for _ in dev::worlds([2]) {
        for outcome in over(Policy::RequireEncrypted, 1) {
            assert!(matches!(outcome, Err(Error::NotEncrypted { transport: "NCCL", .. })), "{outcome:?}");
        }
        let plain = |reach| vec![Ok(Channel::plaintext(reach)); 2];
        assert_eq!(over(Policy::RequireEncrypted, 2), plain(Reach::Machine));
        let trusted = Policy::TrustedNetwork("127.0.0.0/8".parse().unwrap());
        assert_eq!(over(trusted, 1), plain(Reach::Network));
    }
}

/// One rank makes known calls in an order that differs from the other ranks'. NCCL cannot detect
/// this, because the calls have the same number of elements.
#[test]
fn another_order_of_known_calls_is_found_by_its_hash() {
    for world in dev::worlds([3]) {
        let outcomes = processes(world, |group| {
            let options = Options { check_every: 16, ..options(Order::Any) };
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
            let call = |dims: [usize; 2]| {
                nccl.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::zeros(nccl.device(), dims)?)
            };
            let (a, b) = if nccl.rank() == 2 { ([3, 2], [2, 3]) } else { ([2, 3], [3, 2]) };
            for round in 0..40 {
                // Before the twentieth round all ranks use the same order.
                let (first, second) = if round < 20 { ([2, 3], [3, 2]) } else { (a, b) };
                call(first)?;
                call(second)?;
                assert!(round < 40 - 8, "the other order was not found");
            }
            Ok(())
        });
        for outcome in &outcomes {
            let Err(Error::Mismatch(mismatch)) = outcome else { panic!("{outcome:?}") };
            assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, 2));
            assert!(mismatch.left.contains("after calls "), "{}", mismatch.left);
            assert_eq!(outcome, &outcomes[0]);
        }
    }
}

/// The other ranks are in NCCL with a known call, which they did not compare. The control group
/// informs them which rank has not reached the call.
#[test]
fn a_process_that_does_not_come_to_a_known_call_is_named_to_all() {
    for (world, missing) in dev::worlds([3]).flat_map(|world| (0..world).map(move |rank| (world, rank))) {
        let outcomes = processes(world, |group| {
            let options = Options { deadline: Duration::from_secs(1), ..options(Order::Any) };
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
            reduce::<f32>(&nccl, ReduceOp::Sum, 6)?;
            if nccl.rank() == missing {
                thread::sleep(Duration::from_secs(4));
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50 * nccl.rank() as u64));
            reduce::<f32>(&nccl, ReduceOp::Sum, 6)?;
            nccl.device().synchronize()
        });
        for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != missing) {
            let Err(Error::Deadline { missing: named, .. }) = outcome else {
                panic!("rank {rank}: {outcome:?}")
            };
            assert_eq!(named, [missing], "rank {rank}");
        }
    }
}

/// Makes a call of a known kind and waits for its result. Returns an error if a rank is lost.
fn known(group: &Group<Dev>, op: ReduceOp) -> Result<()> {
    reduce::<f32>(group, op, 6)?;
    group.device().synchronize()
}

/// A rank is lost while the others are in NCCL with a known call, which they did not compare.
#[test]
fn a_process_that_is_lost_inside_of_a_collective_ends_it_for_the_others() {
    for world in dev::worlds([2, 3, 4, 8]) {
        // A kernel of this library computes the maximum from all ranks' terms after the NCCL call.
        for (op, fails) in [ReduceOp::Sum, ReduceOp::Max].into_iter().flat_map(|op| [(op, true), (op, false)])
        {
            for (lost, blocking) in [(0, true), (world - 1, true), (world - 1, false)] {
                let outcomes = processes(world, |group| {
                    let options = Options { blocking, ..options(Order::Any) };
                    let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
                    known(&nccl, op)?;
                    if group.rank() == lost {
                        thread::sleep(Duration::from_millis(20));
                        return if fails {
                            Err(Error::Invalid { op: "test", reason: "fails".into() })
                        } else {
                            Ok(())
                        };
                    }
                    // The lost rank does not join this call, so the call has no result.
                    known(&nccl, op)
                });
                for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != lost) {
                    let Err(Error::PeerLost { rank: named, reason, .. }) = outcome else {
                        panic!("rank {rank} of {world}: {outcome:?}")
                    };
                    let expected = if fails { LostReason::Failed } else { LostReason::Left };
                    assert_eq!((named, reason), (lost, expected), "rank {rank} of {world}");
                }
            }
        }
    }
}

/// Rank 0 sends a message to rank 2, which has returned. Rank 1 gets no error.
#[test]
fn a_message_that_nobody_fetches_any_more_is_an_error_of_its_sender_only() {
    for world in dev::worlds([3]) {
        for over_sockets in [false, true] {
            let rank = |group: Group<Cpu>| {
                let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
                nccl.barrier()?;
                let x = Tensor::<f32>::zeros(nccl.device(), [6])?;
                match nccl.rank() {
                    0 => {
                        nccl.exchange(Some((1, &x)), None)?;
                        nccl.exchange(Some((2, &x)), None)?;
                        nccl.device().synchronize()
                    }
                    1 => nccl.exchange::<f32>(None, Some((0, x.shape()))).map(drop),
                    _ => Ok(()),
                }
            };
            let outcomes =
                if over_sockets { processes(world, rank) } else { ranks(world).run_each(rank).unwrap() };
            let Err(Error::PeerLost { rank: 2, reason: LostReason::Left, .. }) = outcomes[0] else {
                panic!("{:?}", outcomes[0])
            };
            assert_eq!(outcomes[1..], [Ok(()), Ok(())]);
        }
    }
}

/// The collectives of all communicators of a rank run in the order of its calls, also on another
/// handle of its GPU.
#[test]
fn collectives_run_in_the_order_of_a_rank_s_calls() {
    for (world, blocking) in dev::worlds([2, 4]).flat_map(|world| WAYS.map(|way| (world, way))) {
        ranks(world)
            .run(|group| {
                let options = Options { blocking, ..options(Order::Any) };
                let device = dev::of_rank(&group)?;
                let whole = group.over_nccl(&device, options.clone())?;
                let part = whole.split_all(group.rank() as u64 % 2)?;
                let other = group.over_nccl(&dev::another_handle(&device), options)?;
                let mut sums = Vec::new();
                for round in 0..10 {
                    for group in [&whole, &part, &other, &part] {
                        let mut x = Tensor::<f32>::full(group.device(), [5], f64::from(round))?;
                        group.all_reduce(ReduceOp::Sum, &mut x)?;
                        sums.push((x, (round as usize * group.size()) as f32));
                    }
                }
                for (x, sum) in sums {
                    assert_eq!(x.to_vec()?, [sum; 5]);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// The sender is in a blocking call of NCCL, which waits for a connection to a rank that does not
/// come. The sender cannot leave this call by itself.
#[test]
fn a_rank_inside_of_a_blocking_call_learns_whom_it_waits_for() {
    for (world, fails) in dev::worlds([2]).flat_map(|world| [false, true].map(|fails| (world, fails))) {
        let outcomes = processes(world, |group| {
            let deadline = Duration::from_secs(if fails { 30 } else { 1 });
            let options = Options { deadline, blocking: true, ..options(Order::Any) };
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
            if nccl.rank() == 0 {
                let x = Tensor::<f32>::zeros(nccl.device(), [6])?;
                nccl.exchange(Some((1, &x)), None)?;
                return nccl.device().synchronize();
            }
            thread::sleep(Duration::from_millis(if fails { 300 } else { 4000 }));
            if fails { Err(Error::Invalid { op: "test", reason: "fails".into() }) } else { Ok(()) }
        });
        match &outcomes[0] {
            Err(Error::PeerLost { rank: 1, reason: LostReason::Failed, .. }) if fails => {}
            Err(Error::Deadline { missing, .. }) if !fails => assert_eq!(missing, &[1]),
            outcome => panic!("{outcome:?}"),
        }
    }
}

/// Rank 0 cannot check for errors, as if it were inside the driver. Its collective waits for a
/// missing rank.
#[test]
fn the_deadline_of_a_rank_that_cannot_look_around_holds() {
    for (world, blocking) in dev::worlds([2]).flat_map(|world| WAYS.map(|way| (world, way))) {
        let outcomes = processes(world, |group| {
            let options = Options { deadline: Duration::from_secs(1), blocking, ..options(Order::Any) };
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
            reduce::<f32>(&nccl, ReduceOp::Sum, 6)?;
            if nccl.rank() == 0 {
                let mut x = Tensor::<f32>::zeros(nccl.device(), [6])?;
                nccl.all_reduce(ReduceOp::Sum, &mut x)?;
                thread::sleep(Duration::from_secs(5));
                let outcome = nccl.device().synchronize();
                // Later reads return the same error, because the collective has no result.
                assert_eq!(x.to_vec().map(drop), outcome);
                return outcome;
            }
            thread::sleep(Duration::from_secs(4));
            nccl.barrier()
        });
        for outcome in &outcomes {
            let Err(Error::Deadline { missing, .. }) = outcome else { panic!("{blocking}: {outcomes:?}") };
            assert_eq!(missing, &[1]);
        }
    }
}

/// As in the test above, rank 0 cannot check for errors. But all ranks have reached the oldest of
/// rank 0's collectives.
#[test]
fn a_collective_behind_others_has_its_deadline_too() {
    for (world, blocking) in dev::worlds([2]).flat_map(|world| WAYS.map(|way| (world, way))) {
        let outcomes = processes(world, |group| {
            let options = Options { deadline: Duration::from_secs(1), blocking, ..options(Order::Any) };
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options)?;
            // In the second round the calls' kind is known, so the ranks do not compare these
            // calls.
            let here = nccl.rank();
            for calls in [3, if here == 0 { 3 } else { 2 }] {
                for _ in 0..calls {
                    nccl.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::zeros(nccl.device(), [6])?)?;
                }
                if here == 0 {
                    thread::sleep(Duration::from_millis(100));
                }
            }
            if here == 0 {
                thread::sleep(Duration::from_secs(7));
                return nccl.device().synchronize();
            }
            thread::sleep(Duration::from_secs(5));
            known(&nccl, ReduceOp::Sum)
        });
        for outcome in &outcomes {
            let Err(Error::Deadline { missing, .. }) = outcome else { panic!("{blocking}: {outcomes:?}") };
            assert_eq!(missing, &[1]);
        }
    }
}

/// NCCL destroys a communicator only when all ranks of a node destroy it. A rank that drops its
/// group must not wait for the other ranks to do so.
#[test]
fn a_rank_that_leaves_a_group_does_not_wait_for_those_that_stay() {
    for (world, over_sockets) in dev::worlds([2]).flat_map(|world| [(world, false), (world, true)]) {
        let rank = |group: Group<Cpu>| {
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
            known(&nccl, ReduceOp::Sum)?;
            if nccl.rank() == 1 {
                thread::sleep(Duration::from_secs(3));
                return Ok(());
            }
            let begin = Instant::now();
            drop(nccl);
            assert!(begin.elapsed() < Duration::from_secs(1), "it waited for {:?}", begin.elapsed());
            Ok(())
        };
        let outcomes =
            if over_sockets { processes(world, rank) } else { ranks(world).run_each(rank).unwrap() };
        assert_eq!(outcomes, [Ok(()), Ok(())]);
    }
}

/// All ranks have reached the collective. Rank 0 cannot see whether the device has finished it, so
/// the collective fails together with rank 1.
#[test]
fn a_rank_that_cannot_look_around_is_freed_when_another_fails() {
    for world in dev::worlds([2]) {
        let outcomes = processes(world, |group| {
            let nccl = group.over_nccl(&dev::of_rank(&group)?, options(Order::Any))?;
            let mut x = Tensor::<f32>::full(nccl.device(), [6], 3.0)?;
            nccl.all_reduce(ReduceOp::Sum, &mut x)?;
            if nccl.rank() == 1 {
                thread::sleep(Duration::from_secs(3));
                return Err(Error::Invalid { op: "test", reason: "fails".into() });
            }
            thread::sleep(Duration::from_secs(5));
            let outcome = nccl.device().synchronize();
            assert_eq!(x.to_vec().map(drop), outcome);
            outcome
        });
        let Err(Error::PeerLost { rank: 1, reason: LostReason::Failed, .. }) = outcomes[0] else {
            panic!("{outcomes:?}")
        };
    }
}

/// The missing result cannot be read after the group was dropped, nor through another handle of the
/// GPU.
#[test]
fn what_an_aborted_collective_did_not_do_is_never_read() {
    for (world, drops) in dev::worlds([2]).flat_map(|world| [(world, true), (world, false)]) {
        let outcomes = processes(world, |group| {
            let device = dev::of_rank(&group)?;
            let nccl = group.over_nccl(&device, options(Order::Any))?;
            known(&nccl, ReduceOp::Sum)?;
            if nccl.rank() == 1 {
                thread::sleep(Duration::from_secs(3));
                return Err(Error::Invalid { op: "test", reason: "fails".into() });
            }
            let of = if drops { device } else { dev::another_handle(&device) };
            let mut x = Tensor::<f32>::full(&of, [6], 3.0)?;
            nccl.all_reduce(ReduceOp::Sum, &mut x)?;
            if drops {
                drop(nccl);
            }
            x.to_vec().map(drop)
        });
        let Err(Error::PeerLost { rank: 1, reason: LostReason::Failed, .. }) = outcomes[0] else {
            panic!("{drops}: {outcomes:?}")
        };
    }
}
