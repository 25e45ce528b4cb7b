//! Tests the environments of launchers and the rendezvous of processes. Threads stand in for the
//! processes, each with its own environment.

use crate::{relay::Relay, support::say};
use shardwise::{
    Error, LostReason, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Env,
    security::{Channel, Identity, Policy},
};
use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(30);

fn env(variables: &[(&str, &str)]) -> Result<Env> {
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    Env::of(|name| variables.get(name).map(|value| value.to_string()))
}

/// Returns the environment of one of several ranks on this machine.
fn rank_env(rank: usize, world: usize, port: u16, change: impl FnOnce(&mut Env)) -> Env {
    let (rank, world, port) = (rank.to_string(), world.to_string(), port.to_string());
    let mut env = env(&[
        ("RANK", &rank),
        ("WORLD_SIZE", &world),
        ("LOCAL_RANK", &rank),
        ("LOCAL_WORLD_SIZE", &world),
        ("SHARDWISE_PORT", &port),
        ("SHARDWISE_TOKEN", "secret"),
    ])
    .unwrap();
    change(&mut env);
    env
}

/// Returns a port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Runs ranks that find each other only by their environment.
pub(crate) fn processes<R: Send>(
    world: usize,
    rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    processes_within(DEADLINE, world, rank)
}

/// Like [`processes`], but with a given deadline.
pub(crate) fn processes_within<R: Send>(
    deadline: Duration,
    world: usize,
    rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    let port = free_port();
    thread::scope(|scope| {
        let start = |number| {
            let rank = &rank;
            scope.spawn(move || rank_env(number, world, port, |_| ()).run(deadline, rank))
        };
        let started: Vec<_> = (0..world).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn launchers_are_understood() {
    let torchrun = env(&[
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "node7"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "run"),
        ("TORCHELASTIC_RESTART_COUNT", "3"),
        ("SHARDWISE_TOKEN", "t"),
        // srun has started torchrun, so the variables of both are set.
        ("SLURM_PROCID", "1"),
        ("SLURM_NTASKS", "2"),
    ])
    .unwrap();
    assert_eq!((torchrun.rank, torchrun.world, torchrun.local_rank, torchrun.local_world), (5, 8, 1, 4));
    // torchrun's agent listens on the port itself, so rank 0 listens on the next port.
    assert_eq!((torchrun.host.as_str(), torchrun.port), ("node7", 29501));
    assert_eq!((torchrun.job.as_str(), torchrun.epoch, torchrun.token.reveal()), ("run", 3, "t"));

    let mpi = env(&[
        ("OMPI_COMM_WORLD_RANK", "2"),
        ("OMPI_COMM_WORLD_SIZE", "3"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "2"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "3"),
        ("PMIX_NAMESPACE", "prterun-1"),
        ("SHARDWISE_PORT", "4000"),
    ])
    .unwrap();
    assert_eq!((mpi.rank, mpi.world, mpi.local_rank, mpi.local_world), (2, 3, 2, 3));
    assert_eq!((mpi.host.as_str(), mpi.port, mpi.job.as_str()), ("127.0.0.1", 4000, "prterun-1"));

    let pmi =
        env(&[("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")]);
    let pmi = pmi.unwrap();
    assert_eq!((pmi.rank, pmi.world), (0, 2));
    assert!((20_000..30_000).contains(&pmi.port));

    let slurm = env(&[
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_STEP_ID", "2"),
        ("MASTER_ADDR", "10.0.0.1"),
    ])
    .unwrap();
    assert_eq!((slurm.rank, slurm.local_rank, slurm.job.as_str()), (3, 1, "77.2"));
    // Slurm gives the requested number of ranks per machine, not the actual one.
    for (nodes, here) in [("2", 1), ("1", 4)] {
        let slurm = env(&[
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NTASKS_PER_NODE", "4"),
            ("SLURM_NNODES", nodes),
            ("MASTER_ADDR", "10.0.0.1"),
        ]);
        assert_eq!(slurm.unwrap().local_world, here, "{nodes} nodes");
    }
    assert_eq!(env(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().local_world, 1);
    let named =
        [("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "run"), ("SHARDWISE_JOB", "train-7")];
    assert_eq!(env(&named).unwrap().job, "train-7");
}

#[test]
fn what_is_missing_or_contradicts_is_named() {
    let says = |variables: &[(&str, &str)], words: &[&str]| {
        let error = env(variables).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    says(&[], &["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"]);
    says(&[("RANK", "0")], &["RANK is set", "WORLD_SIZE is not"]);
    says(&[("RANK", "0"), ("WORLD_SIZE", "2")], &["LOCAL_RANK is not"]);
    says(&[("RANK", "zero"), ("WORLD_SIZE", "2")], &["RANK is `zero`"]);
    says(&[("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")], &["RANK is 2", "WORLD_SIZE is only 2"]);
    let local = |rank: &'static str, world: &'static str| {
        [("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world)]
    };
    says(&local("3", "2"), &["LOCAL_RANK is 3", "LOCAL_WORLD_SIZE is only 2"]);
    says(&local("0", "5"), &["LOCAL_WORLD_SIZE is 5"]);
    says(&local("0", "2"), &["MASTER_ADDR is not set", "4 ranks", "only 2"]);
    let port = [("RANK", "0"), ("WORLD_SIZE", "1"), ("SHARDWISE_PORT", "70000")];
    says(&port, &["no port 70000"]);
}

#[test]
fn an_identity_and_a_policy_are_whole_or_refused() {
    let alone = [("RANK", "0"), ("WORLD_SIZE", "1")];
    let with = |variables: &[(&str, &str)]| env(&[&alone[..], variables].concat());
    let says = |variables: &[(&str, &str)], words: &[&str]| {
        let error = with(variables).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let (key, list, owner) =
        (("SHARDWISE_KEY", "k"), ("SHARDWISE_MEMBERSHIP", "m"), ("SHARDWISE_OWNER", "o"));
    let (chain, roots, name) =
        (("SHARDWISE_CERTIFICATE", "c"), ("SHARDWISE_AUTHORITY", "a"), ("SHARDWISE_NAME", "n"));
    assert_eq!(with(&[]).unwrap().identity, None);
    let (k, m, o) = ("k".into(), "m".into(), "o".into());
    let listed = Identity::Key { key: k, membership: m, owner: o };
    assert_eq!(with(&[key, list, owner]).unwrap().identity, Some(listed));
    let (k, c, a, n) = ("k".into(), "c".into(), "a".into(), "n".into());
    let certified = Identity::Certificate { key: k, certificate: c, authority: a, name: n };
    assert_eq!(with(&[key, chain, roots, name]).unwrap().identity, Some(certified));
    says(&[key], &["SHARDWISE_KEY is set", "SHARDWISE_MEMBERSHIP", "SHARDWISE_CERTIFICATE"]);
    says(&[list], &["SHARDWISE_MEMBERSHIP is set, but SHARDWISE_KEY is not"]);
    says(&[key, list], &["SHARDWISE_MEMBERSHIP is set, but SHARDWISE_OWNER is not"]);
    says(&[key, owner], &["SHARDWISE_OWNER is set, but SHARDWISE_MEMBERSHIP is not"]);
    says(&[key, chain, name], &["SHARDWISE_CERTIFICATE is set, but SHARDWISE_AUTHORITY is not"]);
    says(&[key, list, owner, roots], &["SHARDWISE_MEMBERSHIP and SHARDWISE_AUTHORITY are set"]);

    let policy = |text| with(&[("SHARDWISE_POLICY", text)]).map(|env| env.policy);
    assert_eq!(policy(""), Ok(Policy::Any));
    assert_eq!(policy("require-encrypted"), Ok(Policy::RequireEncrypted));
    assert!(policy("encrypted").unwrap_err().to_string().contains("`encrypted` is no policy"));
    // Without the feature `tls` an identity is not ignored, and with it the files are missing.
    let mut env = with(&[key, list, owner]).unwrap();
    let error = env.run(DEADLINE, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. } | Error::Io { .. }), "{error}");
    // One machine may use plaintext, and several may not.
    (env.identity, env.policy) = (None, Policy::RequireEncrypted);
    assert_eq!(env.run(DEADLINE, |group| Ok(group.communicator().channel())), Ok(Channel::MEMORY));
    (env.world, env.local_world, env.token) = (2, 1, "token".into());
    let error = env.run(DEADLINE, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::NotEncrypted { transport: "Link", .. }), "{error}");
}

#[test]
fn a_network_asks_for_a_secret() {
    let env = env(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "192.0.2.1")]);
    let error = env.unwrap().run(DEADLINE, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("set SHARDWISE_TOKEN"), "{error}");
}

/// The progress of a group that is disturbed while it forms.
#[derive(Default)]
struct Progress {
    /// Whether the last rank may connect.
    enough: AtomicBool,
    /// Whether the group has formed and ended.
    done: AtomicBool,
}

/// Forms a group of three while `disturb` runs. The last rank connects when `disturb` has returned
/// or has set `enough`.
fn disturbed(disturb: impl FnOnce(u16, &Progress) + Send) {
    let (port, progress) = (free_port(), Progress::default());
    thread::scope(|scope| {
        let progress = &progress;
        let rank = |number: usize| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(30 * number as u64));
                while number == 2 && !progress.enough.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                rank_env(number, 3, port, |_| ()).run(DEADLINE, |group| {
                    group.barrier()?;
                    Ok(group.rank())
                })
            })
        };
        let begin = Instant::now();
        let [first, second, third] = [0, 1, 2].map(rank);
        let disturber = scope.spawn(move || {
            disturb(port, progress);
            progress.enough.store(true, Ordering::SeqCst);
        });
        for (number, thread) in [first, second, third].into_iter().enumerate() {
            assert_eq!(thread.join().unwrap(), Ok(number));
        }
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
        progress.done.store(true, Ordering::SeqCst);
        disturber.join().unwrap();
    });
}

fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

#[test]
fn unknown_connections_and_garbage_do_no_harm() {
    disturbed(|port, _| {
        for round in 0..20_u8 {
            let mut stream = connect(port);
            let _ = stream.write_all(&vec![round.wrapping_mul(37); 10 * round as usize]);
            let mut rest = Vec::new();
            let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
            let _ = stream.read_to_end(&mut rest);
            assert!(rest.len() <= 40, "an unknown connection got more than a nonce");
        }
    });
}

#[test]
fn connections_that_say_nothing_do_no_harm() {
    disturbed(|port, progress| {
        let mut connections: Vec<_> = (0..40).map(|_| connect(port)).collect();
        // Half of the connections send one byte at a time.
        for round in 0.. {
            progress.enough.fetch_or(round == 15, Ordering::SeqCst);
            if progress.done.load(Ordering::SeqCst) {
                break;
            }
            connections.iter_mut().step_by(2).for_each(|stream| drop(stream.write_all(&[0])));
            thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Connects a fourth process to a group of three while it forms, and checks its error.
fn intruder(change: impl Fn(&mut Env) + Send + Sync, words: &str) {
    disturbed(|port, _| {
        // Rank 1 of the group has connected by then. The intruder retries some refusals, because
        // the listener may be left over from an earlier start.
        thread::sleep(Duration::from_millis(200));
        let patience = Duration::from_secs(1);
        let error = rank_env(1, 3, port, change).run(patience, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    });
}

#[test]
fn a_foreign_process_is_refused_with_the_reason() {
    intruder(|env| env.token = "guessed".into(), "SHARDWISE_TOKEN");
    intruder(|env| env.job = "another".into(), "another job");
    intruder(|env| env.epoch = 9, "another start");
    intruder(|env| env.world = 4, "another number of ranks");
    // The real rank 1 has already connected.
    intruder(|_| (), "connected already");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let port = free_port();
    let patience = Duration::from_millis(100);
    let error = rank_env(0, 3, port, |_| ()).run(patience, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("ranks [1, 2] did not connect"), "{error}");
    let error = rank_env(1, 3, port, |_| ()).run(patience, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("no rank 0"), "{error}");
}

#[test]
fn jobs_are_killed_and_started_again_on_one_port() {
    let port = free_port();
    for epoch in 0..1000 {
        thread::scope(|scope| {
            // A rank of the previous start still tries to connect.
            let stale = (epoch % 10 == 5).then(|| {
                let env = rank_env(1, 2, port, |env| env.epoch = epoch - 1);
                scope.spawn(move || env.run(Duration::from_millis(5), |_| Ok(0)))
            });
            let ranks = [0, 1].map(|number| {
                let env = rank_env(number, 2, port, |env| env.epoch = epoch);
                scope.spawn(move || {
                    env.run(DEADLINE, |group| {
                        group.barrier()?;
                        if epoch % 3 == number as u64 {
                            return Err(Error::invalid("test", "killed"));
                        }
                        Ok(group.rank())
                    })
                })
            });
            for (number, rank) in ranks.into_iter().enumerate() {
                let want = if epoch % 3 == number as u64 {
                    Err(Error::invalid("test", "killed"))
                } else {
                    Ok(number)
                };
                assert_eq!(rank.join().unwrap(), want, "start {epoch}");
            }
            if let Some(stale) = stale {
                stale.join().unwrap().unwrap_err();
            }
        });
    }
}

/// Runs two or more ranks. A relay, which calls `watch`, connects rank 1 with rank 0.
fn relayed<R: Send>(
    deadline: Duration,
    world: usize,
    watch: impl Fn(usize, &mut [u8]) + Send + Sync + 'static,
    rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    let port = free_port();
    let relay = Relay::to(port, watch);
    thread::scope(|scope| {
        let start = |number| {
            let (rank, port) = (&rank, if number == 1 { relay.port } else { port });
            scope.spawn(move || rank_env(number, world, port, |_| ()).run(deadline, rank))
        };
        let started: Vec<_> = (0..world).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The ranks have proved to each other that they know the token. They reject bytes that another
/// party changes afterwards.
#[test]
fn what_is_changed_on_the_way_is_never_data() {
    for direction in [0, 1] {
        let changed = Arc::new(AtomicBool::new(false));
        let one = 1.0_f64.to_le_bytes();
        let was_changed = Arc::clone(&changed);
        let watch = move |of: usize, bytes: &mut [u8]| {
            let found = bytes.windows(8).position(|word| word == one);
            if let Some(at) = found.filter(|_| of == direction && !was_changed.load(Ordering::SeqCst)) {
                bytes[at..at + 8].copy_from_slice(&3.0_f64.to_le_bytes());
                was_changed.store(true, Ordering::SeqCst);
            }
        };
        let outcomes = relayed(DEADLINE, 2, watch, |group| {
            let mut x = Tensor::<f64>::full(group.device(), [3], 1.0)?;
            group.all_reduce(ReduceOp::Sum, &mut x)?;
            group.barrier()?;
            x.to_vec()
        });
        assert!(changed.load(Ordering::SeqCst));
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            let error = outcome.unwrap_err();
            assert!(
                matches!(error, Error::PeerLost { rank: named, reason: LostReason::Disconnected, .. } if named != rank),
                "rank {rank}: {error}"
            );
        }
    }
}

/// Rank 1 stops reading, as if it were suspended, while large results are sent to it and to the
/// ranks after it.
#[test]
fn a_process_that_reads_nothing_is_named_to_all_others() {
    let over = Arc::new(AtomicBool::new(false));
    let (stopped, ends) = (AtomicBool::new(false), Arc::clone(&over));
    let watch = move |direction: usize, bytes: &mut [u8]| {
        // From the first large result on, the relay forwards nothing.
        if direction == 1 && bytes.len() == 1 << 16 {
            stopped.store(true, Ordering::SeqCst);
        }
        while stopped.load(Ordering::SeqCst) && !ends.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
    };
    let done = AtomicUsize::new(0);
    let begin = Instant::now();
    let outcomes = relayed(Duration::from_secs(2), 4, watch, |group| {
        let sums = || {
            for _ in 0..3 {
                let mut x = Tensor::<f64>::full(group.device(), [1 << 20], 1.0)?;
                group.all_reduce(ReduceOp::Sum, &mut x)?;
                assert_eq!(x.to_vec()?, vec![4.0; 1 << 20]);
            }
            Ok::<_, Error>(())
        };
        let result = sums();
        if done.fetch_add(1, Ordering::SeqCst) == 2 {
            over.store(true, Ordering::SeqCst);
        }
        result
    });
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    for rank in [0, 2, 3] {
        let Err(Error::Deadline { missing, .. }) = &outcomes[rank] else { panic!("{:?}", outcomes[rank]) };
        assert_eq!(*missing, [1], "rank {rank}");
    }
}

/// Opens as many connections as rank 0 examines at a time, and reopens each as soon as it is
/// closed.
#[test]
fn connections_without_end_do_not_keep_a_group_from_forming() {
    disturbed(|port, progress| {
        let mut connections: Vec<_> = (0..64).map(|_| connect(port)).collect();
        thread::sleep(Duration::from_millis(100));
        progress.enough.store(true, Ordering::SeqCst);
        while !progress.done.load(Ordering::SeqCst) {
            for stream in &mut connections {
                stream.set_nonblocking(true).unwrap();
                // The stream has the nonce, has nothing yet, or has ended.
                let ended = match stream.read(&mut [0; 64]) {
                    Ok(len) => len == 0,
                    Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
                };
                if ended && let Ok(again) = TcpStream::connect(("127.0.0.1", port)) {
                    *stream = again;
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn ranks_find_each_other_by_every_form_of_an_address() {
    let meet = |here: usize, hosts: [&'static str; 2]| {
        let port = free_port();
        let run = |number: usize| {
            let host = hosts[number].to_string();
            let env = rank_env(number, 2, port, |env| (env.host, env.local_world) = (host, here));
            env.run(DEADLINE, |group| group.barrier())
        };
        let outcomes = thread::scope(|scope| {
            [0, 1].map(|number| scope.spawn(move || run(number))).map(|rank| rank.join().unwrap())
        });
        assert_eq!(outcomes, [Ok(()), Ok(())], "{here} on this machine, {hosts:?}");
    };
    // All ranks are on this machine, so they find each other whatever the addresses are.
    for hosts in [["::1", "[::1]"], ["127.0.0.1", "localhost"], ["192.0.2.1", "no.such.host.invalid"]] {
        meet(2, hosts);
    }
    // The ranks assume that they are on different machines. The first address is not rank 0's own,
    // like the address of a service. The second is a name that resolves to a loopback address on
    // rank 0's machine.
    meet(1, ["192.0.2.1", "127.0.0.1"]);
    meet(1, ["localhost", "127.0.0.1"]);
    if TcpListener::bind("[::1]:0").is_ok() {
        meet(1, ["[::1]", "::1"]);
        meet(1, ["[2001:db8::1]", "[::1]"]);
    } else {
        say("IPv6 addresses of rank 0 are NOT RUN: this machine has no ::1");
    }
}

/// More processes connect at once than rank 0 examines at a time. All authenticate eventually.
#[test]
fn a_large_group_forms() {
    let outcomes = processes(150, |group| group.barrier());
    assert!(outcomes.into_iter().all(|outcome| outcome == Ok(())));
}

#[test]
fn absurd_numbers_are_errors_or_waited_for() {
    for world in ["1000000000000", "18446744073709551615"] {
        let error = env(&[("RANK", "0"), ("WORLD_SIZE", world), ("LOCAL_RANK", "0")]).unwrap_err();
        assert!(error.to_string().contains(world) && error.to_string().contains("65536"), "{error}");
    }
    let outcomes = processes_within(Duration::MAX, 2, |group| {
        let mut x = Tensor::<f32>::full(group.device(), [1], 1.0)?;
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        let shape = x.shape();
        let y = match group.rank() {
            0 => group.exchange(Some((1, &x)), None)?,
            _ => group.exchange(None, Some((0, shape)))?,
        };
        y.map_or(Ok(vec![2.0]), |y| y.to_vec())
    });
    assert_eq!(outcomes, [Ok(vec![2.0]), Ok(vec![2.0])]);
}
