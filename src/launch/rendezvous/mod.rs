//! The rendezvous of processes: rank 0 listens, and the other ranks connect and authenticate.
//!
//! A connection begins with the TLS handshake if the job has identities. Then, over TLS or not:
//!
//! | from | bytes |
//! |---|---|
//! | both | a magic number of 8 bytes; rank 0 also a nonce of 32 |
//! | the visitor | a hello: rank, world, epoch, two hashes, a nonce, a byte; and a proof |
//! | rank 0 | its verdict, a byte; and a proof |
//! | rank 0 | a byte when all ranks have connected |
//!
//! The hashes are those of the job's name and of the membership file. The byte is 1 if the visitor
//! keeps an audit log, because all ranks of a job have to do the same. A proof is the HMAC-SHA-256
//! of the other side's nonce and the sender's message, with the shared token as key. Over TLS it
//! also covers 32 bytes that are exported from the session, so it proves nothing on another
//! connection. Nobody without the token can imitate either side, and nobody can replay a recorded
//! handshake. Frames are later authenticated with the token and both nonces, or by TLS,
//! which also encrypts them. Without a token and TLS, rank 0 listens on loopback only, and both
//! sides check that the other one belongs to the same user.
//!
//! Each side checks over TLS that the other's key is that of the rank. A side that refuses before
//! its message sends another magic number and the reason instead.
//!
//! Connections from other programs cannot keep the group from forming. Rank 0 examines each
//! connection on a separate thread, for at most five seconds. It examines at most `world + 64`
//! connections at a time. If one more arrives, rank 0 closes the oldest connection. If that
//! connection came from a rank, the rank connects again.

mod host;
mod secure;
mod user;
mod visit;

use super::Env;
use crate::{
    comm::{Connections, Keyed, LinkTerms, Wire},
    error::{Error, Refusal, Result},
    security::{
        Channel, Reach, Roles, Secret,
        audit::{self, AuditLog, Event, Signer},
    },
};
use hmac::{Hmac, KeyInit, Mac};
use secure::Secure;
use sha2::{Digest, Sha256};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

const OP: &str = "rendezvous";
const MAGIC: &[u8; 8] = b"SHWISE02";
/// Stands in the place of the other magic number, and is followed by the number of the reason.
const REFUSED: &[u8; 8] = b"SHWREFUS";
/// How long the handshake of one connection may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The length of a hello: three numbers, two hashes, a nonce, and whether there is an audit log.
const HELLO: usize = 121;

type Bytes32 = [u8; 32];
/// A connection to another rank and, without TLS, the key that authenticates its frames.
type Peer = (Wire, Option<Keyed>);

/// The addresses, the job and the secrets with which the processes of a job find each other.
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
    token: Secret,
    secure: Option<Arc<Secure>>,
    terms: LinkTerms,
    /// Whether this rank keeps an audit log.
    is_audited: bool,
}

/// The refusals that one process reports to the other, by number. Number 0 is the welcome.
const VERDICTS: [Refusal; 14] = [
    Refusal::OtherToken,
    Refusal::OtherJob,
    Refusal::OtherEpoch,
    Refusal::OtherWorld,
    Refusal::OtherMembership,
    Refusal::NoSuchRank,
    Refusal::Taken,
    Refusal::UnknownKey,
    Refusal::OtherRank,
    Refusal::Expired,
    Refusal::Plaintext,
    Refusal::OtherUser,
    Refusal::Role,
    Refusal::OtherAudit,
];

/// The number of a refusal.
fn code(refusal: &Refusal) -> u8 {
    let at = VERDICTS.iter().position(|verdict| verdict == refusal);
    // The other reasons are alerts of TLS, and never verdicts.
    at.map_or(u8::MAX, |at| at as u8 + 1)
}

/// The refusal with a number; none for the welcome.
fn refusal(code: u8) -> Option<Refusal> {
    let at = usize::from(code).checked_sub(1)?;
    Some(VERDICTS.get(at).cloned().unwrap_or_else(|| Refusal::Handshake(format!("reason {code}"))))
}

impl Rendezvous {
    /// Creates the rendezvous of an environment. If all ranks are on this machine, they use a
    /// loopback address.
    ///
    /// # Errors
    /// When the host of rank 0 cannot be resolved, when there is neither a token nor an identity
    /// and the host has an address other than loopback, when the files of the identity are not
    /// those of this rank, when the policy forbids plaintext, or when the world has no such rank.
    pub(super) fn new(env: &Env) -> Result<Self> {
        let place = format!("{}:{}", env.host, env.port);
        let bad = |why: String| Error::invalid(OP, format!("rank 0 at {place}: {why}"));
        // `MASTER_ADDR` may have an IPv6 address in brackets, as addresses with a port do.
        let host = env.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&env.host);
        let one_machine = env.local_world >= env.world;
        let host = if one_machine { "127.0.0.1" } else { host };
        let found = (host, env.port).to_socket_addrs().map_err(|e| bad(e.to_string()))?;
        let addresses: Vec<_> = found.collect();
        let here = *addresses.first().ok_or_else(|| bad("the host has no address".into()))?;
        let authenticates = !env.token.is_empty() || env.identity.is_some();
        if addresses.iter().any(|address| !address.ip().is_loopback()) && !authenticates {
            let set = "set SHARDWISE_TOKEN, or SHARDWISE_KEY for TLS";
            return Err(bad(format!("ranks on a network need a shared secret: {set}")));
        }
        if !authenticates && !user::CAN_CHECK && env.world > 1 {
            let why = "the users of connections cannot be checked on this system: set SHARDWISE_TOKEN";
            return Err(bad(why.into()));
        }
        let mut listens = vec![here];
        if authenticates && !one_machine {
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
        let reach = match one_machine {
            _ if env.world == 1 => Reach::Process,
            true => Reach::Machine,
            false => Reach::Network,
        };
        let channel = Channel { reach, encrypted: env.identity.is_some() && env.world > 1 };
        env.policy.admit("Link", channel, None)?;
        let secure = Secure::load(env)?.map(Arc::new);
        let roles = secure.as_ref().map_or(Roles::UNRESTRICTED, |secure| secure.roles(env.world));
        Ok(Self {
            addresses,
            listens,
            rank: env.rank,
            world: env.world,
            epoch: env.epoch,
            job: Sha256::digest(env.job.as_bytes()).into(),
            token: env.token.clone(),
            secure,
            is_audited: env.audit.is_some(),
            terms: LinkTerms { channel, policy: env.policy, roles },
        })
    }

    /// The key with which this rank signs its audit log.
    pub(super) fn signer(&self) -> Option<Signer> {
        self.secure.as_ref().and_then(|secure| secure.signer())
    }

    /// Adds to the audit log's `start` how this rank joins.
    pub(super) fn describe(&self, event: Event) -> Event {
        let event = event.text("policy", self.terms.policy).text("channel", self.terms.channel);
        let event = match &self.secure {
            Some(_) => event.text("membership", audit::hex(&self.membership())),
            None => event,
        };
        match self.terms.roles.role(self.rank) {
            Some(role) => event.text("role", role),
            None => event,
        }
    }

    /// Connects all ranks. Returns when all of them have connected. Rank 0 writes the connections
    /// that it refuses to `audit`.
    pub(super) fn join(&self, deadline: Duration, audit: Option<&AuditLog>) -> Result<Connections> {
        let peers = if self.rank == 0 { self.host(deadline, audit)? } else { self.visit(deadline)? };
        for (wire, _) in peers.iter().flatten() {
            // On a socket for IPv4 and IPv6, an address of IPv4 is a mapped one.
            for address in [wire.tcp().local_addr(), wire.tcp().peer_addr()] {
                let address = address.ok().map(|address| address.ip().to_canonical());
                self.terms.policy.admit("Link", self.terms.channel, address)?;
            }
        }
        Connections::new(self.rank, deadline, self.terms.clone(), peers)
            .map_err(|error| self.failed("cannot set up the connections", error))
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        Error::invalid(
            OP,
            format!("rank {} of {}, at {}: {what}: {error}", self.rank, self.world, self.addresses[0]),
        )
    }

    fn refused(&self, refusal: Refusal) -> Error {
        Error::Refused { rank: self.rank, world: self.world, address: self.addresses[0], refusal }
    }

    fn mac(&self, role: &[u8], parts: &[&[u8]]) -> Keyed {
        // HMAC accepts keys of any length. An empty key, which is allowed only on loopback and over
        // TLS, authenticates nobody.
        let token = self.token.reveal().as_bytes();
        let mut mac =
            Hmac::<Sha256>::new_from_slice(token).unwrap_or_else(|_| Hmac::new(&Default::default()));
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

    /// Whether both sides have to belong to one user, because nothing else authenticates them.
    fn checks_users(&self) -> bool {
        self.token.is_empty() && self.secure.is_none()
    }

    /// The key of the frames of a connection; none over TLS.
    fn frames(&self, nonces: [&[u8]; 2]) -> Option<Keyed> {
        self.secure.is_none().then(|| self.mac(b"link", &nonces))
    }

    /// The hash of the membership file; zeros without TLS.
    fn membership(&self) -> Bytes32 {
        self.secure.as_ref().map_or([0; 32], |secure| secure.digest())
    }
}

fn nonce() -> io::Result<Bytes32> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_arrive_as_they_were_sent() {
        for verdict in VERDICTS {
            assert_eq!(refusal(code(&verdict)), Some(verdict));
        }
        assert_eq!(refusal(0), None);
        assert!(matches!(refusal(code(&Refusal::Handshake("alert".into()))), Some(Refusal::Handshake(_))));
    }
}
