//! TLS of the rendezvous. Without the feature `tls`, an identity is refused.

use super::Bytes32;
use crate::{
    comm::{ConnectError, Wire},
    error::{Refusal, Result},
    launch::Env,
    security::{Roles, audit::Signer},
};
use std::{io, net::TcpStream, sync::Arc, time::Instant};

/// What this rank needs for TLS.
#[cfg(feature = "tls")]
#[derive(Debug)]
pub(super) struct Secure(crate::security::Credentials);

#[cfg(feature = "tls")]
impl Secure {
    /// Reads the files of the environment's identity, if it has one.
    pub(super) fn load(env: &Env) -> Result<Option<Self>> {
        let load = |identity| crate::security::Credentials::load(identity, &env.job, env.epoch, env.rank);
        Ok(env.identity.as_ref().map(load).transpose()?.map(Self))
    }

    /// The key with which this rank signs its audit log.
    pub(super) fn signer(&self) -> Option<Signer> {
        self.0.signer()
    }

    /// The roles of the job's ranks.
    pub(super) fn roles(&self, world: usize) -> Roles {
        self.0.roles(world)
    }

    /// A hash of what all ranks must have in common.
    pub(super) fn digest(&self) -> Bytes32 {
        self.0.digest()
    }

    /// Makes the handshake as rank 0.
    pub(super) fn accept(&self, tcp: Arc<TcpStream>, until: Instant) -> Result<Wire, ConnectError> {
        Wire::secure(tcp, self.0.accept()?, until)
    }

    /// Makes the handshake as another rank.
    pub(super) fn connect(&self, tcp: Arc<TcpStream>, until: Instant) -> Result<Wire, ConnectError> {
        Wire::secure(tcp, self.0.connect()?, until)
    }

    /// Checks that the other end is rank `rank`.
    pub(super) fn admit(&self, wire: &Wire, rank: usize) -> Result<(), Refusal> {
        wire.session().map_or(Err(Refusal::Plaintext), |session| session.admit(&self.0, rank))
    }

    /// Returns bytes that only the two ends of this connection know.
    pub(super) fn binding(&self, wire: &Wire) -> io::Result<Bytes32> {
        wire.session().map_or(Err(io::ErrorKind::InvalidInput.into()), |session| session.binding())
    }
}

/// There is no value of this type.
#[cfg(not(feature = "tls"))]
#[derive(Debug)]
pub(super) enum Secure {}

#[cfg(not(feature = "tls"))]
impl Secure {
    pub(super) fn load(env: &Env) -> Result<Option<Self>> {
        let reason = "this program was built without TLS: enable the feature `tls` of shardwise".into();
        let refuse = |_| crate::Error::Unsupported { op: "identity", reason };
        env.identity.as_ref().map_or(Ok(None), |identity| Err(refuse(identity)))
    }

    pub(super) fn signer(&self) -> Option<Signer> {
        match *self {}
    }

    pub(super) fn roles(&self, _: usize) -> Roles {
        match *self {}
    }

    pub(super) fn digest(&self) -> Bytes32 {
        match *self {}
    }

    pub(super) fn accept(&self, _: Arc<TcpStream>, _: Instant) -> Result<Wire, ConnectError> {
        match *self {}
    }

    pub(super) fn connect(&self, _: Arc<TcpStream>, _: Instant) -> Result<Wire, ConnectError> {
        match *self {}
    }

    pub(super) fn admit(&self, _: &Wire, _: usize) -> Result<(), Refusal> {
        match *self {}
    }

    pub(super) fn binding(&self, _: &Wire) -> io::Result<Bytes32> {
        match *self {}
    }
}
