//! Disagreement and lost ranks. Failures that end the whole job are separate scenarios: see
//! `driver.rs`.

use crate::disagree::DISAGREEMENTS;
use shardwise::{
    Error, LostReason, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Mpi,
    shard::Shape,
};
use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

/// Asserts that all ranks have the same text.
fn same_everywhere(world: &Group<Cpu>, words: &str) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    words.hash(&mut hasher);
    let own = (hasher.finish() >> 12) as f64;
    for op in [ReduceOp::Min, ReduceOp::Max] {
        let mut x = Tensor::<f64>::full(world.device(), [1], own)?;
        world.all_reduce(op, &mut x)?;
        assert_eq!(x.to_vec()?[0], own, "rank {} has another text: {words}", world.rank());
    }
    Ok(())
}

pub(crate) fn disagreement(world: &Group<Cpu>) -> Result<()> {
    let mut slowest = Duration::ZERO;
    for odd in (0..world.size()).filter(|_| world.size() > 1) {
        for (case, (usual, other, ..)) in DISAGREEMENTS.iter().enumerate() {
            let group = world.split_all(0)?;
            world.barrier()?;
            let begin = Instant::now();
            let error = if group.rank() == odd { other(&group) } else { usual(&group) }.unwrap_err();
            slowest = slowest.max(begin.elapsed());
            assert_eq!(group.barrier().unwrap_err(), error, "a failed group repeats its first error");
            let Error::Mismatch(mismatch) = &error else { panic!("case {case}, {odd} odd: {error}") };
            assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, odd.max(1)), "case {case}: {error}");
            assert!(
                mismatch.left.contains("disagree.rs:") && mismatch.right.contains("disagree.rs:"),
                "{error}"
            );
            same_everywhere(world, &error.to_string())?;
        }
    }
    if world.rank() == 0 {
        println!("    the slowest rank got the error after {slowest:.1?}");
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    Ok(())
}

pub(crate) fn unexpected_message(world: &Group<Cpu>) -> Result<()> {
    if world.size() == 1 {
        return Ok(());
    }
    let group = world.split_all(0)?;
    let x = Tensor::<f32>::full(group.device(), [6], 1.0)?;
    let result = match group.rank() {
        0 => group.exchange(Some((1, &x)), None).map(drop),
        1 => group.exchange::<f32>(None, Some((0, Shape::new(&[2, 3])))).map(drop),
        _ => Ok(()),
    };
    let error = result.and_then(|()| group.barrier()).unwrap_err();
    assert!(error.to_string().contains("sending f32 [6]"), "{error}");
    assert!(error.to_string().contains("expecting f32 [2, 3]"), "{error}");
    same_everywhere(world, &error.to_string())
}

pub(crate) fn lost_rank(world: &Group<Cpu>) -> Result<()> {
    for lost in (0..world.size()).filter(|_| world.size() > 1) {
        for len in [3, 50_000] {
            let group = world.split_all(0)?;
            let mut x = Tensor::<f32>::full(group.device(), [len], 1.0)?;
            let pending = group.start_all_reduce(ReduceOp::Sum, x.clone())?;
            if group.rank() == lost {
                // Dropping the group and the started collective still completes the collective.
                drop(group);
                drop(pending);
                world.barrier()?;
                continue;
            }
            assert_eq!(pending.wait()?.to_vec()?, vec![world.size() as f32; len]);
            let error = group.all_reduce(ReduceOp::Sum, &mut x).unwrap_err();
            let Error::PeerLost { rank, reason, .. } = error else { panic!("{error}") };
            assert_eq!((rank, reason), (lost, LostReason::Left));
            assert_eq!(x.to_vec()?, vec![1.0; len]);
            world.barrier()?;
        }
    }
    Ok(())
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Creates, breaks and drops groups `SHARDWISE_CYCLES` times, or 300 times by default.
pub(crate) fn cycles(world: &Group<Cpu>) -> Result<()> {
    let cycles = std::env::var("SHARDWISE_CYCLES").map_or(300, |number| number.parse().unwrap());
    let before = descriptors();
    for cycle in 0..cycles {
        let group = world.split_all(0)?;
        let len = if cycle % 3 == 0 && group.rank() + 1 == group.size() { 2 } else { 1 };
        let mut x = Tensor::<f64>::full(group.device(), [len], 1.0)?;
        let result = group.all_reduce(ReduceOp::Sum, &mut x);
        assert_eq!(result.is_err(), cycle % 3 == 0 && world.size() > 1, "{result:?}");
    }
    assert!(descriptors() <= before + 2, "{before} descriptors, then {}", descriptors());
    Ok(())
}

/// Sends this process a signal.
fn signal_self(signal: &str) {
    let _ = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
    // The signal may need this time to stop the process.
    std::thread::sleep(Duration::from_millis(200));
}

/// The deadline of the scenarios.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// Runs this rank's role in a scenario, if the environment names one. The scenario names the way in
/// which the last rank is lost.
pub(crate) fn scenario() -> Option<ExitCode> {
    let way = std::env::var("SHARDWISE_SCENARIO").ok()?;
    let role = |world: Group<Cpu>| {
        let mut x = Tensor::<f32>::full(world.device(), [100_000], 1.0)?;
        world.all_reduce(ReduceOp::Sum, &mut x)?;
        let last = world.size() - 1;
        let started = Tensor::<f32>::full(world.device(), [1], 1.0)?;
        if world.rank() == last {
            match way.as_str() {
                "none" => {}
                "return" => return Ok(()),
                "fail" => return Err(Error::invalid("scenario", "fails")),
                "panic" => panic!("scenario"),
                "exit" => std::process::exit(3),
                "kill" => signal_self("-KILL"),
                "stop" => signal_self("-STOP"),
                // The other ranks wait for this rank's data, which never arrive. They start the
                // collective after this rank's last call into MPI. Otherwise MPI could send the
                // data during that call, and the sum would be complete before the rank stops.
                "stop within" => {
                    let pending = world.start_all_reduce(ReduceOp::Sum, x)?;
                    (0..last).try_for_each(|peer| world.exchange(Some((peer, &started)), None).map(drop))?;
                    signal_self("-STOP");
                    return pending.wait().map(drop);
                }
                other => return Err(Error::invalid("scenario", format!("unknown scenario `{other}`"))),
            }
        } else if way == "stop within" {
            world.exchange::<f32>(None, Some((last, started.shape())))?;
        }
        world.start_all_reduce(ReduceOp::Sum, x)?.wait().map(drop)
    };
    // Prints the error before `run` returns: the first process that exits with a failure makes
    // `mpirun` end the others, and no process returns from `run` before all have left the group.
    // One write per error: `mpirun` mixes what the processes write.
    let done = Mpi::new().deadline(PATIENCE).run(|world| {
        role(world).inspect_err(|error| {
            let line = format!("error: {error}\n");
            eprint!("{line}");
        })
    });
    // A policy or an identity refuses the job before `role` runs.
    if let Err(
        error @ (Error::NotEncrypted { .. }
        | Error::Invalid { op: "policy", .. }
        | Error::Unsupported { op: "identity", .. }),
    ) = &done
    {
        eprintln!("error: {error}");
    }
    Some(if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
