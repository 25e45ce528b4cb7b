//! Tests that without a token and without TLS, processes of another user cannot be ranks of a job.
//! Only root can start such processes.

use crate::launch::text;
use shardwise::{Error, Refusal, Result, Tensor, comm::ReduceOp, launch::Env};
use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The user `nobody`.
const OTHER: u32 = 65534;
/// The magic number of the rendezvous.
const MAGIC: &[u8] = b"SHWISE02";

/// The program of the ranks. It is no test by itself.
#[test]
#[ignore = "the program of ranks"]
fn rank_without_token() {
    let deadline = Duration::from_millis(std::env::var("DEADLINE").unwrap().parse().unwrap());
    let rank = || -> Result<f64> {
        Env::read()?.run(deadline, |world| {
            let mut x = Tensor::<f64>::full(world.device(), [1], 1.0 + world.rank() as f64)?;
            world.all_reduce(ReduceOp::Sum, &mut x)?;
            Ok(x.to_vec()?[0])
        })
    };
    match rank() {
        Ok(sum) => println!("sum {sum}"),
        Err(Error::Refused { rank: 1, refusal: Refusal::OtherUser, .. }) => println!("refused: other user"),
        Err(Error::NotConnected { refused: 1.., last: Some(Refusal::OtherUser), .. }) => {
            println!("nobody but another user came");
        }
        Err(error) => panic!("{error}"),
    }
}

/// A rank 0 that checks no user. It prints what each visitor sends until the visitor leaves.
#[test]
#[ignore = "the program of another user"]
fn host_without_checks() {
    let port: u16 = std::env::var("SHARDWISE_PORT").unwrap().parse().unwrap();
    for connection in TcpListener::bind(("127.0.0.1", port)).unwrap().incoming() {
        let (mut connection, mut received) = (connection.unwrap(), Vec::new());
        connection.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        connection.write_all(&[MAGIC, &[7; 32]].concat()).unwrap();
        // The visitor closes the connection before it has read all, which may be an error here.
        let _ = connection.read_to_end(&mut received);
        println!("received {}", String::from_utf8_lossy(&received));
    }
}

/// A visitor that checks no user. It prints the first bytes of rank 0.
#[test]
#[ignore = "the program of another user"]
fn visitor_without_checks() {
    let port: u16 = std::env::var("SHARDWISE_PORT").unwrap().parse().unwrap();
    let begin = Instant::now();
    let mut connection = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(connection) => break connection,
            Err(error) => assert!(begin.elapsed() < LONG, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut received = [0; 9];
    connection.read_exact(&mut received).unwrap();
    println!("received {} {}", String::from_utf8_lossy(&received[..8]), received[8]);
}

/// A copy of this program that every user can run, and a port that is free.
struct Program {
    path: PathBuf,
    port: u16,
    _folder: TempDir,
}

impl Program {
    /// Returns none if this user cannot start processes of another user.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("NOT RUN: only root can start processes of another user");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
        for path in [folder.path(), &path] {
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Some(Self { path, port, _folder: folder })
    }

    /// Starts a test of this program as one of two ranks, as this user or the other one.
    fn start(&self, test: &str, rank: usize, is_other: bool, deadline: Duration) -> Child {
        let mut command = Command::new(&self.path);
        command.args(["--exact", test, "--ignored", "--nocapture"]).current_dir("/");
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHARDWISE"))
        {
            command.env_remove(name);
        }
        command.env_remove("TORCHELASTIC_RUN_ID").env_remove("TORCHELASTIC_RESTART_COUNT");
        let rank = rank.to_string();
        command.envs([
            ("RANK", &*rank),
            ("LOCAL_RANK", &*rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
        ]);
        command.env("SHARDWISE_PORT", self.port.to_string());
        command.env("DEADLINE", deadline.as_millis().to_string());
        if is_other {
            command.uid(OTHER).gid(OTHER);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn rank(&self, rank: usize, is_other: bool, deadline: Duration) -> Child {
        self.start("users::rank_without_token", rank, is_other, deadline)
    }
}

/// Waits until a process has ended well, and checks that it has printed a line.
fn prints(process: Child, line: &str) {
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).lines().any(|printed| printed.ends_with(line)), "no `{line}`: {output:?}");
}

const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(30);

/// The intruder comes while rank 0 waits, and the job then forms without it.
#[test]
fn a_rank_of_another_user_is_refused() {
    let Some(program) = Program::new() else { return };
    let rank0 = program.rank(0, false, LONG);
    prints(program.rank(1, true, SHORT), "refused: other user");
    // This one does not refuse rank 0. It gets the number of the refusal, and no nonce.
    let visitor = program.start("users::visitor_without_checks", 1, true, LONG);
    prints(visitor, "received SHWREFUS 12");
    let rank1 = program.rank(1, false, LONG);
    prints(rank1, "sum 3");
    prints(rank0, "sum 3");
    // Two processes of the other user are a job of that user.
    let rank0 = program.rank(0, true, LONG);
    prints(program.rank(1, true, LONG), "sum 3");
    prints(rank0, "sum 3");
}

#[test]
fn a_rank_0_of_another_user_is_refused() {
    let Some(program) = Program::new() else { return };
    let rank0 = program.rank(0, true, 3 * SHORT);
    prints(program.rank(1, false, SHORT), "refused: other user");
    prints(rank0, "nobody but another user came");
    // This one does not refuse the visitor. It gets the magic number, but neither hello nor proof.
    let mut host = program.start("users::host_without_checks", 0, true, LONG);
    let visitor = program.rank(1, false, 2 * SHORT).wait_with_output().unwrap();
    host.kill().unwrap();
    let received = text(&host.wait_with_output().unwrap().stdout);
    let received: Vec<_> = received.lines().filter_map(|line| line.strip_prefix("received ")).collect();
    assert!(text(&visitor.stdout).contains("refused: other user"), "{visitor:?}");
    assert!(!received.is_empty(), "the visitor has not come");
    assert!(received.iter().all(|bytes| bytes.len() <= MAGIC.len()), "{received:?}");
}
