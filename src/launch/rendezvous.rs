//! The rendezvous of processes: rank 0 listens, and the other ranks connect and authenticate.
//!
//! Rank 0 sends a nonce. The connecting rank answers with a hello (its rank, world size, job, epoch
//! and its own nonce) and an HMAC-SHA-256 of nonce and hello, with the shared token as key. Rank 0
//! answers with its verdict and an HMAC of the rank's nonce and the verdict. So nobody without the
//! token can imitate either side, and nobody can replay a recorded handshake. Frames are later
//! authenticated with the token and both nonces, but not encrypted. Without a token, rank 0 listens
//! on loopback only, and any local program that connects can join as a rank.
//!
//! Connections from other programs cannot keep the group from forming. Rank 0 examines each
//! connection on a separate thread, for at most five seconds. It examines at most `world + 64`
//! connections at a time. If one more arrives, rank 0 closes the oldest connection. If that
//! connection came from a rank, the rank connects again.

use super::Env;
use crate::{
    comm::{Connections, Keyed, lock},
    error::{Error, Result},
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const OP: &str = "rendezvous";
const MAGIC: &[u8; 8] = b"SHWISE01";
/// How long the handshake of one connection may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Rank 0 examines at most this many connections plus the number of ranks at a time.
const EXAMINED: usize = 64;

type Bytes32 = [u8; 32];
/// A connection to another rank, and the key that authenticates its frames.
type Peer = (TcpStream, Keyed);
/// The admitted connections, by rank.
type Admitted = Mutex<Vec<Option<Peer>>>;

/// The addresses, the job and the secret with which the processes of a job find each other.
#[derive(Clone, Debug)]
pub(super) struct Rendezvous {
    /// The addresses of rank 0. The other ranks try them in turn until one answers.
    addresses: Vec<SocketAddr>,
    /// The addresses on which rank 0 may listen. Rank 0 uses the first that it can bind.
    listens: Vec<SocketAddr>,
    rank: usize,
    world: usize,
    epoch: u64,
    job: Bytes32,
    token: Vec<u8>,
}

/// Rank 0's answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Welcome,
    OtherJob,
    OtherEpoch,
    OtherWorld,
    NoSuchRank,
    Taken,
}

impl Verdict {
    const ALL: [Self; 6] =
        [Self::Welcome, Self::OtherJob, Self::OtherEpoch, Self::OtherWorld, Self::NoSuchRank, Self::Taken];

    /// Whether a rank that got this verdict should try again. The listener may be the rank 0 of an
    /// earlier start, and the next attempt may reach the right one.
    fn may_change(self) -> bool {
        matches!(self, Self::OtherJob | Self::OtherEpoch | Self::Taken)
    }

    fn text(self) -> &'static str {
        match self {
            Self::Welcome => "rank 0 admits this rank",
            Self::OtherJob => "rank 0 belongs to another job",
            Self::OtherEpoch => "rank 0 belongs to another start of the job",
            Self::OtherWorld => "rank 0 has another number of ranks",
            Self::NoSuchRank => "no process can connect as this rank",
            Self::Taken => "this rank has connected already",
        }
    }
}

impl Rendezvous {
    /// Creates the rendezvous of an environment. If all ranks are on this machine, they use a
    /// loopback address.
    ///
    /// # Errors
    /// When the host of rank 0 cannot be resolved, when the host has an address other than loopback
    /// and there is no token, or when the world has no such rank.
    pub(super) fn new(env: &Env) -> Result<Self> {
        let place = format!("{}:{}", env.host, env.port);
        let bad = |why: String| Error::invalid(OP, format!("rank 0 at {place}: {why}"));
        // `MASTER_ADDR` may have an IPv6 address in brackets, as addresses with a port do.
        let host = env.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&env.host);
        let host = if env.local_world >= env.world { "127.0.0.1" } else { host };
        let found = (host, env.port).to_socket_addrs().map_err(|e| bad(e.to_string()))?;
        let addresses: Vec<_> = found.collect();
        let here = *addresses.first().ok_or_else(|| bad("the host has no address".into()))?;
        if addresses.iter().any(|address| !address.ip().is_loopback()) && env.token.is_empty() {
            return Err(bad("ranks on a network need a shared secret: set SHARDWISE_TOKEN".into()));
        }
        let mut listens = vec![here];
        if !env.token.is_empty() {
            let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()];
            listens.extend(any.map(|any| SocketAddr::new(any, env.port)));
        }
        // A host may resolve its own name to loopback. Other machines could not connect there, so
        // rank 0 listens on all addresses instead.
        let is_name = host.parse::<IpAddr>().is_err();
        if is_name && here.ip().is_loopback() && listens.len() > 1 {
            listens.remove(0);
        }
        if env.rank >= env.world {
            return Err(Error::sizes(OP, "the rank", env.rank, "the number of ranks", env.world));
        }
        let job = Sha256::digest(env.job.as_bytes()).into();
        let token = env.token.clone().into_bytes();
        Ok(Self { addresses, listens, rank: env.rank, world: env.world, epoch: env.epoch, job, token })
    }

    /// Connects all ranks. Returns when all of them have connected.
    pub(super) fn join(&self, deadline: Duration) -> Result<Connections> {
        let peers = if self.rank == 0 { self.host(deadline)? } else { self.visit(deadline)? };
        Connections::new(self.rank, deadline, peers)
            .map_err(|error| self.failed("cannot set up the connections", error))
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        Error::invalid(
            OP,
            format!("rank {} of {}, at {}: {what}: {error}", self.rank, self.world, self.addresses[0]),
        )
    }

    /// Rank 0: accepts the connections of all other ranks.
    fn host(&self, deadline: Duration) -> Result<Vec<Option<Peer>>> {
        let begin = Instant::now();
        let admitted: Arc<Admitted> = Arc::new(Mutex::new((0..self.world).map(|_| None).collect()));
        if self.world > 1 {
            let listener = self.listen(begin, deadline)?;
            // The connections under examination, oldest first, and the number of connections that
            // failed the examination.
            let (mut examined, refused) = (VecDeque::<Weak<TcpStream>>::new(), Arc::new(AtomicU64::new(0)));
            loop {
                let missing: Vec<_> =
                    (1..self.world).filter(|&rank| lock(&admitted)[rank].is_none()).collect();
                if missing.is_empty() {
                    break;
                }
                if begin.elapsed() > deadline {
                    let others = match refused.load(Ordering::Relaxed) {
                        0 => String::new(),
                        others => format!(
                            " ({others} connections did not authenticate as a rank: does SHARDWISE_TOKEN differ?)"
                        ),
                    };
                    let what = format!("ranks {missing:?} did not connect{others}");
                    return Err(self.failed(&what, format!("the deadline of {deadline:?} is over")));
                }
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_micros(500));
                    continue;
                };
                examined.retain(|stream| stream.strong_count() > 0);
                if examined.len() >= EXAMINED + self.world {
                    // While this lock is held, `examine` cannot admit the connection that is closed
                    // here.
                    let _admitted = lock(&admitted);
                    let oldest = examined.pop_front().and_then(|stream| stream.upgrade());
                    oldest.inspect(|oldest| drop(oldest.shutdown(Shutdown::Both)));
                }
                let stream = Arc::new(stream);
                examined.push_back(Arc::downgrade(&stream));
                let (this, admitted, refused) = (self.clone(), Arc::clone(&admitted), Arc::clone(&refused));
                // If the thread cannot be started, the connection is dropped, which closes it.
                let _ = thread::Builder::new().name("rendezvous".into()).spawn(move || {
                    if this.examine(stream, &admitted).is_err() {
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        let mut peers = std::mem::take(&mut *lock(&admitted));
        for (peer, _) in peers.iter_mut().flatten() {
            // All ranks have connected. This byte starts the rank.
            peer.write_all(&[1]).map_err(|error| self.failed("a rank was lost before the start", error))?;
        }
        Ok(peers)
    }

    /// Listens on the address of rank 0. With a token, rank 0 listens on all addresses of this
    /// machine instead if it cannot bind its own address, which may be a service's, or if the
    /// host's name resolves to loopback.
    fn listen(&self, begin: Instant, deadline: Duration) -> Result<TcpListener> {
        let mut addresses = self.listens.iter().peekable();
        loop {
            let Some(address) = addresses.peek() else {
                return Err(self.failed("cannot listen", "there is no address"));
            };
            match TcpListener::bind(address) {
                Ok(listener) => {
                    let ready = listener.set_nonblocking(true).map(|()| listener);
                    return ready.map_err(|error| self.failed("cannot listen", error));
                }
                // The rank 0 of an earlier start may still listen, so try again.
                Err(error) if error.kind() == ErrorKind::AddrInUse && begin.elapsed() < deadline => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) if error.kind() == ErrorKind::AddrInUse || addresses.len() == 1 => {
                    let hint = "cannot listen (SHARDWISE_PORT chooses another port)";
                    return Err(self.failed(hint, error));
                }
                Err(_) => drop(addresses.next()),
            }
        }
    }

    /// Rank 0: performs the handshake of a connection. Admits the connection if it comes from a
    /// rank of this job that has not connected yet.
    fn examine(&self, connection: Arc<TcpStream>, admitted: &Admitted) -> io::Result<()> {
        let stream = &*connection;
        stream.set_nonblocking(false)?;
        let until = Instant::now() + PATIENCE;
        let nonce = nonce()?;
        write(stream, &[MAGIC, &nonce], until)?;
        let mut hello = [0; 96];
        read(stream, &mut hello, until)?;
        let mut proof = [0; 32];
        read(stream, &mut proof, until)?;
        if &hello[..8] != MAGIC || !self.proves(b"visitor", &[&nonce, &hello], &proof) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| hello[at + byte]));
        let rank = usize::try_from(number(8)).unwrap_or(usize::MAX);
        let visitor = &hello[64..96];
        let mut admitted = lock(admitted);
        let verdict = if hello[32..64] != self.job {
            Verdict::OtherJob
        } else if number(24) != self.epoch {
            Verdict::OtherEpoch
        } else if number(16) != self.world as u64 {
            Verdict::OtherWorld
        } else {
            match admitted.get(rank) {
                _ if rank == 0 || rank >= self.world => Verdict::NoSuchRank,
                // The list is empty, because `host` has taken it after all ranks had connected.
                None => Verdict::Taken,
                Some(Some((earlier, _))) if is_open(earlier) => Verdict::Taken,
                Some(_) => Verdict::Welcome,
            }
        };
        let answer = [verdict as u8];
        let proof = self.proof(b"host", &[visitor, &answer]);
        write(stream, &[&answer, &proof], until)?;
        if verdict == Verdict::Welcome {
            // This is the only reference to the connection. `host` takes a second reference only
            // under the lock, and only to close the connection. If `host` has closed it, the write
            // above has failed.
            let stream = Arc::into_inner(connection).ok_or(ErrorKind::ConnectionAborted)?;
            admitted[rank] = Some((stream, self.mac(b"link", &[&nonce, visitor])));
        }
        Ok(())
    }

    /// Other ranks: connects to rank 0, with retries. Returns when all ranks have connected.
    fn visit(&self, deadline: Duration) -> Result<Vec<Option<Peer>>> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        for address in self.addresses.iter().cycle() {
            let left = deadline.saturating_sub(begin.elapsed());
            let why = match self.connect(address, left) {
                Ok(Ok(peer)) => {
                    let mut peers: Vec<_> = (0..self.world).map(|_| None).collect();
                    peers[0] = Some(peer);
                    return Ok(peers);
                }
                Ok(Err(verdict)) if !verdict.may_change() => {
                    return Err(self.failed("rank 0 refuses this rank", verdict.text()));
                }
                Ok(Err(verdict)) => format!("rank 0 refuses this rank: {}", verdict.text()),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    return Err(self.failed("rank 0 has another token", "SHARDWISE_TOKEN differs"));
                }
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    "the connection was closed before all ranks had connected (does SHARDWISE_TOKEN differ?)"
                        .into()
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    "no answer in time".into()
                }
                Err(error) => error.to_string(),
            };
            if begin.elapsed() + pause > deadline {
                return Err(self.failed(&format!("no rank 0 within {deadline:?}"), why));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        Err(self.failed("no rank 0", "its host has no address"))
    }

    fn connect(
        &self,
        address: &SocketAddr,
        left: Duration,
    ) -> io::Result<std::result::Result<Peer, Verdict>> {
        let until = Instant::now() + PATIENCE.min(left);
        let stream = TcpStream::connect_timeout(address, remaining(until)?)?;
        let mut greeting = [0; 40];
        read(&stream, &mut greeting, until)?;
        let (magic, nonce_there) = greeting.split_at(8);
        if magic != MAGIC {
            return Err(io::Error::new(ErrorKind::InvalidData, "another program listens there"));
        }
        let own = nonce()?;
        let mut hello = [0; 96];
        hello[..8].copy_from_slice(MAGIC);
        hello[8..16].copy_from_slice(&(self.rank as u64).to_le_bytes());
        hello[16..24].copy_from_slice(&(self.world as u64).to_le_bytes());
        hello[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        hello[32..64].copy_from_slice(&self.job);
        hello[64..96].copy_from_slice(&own);
        let proof = self.proof(b"visitor", &[nonce_there, &hello]);
        write(&stream, &[&hello, &proof], until)?;
        let mut answer = [0; 33];
        read(&stream, &mut answer, until)?;
        let (verdict, proof) = answer.split_at(1);
        if !self.proves(b"host", &[&own, verdict], proof) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        match Verdict::ALL.get(verdict[0] as usize) {
            Some(Verdict::Welcome) => {}
            Some(refusal) => return Ok(Err(*refusal)),
            None => return Err(ErrorKind::InvalidData.into()),
        }
        // Rank 0 writes this byte after all ranks have connected.
        read(&stream, &mut [0; 1], Instant::now() + left)?;
        Ok(Ok((stream, self.mac(b"link", &[nonce_there, &own]))))
    }

    fn mac(&self, role: &[u8], parts: &[&[u8]]) -> Keyed {
        // HMAC accepts keys of any length. An empty key, which is allowed only on loopback,
        // authenticates nobody.
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.token).unwrap_or_else(|_| Hmac::new(&Default::default()));
        mac.update(role);
        parts.iter().for_each(|part| mac.update(part));
        mac
    }

    fn proof(&self, role: &[u8], parts: &[&[u8]]) -> Bytes32 {
        self.mac(role, parts).finalize().into_bytes().into()
    }

    fn proves(&self, role: &[u8], parts: &[&[u8]], proof: &[u8]) -> bool {
        // The comparison takes constant time, so that it leaks no prefix of the proof.
        self.mac(role, parts).verify_slice(proof).is_ok()
    }
}

fn nonce() -> io::Result<Bytes32> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(nonce)
}

fn remaining(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Fills `buffer`. `until` limits the time of the whole call, not of each read.
fn read(mut stream: &TcpStream, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(remaining(until)?))?;
        match stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write(mut stream: &TcpStream, parts: &[&[u8]], until: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(remaining(until)?))?;
    stream.write_all(&parts.concat())
}

/// Whether the connection is still open. The result is false if the peer has sent bytes that are
/// unread.
fn is_open(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let _ = stream.set_nonblocking(false);
    matches!(peeked, Err(error) if error.kind() == ErrorKind::WouldBlock)
}
