//! Where a process finds its key and how it recognizes the other ranks.

use crate::error::{Error, Result};
use std::path::PathBuf;

const OP: &str = "identity";

/// The files with which a process proves which rank it is. Feature `tls`: without it, a job with an
/// identity is refused.
///
/// | environment variable | `Key` | `Certificate` |
/// |---|---|---|
/// | `SHARDWISE_KEY` | the rank's private key, PEM (PKCS #8) | the same |
/// | `SHARDWISE_MEMBERSHIP` | the signed list of the ranks' keys | |
/// | `SHARDWISE_OWNER` | the public key that signs the list, PEM | |
/// | `SHARDWISE_CERTIFICATE` | | the rank's certificate and intermediates, PEM |
/// | `SHARDWISE_AUTHORITY` | | the authorities that sign certificates, PEM |
/// | `SHARDWISE_NAME` | | the DNS name of a rank's certificate, with `{rank}` and `{job}` |
///
/// With `Key`, TLS uses the keys themselves (raw public keys, RFC 7250): no authority is needed.
/// With `Certificate`, each rank's certificate has the DNS name that results from `name`, for
/// example `rank-3.train-7.ranks.example` for rank 3 of the job `train-7` and the name
/// `rank-{rank}.{job}.ranks.example`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Identity {
    /// A key that a signed membership file lists.
    Key {
        /// The private key of this rank.
        key: PathBuf,
        /// The membership file. Its signature is in the file of the same name with `.sig` appended.
        membership: PathBuf,
        /// The public key of the owner, who signs membership files.
        owner: PathBuf,
    },
    /// An X.509 certificate that an authority of the site has signed.
    Certificate {
        /// The private key of this rank.
        key: PathBuf,
        /// The certificate of this rank, then the intermediate certificates.
        certificate: PathBuf,
        /// The certificates of the authorities.
        authority: PathBuf,
        /// The DNS name of a rank's certificate, with `{rank}` and `{job}` in it.
        name: String,
    },
}

impl Identity {
    /// Reads the environment variables of the table above; none if none of them is set.
    ///
    /// # Errors
    /// When variables of both kinds are set, or only some variables of one kind.
    pub(crate) fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        const KEY: [&str; 2] = ["SHARDWISE_MEMBERSHIP", "SHARDWISE_OWNER"];
        const CERTIFICATE: [&str; 3] = ["SHARDWISE_CERTIFICATE", "SHARDWISE_AUTHORITY", "SHARDWISE_NAME"];
        let first = |names: &[&'static str]| names.iter().copied().find(|name| variable(name).is_some());
        let (of_key, of_certificate) = (first(&KEY), first(&CERTIFICATE));
        let needs = |name: &str, other: &str| {
            variable(name).ok_or_else(|| Error::invalid(OP, format!("{other} is set, but {name} is not")))
        };
        match (of_key, of_certificate, variable("SHARDWISE_KEY")) {
            (Some(one), Some(other), _) => {
                Err(Error::invalid(OP, format!("{one} and {other} are set, but a rank has one identity")))
            }
            (None, None, None) => Ok(None),
            (None, None, Some(_)) => {
                let others = "SHARDWISE_MEMBERSHIP and SHARDWISE_OWNER, or SHARDWISE_CERTIFICATE, \
                              SHARDWISE_AUTHORITY and SHARDWISE_NAME";
                Err(Error::invalid(OP, format!("SHARDWISE_KEY is set, but not {others}")))
            }
            (Some(one), None, _) => Ok(Some(Self::Key {
                key: needs("SHARDWISE_KEY", one)?.into(),
                membership: needs(KEY[0], one)?.into(),
                owner: needs(KEY[1], one)?.into(),
            })),
            (None, Some(one), _) => Ok(Some(Self::Certificate {
                key: needs("SHARDWISE_KEY", one)?.into(),
                certificate: needs(CERTIFICATE[0], one)?.into(),
                authority: needs(CERTIFICATE[1], one)?.into(),
                name: needs(CERTIFICATE[2], one)?,
            })),
        }
    }
}
