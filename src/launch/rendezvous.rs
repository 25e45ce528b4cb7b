//! How processes find each other: rank 0 listens, and the others prove who they are.
//!
//! Rank 0 sends a nonce. A rank answers with a hello (rank, world, job, epoch, a nonce of its own) and an HMAC-SHA-256 of
//! nonce and hello under the shared token. Rank 0 answers with its verdict, authenticated in the same way: neither side can
//! be imitated by who does not know the token, and nothing that was recorded is of use. The connections themselves are not
//! encrypted.
//!
//! Whoever else connects does no harm: every connection is examined by a thread of its own, for five seconds at most, and
//! of those there are at most 64 at a time.

use super::Env;
use crate::{
    comm::Line,
    error::{Error, Result},
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const OP: &str = "rendezvous";
const MAGIC: &[u8; 8] = b"SHWISE01";
/// How long one connection may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many connections are examined at a time.
const EXAMINED: usize = 64;

type Bytes32 = [u8; 32];

/// A place and a secret by which the processes of a job find each other.
#[derive(Clone, Debug)]
pub(super) struct Rendezvous {
    address: SocketAddr,
    rank: usize,
    world: usize,
    epoch: u64,
    job: Bytes32,
    token: Vec<u8>,
}

/// What rank 0 says to a hello.
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

    /// Whether another try may end otherwise: what listens there may be the rest of an earlier start.
    fn may_change(self) -> bool {
        matches!(self, Self::OtherJob | Self::OtherEpoch | Self::Taken)
    }

    fn words(self) -> &'static str {
        match self {
            Self::Welcome => "it is welcome",
            Self::OtherJob => "it listens for another job",
            Self::OtherEpoch => "it listens for another start of the job",
            Self::OtherWorld => "it counts another number of ranks",
            Self::NoSuchRank => "there is no such rank to connect",
            Self::Taken => "this rank has connected already",
        }
    }
}

impl Rendezvous {
    /// The meeting place that an environment names.
    ///
    /// # Errors
    /// When the host of rank 0 is not known, or is another than this one and there is no token.
    pub(super) fn new(env: &Env) -> Result<Self> {
        let place = format!("{}:{}", env.host, env.port);
        let bad = |why: String| Error::invalid(OP, format!("rank 0 at {place}: {why}"));
        let mut found = (env.host.as_str(), env.port).to_socket_addrs().map_err(|e| bad(e.to_string()))?;
        let address = found.next().ok_or_else(|| bad("the host has no address".into()))?;
        if !address.ip().is_loopback() && env.token.is_empty() {
            return Err(bad("ranks that talk over a network need a secret: set SHARDWISE_TOKEN".into()));
        }
        if env.rank >= env.world {
            return Err(Error::sizes(OP, "the rank", env.rank, "the number of ranks", env.world));
        }
        let job = Sha256::digest(env.job.as_bytes()).into();
        let token = env.token.clone().into_bytes();
        Ok(Self { address, rank: env.rank, world: env.world, epoch: env.epoch, job, token })
    }

    /// Returns when all ranks have come.
    pub(super) fn join(&self, deadline: Duration) -> Result<Line> {
        let peers = if self.rank == 0 { self.host(deadline)? } else { self.visit(deadline)? };
        Line::new(self.rank, deadline, peers).map_err(|error| self.failed("the connections fail", error))
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        Error::invalid(
            OP,
            format!("rank {} of {}, at {}: {what}: {error}", self.rank, self.world, self.address),
        )
    }

    /// Rank 0: takes in all others.
    fn host(&self, deadline: Duration) -> Result<Vec<Option<TcpStream>>> {
        let begin = Instant::now();
        let seats: Arc<Mutex<Vec<Option<TcpStream>>>> =
            Arc::new(Mutex::new((0..self.world).map(|_| None).collect()));
        let lock = || seats.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.world > 1 {
            let listener = self.listen(begin, deadline)?;
            let examined = Arc::new(AtomicUsize::new(0));
            loop {
                let missing: Vec<_> = (1..self.world).filter(|&rank| lock()[rank].is_none()).collect();
                if missing.is_empty() {
                    break;
                }
                if begin.elapsed() > deadline {
                    return Err(
                        self.failed(&format!("ranks {missing:?} did not come"), format!("{deadline:?}"))
                    );
                }
                match listener.accept() {
                    Ok((stream, _)) if examined.load(Ordering::Relaxed) < EXAMINED => {
                        examined.fetch_add(1, Ordering::Relaxed);
                        let (this, seats, examined) =
                            (self.clone(), Arc::clone(&seats), Arc::clone(&examined));
                        // A stranger's connection that cannot be examined is closed.
                        let _ = thread::Builder::new().name("rendezvous".into()).spawn(move || {
                            let _ = this.examine(stream, &seats);
                            examined.fetch_sub(1, Ordering::Relaxed);
                        });
                    }
                    Ok(_) => {}
                    Err(_) => thread::sleep(Duration::from_micros(500)),
                }
            }
        }
        let mut peers = std::mem::take(&mut *lock());
        for peer in peers.iter_mut().flatten() {
            // All are here: go.
            peer.write_all(&[1]).map_err(|error| self.failed("a rank was lost at once", error))?;
        }
        Ok(peers)
    }

    fn listen(&self, begin: Instant, deadline: Duration) -> Result<TcpListener> {
        loop {
            match TcpListener::bind(self.address) {
                Ok(listener) => {
                    let ready = listener.set_nonblocking(true).map(|()| listener);
                    return ready.map_err(|error| self.failed("cannot listen", error));
                }
                // The rank 0 of an earlier start may not have ended yet.
                Err(error) if error.kind() == ErrorKind::AddrInUse && begin.elapsed() < deadline => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => {
                    let hint = "cannot listen (SHARDWISE_PORT chooses another port)";
                    return Err(self.failed(hint, error));
                }
            }
        }
    }

    /// Rank 0: gives a connection its seat, if it has proved to be a rank of this job.
    fn examine(&self, mut stream: TcpStream, seats: &Mutex<Vec<Option<TcpStream>>>) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let until = Instant::now() + PATIENCE;
        let nonce = nonce()?;
        write(&mut stream, &[MAGIC, &nonce], until)?;
        let mut hello = [0; 96];
        read(&mut stream, &mut hello, until)?;
        let mut proof = [0; 32];
        read(&mut stream, &mut proof, until)?;
        if &hello[..8] != MAGIC || !self.proves(b"visitor", &[&nonce, &hello], &proof) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| hello[at + byte]));
        let rank = usize::try_from(word(8)).unwrap_or(usize::MAX);
        let visitor = &hello[64..96];
        let mut seats = seats.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let verdict = if hello[32..64] != self.job {
            Verdict::OtherJob
        } else if word(24) != self.epoch {
            Verdict::OtherEpoch
        } else if word(16) != self.world as u64 {
            Verdict::OtherWorld
        } else {
            match seats.get(rank) {
                _ if rank == 0 => Verdict::NoSuchRank,
                None => Verdict::NoSuchRank,
                Some(Some(seated)) if is_open(seated) => Verdict::Taken,
                Some(_) => Verdict::Welcome,
            }
        };
        let answer = [verdict as u8];
        let proof = self.proof(b"host", &[visitor, &answer]);
        write(&mut stream, &[&answer, &proof], until)?;
        if verdict == Verdict::Welcome {
            seats[rank] = Some(stream);
        }
        Ok(())
    }

    /// Another rank: connects to rank 0 until that is there and all others are, too.
    fn visit(&self, deadline: Duration) -> Result<Vec<Option<TcpStream>>> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let left = deadline.saturating_sub(begin.elapsed());
            let why = match self.knock(left) {
                Ok(Ok(stream)) => {
                    let mut peers: Vec<_> = (0..self.world).map(|_| None).collect();
                    peers[0] = Some(stream);
                    return Ok(peers);
                }
                Ok(Err(verdict)) if !verdict.may_change() => {
                    return Err(self.failed("rank 0 refuses this rank", verdict.words()));
                }
                Ok(Err(verdict)) => format!("rank 0 refuses this rank: {}", verdict.words()),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    return Err(
                        self.failed("what listens there does not know the token", "SHARDWISE_TOKEN differs")
                    );
                }
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    "the connection was closed before all ranks were there (does SHARDWISE_TOKEN differ?)"
                        .into()
                }
                Err(error) => error.to_string(),
            };
            if begin.elapsed() + pause > deadline {
                return Err(self.failed(&format!("no rank 0 within {deadline:?}"), why));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    fn knock(&self, left: Duration) -> io::Result<std::result::Result<TcpStream, Verdict>> {
        let until = Instant::now() + PATIENCE.min(left);
        let mut stream = TcpStream::connect_timeout(&self.address, remaining(until)?)?;
        let mut greeting = [0; 40];
        read(&mut stream, &mut greeting, until)?;
        let (magic, nonce_there) = greeting.split_at(8);
        if magic != MAGIC {
            return Err(io::Error::new(ErrorKind::InvalidData, "something else listens there"));
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
        write(&mut stream, &[&hello, &proof], until)?;
        let mut answer = [0; 33];
        read(&mut stream, &mut answer, until)?;
        let (verdict, proof) = answer.split_at(1);
        if !self.proves(b"host", &[&own, verdict], proof) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        match Verdict::ALL.get(verdict[0] as usize) {
            Some(Verdict::Welcome) => {}
            Some(refusal) => return Ok(Err(*refusal)),
            None => return Err(ErrorKind::InvalidData.into()),
        }
        // Rank 0 says when all are there.
        read(&mut stream, &mut [0; 1], Instant::now() + left)?;
        Ok(Ok(stream))
    }

    fn mac(&self, role: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
        // HMAC takes keys of any length; an empty one authenticates nothing, on loopback only.
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
        // In constant time.
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

/// Fills `buffer` before a point in time, however slowly the bytes come.
fn read(stream: &mut TcpStream, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
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

fn write(stream: &mut TcpStream, parts: &[&[u8]], until: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(remaining(until)?))?;
    stream.write_all(&parts.concat())
}

/// Whether the other side has not closed a connection on which it has nothing to say yet.
fn is_open(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let _ = stream.set_nonblocking(false);
    matches!(peeked, Err(error) if error.kind() == ErrorKind::WouldBlock)
}
