//! Tests `shardwise launch`: the environment of the ranks, the end of a job, and that no process or
//! file remains.

use shardwise::{Result, Tensor, comm::ReduceOp, launch::Env};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

fn shardwise(ranks: usize, options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.args(["launch", "-n", &ranks.to_string()]).args(options).arg("--").args(program);
    command
}

/// Returns the command that launches ranks with a shell script.
pub(crate) fn script(ranks: usize, options: &[&str], script: &str) -> Command {
    shardwise(ranks, options, &["sh", "-c", script])
}

/// Returns the command that launches ranks, each of which runs one of this program's own tests.
pub(crate) fn ranks_of_this_program(ranks: usize, options: &[&str], test: &str) -> Command {
    let own = std::env::current_exe().unwrap();
    shardwise(ranks, options, &[own.to_str().unwrap(), "--exact", test, "--ignored", "--nocapture"])
}

pub(crate) fn run(mut command: Command) -> Output {
    command.output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn ranks_get_their_environment_and_their_lines_are_prefixed() {
    let output = run(script(
        3,
        &[],
        "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR; echo to stderr >&2; printf unfinished",
    ));
    assert!(output.status.success(), "{output:?}");
    let lines: BTreeSet<_> = text(&output.stdout).lines().map(str::to_string).collect();
    let mut want: BTreeSet<_> = (0..3).map(|rank| format!("[{rank}] {rank} 3 {rank} 3 127.0.0.1")).collect();
    want.extend((0..3).map(|rank| format!("[{rank}] unfinished")));
    assert_eq!(lines, want);
    let lines: BTreeSet<_> = text(&output.stderr).lines().map(str::to_string).collect();
    assert_eq!(lines, (0..3).map(|rank| format!("[{rank}] to stderr")).collect());
}

#[test]
fn a_job_has_one_fresh_token_and_port() {
    let facts = || {
        let output = run(script(2, &[], "echo $SHARDWISE_TOKEN $SHARDWISE_PORT"));
        let lines: BTreeSet<_> = text(&output.stdout).lines().map(|line| line[4..].to_string()).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.into_iter().next().unwrap()
    };
    let (first, second) = (facts(), facts());
    let (token, port) = first.split_once(' ').unwrap();
    assert_eq!(token.len(), 64);
    assert!(port.parse::<u16>().unwrap() > 0);
    assert_ne!(token, &second[..64]);
}

/// The program of the ranks in the next test. It is no test by itself.
#[test]
#[ignore = "the program of ranks"]
fn rank_program() {
    let rank = || -> Result<()> {
        Env::read()?.run(Duration::from_secs(20), |world| {
            let mut x = Tensor::<f64>::full(world.device(), [1], world.rank() as f64)?;
            world.all_reduce(ReduceOp::Sum, &mut x)?;
            println!("sum {}", x.to_vec()?[0]);
            Ok(())
        })
    };
    rank().unwrap();
}

#[test]
fn ranks_find_each_other() {
    let output = run(ranks_of_this_program(4, &[], "launch::rank_program"));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout).lines().filter(|line| line.ends_with("sum 6")).count(), 4);
}

#[test]
fn the_rank_that_failed_first_is_named_and_its_code_returned() {
    let cases = [
        ("exit 3", 3, "rank 1 failed first: exit code 3"),
        ("kill -SEGV $$", 139, "rank 1 failed first: killed by SIGSEGV"),
        ("kill -KILL $$", 137, "rank 1 failed first: killed by SIGKILL"),
    ];
    for (end, code, words) in cases {
        let begin = Instant::now();
        let output = run(script(3, &[], &format!("[ $RANK = 1 ] && {end}; exec sleep 100")));
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
        assert_eq!(output.status.code(), Some(code));
        assert!(text(&output.stderr).contains(words), "{output:?}");
    }
    let output = run(shardwise(2, &[], &["/no/such/program"]));
    assert_eq!(output.status.code(), Some(127));
    assert!(text(&output.stderr).contains("cannot start /no/such/program: No such file"), "{output:?}");
}

#[test]
fn the_ranks_that_left_and_were_stopped_are_reported() {
    let output =
        run(script(3, &[], "case $RANK in 0) exit 0;; 1) sleep 0.3; exit 5;; 2) kill -STOP $$;; esac"));
    let words = text(&output.stderr);
    assert!(words.contains("rank 1 failed first: exit code 5"), "{words}");
    assert!(
        words.contains("ranks [0] had ended before") && words.contains("ranks [2] were stopped"),
        "{words}"
    );
}

#[test]
fn the_others_have_time_for_last_words_and_are_killed_if_they_stay() {
    let begin = Instant::now();
    let deaf =
        "[ $RANK = 0 ] && exit 9; trap '' TERM; sleep 0.1; echo last words; sleep 100 & wait; sleep 100";
    let output = run(script(2, &["--grace", "0.5"], deaf));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(output.status.code(), Some(9));
    assert!(text(&output.stdout).contains("[1] last words"), "{output:?}");
}

#[test]
fn a_grace_of_any_length_is_kept_and_what_is_no_time_refused() {
    let output = run(script(2, &["--grace", "1e19"], "[ $RANK = 1 ] && exit 3; exec sleep 100"));
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    for wrong in ["nan", "inf", "-1", "1e20", "soon", ""] {
        let output = run(script(2, &["--grace", wrong], "exit 3"));
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output:?}");
        let words = text(&output.stderr);
        assert!(words.contains(&format!("invalid value '{wrong}' for '--grace <GRACE>': ")), "{words}");
    }
}

/// Returns the number of processes that have `TAG=tag` in their environment.
fn tagged(tag: &str) -> usize {
    let entry = format!("TAG={tag}").into_bytes();
    let carries = |pid: &str| {
        pid.parse::<u32>().is_ok()
            && fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|all| all.split(|b| *b == 0).any(|v| v == entry))
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| entry.file_name().to_str().is_some_and(carries)).count()
}

/// Starts a job of long-lived ranks with children, and waits until all ranks have started. All
/// processes of the job have `TAG=tag` in their environment.
pub(crate) fn long_job(tag: &str, options: &[&str], body: &str, temporary: &Path) -> Child {
    let mut command = script(2, &[&["--grace", "1"], options].concat(), body);
    command.env("TAG", tag).env("TMPDIR", temporary);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    for _ in 0..2 {
        lines.read_line(&mut String::new()).unwrap();
    }
    // A thread reads the later lines. Without this reader, writing to the closed pipe would fail,
    // and the writer would report the failure.
    std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
    child
}

/// Returns the process id of the parent of a job's ranks.
pub(crate) fn keeper_of(job: &Child) -> u32 {
    let launcher = job.id();
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    children.trim().parse().unwrap()
}

pub(crate) fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

pub(crate) fn fresh_tag() -> String {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Waits until no process has the tag, and returns the time taken.
pub(crate) fn gone_after(tag: &str, patience: Duration) -> Duration {
    let begin = Instant::now();
    while tagged(tag) > 0 {
        assert!(begin.elapsed() < patience, "{} orphans after {:?}", tagged(tag), begin.elapsed());
        sleep(Duration::from_millis(5));
    }
    begin.elapsed()
}

/// Starts three children. The first stays in the rank's process group. The second and the third
/// each have a session of their own, and the third also ignores signals.
const CHILDREN: &str =
    "sleep 1000 & setsid sleep 1000 & setsid sh -c \"trap '' TERM INT HUP; sleep 1000; sleep 1000\" &";

#[test]
fn signals_are_forwarded() {
    let temporary = tempfile::tempdir().unwrap();
    for (signal, name) in [("-INT", "SIGINT"), ("-TERM", "SIGTERM"), ("-HUP", "SIGHUP")] {
        let tag = fresh_tag();
        let body =
            format!("{CHILDREN} trap 'exit 0' {}; echo ready; while :; do sleep 0.01; done", &signal[1..]);
        let mut job = long_job(&tag, &[], &body, temporary.path());
        kill(job.id(), signal);
        let mut words = String::new();
        job.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        assert_eq!(job.wait().unwrap().code(), Some(0), "the ranks end with success: {words}");
        assert!(words.contains(&format!("ended by {name}")), "{words}");
        assert_eq!(tagged(&tag), 0, "processes of the ended job remain");
    }
    // The signal kills ranks that do not handle it.
    let tag = fresh_tag();
    let mut job = long_job(&tag, &[], "echo ready; exec sleep 1000", temporary.path());
    kill(job.id(), "-TERM");
    assert_eq!(job.wait().unwrap().code(), Some(128 + 15));
    // The launcher forwards a signal that does not end jobs, and the job continues.
    let body = "trap 'exit 7' USR1; echo ready; while :; do sleep 0.01; done";
    let mut job = long_job(&tag, &[], body, temporary.path());
    kill(job.id(), "-USR1");
    assert_eq!(job.wait().unwrap().code(), Some(7));
}

/// Kills the launcher or the process that supervises its ranks, in turn. The number of kills is
/// `SHARDWISE_KILLS`, or 6 by default.
#[test]
fn a_killed_launcher_leaves_no_orphans() {
    let kills = std::env::var("SHARDWISE_KILLS").map_or(6, |number| number.parse::<usize>().unwrap());
    let mut slowest = Duration::ZERO;
    for round in 0..kills {
        let tag = fresh_tag();
        let temporary = tempfile::tempdir().unwrap();
        let body = format!("{CHILDREN} echo ready; wait; sleep 1000");
        let mut job = long_job(&tag, &[], &body, temporary.path());
        let keeper = keeper_of(&job);
        assert!(tagged(&tag) >= 8, "the launcher, its supervisor, the ranks and their children");
        let victim = if round % 2 == 0 { job.id() } else { keeper };
        kill(victim, "-KILL");
        // The test reaps the launcher at once, as a shell does.
        let status = job.wait().unwrap();
        slowest = slowest.max(gone_after(&tag, Duration::from_secs(2)));
        // The surviving process removes the folder of records.
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
        assert!(!status.success());
    }
    println!("{kills} kills, the last process was gone after {slowest:?}");
}

/// Nobody reads the output, so a full pipe blocks the writes of ranks and launcher. After a signal
/// the job must still end.
#[test]
fn a_job_ends_though_nobody_reads_its_output() {
    for (signal, both) in [("-TERM", false), ("-KILL", false), ("-TERM", true), ("-KILL", true)] {
        let tag = fresh_tag();
        let (unread, to) = std::io::pipe().unwrap();
        let mut job = script(2, &["--grace", "0.5"], "echo x > $FIFO; exec yes");
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("started");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        job.env("TAG", &tag).env("FIFO", &fifo).stdout(to.try_clone().unwrap());
        job.stderr(if both { to.into() } else { Stdio::null() });
        let mut child = job.spawn().unwrap();
        drop(job);
        let mut started = BufReader::new(fs::File::open(&fifo).unwrap()).lines();
        assert!(started.all(|line| line.is_ok()));
        sleep(Duration::from_millis(200));
        kill(child.id(), signal);
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(4), "{signal}: the launcher has not ended");
            sleep(Duration::from_millis(5));
        }
        assert!(!child.wait().unwrap().success());
        gone_after(&tag, Duration::from_secs(4));
        drop(unread);
    }
}

/// The launcher waits for a slow reader, which gets all lines.
#[test]
fn a_job_that_ends_by_itself_waits_for_its_reader() {
    let mut job = script(1, &["--grace", "0.1"], "seq 100000; exit 3");
    let mut child = job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    sleep(Duration::from_secs(1));
    let output = child.stdout.take().map(BufReader::new).unwrap().lines();
    assert_eq!(output.map(|line| line.unwrap()).last().unwrap(), "[0] 100000");
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_job_leaves_nothing_of_what_its_ranks_started() {
    for (end, code) in [("exit 0", 0), ("[ $RANK = 0 ] && exit 4; wait", 4)] {
        let tag = fresh_tag();
        let mut command = script(2, &[], &format!("{CHILDREN} {end}"));
        let output = command.env("TAG", &tag).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!(tagged(&tag), 0);
    }
}
