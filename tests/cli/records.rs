//! Tests `shardwise blame` and `shardwise trace` on the records of processes.

use crate::launch::{ranks_of_this_program, run, text};
use shardwise::{Error, Result, Tensor, comm::ReduceOp, launch::Env};
use std::{
    process::{Command, Output},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The program of the ranks. Rank `VICTIM` is lost in the way that `WAY` names. It is no test by
/// itself.
#[test]
#[ignore = "the program of ranks"]
fn rank_that_may_be_lost() {
    let [victim, way, deadline] = ["VICTIM", "WAY", "DEADLINE"].map(|name| std::env::var(name).unwrap());
    let rank = || -> Result<()> {
        Env::read()?.run(Duration::from_secs(deadline.parse().unwrap()), |world| {
            let mut x = Tensor::<f64>::full(world.device(), [5], 1.0)?;
            world.all_reduce(ReduceOp::Sum, &mut x)?;
            if world.rank().to_string() == victim {
                match way.as_str() {
                    "return" => return Ok(()),
                    "fail" | "linger" => return Err(Error::invalid("test", "fails")),
                    "panic" => panic!("lost"),
                    "exit" => std::process::exit(3),
                    "leave" => std::process::exit(0),
                    "abort" => std::process::abort(),
                    "hang" => thread::sleep(Duration::from_secs(100)),
                    signal => {
                        let _ = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
                        std::thread::sleep(Duration::from_millis(300));
                    }
                }
            }
            if std::env::var("BUSY").is_ok_and(|busy| world.rank().to_string() == busy) {
                thread::sleep(Duration::from_secs(100));
            }
            world.barrier()
        })
    };
    if let Err(error) = rank() {
        eprintln!("error: {error}");
        if way == "linger" && Env::read().unwrap().rank.to_string() == victim {
            thread::sleep(Duration::from_millis(600));
            std::process::exit(4);
        }
        std::process::exit(1);
    }
}

fn shardwise(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_shardwise")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// Each way of losing a rank, the launcher's description of how the rank ended, and the job's exit
/// code.
const WAYS: [(&str, &str, i32); 10] = [
    // In the first four ways the lost rank exits with 0, or the launcher ends it. The job's exit
    // code is then that of a rank that waited for the lost rank.
    ("return", "exit code 0", 1),
    ("leave", "exit code 0", 1),
    ("-STOP", "killed by SIGKILL, sent by the launcher", 1),
    ("hang", "killed by SIGTERM, sent by the launcher", 1),
    ("fail", "exit code 1", 1),
    // The rank has reported its failure and takes longer to end than other ranks may. The launcher
    // gives it more time.
    ("linger", "exit code 4", 4),
    ("panic", "exit code 101", 101),
    ("exit", "exit code 3", 3),
    ("abort", "killed by SIGABRT", 134),
    ("-KILL", "killed by SIGKILL", 137),
];

/// Returns the command of a job in which rank `victim` is lost.
fn lose(victim: usize, ranks: usize, way: &str, deadline: usize, options: &[&str]) -> Command {
    let mut job = ranks_of_this_program(ranks, options, "records::rank_that_may_be_lost");
    job.env("VICTIM", victim.to_string()).env("WAY", way).env("DEADLINE", deadline.to_string());
    job
}

/// Checks that the launcher prints one verdict, which follows from the records, and returns the
/// expected exit code.
fn check_verdict(output: &Output, victim: usize, (way, end, code): (&str, &str, i32)) {
    let words = text(&output.stderr);
    let what = format!("rank {victim}, {way}: {words}");
    assert_eq!(output.status.code(), Some(code), "{what}");
    let said: Vec<_> = words.lines().filter_map(|line| line.strip_prefix("shardwise: ")).collect();
    assert_eq!(said[0], format!("rank {victim} failed first: {end}"), "{what}");
    assert_eq!(said.iter().filter(|line| line.contains("failed first")).count(), 1, "{what}");
    assert_eq!(said.iter().filter(|line| line.starts_with("by the ranks' records: ")).count(), 1, "{what}");
    let other = said.iter().any(|line| line.starts_with("the job ends like rank "));
    assert_eq!(other, ["return", "leave", "-STOP", "hang"].contains(&way), "{what}");
}

/// A lock for tests that measure times or use all cores.
static CORES: Mutex<()> = Mutex::new(());

#[test]
fn lost_processes_are_blamed() {
    let _cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
    for ranks in [2, 4] {
        for (way, end, code) in WAYS {
            for victim in [0, ranks - 1] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().to_str().unwrap();
                let begin = Instant::now();
                let output = run(lose(victim, ranks, way, 1, &["--flight", path]));
                let what = format!("rank {victim} of {ranks}, {way}: {}", text(&output.stderr));
                // If a rank stops or hangs, the others wait for the deadline of one second. A rank
                // that lingers also takes up to a second. Every job may take one more second.
                let limit = if ["-STOP", "hang", "linger"].contains(&way) { 2000 } else { 1000 };
                assert!(begin.elapsed() < Duration::from_millis(limit), "{:?}: {what}", begin.elapsed());
                check_verdict(&output, victim, (way, end, code));
                assert!(shardwise(&["blame", path]).starts_with(&format!("rank {victim}: ")), "{what}");
                let line = folder.path().join("line.json");
                shardwise(&["trace", path, "-o", line.to_str().unwrap()]);
                let line: serde_json::Value = serde_json::from_slice(&std::fs::read(line).unwrap()).unwrap();
                // The timeline has at least a name and one operation for each survivor, because a
                // survivor may get the error in its first call.
                let survivors = ranks - 1;
                assert!(line["traceEvents"].as_array().unwrap().len() >= 2 * survivors, "{what}");
            }
        }
    }
}

/// The killed rank and rank 1 have no record. Rank 1 sleeps until the launcher ends it.
#[test]
fn a_rank_that_the_launcher_has_ended_is_not_blamed() {
    let mut job = lose(2, 4, "-KILL", 60, &[]);
    job.env("BUSY", "1");
    check_verdict(&run(job), 2, ("-KILL", "killed by SIGKILL", 137));
}

/// Survivors may end before the culprit, because threads take all cores. Each kind of loss is tried
/// `SHARDWISE_LOSSES` times, or twice by default.
#[test]
fn the_culprit_is_named_in_any_order_of_ends_and_no_private_record_is_left() {
    let _cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
    let losses = std::env::var("SHARDWISE_LOSSES").map_or(2, |number| number.parse::<usize>().unwrap());
    let temporary = tempfile::tempdir().unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let tries = || {
            for (way, end, code) in WAYS.into_iter().filter(|(way, ..)| !["-STOP", "hang"].contains(way)) {
                for _ in 0..losses {
                    // The deadline is long, because printing a backtrace under this load may take
                    // over a second.
                    let mut job = lose(2, 4, way, 60, &[]);
                    job.env("RUST_BACKTRACE", "1").env("TMPDIR", temporary.path());
                    check_verdict(&run(job), 2, (way, end, code));
                }
            }
        };
        let done = std::panic::catch_unwind(tries);
        over.store(true, Ordering::Relaxed);
        done.unwrap();
    });
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0);
}

#[test]
fn what_is_no_record_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [["blame", folder.path().to_str().unwrap()], ["blame", "/no/such/file"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_shardwise")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).starts_with("shardwise: "), "{output:?}");
    }
}
