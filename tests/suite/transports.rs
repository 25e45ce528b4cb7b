//! Host-staged tensors and processes give the results of thread ranks.

use crate::{
    disagree::DISAGREEMENTS,
    exact::{DTYPES, all_exact, all_in_flight, nan_wins, sums_in_rank_order, with_element},
    launch::{processes, processes_within},
};
use shardwise::{
    Error, LostReason, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    kernels::Pointwise,
    launch::Threads,
    shard::Shape,
};
use std::time::Duration;

/// Runs the checks that every communicator must pass.
fn everything<B: Pointwise>(group: &Group<B>) -> Result<()> {
    all_exact(group, false)?;
    all_in_flight(group)?;
    for dtype in DTYPES {
        with_element!(dtype, sums_in_rank_order(group))?;
        if group.size() <= 3 {
            with_element!(dtype, nan_wins(group))?;
        }
    }
    group.barrier()
}

fn staged(world: usize) -> Threads {
    Threads::new(world).device(Cpu::poisoned).deadline(Duration::from_secs(60))
}

#[test]
fn staged_collectives_are_those_of_the_ranks_they_are_staged_by() {
    for world in 1..=8 {
        staged(world).run(|group| everything(&group.staged(&Cpu::poisoned()))).unwrap();
    }
}

#[test]
fn a_lone_rank_has_the_collectives_of_threads_and_so_has_a_record() {
    everything(&Group::solo(&Cpu::poisoned())).unwrap();
    for world in 1..=4 {
        staged(world).run(|group| everything(&group.recorded().0)).unwrap();
    }
}

#[test]
fn processes_have_the_collectives_of_threads() {
    for world in 1..=8 {
        for outcome in processes(world, |group| everything(&group)) {
            outcome.unwrap();
        }
    }
}

/// Returns the error when rank 1 disagrees, on a group of any kind.
fn disagrees<B: Pointwise>(group: &Group<B>) -> Result<Error> {
    let len = if group.rank() == 1 { 4 } else { 3 };
    let mut x = Tensor::<f32, B>::full(group.device(), [len], 7.0)?;
    let error = group.all_reduce(ReduceOp::Sum, &mut x).unwrap_err();
    assert_eq!(x.to_vec()?, vec![7.0; len], "the buffer has changed");
    assert_eq!(group.barrier().unwrap_err(), error, "a failed group repeats its first error");
    Ok(error)
}

#[test]
fn a_disagreement_is_the_same_error_on_every_rank_of_every_communicator() {
    let check = |errors: Vec<Error>| {
        let Error::Mismatch(mismatch) = &errors[0] else { panic!("{}", errors[0]) };
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, 1));
        assert!(mismatch.left.contains("all_reduce(sum, f32 [3], call 0) at tests"), "{}", errors[0]);
        assert!(mismatch.right.contains("all_reduce(sum, f32 [4], call 0) at tests"), "{}", errors[0]);
    };
    for world in 2..=4 {
        check(staged(world).run(|group| disagrees(&group.staged(&Cpu::new()))).unwrap());
        check(processes(world, |group| disagrees(&group)).into_iter().collect::<Result<_>>().unwrap());
    }
}

/// Returns the errors of every disagreement, with each rank in turn as the odd one. Each
/// disagreement has its own group.
fn all_disagreements(world: &Group<Cpu>, of: impl Fn(Group<Cpu>) -> Group<Cpu>) -> Result<Vec<Error>> {
    let mut found = Vec::new();
    for odd in 0..world.size() {
        for (case, (usual, other, ..)) in DISAGREEMENTS.iter().enumerate() {
            let group = of(world.split_all(0)?);
            let error = if group.rank() == odd { other(&group) } else { usual(&group) }.unwrap_err();
            assert_eq!(group.barrier().unwrap_err(), error, "a failed group repeats its first error");
            let Error::Mismatch(mismatch) = &error else { panic!("case {case}, {odd} odd: {error}") };
            assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, odd.max(1)), "case {case}: {error}");
            found.push(error);
        }
    }
    Ok(found)
}

#[test]
fn every_disagreement_is_found_on_every_communicator() {
    let check = |found: Vec<Vec<Error>>| {
        assert!(!found[0].is_empty() && found.iter().all(|errors| *errors == found[0]));
    };
    for world in 2..=4 {
        check(staged(world).run(|group| all_disagreements(&group, |part| part.staged(&Cpu::new()))).unwrap());
        let outcomes = processes(world, |group| all_disagreements(&group, |part| part));
        check(outcomes.into_iter().collect::<Result<_>>().unwrap());
    }
}

/// Rank 0 sends a vector, but the receiver expects a matrix.
fn surprises<B: Pointwise>(group: &Group<B>) -> Result<Error> {
    let x = Tensor::<f32, B>::full(group.device(), [6], 1.0)?;
    let result = match group.rank() {
        0 => group.exchange(Some((1, &x)), None).map(drop),
        _ => group.exchange::<f32>(None, Some((0, Shape::new(&[2, 3])))).map(drop),
    };
    Ok(result.and_then(|()| group.barrier()).unwrap_err())
}

#[test]
fn an_unexpected_message_is_a_disagreement_on_every_communicator() {
    let check = |errors: Vec<Error>| {
        assert!(matches!(errors[0], Error::Mismatch(_)), "{}", errors[0]);
        assert_eq!(errors[0], errors[1]);
    };
    check(staged(2).run(|group| surprises(&group.staged(&Cpu::new()))).unwrap());
    check(processes(2, |group| surprises(&group)).into_iter().collect::<Result<_>>().unwrap());
}

#[test]
fn a_lost_process_is_an_error_on_every_other() {
    for world in 2..=4 {
        for lost in 0..world {
            let outcomes = processes(world, |group| {
                let pairs = group.split_all(group.rank() as u64 / 2)?;
                group.barrier()?;
                if group.rank() == lost {
                    return Err(Error::invalid("test", "fails"));
                }
                let error = group.barrier().unwrap_err();
                if pairs.size() == 2 && lost / 2 == group.rank() / 2 {
                    let pair = pairs.barrier().unwrap_err();
                    assert!(matches!(pair, Error::PeerLost { rank, .. } if rank == lost % 2), "{pair}");
                }
                Ok(error)
            });
            for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != lost) {
                let error = outcome.unwrap();
                let Error::PeerLost { rank: named, reason, op: "barrier", .. } = &error else {
                    panic!("rank {rank}: {error}")
                };
                // The error names the lost rank, although a rank that gets the error leaves, too.
                assert!(
                    *named == lost && *reason == LostReason::Failed,
                    "rank {rank} of {world}, {lost} lost: {error}"
                );
            }
        }
    }
}

/// Rank 2 fails. Rank 1 waits for rank 2, receives the error and fails as well. Rank 3 waits only
/// for rank 1, but its error must name rank 2.
#[test]
fn the_first_lost_process_is_the_one_that_is_named() {
    let outcomes = processes(4, |group| {
        let shape = Shape::new(&[1]);
        match group.rank() {
            0 => group.exchange::<f32>(None, Some((3, shape)))?,
            1 => group.exchange::<f32>(None, Some((2, shape)))?,
            2 => return Err(Error::invalid("test", "fails")),
            _ => {
                // Ranks 1 and 2 have failed by now.
                std::thread::sleep(Duration::from_millis(100));
                group.exchange::<f32>(None, Some((1, shape)))?
            }
        };
        Ok(())
    });
    for rank in [0, 1, 3] {
        let error = outcomes[rank].as_ref().unwrap_err();
        assert!(
            matches!(error, Error::PeerLost { rank: 2, reason: LostReason::Failed, .. }),
            "rank {rank}: {error}"
        );
    }
}

/// All messages pass through rank 0, also those of groups without rank 0.
#[test]
fn the_loss_of_the_first_process_is_reported_in_groups_without_it() {
    let outcomes = processes(4, |group| {
        // Ranks 0 and 3 each are alone in a group. Ranks 1 and 2 are in one group.
        let part = group.split_all([0, 1, 1, 2][group.rank()])?;
        group.barrier()?;
        if group.rank() == 0 {
            return Err(Error::invalid("test", "fails"));
        }
        if part.size() == 1 {
            // A group of one rank waits for no other rank, so its calls succeed at any time.
            std::thread::sleep(Duration::from_millis(100));
            part.barrier()?;
            let mut x = Tensor::<f64>::full(part.device(), [2], 3.0)?;
            part.all_reduce(ReduceOp::Sum, &mut x)?;
            assert_eq!(x.to_vec()?, [3.0; 2]);
            return Ok(None);
        }
        loop {
            if let Err(error) = part.barrier() {
                return Ok(Some(error));
            }
        }
    });
    assert_eq!(outcomes[3], Ok(None));
    for outcome in &outcomes[1..3] {
        let Ok(Some(Error::PeerLost { rank: 0, reason: LostReason::Failed, group, .. })) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(group, "world");
    }
}

/// Whichever rank gives up first, every error names the rank that did not come, not the rank that
/// gave up.
#[test]
fn a_process_that_does_not_come_is_named_to_all() {
    let outcomes = processes_within(Duration::from_secs(1), 3, |group| {
        group.barrier()?;
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(4));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100 * group.rank() as u64));
        group.barrier()
    });
    for rank in [0, 2] {
        let error = outcomes[rank].as_ref().unwrap_err();
        assert!(matches!(error, Error::Deadline { missing, .. } if *missing == [1]), "rank {rank}: {error}");
    }
}

#[test]
fn a_process_that_has_done_its_part_may_leave() {
    for world in 2..=4 {
        for late in 0..world {
            let outcomes = processes(world, |group| {
                if group.rank() == late {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let mut x = Tensor::<f64>::full(group.device(), [2], 1.0)?;
                group.all_reduce(ReduceOp::Sum, &mut x)?;
                // The last step is a ring.
                let (to, from) = ((group.rank() + 1) % world, (group.rank() + world - 1) % world);
                let y = group.exchange(Some((to, &x)), Some((from, x.shape())))?.unwrap();
                y.to_vec()
            });
            for outcome in outcomes {
                assert_eq!(outcome, Ok(vec![world as f64; 2]));
            }
        }
    }
}

/// A rank that arrives after the others have given up receives the same error.
#[test]
fn a_process_that_comes_too_late_gets_the_error() {
    for (world, late) in [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)] {
        let outcomes = processes_within(Duration::from_millis(500), world, |group| {
            group.barrier()?;
            if group.rank() == late {
                std::thread::sleep(Duration::from_millis(1500));
            }
            let mut x = Tensor::<f64>::full(group.device(), [2], 1.0)?;
            Ok(group.all_reduce(ReduceOp::Sum, &mut x).unwrap_err())
        });
        for outcome in outcomes {
            let error = outcome.unwrap();
            assert!(matches!(&error, Error::Deadline { missing, .. } if *missing == [late]), "{error}");
        }
    }
}

/// The ranks get the error before the deadline, because rank 0 finds the wait cycle earlier.
#[test]
fn processes_that_wait_in_a_circle_disagree() {
    for receiver in 0..3 {
        for sender in (0..3).filter(|sender| *sender != receiver) {
            let outcomes = processes(3, |group| {
                let x = Tensor::<f32>::full(group.device(), [1], 1.0)?;
                // This message arrives, so its exchange forms no cycle.
                if group.rank() == sender {
                    group.exchange(Some((receiver, &x)), None)?;
                } else if group.rank() == receiver {
                    group.exchange::<f32>(None, Some((sender, x.shape())))?;
                }
                group.barrier()?;
                let begin = std::time::Instant::now();
                let error = if group.rank() == receiver {
                    group.exchange::<f32>(None, Some((sender, x.shape()))).map(drop)
                } else {
                    group.barrier()
                };
                Ok((error.unwrap_err(), begin.elapsed()))
            });
            for outcome in outcomes {
                let (error, after) = outcome.unwrap();
                assert!(after < Duration::from_secs(10), "{after:?}");
                let Error::Mismatch(mismatch) = error else { panic!("{error}") };
                let [left, right] =
                    [(mismatch.left_rank, &mismatch.left), (mismatch.right_rank, &mismatch.right)];
                assert!([left.0, right.0].contains(&receiver), "{mismatch:?}");
                for (rank, call) in [left, right] {
                    let op = if rank == receiver { "exchange(" } else { "barrier(" };
                    assert!(call.starts_with(op) && call.contains("transports.rs:"), "{mismatch:?}");
                }
            }
        }
    }
}

/// Each rank waits for the next rank of a chain. The last rank of the chain is missing. All give up
/// at the same time.
#[test]
fn the_end_of_a_chain_of_waiting_processes_is_named_to_all() {
    let outcomes = processes_within(Duration::from_secs(1), 4, |group| {
        group.barrier()?;
        let x = Tensor::<f32>::full(group.device(), [1], 1.0)?;
        match group.rank() {
            1 => {
                std::thread::sleep(Duration::from_secs(3));
                group.exchange(Some((2, &x)), None)?;
            }
            0 => drop(group.exchange::<f32>(None, Some((3, x.shape())))?),
            rank => drop(group.exchange::<f32>(None, Some((rank - 1, x.shape())))?),
        }
        Ok(())
    });
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::Deadline { missing, .. } if *missing == [1]), "rank {rank}: {error}");
    }
}
