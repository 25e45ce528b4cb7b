//! `shardwise blame` and `shardwise trace`, on records of processes.

use crate::launch::{ranks_of_this_program, run, text};
use shardwise::{Error, Result, Tensor, comm::ReduceOp, launch::Env};
use std::{
    process::Command,
    time::{Duration, Instant},
};

/// Not a test by itself: the program of ranks of which one, `VICTIM`, is lost in the way `WAY`.
#[test]
#[ignore = "the program of ranks"]
fn rank_that_may_be_lost() {
    let (victim, way) = (std::env::var("VICTIM").unwrap(), std::env::var("WAY").unwrap());
    let rank = || -> Result<()> {
        Env::read()?.run(Duration::from_secs(1), |world| {
            let mut x = Tensor::<f64>::full(world.device(), [5], 1.0)?;
            world.all_reduce(ReduceOp::Sum, &mut x)?;
            if world.rank().to_string() == victim {
                match way.as_str() {
                    "return" => return Ok(()),
                    "fail" => return Err(Error::invalid("test", "fails")),
                    "panic" => panic!("lost"),
                    "exit" => std::process::exit(3),
                    signal => {
                        let _ = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
                        std::thread::sleep(Duration::from_millis(300));
                    }
                }
            }
            world.barrier()
        })
    };
    if let Err(error) = rank() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn shardwise(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_shardwise")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

#[test]
fn lost_processes_are_blamed() {
    for ranks in [2, 4] {
        for way in ["return", "fail", "panic", "exit", "-KILL", "-STOP"] {
            for victim in [0, ranks - 1] {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().to_str().unwrap();
                let options = ["--flight", path];
                let mut job = ranks_of_this_program(ranks, &options, "records::rank_that_may_be_lost");
                job.env("VICTIM", victim.to_string()).env("WAY", way);
                let begin = Instant::now();
                let output = run(job);
                let what = format!("rank {victim} of {ranks}, {way}: {}", text(&output.stderr));
                assert!(!output.status.success(), "{what}");
                // The deadline of a second, and a second.
                let limit = if way == "-STOP" { 2000 } else { 1000 };
                assert!(begin.elapsed() < Duration::from_millis(limit), "{:?}: {what}", begin.elapsed());
                let blamed = format!("shardwise: by the ranks' records, rank {victim}: ");
                assert!(text(&output.stderr).contains(&blamed), "{what}");
                assert!(shardwise(&["blame", path]).starts_with(&format!("rank {victim}: ")), "{what}");
                let line = folder.path().join("line.json");
                shardwise(&["trace", path, "-o", line.to_str().unwrap()]);
                let line: serde_json::Value = serde_json::from_slice(&std::fs::read(line).unwrap()).unwrap();
                assert!(line["traceEvents"].as_array().unwrap().len() > ranks, "{what}");
            }
        }
    }
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
