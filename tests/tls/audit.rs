//! Audit logs of jobs whose ranks have keys.

use crate::job::{CROWD, DEADLINE, Job, env, run};
use shardwise::{
    Error, Refusal, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Env,
    security::{
        Membership, PrivateKey, Role,
        audit::{self, Verdict, verify_signed},
    },
};
use std::{
    fs,
    io::Write,
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

const WORLD: usize = 4;

fn audited(job: &Job, folder: &Path) -> Vec<Env> {
    let env = |rank| {
        with!(
            job.env(rank),
            audit = Some(folder.to_path_buf()),
            policy = shardwise::security::Policy::RequireEncrypted
        )
    };
    (0..WORLD).map(env).collect()
}

fn sum(group: Group<Cpu>) -> Result<f32> {
    let mut x = Tensor::full(group.device(), [1], group.rank() as f64)?;
    group.all_reduce(ReduceOp::Sum, &mut x)?;
    Ok(x.to_vec()?[0])
}

fn logs(folder: &Path) -> Vec<(PathBuf, String)> {
    let path = |rank| folder.join(format!("job-rank{rank}.audit.jsonl"));
    (0..WORLD).map(|rank| (path(rank), fs::read_to_string(path(rank)).unwrap())).collect()
}

/// Two starts of a job of four processes, and changes that an auditor finds.
#[test]
fn an_auditor_verifies_the_logs_of_two_starts() {
    let (job, folder) = (Job::new(WORLD), tempfile::tempdir().unwrap());
    for epoch in [0, 1] {
        let envs = audited(&job, folder.path()).into_iter().map(|env| with!(env, epoch = epoch));
        assert_eq!(run(DEADLINE, envs.collect(), sum), [const { Ok(6.0) }; WORLD]);
    }
    let list = Membership::read(job.path("membership.json"), job.owner.public()).unwrap();
    let verdict = || {
        let report = verify_signed([folder.path()], std::slice::from_ref(&list)).unwrap();
        println!("{report}");
        report.verdict()
    };
    assert_eq!(verdict(), Verdict::Intact);
    let whole = logs(folder.path());
    for (rank, (_, text)) in whole.iter().enumerate() {
        let starts: Vec<_> = text.lines().filter(|line| line.contains(r#""event":"start""#)).collect();
        assert_eq!(starts.len(), 2);
        for start in starts {
            let fields = [r#""policy":"require-encrypted""#, r#""channel":"one machine, TLS 1.3""#];
            assert!(fields.iter().all(|field| start.contains(field)), "{start}");
            assert!(start.contains(r#""role":"checkpointer""#), "{start}");
        }
        // Of each start: start, join, witness, end, witness.
        assert_eq!(text.lines().count(), 10, "rank {rank}");
        assert_eq!(text.matches(r#""signature":"#).count(), 6, "rank {rank}");
        for key in (0..WORLD).map(|rank| fs::read_to_string(job.path(&format!("rank{rank}.pem"))).unwrap()) {
            let secret = &key.lines().nth(1).unwrap()[23..];
            assert!(secret.len() > 30 && !text.contains(secret), "a key of rank {rank} is in its log");
        }
    }
    // Each line is deleted, and cut off with all that follow.
    let mut found = 0;
    for (path, text) in &whole {
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for at in 0..lines.len() {
            let without = [&lines[..at], &lines[at + 1..]].concat().concat();
            for changed in [without, lines[..at].concat()] {
                fs::write(path, changed).unwrap();
                assert_ne!(verdict(), Verdict::Intact, "line {at} of {}", path.display());
                found += 1;
            }
        }
        fs::write(path, text).unwrap();
    }
    assert_eq!((found, verdict()), (WORLD * 10 * 2, Verdict::Intact));
    // Another owner's list has other keys.
    let other = Job::new(WORLD);
    let other = Membership::read(other.path("membership.json"), other.owner.public()).unwrap();
    assert_ne!(verify_signed([folder.path()], &[other]).unwrap().verdict(), Verdict::Intact);
}

#[test]
fn refused_connections_are_in_the_log_of_rank_0() {
    let (job, folder) = (Job::new(WORLD), tempfile::tempdir().unwrap());
    let mut envs = audited(&job, folder.path());
    // Rank 1's place is taken by a process with a key that rank 0's list does not have.
    let intruder = PrivateKey::generate().unwrap();
    intruder.write(job.path("intruder.pem")).unwrap();
    let list = job.list("intruder.json", |members| members[1].key = intruder.public().clone());
    envs[1].identity = job.identity("intruder.pem", &list);
    let deadline = Duration::from_secs(2);
    let outcomes = run(deadline, envs, sum);
    assert!(matches!(&outcomes[1], Err(Error::Refused { refusal: Refusal::UnknownKey, .. })), "{outcomes:?}");
    let logs = logs(folder.path());
    let refused: Vec<_> = logs[0].1.lines().filter(|line| line.contains(r#""event":"refuse""#)).collect();
    // The process tries again many times, and is written once. Then the number is.
    assert_eq!(refused.len(), 2, "{}", logs[0].1);
    assert!(
        refused[0].contains(r#""peer":"127.0.0.1:"#) && refused[1].contains(r#""connections":"#),
        "{refused:?}"
    );
    assert!(
        refused.iter().any(|line| line.contains("the membership file does not have the key")),
        "{refused:?}"
    );
    // Rank 1 says why it ended.
    let end = logs[1].1.lines().last().unwrap();
    assert!(end.contains(r#""event":"end""#) && end.contains(r#""result":"failed""#), "{end}");
    assert!(end.contains("refused: the membership file does not have the key"), "{end}");
    assert_eq!(audit::verify([folder.path()]).unwrap().verdict(), Verdict::Incomplete);
}

#[test]
fn a_process_that_cannot_be_used_says_so_in_its_log() {
    let (job, folder) = (Job::new(WORLD), tempfile::tempdir().unwrap());
    let mut env = audited(&job, folder.path()).swap_remove(2);
    env.identity = job.identity("rank1.pem", &job.path("membership.json"));
    assert!(matches!(env.run(DEADLINE, sum), Err(Error::Credential { .. })));
    let text = fs::read_to_string(folder.path().join("job-rank2.audit.jsonl")).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[1].contains("rank1.pem cannot be used for rank 2"), "{text}");
}

/// With a token or with keys, all ranks keep logs or none.
#[test]
fn one_rank_without_a_log_is_refused_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let job = Job::new(2);
    for secure in [true, false] {
        let env = |rank| {
            if secure { job.env(rank) } else { with!(env(rank, 2, job.port), token = "token".into()) }
        };
        for audited in [0, 1] {
            let log = folder.path().join(format!("{secure}{audited}"));
            let of = |rank| with!(env(rank), audit = (rank == audited).then(|| log.clone()));
            let outcomes = run(Duration::from_millis(700), vec![of(0), of(1)], sum);
            let Err(Error::NotConnected { last, .. }) = &outcomes[0] else { panic!("{outcomes:?}") };
            assert_eq!(last, &Some(Refusal::OtherAudit));
            assert!(
                matches!(&outcomes[1], Err(Error::Refused { refusal: Refusal::OtherAudit, .. })),
                "{outcomes:?}"
            );
        }
    }
}

/// Many connections for the same reason are one line, and one with their number.
#[test]
fn refusals_do_not_fill_the_log() {
    let (job, folder) = (Job::new(2), tempfile::tempdir().unwrap());
    let env = |rank| with!(job.env(rank), audit = Some(folder.path().to_path_buf()));
    let (host, visitor, port) = (env(0), env(1), job.port);
    let _crowd = CROWD.lock();
    std::thread::scope(|scope| {
        let host = scope.spawn(move || host.run(DEADLINE, sum));
        let mut sent = 0;
        while sent < 300 {
            // Plaintext, which is refused with a reason.
            if let Ok(mut tcp) = TcpStream::connect(("127.0.0.1", port)) {
                let _ = tcp.write_all(b"SHWISE02 in plaintext");
                sent += 1;
            }
        }
        assert_eq!(visitor.run(DEADLINE, sum), Ok(1.0));
        assert_eq!(host.join().unwrap(), Ok(1.0));
    });
    let text = fs::read_to_string(folder.path().join("job-rank0.audit.jsonl")).unwrap();
    let refused: Vec<_> = text.lines().filter(|line| line.contains(r#""event":"refuse""#)).collect();
    assert_eq!(refused.len(), 2, "{refused:?}");
    let count = refused[1].split(r#""connections":"#).nth(1).unwrap();
    let count: u64 = count.split('}').next().unwrap().parse().unwrap();
    assert!(count > 100, "{count}");
    assert_eq!(audit::verify([folder.path()]).unwrap().verdict(), Verdict::Intact);
}

/// A rank whose log is on a full disk fails, and the others learn of it.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_on_every_rank() {
    let (job, folder) = (Job::new(WORLD), tempfile::tempdir().unwrap());
    std::os::unix::fs::symlink("/dev/full", folder.path().join("job-rank2.audit.jsonl")).unwrap();
    let outcomes = run(Duration::from_secs(1), audited(&job, folder.path()), sum);
    let Err(Error::Io { path, .. }) = &outcomes[2] else { panic!("{outcomes:?}") };
    assert!(path.ends_with("job-rank2.audit.jsonl"));
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
}

#[test]
fn roles_are_in_the_log() {
    let (job, folder) = (Job::new(WORLD), tempfile::tempdir().unwrap());
    let list = job.list("roles.json", |members| members[3].role = Role::Trainer);
    let envs = audited(&job, folder.path())
        .into_iter()
        .enumerate()
        .map(|(rank, env)| with!(env, identity = job.identity(&format!("rank{rank}.pem"), &list)));
    assert_eq!(run(DEADLINE, envs.collect(), sum), [const { Ok(6.0) }; WORLD]);
    for (rank, (_, text)) in logs(folder.path()).iter().enumerate() {
        let role = if rank == 3 { "trainer" } else { "checkpointer" };
        assert!(text.lines().next().unwrap().contains(&format!(r#""role":"{role}""#)), "{text}");
    }
}
