//! Which processes may join a job, and which connections may carry its data.
//!
//! Threads of one process share memory. Processes connect to rank 0 ([`crate::comm::Link`]), in one
//! of three ways:
//!
//! | set for every rank | ranks prove | frames |
//! |---|---|---|
//! | nothing; all are on one machine | that they have one user (Linux) | plaintext on loopback |
//! | `SHARDWISE_TOKEN` | that they know a secret | plaintext, authenticated |
//! | an [`Identity`] (feature `tls`) | that they have the key of the rank | TLS 1.3 |
//!
//! * `Membership` (feature `tls`) is the signed list of a job's members, with their keys and
//!   [roles](Role).
//! * [`audit`] is the log of what each rank has done, and its verification.
//! * [`Policy`] refuses transports that would send plaintext between machines, such as NCCL and
//!   MPI. [`Channel`] describes the transport of a group.
//!
//! `SECURITY.md` has the threat model, and `docs/security.md` an example with four processes.

pub mod audit;
#[cfg(feature = "tls")]
mod credentials;
mod identity;
#[cfg(feature = "tls")]
mod keys;
#[cfg(feature = "tls")]
mod membership;
mod policy;
mod roles;
mod secret;

#[cfg(feature = "tls")]
pub(crate) use credentials::Credentials;
pub use identity::Identity;
#[cfg(feature = "tls")]
pub use {
    keys::{PrivateKey, PublicKey},
    membership::{Member, Membership},
};
pub use {
    policy::{Channel, Policy, Reach},
    roles::{Role, Roles},
    secret::Secret,
};
