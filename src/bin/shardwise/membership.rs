//! `shardwise membership`: signs and checks the list of a job's keys.

use clap::Subcommand;
use shardwise::{
    Result,
    security::{Membership, PrivateKey, PublicKey},
};
use std::{fmt::Write, path::PathBuf, time::SystemTime};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Checks a list and writes its signature to the file of the same name with `.sig` appended.
    Sign {
        /// The list, in JSON.
        file: PathBuf,
        /// The owner's private key, in PEM.
        #[arg(long)]
        key: PathBuf,
    },
    /// Verifies the signature of a list and prints its members.
    Check {
        /// The list, in JSON.
        file: PathBuf,
        /// The owner's public key, in PEM.
        #[arg(long)]
        owner: PathBuf,
    },
}

impl Command {
    /// Returns what the command prints.
    pub(crate) fn run(&self) -> Result<String> {
        match self {
            Self::Sign { file, key } => {
                Membership::sign(file, &PrivateKey::read(key)?)?;
                Ok(String::new())
            }
            Self::Check { file, owner } => {
                Ok(describe(&Membership::read(file, &PublicKey::read(owner)?)?, SystemTime::now()))
            }
        }
    }
}

/// The job, epochs and expiry of a list, then a line for each member. A key expires with the list,
/// or before it.
fn describe(list: &Membership, now: SystemTime) -> String {
    let (first, last) = list.epochs().into_inner();
    let mut text =
        format!("job {}, epochs {first} to {last}, {}\n", list.job(), expiry(list.not_after(), now));
    for member in list.members() {
        let not_after = member.not_after.into_iter().chain(list.not_after()).min();
        let role = member.rank.map_or(String::new(), |_| format!("{}, ", member.role));
        let _ = writeln!(text, "{member}: {role}{}, {}", member.key, expiry(not_after, now));
    }
    text
}

fn expiry(not_after: Option<SystemTime>, now: SystemTime) -> String {
    match not_after {
        None => "does not expire".into(),
        Some(end) if end < now => format!("expired at {}", humantime::format_rfc3339(end)),
        Some(end) => format!("expires at {}", humantime::format_rfc3339(end)),
    }
}
