//! Rank 0's part of the rendezvous.

use super::{HELLO, MAGIC, PATIENCE, Peer, REFUSED, Rendezvous, code, nonce, refusal, user};
use crate::{
    comm::{ConnectError, Wire, linger, lock},
    error::{Error, Refusal, Result},
    security::audit::{AuditLog, Event},
};
use std::{
    collections::HashSet,
    io::{ErrorKind, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Rank 0 examines at most this many connections plus the number of ranks at a time, each in a
/// thread.
const EXAMINED: usize = 64;
/// The audit log has at most this many refusals of a start, so that nobody can fill the disk.
const AUDITED: usize = 1000;
/// The first byte of a connection that uses TLS: the type of the record of a handshake.
const TLS_HANDSHAKE: u8 = 22;

/// What the threads that examine connections report.
struct Board {
    /// The admitted connections, by rank. Empty after all ranks have connected.
    admitted: Mutex<Vec<Option<Peer>>>,
    refused: Mutex<Refused>,
    /// None after all ranks have connected.
    audit: Mutex<Option<AuditLog>>,
}

/// The refused connections.
#[derive(Default)]
struct Refused {
    count: u64,
    /// The last reason that is known.
    last: Option<Refusal>,
    /// The machines and reasons that are in the audit log.
    logged: HashSet<(IpAddr, String)>,
}

/// A connection that is being examined. Its thread holds it until it has reported a refusal.
struct Examined {
    tcp: Arc<TcpStream>,
    /// Where the connection comes from. The socket no longer knows it after a reset.
    peer: SocketAddr,
    /// Set while `Board::admitted` is locked.
    is_admitted: AtomicBool,
}

impl Board {
    /// Writes to the audit log how many connections were refused, and no later refusal.
    fn log_count(&self) {
        let count = lock(&self.refused).count;
        if let Some(audit) = lock(&self.audit).take().filter(|_| count > 0) {
            let _ = audit.write(&Event::new("refuse").number("connections", count));
        }
    }
}

impl Rendezvous {
    /// Rank 0: accepts the connections of all other ranks.
    pub(super) fn host(&self, deadline: Duration, audit: Option<&AuditLog>) -> Result<Vec<Option<Peer>>> {
        let begin = Instant::now();
        let admitted = Mutex::new((0..self.world).map(|_| None).collect());
        let board =
            Arc::new(Board { admitted, refused: Mutex::default(), audit: Mutex::new(audit.cloned()) });
        if self.world > 1 {
            let listener = self.listen(begin, deadline)?;
            // The connections under examination, oldest first.
            let mut examined = Vec::<Weak<Examined>>::new();
            loop {
                let missing: Vec<_> =
                    (1..self.world).filter(|&rank| lock(&board.admitted)[rank].is_none()).collect();
                if missing.is_empty() {
                    break;
                }
                if begin.elapsed() > deadline {
                    board.log_count();
                    let Refused { count: refused, last, .. } = &*lock(&board.refused);
                    let (address, refused, last) = (self.addresses[0], *refused, last.clone());
                    return Err(Error::NotConnected { missing, address, after: deadline, refused, last });
                }
                let Ok((tcp, peer)) = listener.accept() else {
                    thread::sleep(Duration::from_micros(500));
                    continue;
                };
                loop {
                    examined.retain(|connection| connection.strong_count() > 0);
                    if examined.len() < EXAMINED + self.world || begin.elapsed() > deadline {
                        break;
                    }
                    close(examined.first(), &board);
                    // The thread of the closed connection ends now.
                    thread::sleep(Duration::from_micros(500));
                }
                let (tcp, is_admitted) = (Arc::new(tcp), AtomicBool::new(false));
                let connection = Arc::new(Examined { tcp, peer, is_admitted });
                examined.push(Arc::downgrade(&connection));
                let (this, board) = (self.clone(), Arc::clone(&board));
                // If the thread cannot be started, the connection is dropped, which closes it.
                let _ = thread::Builder::new().name("rendezvous".into()).spawn(move || {
                    if let Err(error) = this.examine(&connection, &board) {
                        this.report(&connection, error, &board);
                    }
                });
            }
        }
        board.log_count();
        let mut peers = std::mem::take(&mut *lock(&board.admitted));
        for (wire, _) in peers.iter_mut().flatten() {
            // All ranks have connected. This byte starts the rank.
            let started = (&*wire).write_all(&[1]);
            started.map_err(|error| self.failed("a rank was lost before the start", error))?;
        }
        Ok(peers)
    }

    /// Listens on the address of rank 0. With a token or an identity, rank 0 listens on all
    /// addresses of this machine instead if it cannot bind its own address, which may be a
    /// service's, or if the host's name resolves to loopback.
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

    /// Records that a connection was refused, and gives the other process time to read the reason.
    /// Sends the reason first if the other process expects one in plaintext.
    fn report(&self, connection: &Examined, error: ConnectError, board: &Board) {
        let Examined { tcp, peer, .. } = connection;
        let mut refused = lock(&board.refused);
        refused.count += 1;
        let ConnectError::Refused(reason) = error else { return };
        refused.last = Some(reason.clone());
        // A process that is refused tries again many times.
        let is_new = refused.logged.len() < AUDITED && refused.logged.insert((peer.ip(), reason.to_string()));
        drop(refused);
        if let Some(audit) = lock(&board.audit).as_ref().filter(|_| is_new) {
            // If the log fails, the next event of this rank reports it.
            let _ = audit.write(&Event::new("refuse").text("peer", peer).text("reason", &reason));
        }
        tracing::warn!(target: "shardwise", rank = self.rank, %peer, %reason, "a connection is refused");
        if matches!(reason, Refusal::Plaintext | Refusal::OtherUser) {
            let plain = Wire::plain(Arc::clone(tcp));
            let _ = plain.write_until(&[REFUSED, &[code(&reason)]], Instant::now() + PATIENCE);
        }
        linger(tcp);
    }

    /// Performs the handshake of a connection. Admits the connection if it comes from a rank of
    /// this job that has not connected yet.
    fn examine(&self, connection: &Examined, board: &Board) -> Result<(), ConnectError> {
        let tcp = Arc::clone(&connection.tcp);
        tcp.set_nonblocking(false)?;
        let until = Instant::now() + PATIENCE;
        if self.checks_users() && !user::same_user(&tcp)? {
            return Err(Refusal::OtherUser.into());
        }
        let (wire, binding) = match &self.secure {
            Some(secure) => {
                let wire = secure.accept(tcp, until)?;
                let binding = secure.binding(&wire)?;
                (wire, binding)
            }
            None => (Wire::plain(tcp), [0; 32]),
        };
        let nonce = nonce()?;
        wire.write_until(&[MAGIC, &nonce], until)?;
        let mut magic = [0; 8];
        wire.read_until(&mut magic, until)?;
        if magic == *REFUSED {
            let mut reason = [0];
            wire.read_until(&mut reason, until)?;
            return Err(refusal(reason[0]).map_or(ErrorKind::InvalidData.into(), ConnectError::Refused));
        }
        if magic[0] == TLS_HANDSHAKE && self.secure.is_none() {
            return Err(Refusal::Plaintext.into());
        }
        if magic != *MAGIC {
            return Err(ErrorKind::InvalidData.into());
        }
        let (mut hello, mut proof) = ([0; HELLO], [0; 32]);
        wire.read_until(&mut hello, until)?;
        wire.read_until(&mut proof, until)?;
        let visitor = &hello[88..120];
        let rank = number(&hello, 0);
        let is_proved = self.proves(b"visitor", &[&binding, &nonce, &hello], &proof);
        let verdict = if is_proved { self.verdict(&wire, &hello) } else { Err(Refusal::OtherToken) };
        let mut admitted = lock(&board.admitted);
        let verdict = verdict.and_then(|()| match admitted.get(rank) {
            _ if rank == 0 || rank >= self.world => Err(Refusal::NoSuchRank),
            // The list is empty, because `host` has taken it after all ranks had connected.
            None => Err(Refusal::Taken),
            Some(Some((earlier, _))) if earlier.is_open() => Err(Refusal::Taken),
            Some(_) => Ok(()),
        });
        let answer = [verdict.as_ref().err().map_or(0, code)];
        let proof = self.proof(b"host", &[&binding, visitor, &answer]);
        wire.write_until(&[&answer, &proof], until)?;
        verdict?;
        // If `host` has closed the connection, which it does under the lock, the write above has
        // failed. From here on, it does not close it.
        connection.is_admitted.store(true, Ordering::Relaxed);
        admitted[rank] = Some((wire, self.frames([&nonce, visitor])));
        Ok(())
    }

    /// Compares a hello with this rank's job, and the key of the connection with the rank's.
    fn verdict(&self, wire: &Wire, hello: &[u8; HELLO]) -> Result<(), Refusal> {
        // The key comes first, so a process that is not the rank does not learn whether the rest
        // is right.
        if let Some(secure) = &self.secure {
            secure.admit(wire, number(hello, 0))?;
        }
        if hello[24..56] != self.job {
            return Err(Refusal::OtherJob);
        }
        if number(hello, 16) as u64 != self.epoch {
            return Err(Refusal::OtherEpoch);
        }
        if number(hello, 8) != self.world {
            return Err(Refusal::OtherWorld);
        }
        if hello[56..88] != self.membership() {
            return Err(Refusal::OtherMembership);
        }
        if hello[120] != u8::from(self.is_audited) { Err(Refusal::OtherAudit) } else { Ok(()) }
    }
}

/// Closes a connection that is being examined, unless it has been admitted.
fn close(connection: Option<&Weak<Examined>>, board: &Board) {
    // While this lock is held, `examine` cannot admit the connection.
    let _admitted = lock(&board.admitted);
    if let Some(connection) = connection.and_then(Weak::upgrade)
        && !connection.is_admitted.load(Ordering::Relaxed)
    {
        let _ = connection.tcp.shutdown(Shutdown::Both);
    }
}

/// The number of a hello at a place.
fn number(hello: &[u8; HELLO], at: usize) -> usize {
    let number = u64::from_le_bytes(std::array::from_fn(|byte| hello[at + byte]));
    usize::try_from(number).unwrap_or(usize::MAX)
}
