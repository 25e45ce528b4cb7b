//! Collectives: exact results, disagreement, lost ranks.
//!
//! Fresh tensors are NaN, so an element that is never written makes the result wrong.

use crate::{
    disagree::{Act, DISAGREEMENTS, broadcast, even, gather, reduce, scatter, started},
    exact::{
        Awaited, DTYPES, OPS, Step, all_exact, all_in_flight, inputs, mix, nan_wins, perform, same, start,
        sums_in_rank_order, uneven, with_element,
    },
};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use proptest::{collection::vec, prelude::*};
use shardwise::{
    Error, LostReason, Mismatch, Result, Tensor,
    comm::{Group, Op, ReduceOp, Transfer},
    device::{Cpu, DType},
    launch::Threads,
    shard::{Partition, Shape},
};
use std::{
    mem::forget,
    num::NonZeroUsize,
    panic::resume_unwind,
    sync::atomic::{AtomicUsize, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

/// Thread ranks whose fresh tensors are NaN. A run reaches the deadline only if a rank waits in
/// vain.
fn ranks(world: usize) -> Threads {
    Threads::new(world).device(Cpu::poisoned).deadline(Duration::from_secs(60))
}

#[test]
fn collectives_are_exact_for_every_world_element_and_size() {
    for world in 1..=8 {
        ranks(world).run(|group| all_exact(&group, true)).unwrap();
    }
}

#[test]
fn three_dimensional_tensors_are_sharded_along_any_dimension() {
    let dims = [3, 5, 4];
    for world in [2, 3, 5] {
        ranks(world)
            .run(|group| {
                for dim in 0..3 {
                    let partition = uneven(dim as u64, dims[dim], world);
                    let scatter = Step::ReduceScatter(ReduceOp::Sum, dim, partition.clone());
                    perform::<f32, _>(&group, &Step::AllGather(dim, partition), &inputs(1, world, &dims))?;
                    perform::<f32, _>(&group, &scatter, &inputs(2, world, &dims))?;
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn several_in_flight_are_waited_for_in_any_order() {
    for world in [1, 2, 3, 4] {
        ranks(world).run(|group| all_in_flight(&group)).unwrap();
    }
}

#[test]
fn sums_of_any_floats_are_made_in_rank_order_in_the_accumulator() {
    for world in [2, 3, 4, 7] {
        ranks(world)
            .run(|group| DTYPES.iter().try_for_each(|dtype| with_element!(dtype, sums_in_rank_order(&group))))
            .unwrap();
    }
}

#[test]
fn a_nan_is_never_dropped_on_any_rank() {
    for world in 1..=4 {
        ranks(world)
            .run(|group| DTYPES.iter().try_for_each(|dtype| with_element!(dtype, nan_wins(&group))))
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random programs of blocking and started collectives on random shapes and partitions.
    #[test]
    fn random_programs_agree_with_the_oracle(
        world in 1..=8_usize,
        program in vec((0..8_usize, 0..4_usize, 0..40_usize, 0..300_usize, any::<u64>(), any::<bool>()), 1..20),
    ) {
        let outcome = ranks(world).run(|group| {
            let mut flights: Vec<Awaited> = Vec::new();
            for &(kind, dtype, rows, cols, seed, started) in &program {
                let (dims, dim) = ([rows, cols], seed as usize / 8 % 2);
                let partition = uneven(seed, dims[dim], world);
                let (op, peer) = (OPS[seed as usize % 3], seed as usize % world);
                let step = match kind {
                    0 => Step::AllReduce(op),
                    1 => Step::AllGather(dim, partition),
                    2 => Step::ReduceScatter(op, dim, partition),
                    3 => Step::Broadcast(peer),
                    4 => Step::Shift(peer),
                    5 => Step::Pairs,
                    6 => Step::Barrier,
                    _ => Step::Split(seed),
                };
                let inputs = inputs(seed, world, &dims);
                if started {
                    flights.push(with_element!(DTYPES[dtype], start(&group, &step, &inputs))?);
                } else {
                    with_element!(DTYPES[dtype], perform(&group, &step, &inputs))?;
                }
                // Each rank waits for one of its started collectives, drops one, or does neither.
                let turn = mix(seed, group.rank(), 3) as usize;
                if turn.is_multiple_of(2) && !flights.is_empty() {
                    let flight = flights.swap_remove(turn / 16 % flights.len());
                    if !(turn / 2).is_multiple_of(8) { flight()? }
                }
            }
            flights.into_iter().try_for_each(|flight| flight())
        });
        prop_assert_eq!(outcome.map(|_| ()), Ok(()));
    }
}

#[test]
fn disagreement_is_an_error_on_every_rank_that_names_both_sides() {
    for (world, odd) in [(2, 0), (2, 1), (3, 1), (4, 0), (4, 3)] {
        for (case, (usual, other, usual_text, odd_text)) in DISAGREEMENTS.iter().enumerate() {
            let errors = ranks(world)
                .run(|group| {
                    let act = if group.rank() == odd { other } else { usual };
                    let error = act(&group).unwrap_err();
                    let later = group.barrier().unwrap_err();
                    assert_eq!(error, later, "a failed group repeats its first error");
                    assert_eq!(reduce::<f32>(&group, ReduceOp::Sum, &[9999]).unwrap_err(), error);
                    assert!(!error.is_consequence());
                    Ok(error)
                })
                .unwrap();
            let Error::Mismatch(mismatch) = &errors[0] else {
                panic!("case {case} of {world} ranks, {odd} odd: {}", errors[0])
            };
            assert!(errors.iter().all(|error| *error == errors[0]), "case {case}: {errors:?}");
            let (left, right) = if odd == 0 { (odd_text, usual_text) } else { (usual_text, odd_text) };
            let Mismatch { left_rank, left: left_words, right_rank, right: right_words } = &**mismatch;
            assert_eq!((*left_rank, *right_rank), (0, odd.max(1)), "case {case}");
            assert!(left_words.contains(left) && right_words.contains(right), "case {case}: {}", errors[0]);
            assert!(
                left_words.contains("disagree.rs:") && right_words.contains("disagree.rs:"),
                "{}",
                errors[0]
            );
        }
    }
}

#[test]
fn the_error_names_calls_and_lines() {
    let error = ranks(2).run(|group| broadcast(&group, group.rank(), 6)).unwrap_err();
    let Error::RankFailed { rank: 0, source } = error else { panic!("{error}") };
    let words = source.to_string();
    let words: Vec<_> = words.split(char::is_numeric).collect();
    assert_eq!(words.concat(), {
        let side = |_: u8| "broadcast(root , f [], call ) at tests/suite/disagree.rs:";
        format!("ranks disagree: rank  called {}; rank  called {}", side(0), side(1))
    });
}

#[test]
fn what_a_receiver_does_not_expect_is_a_disagreement() {
    let cases: [(Act, &str, &str); 2] = [
        (
            |group| group.exchange::<f64>(None, Some((0, Shape::new(&[2, 3])))).map(drop),
            "sending f32 [2, 3]",
            "expecting f64 [2, 3]",
        ),
        (
            |group| group.exchange::<f32>(None, Some((0, Shape::new(&[3, 2])))).map(drop),
            "sending f32 [2, 3]",
            "expecting f32 [3, 2]",
        ),
    ];
    for (receive, sending, expecting) in cases {
        let errors = ranks(3)
            .run(|group| {
                let result = match group.rank() {
                    0 => group
                        .exchange(Some((2, &Tensor::<f32>::zeros(group.device(), [2, 3])?)), None)
                        .map(drop),
                    1 => group.barrier(),
                    _ => receive(&group),
                };
                // The sender did not wait for the receiver, so its next call reports the error.
                Ok(result.and_then(|()| group.barrier()).unwrap_err())
            })
            .unwrap();
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        let Error::Mismatch(mismatch) = &errors[0] else { panic!("{}", errors[0]) };
        assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, 2));
        assert!(mismatch.left.contains(sending) && mismatch.right.contains(expecting), "{}", errors[0]);
    }
}

/// How a rank is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Failure {
    Panic,
    Return,
    Fail,
    /// Drops the group and continues without it.
    Drop,
    /// Leaks the group and returns.
    Leak,
    LeakAndPanic,
}

const FAILURES: [Failure; 6] =
    [Failure::Panic, Failure::Return, Failure::Fail, Failure::Drop, Failure::Leak, Failure::LeakAndPanic];

/// The calls in which the other ranks wait.
const WAITS: [Act; 11] = [
    |group| reduce::<f32>(group, ReduceOp::Sum, &[3]),
    |group| reduce::<f64>(group, ReduceOp::Max, &[5000]),
    |group| gather(group, 0, &even(group)),
    |group| scatter(group, ReduceOp::Sum, 1, &even(group)),
    |group| broadcast(group, 0, 9),
    |group| broadcast(group, group.size() - 1, 9000),
    |group| group.barrier(),
    |group| group.split(Some(1), 0).map(drop),
    |group| started(group, ReduceOp::Sum, 5),
    |group| perform::<f32, _>(group, &Step::Shift(1), &inputs(0, group.size(), &[4])),
    // A started collective, then a barrier before its wait.
    |group| {
        let x = Tensor::<f32>::zeros(group.device(), [70_000])?;
        let pending = group.start_all_reduce(ReduceOp::Sum, x)?;
        group.barrier()?;
        pending.wait().map(drop)
    },
];

/// Loses rank `lost` after `before` collectives and `delay`, while the others repeat `wait` until
/// `wait` fails.
fn lose(world: usize, lost: usize, failure: Failure, before: usize, delay: Duration, wait: Act) {
    let (heard, gone) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begin = Instant::now();
    let outcomes = ranks(world)
        .run_each(|group| {
            for at in 0..before {
                perform::<f32, _>(
                    &group,
                    &Step::AllReduce(ReduceOp::Sum),
                    &inputs(1, world, &[[3, 5000][at % 2]]),
                )?;
            }
            if group.rank() == lost {
                sleep(delay);
                gone.store(1, Ordering::SeqCst);
                match failure {
                    Failure::Panic => resume_unwind(Box::new("lost")),
                    Failure::Return => {}
                    Failure::Fail => return Err(Error::invalid("test", "fails")),
                    Failure::Drop => {
                        drop(group);
                        while heard.load(Ordering::SeqCst) < world - 1 && begin.elapsed().as_secs() < 20 {
                            sleep(Duration::from_micros(100));
                        }
                    }
                    Failure::Leak => forget(group),
                    Failure::LeakAndPanic => {
                        forget(group);
                        resume_unwind(Box::new("lost"));
                    }
                }
                return Ok(None);
            }
            // An exchange needs only two ranks, so some ranks complete their first exchange.
            let error = wait(&group).and_then(|()| group.barrier()).unwrap_err();
            assert_eq!(gone.load(Ordering::SeqCst), 1, "the error came before a rank was lost: {error}");
            heard.fetch_add(1, Ordering::SeqCst);
            Ok(Some((error, group.barrier().unwrap_err())))
        })
        .unwrap();
    let what = format!("rank {lost} of {world}: {failure:?} after {before}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{what}: {:?}", begin.elapsed());
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        if rank == lost {
            match failure {
                Failure::Panic | Failure::LeakAndPanic => {
                    assert_eq!(outcome, Err(Error::RankPanicked { rank, message: "lost".into() }));
                }
                Failure::Fail => assert_eq!(outcome, Err(Error::invalid("test", "fails"))),
                _ => assert_eq!(outcome, Ok(None)),
            }
            continue;
        }
        let Ok(Some((first, later))) = outcome else { panic!("{what}: rank {rank}: {outcome:?}") };
        for error in [&first, &later] {
            let Error::PeerLost { rank: named, op, reason, .. } = error else { panic!("{what}: {error}") };
            // In the ring, the error may name a neighbour that has left because of the lost rank.
            assert!(*named == lost || *op == "exchange" && *reason == LostReason::Left, "{what}: {error}");
            let right = match failure {
                Failure::Panic | Failure::LeakAndPanic => *reason == LostReason::Panicked,
                Failure::Fail => *reason == LostReason::Failed,
                _ => *reason == LostReason::Left,
            };
            assert!(right, "{what}: {error}");
        }
    }
}

/// A failing rank drops its groups, including split ones, before the launcher gets the error. The
/// other ranks must be informed that it failed, not that it left.
#[test]
fn who_is_lost_by_an_error_has_not_left() {
    for world in [2, 4] {
        for round in 0..300 {
            let outcomes = ranks(world)
                .run_each(|group| {
                    let part = group.split_all(0)?;
                    let call = |group: &Group<Cpu>| match round % 3 {
                        0 => group.barrier(),
                        1 => reduce::<f32>(group, ReduceOp::Sum, &[5000]),
                        _ => started(group, ReduceOp::Sum, 5),
                    };
                    if group.rank() == round % world {
                        return Err(Error::invalid("test", "fails"));
                    }
                    let used = if round % 2 == 0 { &part } else { &group };
                    Ok(call(used).unwrap_err())
                })
                .unwrap();
            for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != round % world)
            {
                let is_named = matches!(&outcome, Ok(Error::PeerLost { rank, reason: LostReason::Failed, .. })
                    if *rank == round % world);
                assert!(is_named, "rank {rank} of {world}, round {round}: {outcome:?}");
            }
        }
    }
}

#[test]
fn a_lost_rank_is_an_error_on_every_other() {
    for world in [2, 3, 4, 8] {
        for lost in 0..world {
            for (at, failure) in FAILURES.into_iter().enumerate() {
                for (case, wait) in WAITS.into_iter().enumerate() {
                    // Larger groups run fewer of the combinations.
                    if (lost + at + case) % (world / 2) == 0 {
                        lose(world, lost, failure, (at + case) % 3, Duration::ZERO, wait);
                    }
                }
            }
        }
    }
}

#[test]
fn a_rank_is_lost_while_the_others_wait() {
    for (world, lost) in [(2, 0), (3, 2), (4, 1), (8, 5)] {
        for failure in FAILURES {
            for (case, wait) in WAITS.into_iter().enumerate() {
                if case % 2 == world % 4 / 2 || world == 2 {
                    // The delay is longer than a waiting rank spins, so the waiting ranks sleep.
                    lose(world, lost, failure, 1, Duration::from_millis(4), wait);
                }
            }
        }
    }
}

#[test]
fn the_launcher_reports_what_went_wrong_first() {
    let run = |act: Act| {
        ranks(4).run(|group| {
            if group.rank() == 2 {
                return act(&group);
            }
            group.barrier()?;
            group.barrier()
        })
    };
    let panicked = Error::RankPanicked { rank: 2, message: "lost".into() };
    assert_eq!(run(|_| resume_unwind(Box::new("lost"))).unwrap_err(), panicked);
    let panicked = Error::RankPanicked { rank: 2, message: "number 7".into() };
    assert_eq!(run(|group| panic!("number {}", group.size() + 3)).unwrap_err(), panicked);
    let source = Box::new(Error::invalid("test", "fails"));
    let failed = Error::RankFailed { rank: 2, source };
    assert_eq!(run(|_| Err(Error::invalid("test", "fails"))).unwrap_err(), failed);
    let Error::RankFailed { rank: 0, source } = run(|group| group.barrier()).unwrap_err() else { panic!() };
    assert!(matches!(*source, Error::PeerLost { rank: 2, reason: LostReason::Left, seq: 1, .. }), "{source}");
    assert!(matches!(Threads::new(0).run(|_| Ok(())), Err(Error::Invalid { op: "launch", .. })));
}

#[test]
fn more_ranks_than_there_can_be_are_refused_before_anything_is_made() {
    for number in [65_537, usize::MAX] {
        let error = Threads::new(number).run(|_| Ok(())).unwrap_err().to_string();
        assert_eq!(error, format!("launch: {number} ranks: at most 65536 can be threads of one process"));
    }
}

#[test]
fn devices_get_the_threads_of_the_options_or_keep_their_own() {
    let [three, five] = [3, 5].map(|threads| NonZeroUsize::new(threads).unwrap());
    let own: fn() -> Cpu = || Cpu::new().with_threads(NonZeroUsize::new(3).unwrap());
    let threads = |options: Threads| options.run(|group| Ok(group.device().threads())).unwrap();
    assert_eq!(threads(Threads::new(2)), [1; 2]);
    assert_eq!(threads(Threads::new(2).gemm_threads(three)), [3; 2]);
    assert_eq!(threads(Threads::new(2).device(own)), [3; 2]);
    assert_eq!(threads(Threads::new(2).gemm_threads(five).device(own)), [5; 2]);
}

#[test]
fn a_lost_rank_breaks_the_groups_it_was_split_into_too() {
    let outcomes = ranks(4)
        .run_each(|group| {
            let pair = group.split_all(group.rank() as u64 / 2)?;
            let column = group.split_all(group.rank() as u64 % 2)?;
            if group.rank() == 3 {
                resume_unwind(Box::new("lost"));
            }
            Ok(match group.rank() {
                2 => pair.barrier(),
                1 => column.barrier(),
                _ => group.barrier(),
            })
        })
        .unwrap();
    for (rank, name) in [(0, "world"), (1, "world/1"), (2, "world/1")] {
        let Ok(Err(Error::PeerLost { rank: lost, reason, group, .. })) = &outcomes[rank] else {
            panic!("{:?}", outcomes[rank])
        };
        // The error numbers the lost rank in the group of the call.
        assert_eq!(
            (*lost, *reason, group.as_str()),
            (if rank == 0 { 3 } else { 1 }, LostReason::Panicked, name)
        );
    }
}

#[test]
fn a_rank_that_has_done_its_part_may_leave() {
    for world in 2..=5 {
        for late in 0..world {
            let wait = |group: &Group<Cpu>| {
                if group.rank() == late {
                    sleep(Duration::from_millis(3));
                }
            };
            // The last step is a ring. Before the late rank arrives, all others have left except
            // the rank that waits for the late rank's message.
            let ring = |group: Group<Cpu>| {
                wait(&group);
                perform::<f32, _>(&group, &Step::Shift(1), &inputs(5, world, &[100]))
            };
            ranks(world).run(ring).unwrap();
            // The others post their inputs to an all-reduce, and leave without waiting for the
            // result.
            let flight = |group: Group<Cpu>| {
                wait(&group);
                let awaited =
                    start::<f32, _>(&group, &Step::AllReduce(ReduceOp::Sum), &inputs(6, world, &[100]))?;
                if group.rank() == late { awaited() } else { Ok(()) }
            };
            ranks(world).run(flight).unwrap();
            // One rank sends a message and leaves. The message still arrives.
            let message = |group: Group<Cpu>| {
                let (to, from) = (late, (late + 1) % world);
                wait(&group);
                let x = Tensor::<f32>::full(group.device(), [3], 7.0)?;
                let send = (group.rank() == from).then_some((to, &x));
                let recv = (group.rank() == to).then_some((from, Shape::new(&[3])));
                let arrived = group.exchange(send, recv)?;
                assert_eq!(arrived.is_some(), group.rank() == to);
                arrived.map_or(Ok(()), |x| same(&Step::Shift(1), &x, &ArrayD::from_elem(IxDyn(&[3]), 7.0)))
            };
            ranks(world).run(message).unwrap();
        }
    }
}

#[test]
fn a_flight_that_nobody_waits_for_does_no_harm() {
    ranks(3)
        .run(|group| {
            for seed in 0..20 {
                let inputs = inputs(seed, 3, &[300]);
                for op in OPS {
                    let awaited = start::<f16, _>(&group, &Step::AllReduce(op), &inputs)?;
                    if group.rank() != seed as usize % 4 {
                        awaited()?;
                    }
                    perform::<f32, _>(&group, &Step::AllReduce(op), &inputs)?;
                }
            }
            Ok(())
        })
        .unwrap();
}

/// Rank `root` polls, and gets a request after three times the deadline. Until then the other ranks
/// wait without an error, and they get no request. A failed poll ends the wait of all ranks.
#[test]
fn a_rank_waits_for_another_beyond_the_deadline() {
    let deadline = Duration::from_millis(300);
    for (world, root) in [(1, 0), (3, 0), (4, 3)] {
        let found = ranks(world).deadline(deadline).run(|group| {
            let begun = Instant::now();
            let poll = || {
                sleep(deadline / 10);
                Ok((begun.elapsed() > 3 * deadline).then_some("request"))
            };
            let found = group.wait_for(root, poll)?;
            assert!(begun.elapsed() > 3 * deadline);
            Ok(found)
        });
        let want = |rank| (rank == root).then_some("request");
        assert_eq!(found.unwrap(), (0..world).map(want).collect::<Vec<_>>());
    }
    let failed = ranks(3).deadline(deadline).run(|group| {
        group.wait_for(1, || Err::<Option<()>, _>(Error::Invalid { op: "poll", reason: "closed".into() }))
    });
    assert_eq!(failed.unwrap_err().to_string(), "rank 1: poll: closed");
    let beyond = ranks(2).run(|group| group.wait_for(2, || Ok(Some(()))));
    assert_eq!(beyond.unwrap_err().to_string(), "rank 0: wait for: rank 2 of a group of 2");
}

/// A broadcast and an all-gather of bytes deliver them unchanged, whatever their values and number.
#[test]
fn bytes_come_as_they_are() {
    let bytes = |rank: usize| -> Vec<u8> { (0..=255).cycle().skip(rank).take(300 * rank).collect() };
    for world in [1, 2, 3, 5] {
        let run = ranks(world).run(|group| {
            for root in 0..world {
                assert_eq!(group.broadcast_bytes(root, &bytes(group.rank()))?, bytes(root));
            }
            assert_eq!(
                group.all_gather_bytes(&bytes(group.rank()))?,
                (0..world).map(bytes).collect::<Vec<_>>()
            );
            Ok(())
        });
        run.unwrap();
    }
}

/// Returns the errors of ranks that make different calls under a deadline of one second. One second
/// is long enough for ranks that are not late, even on a busy machine.
fn late(world: usize, act: impl Fn(&Group<Cpu>) -> Result<()> + Sync) -> Vec<Error> {
    let after = Duration::from_secs(1);
    let begin = Instant::now();
    let errors = ranks(world).deadline(after).run(|group| Ok(act(&group).unwrap_err())).unwrap();
    assert!(begin.elapsed() >= after && begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    for error in &errors {
        assert!(matches!(error, Error::Deadline { after: said, .. } if *said == after), "{error}");
    }
    errors
}

#[test]
fn a_deadline_names_the_ranks_that_did_not_come() {
    let waits: [Act; 4] = [
        |group| group.barrier(),
        |group| reduce::<f32>(group, ReduceOp::Sum, &[50_000]),
        |group| started(group, ReduceOp::Sum, 4),
        |group| group.exchange::<f32>(None, Some((1, Shape::new(&[1])))).map(drop),
    ];
    let named: [&[usize]; 4] = [&[1, 3], &[1, 3], &[1, 3], &[1]];
    for (wait, named) in waits.into_iter().zip(named) {
        let given_up = AtomicUsize::new(0);
        let errors = late(4, |group| {
            if group.rank() % 2 == 1 {
                while given_up.load(Ordering::SeqCst) < 2 {
                    sleep(Duration::from_millis(1));
                }
                return wait(group);
            }
            let outcome = wait(group);
            given_up.fetch_add(1, Ordering::SeqCst);
            outcome
        });
        for error in errors {
            let Error::Deadline { missing, op, group, .. } = error else { panic!("{error}") };
            assert_eq!((missing.as_slice(), group.as_str()), (named, "world"), "{op}");
        }
    }
}

/// Ranks that wait in different calls, each for another rank.
#[test]
fn who_waits_in_a_circle_disagrees() {
    let cases: [(Act, Act, &str, &str); 4] = [
        // A started collective with an immediate wait, and a blocking call.
        (
            |group| started(group, ReduceOp::Sum, 6),
            |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
            "start_all_reduce(",
            "all_reduce(",
        ),
        (
            |group| started(group, ReduceOp::Sum, 9000),
            |group| group.split(Some(1), 0).map(drop),
            "start_all_reduce(",
            "split(",
        ),
        // A message and a collective.
        (
            |group| {
                let peer = (group.rank() + 1) % group.size();
                group.exchange::<f32>(None, Some((peer, Shape::new(&[1])))).map(drop)
            },
            |group| group.barrier(),
            "exchange(",
            "barrier(",
        ),
        (
            |group| {
                let peer = (group.rank() + 1) % group.size();
                group.exchange::<f32>(None, Some((peer, Shape::new(&[1])))).map(drop)
            },
            |group| reduce::<f64>(group, ReduceOp::Sum, &[9000]),
            "exchange(",
            "all_reduce(",
        ),
    ];
    for (world, odd) in [(2, 0), (2, 1), (3, 1), (4, 3)] {
        for (case, (act, usual, odd_text, usual_text)) in cases.into_iter().enumerate() {
            for late in [0, 5] {
                let begin = Instant::now();
                let errors = ranks(world).run(|group| {
                    let is_odd = group.rank() == odd;
                    // Either the odd rank or the others wait first.
                    sleep(Duration::from_millis(if is_odd { late } else { 5 - late }));
                    Ok(if is_odd { act(&group) } else { usual(&group) }.unwrap_err())
                });
                let errors = errors.unwrap();
                assert!(begin.elapsed() < Duration::from_secs(5), "case {case}: {:?}", begin.elapsed());
                let Error::Mismatch(mismatch) = &errors[0] else { panic!("case {case}: {}", errors[0]) };
                assert!(errors.iter().all(|error| *error == errors[0]), "case {case}: {errors:?}");
                let sides = [(mismatch.left_rank, &mismatch.left), (mismatch.right_rank, &mismatch.right)];
                for (rank, words) in sides {
                    let word = if rank == odd { odd_text } else { usual_text };
                    assert!(words.starts_with(word), "case {case}, {odd} of {world}: {}", errors[0]);
                }
                assert!(mismatch.left_rank == odd || mismatch.right_rank == odd);
            }
        }
    }
}

/// The waits form a cycle only for a moment, because the awaited message has already arrived.
#[test]
fn a_message_that_came_before_the_meeting_is_received() {
    for round in 0..30 {
        ranks(3)
            .run(|group| {
                let (rank, device) = (group.rank(), group.device());
                let x = Tensor::<f32>::full(device, [2], 7.0)?;
                if rank == 1 {
                    group.exchange(Some((0, &x)), None)?;
                    let pending = group.start_all_reduce(ReduceOp::Sum, x)?;
                    group.barrier()?;
                    return pending.wait().map(drop);
                }
                let pending = group.start_all_reduce(ReduceOp::Sum, x.clone())?;
                // The sleep is shorter or longer than the time after which a rank announces that it
                // waits.
                sleep(Duration::from_micros(round * 100));
                if rank == 0 {
                    assert!(group.exchange::<f32>(None, Some((1, x.shape())))?.is_some());
                }
                assert_eq!(pending.wait()?.to_vec()?, [21.0; 2]);
                group.barrier()
            })
            .unwrap();
    }
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    ranks(2)
        .run(|group| {
            let x = Tensor::<f32>::zeros(group.device(), [4, 2])?;
            let partition = |sizes: &[usize]| Partition::from_sizes(sizes.iter().copied());
            let op = ReduceOp::Sum;
            assert!(matches!(group.broadcast(2, &mut x.clone()), Err(Error::Invalid { .. })));
            assert!(matches!(group.exchange(Some((5, &x)), None), Err(Error::Invalid { .. })));
            assert!(matches!(group.all_gather(&x, 2, &partition(&[4, 4])), Err(Error::Invalid { .. })));
            assert!(matches!(group.all_gather(&x, 0, &partition(&[4, 4, 4])), Err(Error::Sizes { .. })));
            assert!(matches!(group.all_gather(&x, 0, &partition(&[5, 5])), Err(Error::Shapes { .. })));
            assert!(matches!(group.reduce_scatter(op, &x, 0, &partition(&[1, 2])), Err(Error::Sizes { .. })));
            // The rejected calls got no sequence number, so the ranks still agree and the group
            // works.
            group.barrier()
        })
        .unwrap();
}

#[test]
fn a_record_lists_the_transfers_of_a_program() {
    for world in [1, 2, 3] {
        ranks(world)
            .run(|world| {
                let (group, record) = world.recorded();
                let (size, rank) = (group.size(), group.rank());
                let device = group.device();
                let partition = Partition::even(10, size);
                let mut x = Tensor::<f32>::zeros(device, [4, 10])?;
                let part = Tensor::<bf16>::zeros(device, [4, partition.size(rank)])?;
                group.all_reduce(ReduceOp::Sum, &mut x)?;
                group.all_gather(&part, 1, &partition)?;
                group.barrier()?;
                group.reduce_scatter(ReduceOp::Max, &x, 1, &partition)?;
                group.broadcast(0, &mut x)?;
                let transfer = |op, dtype| Transfer { op, dtype, elements: 40 };
                let first = [
                    transfer(Op::AllReduce, DType::F32),
                    transfer(Op::AllGather, DType::BF16),
                    transfer(Op::ReduceScatter, DType::F32),
                    transfer(Op::Broadcast, DType::F32),
                ];
                assert_eq!(record.take(), first);
                assert_eq!(record.take(), []);

                let reduce = group.start_all_reduce(ReduceOp::Sum, x.clone())?;
                let gather = group.start_all_gather(part, 1, &partition)?;
                let scatter = group.start_reduce_scatter(ReduceOp::Sum, x.clone(), 1, &partition)?;
                scatter.wait()?;
                gather.wait()?;
                reduce.wait()?;
                // The record includes the collectives of groups that were split from `group`. It
                // does not include those of `world`.
                let mut y = Tensor::<f64>::zeros(device, [7])?;
                group.split_all(rank as u64)?.all_reduce(ReduceOp::Min, &mut y)?;
                world.all_reduce(ReduceOp::Min, &mut y)?;
                group.exchange(Some(((rank + 1) % size, &x)), Some(((rank + size - 1) % size, x.shape())))?;
                let second = [
                    transfer(Op::AllReduce, DType::F32),
                    transfer(Op::AllGather, DType::BF16),
                    transfer(Op::ReduceScatter, DType::F32),
                    Transfer { op: Op::AllReduce, dtype: DType::F64, elements: 7 },
                    transfer(Op::Exchange, DType::F32),
                ];
                assert_eq!(record.take(), second);
                Ok(())
            })
            .unwrap();
    }
    // The bytes follow the factors of nccl-tests.
    let wire = |op| Transfer { op, dtype: DType::F32, elements: 1000 }.wire_bytes(4);
    assert_eq!(
        [Op::AllReduce, Op::AllGather, Op::ReduceScatter, Op::Broadcast].map(wire),
        [6000, 3000, 3000, 4000]
    );
}
