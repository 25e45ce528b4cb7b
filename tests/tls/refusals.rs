//! Processes that are refused, and what both sides report.

use crate::{
    job::{CROWD, DEADLINE, Job, env, run},
    relay::Relay,
};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::CertifiedKey,
};
use shardwise::{
    Error, Refusal, Result,
    launch::Env,
    security::{Member, Membership, PrivateKey, Role},
};
use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// Returns the last refusal that rank 0 reports when rank 1 has missed the deadline.
fn last(outcome: Result<()>) -> Option<Refusal> {
    match outcome {
        Err(Error::NotConnected { missing, refused: 1.., last, .. }) if missing[0] == 1 => last,
        other => panic!("{other:?}"),
    }
}

/// Rank 0 waits for rank 1, and `visitor` comes instead. Returns what rank 0 and the visitor
/// report.
fn refused(host: Env, visitor: Env) -> (Option<Refusal>, Refusal) {
    let patience = Duration::from_millis(400);
    thread::scope(|scope| {
        let host = scope.spawn(move || host.run(2 * patience, |_| Ok(())));
        let visitor = visitor.run(patience, |_| Ok(()));
        let Err(Error::Refused { rank: 1, refusal, .. }) = visitor else { panic!("{visitor:?}") };
        (last(host.join().unwrap()), refusal)
    })
}

/// Both sides report the same reason.
fn both(host: Env, visitor: Env, expected: Refusal) {
    let outcome = refused(host, visitor);
    assert_eq!(outcome, (Some(expected.clone()), expected));
}

#[test]
fn a_process_that_is_not_the_rank_is_refused_with_the_reason_on_both_sides() {
    let job = Job::new(3);
    let own = |rank: usize| job.env(rank);
    let with = |rank: usize, key: &str, list: &std::path::Path| {
        with!(job.env(rank), identity = job.identity(key, list))
    };
    let other = PrivateKey::generate().unwrap();
    other.write(job.path("other.pem")).unwrap();

    // The visitor's list has its own key for rank 1, and rank 0's list has not.
    let list = job.list("own.json", |members| members[1].key = other.public().clone());
    both(own(0), with(1, "other.pem", &list), Refusal::UnknownKey);
    // The visitor's list has another key for rank 0, so the visitor refuses.
    let list = job.list("zero.json", |members| members[0].key = other.public().clone());
    both(own(0), with(1, "rank1.pem", &list), Refusal::UnknownKey);
    // The visitor has rank 2's key, and a list in which it is rank 1's.
    let list = job.list("swap.json", |members| {
        let keys = [members[2].key.clone(), members[1].key.clone()];
        [members[1].key, members[2].key] = keys;
    });
    both(own(0), with(1, "rank2.pem", &list), Refusal::OtherRank);
    // Rank 0's list has the visitor's key, as that of an auditor.
    let list = job.list("auditor.json", |members| {
        members[1].key = other.public().clone();
        members.push(Member::named("ann", Role::Auditor, job.keys[1].public().clone()));
    });
    both(with(0, "rank0.pem", &list), own(1), Refusal::Role);
    // The same keys with other roles.
    let list = job.list("roles.json", |members| members[1].role = Role::Trainer);
    both(own(0), with(1, "rank1.pem", &list), Refusal::OtherMembership);
    let list = job.list("expired.json", |members| {
        members[1].not_after = Some(SystemTime::now() - Duration::from_secs(1));
    });
    both(with(0, "rank0.pem", &list), own(1), Refusal::Expired);
    // The same keys in another file.
    let list = job.list("more.json", |members| {
        members.push(Member::rank(7, Role::Trainer, other.public().clone()));
    });
    both(own(0), with(1, "rank1.pem", &list), Refusal::OtherMembership);
    both(own(0), with!(own(1), epoch = 1), Refusal::OtherEpoch);
    let token = |rank, token: &str| with!(own(rank), token = token.into());
    both(token(0, "token"), token(1, "guess"), Refusal::OtherToken);
    both(token(0, "token"), own(1), Refusal::OtherToken);
}

#[test]
fn another_job_and_another_world_are_refused() {
    let (job, other) = (Job::new(2), Job::new(2));
    // With the same keys, but for another job.
    let list = other.path("other-job.json");
    Membership::new("other", 0..=0, None, job.members()).unwrap().write(&list, &job.owner).unwrap();
    let visitor = with!(job.env(1), job = "other".into(), identity = job.identity("rank1.pem", &list));
    both(job.env(0), visitor, Refusal::OtherJob);
    both(job.env(0), with!(job.env(1), world = 3), Refusal::OtherWorld);
    // All keys are unknown to each other.
    both(job.env(0), with!(other.env(1), port = job.port), Refusal::UnknownKey);
    // A process with an unknown key does not learn whether the rest is right.
    let list = other.list("host.json", |members| members[0].key = job.keys[0].public().clone());
    let visitor = |world, epoch| {
        let identity = other.identity("rank1.pem", &list);
        with!(other.env(1), port = job.port, world = world, epoch = epoch, identity = identity)
    };
    both(job.env(0), visitor(3, 0), Refusal::UnknownKey);
    both(job.env(0), visitor(2, 1), Refusal::UnknownKey);
}

#[test]
fn there_is_no_way_back_to_plaintext() {
    let job = Job::new(2);
    let plain = |rank| with!(env(rank, 2, job.port), token = "token".into(), job = "job".into());
    both(job.env(0), plain(1), Refusal::Plaintext);
    both(plain(0), job.env(1), Refusal::Plaintext);
    both(job.env(0), with!(plain(1), token = "".into()), Refusal::Plaintext);
}

/// Runs the ranks of a job while `disturb` does what it wants with the port of rank 0. The last
/// rank comes when `disturb` has returned.
fn disturbed(job: &Job, disturb: impl FnOnce(u16) + Send) {
    thread::scope(|scope| {
        let early: Vec<_> = (0..job.keys.len() - 1).map(|rank| job.env(rank)).collect();
        let early = scope.spawn(move || {
            run(DEADLINE, early, |group| {
                group.barrier()?;
                Ok(group.rank())
            })
        });
        thread::sleep(Duration::from_millis(100));
        disturb(job.port);
        let last = job.env(job.keys.len() - 1).run(DEADLINE, |group| {
            group.barrier()?;
            Ok(group.rank())
        });
        let outcomes: Vec<_> = early.join().unwrap().into_iter().chain([last]).collect();
        assert_eq!(outcomes, (0..job.keys.len()).map(Ok).collect::<Vec<_>>());
    });
}

#[test]
fn intruders_do_not_harm_the_other_ranks() {
    let job = Job::new(3);
    let stolen =
        job.list("stolen.json", |members| members[0].key = PrivateKey::generate().unwrap().public().clone());
    disturbed(&job, |port| {
        let patience = Duration::from_millis(300);
        // Rank 1 has connected.
        let taken = job.env(1).run(patience, |_| Ok(())).unwrap_err();
        assert!(matches!(taken, Error::Refused { refusal: Refusal::Taken, .. }), "{taken}");
        let lost = with!(job.env(2), identity = job.identity("rank2.pem", &stolen));
        assert!(matches!(lost.run(patience, |_| Ok(())), Err(Error::Refused { .. })));
        for garbage in
            [&b""[..], b"\x16", b"\x16\x03\x01\xff\xff", b"GET / HTTP/1.1\r\n\r\n", &[0; 4096], &[0x16; 4096]]
        {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let _ = stream.write_all(garbage);
            let mut answer = Vec::new();
            let _ = stream.set_read_timeout(Some(Duration::from_millis(20)));
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.len() < 64, "{} bytes", answer.len());
        }
    });
}

/// Who listens on rank 0's port before it does is not authenticated, so its refusal is not final.
#[test]
fn a_refusal_of_a_process_that_is_not_rank_0_is_not_final() {
    let port = crate::job::free_port();
    let rank = |rank| with!(env(rank, 2, port), token = "secret".into());
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    thread::scope(|scope| {
        let visitor = rank(1);
        let visitor = scope.spawn(move || visitor.run(DEADLINE, |group| group.barrier()));
        let (mut stream, _) = listener.accept().unwrap();
        // The number of ranks differs: another attempt would have the same result.
        stream.write_all(b"SHWREFUS\x04").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        drop((listener, stream));
        assert_eq!(rank(0).run(Duration::from_secs(5), |group| group.barrier()), Ok(()));
        assert_eq!(visitor.join().unwrap(), Ok(()));
    });
}

/// A connection takes a thread until it is closed, also while it is refused.
#[cfg(target_os = "linux")]
#[test]
fn refused_connections_take_few_threads() {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "rendezvous").count()
    };
    let _crowd = CROWD.lock();
    let most = std::sync::atomic::AtomicUsize::new(0);
    disturbed(&Job::new(3), |port| {
        let mut streams = Vec::new();
        for number in 0..400 {
            let mut stream = connect(port);
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
            streams.push(stream);
            if number % 20 == 0 {
                most.fetch_max(threads(), std::sync::atomic::Ordering::SeqCst);
            }
        }
    });
    // At most 64 and one for each rank. Other tests of this program have a few connections, too.
    let most = most.into_inner();
    assert!((20..150).contains(&most), "{most} threads");
}

/// Sends again what a rank has sent when it joined an earlier start of the job.
#[test]
fn recorded_connections_cannot_be_replayed() {
    let job = Job::new(2);
    let relay = Relay::to(job.port, |_, _| ());
    let envs = vec![job.env(0), with!(job.env(1), port = relay.port)];
    assert!(run(DEADLINE, envs, |group| group.barrier()).iter().all(Result::is_ok));
    let sent: Vec<_> =
        relay.recorded().into_iter().map(|[sent, _]| sent).filter(|sent| sent.len() > 500).collect();
    assert!(!sent.is_empty());
    thread::scope(|scope| {
        let env = job.env(0);
        let host = scope.spawn(move || env.run(Duration::from_millis(800), |_| Ok(())));
        thread::sleep(Duration::from_millis(100));
        for sent in &sent {
            let mut stream = TcpStream::connect(("127.0.0.1", job.port)).unwrap();
            let _ = stream.write_all(sent);
            let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
            let _ = stream.read_to_end(&mut Vec::new());
        }
        let last = last(host.join().unwrap());
        assert!(matches!(last, Some(Refusal::Handshake(_))), "{last:?}");
    });
}

/// Accepts the key of every server, and has no key itself.
#[derive(Debug)]
struct Anonymous;

impl ResolvesClientCert for Anonymous {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Anonymous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn connect(port: u16) -> TcpStream {
    let begin = Instant::now();
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(begin.elapsed() < DEADLINE, "{error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs rank 0 while `client` connects, and returns why rank 0 refused it.
fn refused_client(job: &Job, client: impl FnOnce(TcpStream)) -> String {
    thread::scope(|scope| {
        let env = job.env(0);
        let host = scope.spawn(move || env.run(Duration::from_millis(500), |_| Ok(())));
        client(connect(job.port));
        match last(host.join().unwrap()) {
            Some(Refusal::Handshake(reason)) => reason,
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn clients_without_a_key_are_refused() {
    let anonymous = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anonymous))
        .with_client_cert_resolver(Arc::new(Anonymous));
    let reason = refused_client(&Job::new(2), |mut stream| {
        let name = ServerName::try_from("rank-0").unwrap();
        let mut connection = ClientConnection::new(Arc::new(anonymous), name).unwrap();
        let error = loop {
            if let Err(error) = connection.complete_io(&mut stream) {
                break error;
            }
            let mut greeting = [0; 40];
            if let Ok(len @ 1..) = connection.reader().read(&mut greeting) {
                panic!("{len} bytes were sent to an unknown client");
            }
        };
        assert!(error.to_string().contains("alert"), "{error}");
    });
    assert!(reason.contains("sent no certificates"), "{reason}");
}

/// The first message of a TLS 1.2 client: version, 32 random bytes, no session, two cipher suites,
/// no compression; the extensions are the curve x25519 and the signatures Ed25519 and ECDSA.
#[test]
fn earlier_versions_of_tls_are_refused() {
    let hello = [
        &[0x03, 0x03][..],
        &[7; 32],
        &[0],
        &[0, 4, 0xc0, 0x2b, 0xc0, 0x2f],
        &[1, 0],
        &[0, 18],
        &[0, 10, 0, 4, 0, 2, 0, 29],
        &[0, 13, 0, 6, 0, 4, 8, 7, 4, 3],
    ]
    .concat();
    let length = |extra: usize| ((hello.len() + extra) as u16).to_be_bytes();
    let message = [&[0x16, 0x03, 0x01][..], &length(4), &[1, 0], &length(0), &hello].concat();
    let reason = refused_client(&Job::new(2), |mut stream| {
        stream.write_all(&message).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        // An alert: fatal, protocol_version (RFC 8446, section 6).
        assert!(matches!(answer[..], [0x15, 0x03, _, 0, 2, 2, 70]), "{answer:x?}");
    });
    assert!(reason.contains("incompatible"), "{reason}");
}

/// A rank whose own files do not fit does not connect.
#[test]
fn the_files_of_an_identity_are_checked_before_anything_is_sent() {
    let job = Job::new(2);
    let refused = |env: Env, words: &str| {
        let error = env.run(DEADLINE, |_| Ok(())).unwrap_err();
        let Error::Credential { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains(words), "{error}");
    };
    let list = |name: &str, change: &dyn Fn(&mut Vec<shardwise::security::Member>)| {
        let path = job.list(name, change);
        with!(job.env(1), identity = job.identity("rank1.pem", &path))
    };
    refused(with!(job.env(1), job = "another".into()), "this job is `another`");
    refused(with!(job.env(1), epoch = 2), "epochs 0 to 1, but this is epoch 2");
    refused(with!(job.env(1), identity = job.identity("rank0.pem", &job.path("membership.json"))), "rank 1");
    let past = SystemTime::now() - Duration::from_secs(60);
    refused(list("a.json", &|members| members[1].not_after = Some(past)), "expired");
    refused(list("b.json", &|members| drop(members.remove(1))), "does not have the key");
    fs::write(job.path("owner.pub"), PrivateKey::generate().unwrap().public().to_pem()).unwrap();
    refused(job.env(1), "has not signed");
    fs::write(job.path("owner.pub"), job.owner.public().to_pem()).unwrap();
    let text = fs::read_to_string(job.path("membership.json")).unwrap();
    fs::write(job.path("membership.json"), text.replace("\"rank\": 1", "\"rank\": 9")).unwrap();
    refused(job.env(1), "has not signed");
    let missing = with!(job.env(1), identity = job.identity("rank7.pem", &job.path("membership.json")));
    assert!(matches!(missing.run(DEADLINE, |_| Ok(())), Err(Error::Io { .. })));
}
