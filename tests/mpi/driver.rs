//! Runs this program under `mpirun`: the tests on 1 to 8 processes, and the scenarios in which a
//! rank is lost.

use crate::failure::PATIENCE;
use std::{
    process::{Command, Output},
    time::{Duration, Instant},
};

/// The variable that marks a process that `mpirun` has started.
pub(crate) const STARTED: &str = "SHARDWISE_MPI_STARTED";

fn mpirun(processes: usize, variables: &[(&str, &str)]) -> Command {
    mpirun_by(processes, &[], variables)
}

/// Like [`mpirun`], but every process is started by the program `by`.
fn mpirun_by(processes: usize, by: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-n", &processes.to_string()]).args(by).arg(std::env::current_exe().unwrap());
    // Open MPI requires these variables in containers, where it runs as root.
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("RUST_BACKTRACE", "0");
    command.env(STARTED, "1").envs(variables.iter().copied());
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Each way of losing a rank, the words in the job's error, and the time limit for the job.
fn scenarios(lost: usize, missing: &str) -> [(&'static str, String, Duration); 7] {
    // When a process has failed, Open MPI ends the others by SIGTERM and kills those that are left
    // after a second.
    let (soon, said) = (Duration::from_secs(1), Duration::from_secs(3));
    let late = PATIENCE + PATIENCE / 10 + soon;
    [
        ("return", format!("rank {lost} was lost (it left the group)"), said),
        ("fail", format!("rank {lost} was lost (it returned an error)"), said),
        ("panic", format!("rank {lost} was lost (it panicked)"), said),
        // The MPI launcher itself detects these losses.
        ("exit", "Exit code:    3".into(), soon),
        ("kill", format!("process rank {lost} "), soon),
        ("stop", format!("ranks [{missing}] did not join all_reduce"), late),
        ("stop within", format!("ranks [{missing}] did not join all_reduce"), late),
    ]
}

/// A policy that forbids plaintext between machines allows a job on one machine, and refuses a job
/// whose launcher reports several.
fn policy() {
    let none = ("SHARDWISE_SCENARIO", "none");
    for policy in ["require-encrypted", "trusted-network=203.0.113.0/24"] {
        let variables = [none, ("SHARDWISE_POLICY", policy)];
        assert!(mpirun(2, &variables).status().unwrap().success(), "{policy}");
        let apart = mpirun_by(2, &["env", "OMPI_COMM_WORLD_LOCAL_SIZE=1"], &variables).output().unwrap();
        assert!(!apart.status.success(), "{policy}");
        let words = format!("MPI sends plaintext between machines, but the policy is `{policy}`");
        assert!(text(&apart).contains(&words), "{}", text(&apart));
    }
    // Variables of a job of one rank, by another launcher, say nothing about this job.
    let variables = [none, ("SHARDWISE_POLICY", "require-encrypted")];
    let other = mpirun_by(2, &["env", "RANK=0", "WORLD_SIZE=1"], &variables).output().unwrap();
    assert!(!other.status.success() && text(&other).contains("MPI sends plaintext"), "{}", text(&other));
    let trusted = [none, ("SHARDWISE_POLICY", "trusted-network=127.0.0.0/8")];
    let apart = mpirun_by(2, &["env", "OMPI_COMM_WORLD_LOCAL_SIZE=1"], &trusted);
    assert!({ apart }.status().unwrap().success());
    let unknown = mpirun(2, &[none, ("SHARDWISE_POLICY", "secret")]).output().unwrap();
    assert!(
        !unknown.status.success() && text(&unknown).contains("`secret` is no policy"),
        "{}",
        text(&unknown)
    );
    // The job's name and epoch are the launcher's.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    for epoch in ["0", "1"] {
        let variables =
            [none, ("SHARDWISE_AUDIT_DIR", path), ("SHARDWISE_JOB", "a"), ("SHARDWISE_EPOCH", epoch)];
        assert!(mpirun(3, &variables).status().unwrap().success());
    }
    let report = shardwise::security::audit::verify([folder.path()]).unwrap();
    let found: Vec<_> = report.logs().iter().map(|log| (&*log.job, log.rank, log.starts)).collect();
    assert_eq!(report.verdict(), shardwise::security::audit::Verdict::Intact, "{report}");
    assert_eq!(found, [("a", 0, 2), ("a", 1, 2), ("a", 2, 2)]);
    println!("ok: MPI ranks keep audit logs");
    let key = ["SHARDWISE_KEY", "SHARDWISE_MEMBERSHIP", "SHARDWISE_OWNER"].map(|name| (name, "file"));
    let identity = mpirun(2, &[&[none], &key[..]].concat()).output().unwrap();
    let words = "identity: not supported: MPI authenticates no rank";
    assert!(!identity.status.success() && text(&identity).contains(words), "{}", text(&identity));
    let empty = ["SHARDWISE_KEY", "SHARDWISE_MEMBERSHIP"].map(|name| (name, ""));
    assert!(mpirun(2, &[&[none], &empty[..]].concat()).status().unwrap().success());
    println!("ok: MPI is refused by a policy, between machines only, and with an identity");
}

pub(crate) fn drive() {
    if std::env::var_os("SHARDWISE_HUGE").is_some() {
        assert!(mpirun(2, &[]).status().unwrap().success(), "huge tensors");
        return;
    }
    for processes in 1..=4 {
        assert!(mpirun(processes, &[]).status().unwrap().success(), "{processes} processes");
    }
    for processes in 5..=8 {
        assert!(
            mpirun(processes, &[("SHARDWISE_EXACT", "1")]).status().unwrap().success(),
            "{processes} processes"
        );
    }
    for processes in [2, 3] {
        println!("every message is split:");
        assert!(mpirun(processes, &[("SHARDWISE_PIECES", "1")]).status().unwrap().success());
    }
    // The time of a job that does nothing: MPI's start and end.
    let begin = Instant::now();
    assert!(mpirun(2, &[("SHARDWISE_SCENARIO", "none")]).status().unwrap().success());
    let empty = begin.elapsed();
    policy();
    for processes in [2, 3, 4] {
        for (way, words, limit) in scenarios(processes - 1, &(processes - 1).to_string()) {
            let begin = Instant::now();
            // In these jobs every rank that is left reports the loss.
            let reported = ["return", "fail", "panic"].contains(&way);
            let wait = if reported { "1" } else { "0" };
            let variables = [("SHARDWISE_SCENARIO", way), ("OMPI_MCA_odls_base_sigkill_timeout", wait)];
            let output = mpirun(processes, &variables).output().unwrap();
            let time = begin.elapsed();
            assert!(!output.status.success(), "{way}: {}", text(&output));
            let (count, least) =
                (text(&output).matches(&words).count(), if reported { processes - 1 } else { 1 });
            assert!(count >= least, "{way}: `{words}` is {count} times in\n{}", text(&output));
            println!(
                "ok: a rank of {processes} is lost: {way}, job over after {time:.2?} (an empty one {empty:.2?})"
            );
            assert!(time < limit + empty + Duration::from_secs(1), "{way}: {time:?}");
        }
    }
}
