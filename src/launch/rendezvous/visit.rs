//! The part of the other ranks in the rendezvous.

use super::{HELLO, MAGIC, PATIENCE, Peer, REFUSED, Rendezvous, code, nonce, refusal, user};
use crate::{
    comm::{ConnectError, Wire, linger, remaining},
    error::{Refusal, Result},
};
use std::{
    io::{Error, ErrorKind},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

impl Rendezvous {
    /// Other ranks: connects to rank 0, with retries. Returns when all ranks have connected.
    pub(super) fn visit(&self, deadline: Duration) -> Result<Vec<Option<Peer>>> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        // The listener may be the rank 0 of an earlier start, so a refusal is final only at the
        // deadline.
        let mut refused = None;
        for address in self.addresses.iter().cycle() {
            let left = deadline.saturating_sub(begin.elapsed());
            let why = match self.connect(address, left) {
                Ok(peer) => {
                    let mut peers: Vec<_> = (0..self.world).map(|_| None).collect();
                    peers[0] = Some(peer);
                    return Ok(peers);
                }
                // Another attempt would have the same result.
                Err(ConnectError::Refused(refusal @ (Refusal::OtherWorld | Refusal::NoSuchRank))) => {
                    return Err(self.refused(refusal));
                }
                Err(ConnectError::Refused(refusal)) => {
                    refused = Some(refusal);
                    String::new()
                }
                Err(ConnectError::Io(error)) => describe(&error),
            };
            if begin.elapsed() + pause > deadline {
                let failed = || self.failed(&format!("no rank 0 within {deadline:?}"), why);
                return Err(refused.map_or_else(failed, |refusal| self.refused(refusal)));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        Err(self.failed("no rank 0", "its host has no address"))
    }

    fn connect(&self, address: &SocketAddr, left: Duration) -> Result<Peer, ConnectError> {
        let until = Instant::now() + PATIENCE.min(left);
        let tcp = Arc::new(TcpStream::connect_timeout(address, remaining(until)?)?);
        let (wire, binding) = match &self.secure {
            Some(secure) => {
                let wire = secure.connect(tcp, until)?;
                let binding = secure.binding(&wire)?;
                if let Err(refusal) = secure.admit(&wire, 0) {
                    wire.write_until(&[REFUSED, &[code(&refusal)]], until)?;
                    linger(wire.tcp());
                    return Err(refusal.into());
                }
                (wire, binding)
            }
            None => (Wire::plain(tcp), [0; 32]),
        };
        wire.write_until(&[MAGIC], until)?;
        let mut magic = [0; 8];
        wire.read_until(&mut magic, until)?;
        if magic == *REFUSED {
            let mut reason = [0];
            wire.read_until(&mut reason, until)?;
            return Err(match refusal(reason[0]) {
                // Rank 0 sends no other reason here. Nothing has authenticated the other process,
                // so the visitor goes on until its deadline.
                Some(refusal @ (Refusal::Plaintext | Refusal::OtherUser)) => refusal.into(),
                _ => Error::new(ErrorKind::InvalidData, "another program listens there").into(),
            });
        }
        if magic != *MAGIC {
            return Err(Error::new(ErrorKind::InvalidData, "another program listens there").into());
        }
        if self.checks_users() && !user::same_user(wire.tcp())? {
            return Err(Refusal::OtherUser.into());
        }
        let mut nonce_there = [0; 32];
        wire.read_until(&mut nonce_there, until)?;
        let (own, mut hello) = (nonce()?, [0; HELLO]);
        for (at, number) in [self.rank as u64, self.world as u64, self.epoch].into_iter().enumerate() {
            hello[8 * at..][..8].copy_from_slice(&number.to_le_bytes());
        }
        hello[24..56].copy_from_slice(&self.job);
        hello[56..88].copy_from_slice(&self.membership());
        hello[88..120].copy_from_slice(&own);
        hello[120] = u8::from(self.is_audited);
        let proof = self.proof(b"visitor", &[&binding, &nonce_there, &hello]);
        wire.write_until(&[&hello, &proof], until)?;
        let (mut answer, mut proof) = ([0], [0; 32]);
        wire.read_until(&mut answer, until)?;
        wire.read_until(&mut proof, until)?;
        if !self.proves(b"host", &[&binding, &own, &answer], &proof) {
            return Err(Refusal::OtherToken.into());
        }
        if let Some(refusal) = refusal(answer[0]) {
            return Err(refusal.into());
        }
        // Rank 0 writes this byte after all ranks have connected.
        wire.read_until(&mut [0; 1], Instant::now() + left)?;
        Ok((wire, self.frames([&nonce_there, &own])))
    }
}

fn describe(error: &Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "the connection was closed before all ranks had connected".into(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".into(),
        _ => error.to_string(),
    }
}
