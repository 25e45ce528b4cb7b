//! What passes over TLS, and what others see of it.

use crate::{
    job::{DEADLINE, Job, env, run},
    relay::Relay,
};
use shardwise::{
    Error, LostReason, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch,
    launch::Env,
    security::{Channel, Policy, Reach},
    shard::Partition,
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A number whose bytes are found in plaintext.
const CANARY: &[u8; 8] = b"CANARY!!";

/// Collectives of every kind, with values that have all bits. Returns what this rank gets.
fn collectives(group: &Group<Cpu>) -> shardwise::Result<Vec<u64>> {
    let (rank, ranks, device) = (group.rank(), group.size(), group.device().clone());
    let values = |len: usize| (0..len).map(|at| ((at * 31 + rank * 7 + 3) as f64).sin()).collect::<Vec<_>>();
    let mut all = Vec::new();
    for len in [1, 7, 20_000] {
        let mut x = Tensor::from_slice(&device, [len], &values(len))?;
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        all.extend(x.to_vec()?);
        let partition = Partition::even(len, ranks);
        let shard = Tensor::from_slice(&device, [partition.size(rank)], &values(partition.size(rank)))?;
        all.extend(group.all_gather(&shard, 0, &partition)?.to_vec()?);
        let whole = Tensor::from_slice(&device, [len], &values(len))?;
        all.extend(group.reduce_scatter(ReduceOp::Sum, &whole, 0, &partition)?.to_vec()?);
        let (to, from) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        let received = group.exchange(Some((to, &whole)), Some((from, whole.shape())))?;
        all.extend(received.map_or(Ok(Vec::new()), |x| x.to_vec())?);
        let mut root = Tensor::from_slice(&device, [len], &values(len))?;
        group.broadcast(ranks - 1, &mut root)?;
        all.extend(root.to_vec()?);
    }
    Ok(all.into_iter().map(f64::to_bits).collect())
}

#[test]
fn collectives_have_the_same_bits_over_tls() {
    for world in [1, 2, 3, 5] {
        let job = Job::new(world);
        let threads = launch::threads(world, |group| collectives(&group)).unwrap();
        let tls = run(DEADLINE, (0..world).map(|rank| job.env(rank)).collect(), |group| collectives(&group));
        let token = |rank| with!(env(rank, world, job.port), token = "secret".into(), port = job.port);
        let plain = run(DEADLINE, (0..world).map(token).collect(), |group| collectives(&group));
        for rank in 0..world {
            assert!(threads[rank].len() > 60_000);
            assert_eq!(tls[rank].as_ref().unwrap(), &threads[rank], "rank {rank} of {world}, TLS");
            assert_eq!(plain[rank].as_ref().unwrap(), &threads[rank], "rank {rank} of {world}, a token");
        }
    }
}

/// Runs two ranks through a relay, with tensors full of canaries. Returns how often a canary was
/// seen by the relay, in both directions.
fn seen(envs: [Env; 2]) -> usize {
    let [first, mut second] = envs;
    let relay = Relay::to(first.port, |_, _| ());
    second.port = relay.port;
    let outcomes = run(DEADLINE, vec![first, second], |group| {
        let staged = group.staged(&Cpu::new());
        for group in [&group, &staged] {
            let x = Tensor::<f64>::full(group.device(), [50], f64::from_le_bytes(*CANARY))?;
            group.all_gather(&x, 0, &Partition::even(100, 2))?;
            let other = 1 - group.rank();
            group.exchange(Some((other, &x)), Some((other, x.shape())))?;
        }
        Ok(())
    });
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let recorded = relay.recorded();
    assert!(!recorded.is_empty());
    assert!(recorded.iter().all(|[there, back]| there.len() > 500 && back.len() > 500));
    let count = |bytes: &Vec<u8>| bytes.windows(8).filter(|window| window == CANARY).count();
    recorded.iter().flatten().map(count).sum()
}

#[test]
fn a_relay_sees_no_value_of_a_tensor() {
    let job = Job::new(2);
    assert_eq!(seen([0, 1].map(|rank| job.env(rank))), 0);
    // Each rank sends its tensor twice, and gets both: the relay finds them without TLS.
    let token = |rank| with!(env(rank, 2, job.port), token = "secret".into());
    assert!(seen([0, 1].map(token)) >= 4 * 2 * 50);
}

/// A relay changes a byte of the 30th part that it forwards, so no rank gets a result of it.
#[test]
fn what_is_changed_on_the_way_is_an_error() {
    for direction in [0, 1] {
        let job = Job::new(2);
        let parts = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&parts);
        let relay = Relay::to(job.port, move |of, bytes| {
            if of == direction && count.fetch_add(1, Ordering::SeqCst) == 30 {
                bytes[bytes.len() / 2] ^= 1;
            }
        });
        let envs = vec![job.env(0), with!(job.env(1), port = relay.port)];
        let outcomes = run(DEADLINE, envs, |group| {
            for _ in 0..1000 {
                let mut x = Tensor::<f64>::full(group.device(), [3], 1.0)?;
                group.all_reduce(ReduceOp::Sum, &mut x)?;
                assert_eq!(x.to_vec()?, [2.0; 3]);
            }
            Ok(())
        });
        assert!(parts.load(Ordering::SeqCst) > 30);
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            let error = outcome.unwrap_err();
            assert!(
                matches!(error, Error::PeerLost { rank: named, reason: LostReason::Disconnected, .. } if named != rank),
                "rank {rank}: {error}"
            );
        }
    }
}

#[test]
fn lost_ranks_are_reported_over_tls() {
    let job = Job::new(3);
    let outcomes = run(DEADLINE, (0..3).map(|rank| job.env(rank)).collect(), |group| {
        if group.rank() == 1 {
            return Err(Error::invalid("test", "fails"));
        }
        group.barrier()
    });
    for rank in [0, 2] {
        assert!(
            matches!(&outcomes[rank], Err(Error::PeerLost { rank: 1, reason: LostReason::Failed, .. })),
            "{outcomes:?}"
        );
    }
    // Ranks that disagree are reported as without TLS.
    let outcomes = run(DEADLINE, (0..3).map(|rank| job.env(rank)).collect(), |group| {
        let mut x = Tensor::<f64>::full(group.device(), [3 + group.rank() / 2], 1.0)?;
        group.all_reduce(ReduceOp::Sum, &mut x)
    });
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::Mismatch(_))), "{outcome:?}");
    }
}

#[test]
fn channels_are_known_and_the_policy_is_kept() {
    let job = Job::new(2);
    // The launcher reports one rank a machine, so the transport is a network.
    let apart = |env: Env| with!(env, local_world = 1);
    let plain = |policy| {
        let env = |rank| with!(apart(env(rank, 2, job.port)), token = "secret".into(), policy = policy);
        run(DEADLINE, vec![env(0), env(1)], |group| Ok(group.communicator().channel()))
    };
    let tls = |policy, change: fn(Env) -> Env| {
        let env = |rank| with!(change(job.env(rank)), policy = policy);
        run(DEADLINE, vec![env(0), env(1)], |group| {
            let parts = group.split_all(group.rank() as u64)?;
            let channels = [&group, &group.recorded().0, &group.staged(&Cpu::new()), &parts]
                .map(|group| group.communicator().channel());
            assert!(channels.iter().all(|channel| *channel == channels[0]), "{channels:?}");
            Ok(channels[0])
        })
    };
    let (network, loopback) = ("10.1.0.0/16", "127.0.0.0/8");
    let trusted = |network: &str| Policy::TrustedNetwork(network.parse().unwrap());
    for policy in [Policy::Any, Policy::RequireEncrypted, trusted(network)] {
        let channel = |reach| Channel { reach, encrypted: true };
        assert_eq!(tls(policy, apart), vec![Ok(channel(Reach::Network)); 2]);
        assert_eq!(tls(policy, |env| env), vec![Ok(channel(Reach::Machine)); 2]);
    }
    assert_eq!(plain(Policy::Any), vec![Ok(Channel::plaintext(Reach::Network)); 2]);
    assert_eq!(plain(trusted(loopback)), vec![Ok(Channel::plaintext(Reach::Network)); 2]);
    for policy in [Policy::RequireEncrypted, trusted(network)] {
        for outcome in plain(policy) {
            assert!(matches!(outcome, Err(Error::NotEncrypted { transport: "Link", .. })), "{outcome:?}");
        }
    }
}

/// Whatever prints a rank's environment, error or record shows no secret.
#[test]
fn secrets_are_not_printed() {
    let job = Job::new(2);
    let token = "CANARY-of-the-token";
    let env = with!(job.env(0), token = token.into());
    let pem = std::fs::read_to_string(job.path("rank0.pem")).unwrap();
    let secret = pem.lines().nth(1).unwrap();
    assert!(secret.len() == 64, "{secret}");
    let other = with!(job.env(1), token = "CANARY-guessed".into());
    let outcomes = run(std::time::Duration::from_millis(300), vec![env.clone(), other], |_| Ok(()));
    let shown = format!("{env:?} {env:#?} {outcomes:?} {:?} {:?}", job.keys, job.owner);
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    for canary in ["CANARY", secret, &secret[22..]] {
        assert!(!shown.contains(canary), "{shown}");
    }
}
