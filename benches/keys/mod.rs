//! The keys and the signed membership file of a job over TLS.

use shardwise::{
    Result,
    security::{Member, Membership, PrivateKey},
};
use std::path::PathBuf;
use tempfile::TempDir;

const JOB: &str = "bench";

/// A folder with the keys of a job's ranks. It is removed when it is dropped.
pub(crate) struct Keys(TempDir);

impl Keys {
    /// Makes the keys of `ranks` ranks, and an owner who signs their list.
    pub(crate) fn new(ranks: usize) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let keys = Self(tempfile::tempdir()?);
        let member = |rank| -> Result<Member> {
            let key = PrivateKey::generate()?;
            key.write(keys.of_rank(rank))?;
            Ok(Member { rank, key: key.public().clone(), not_after: None })
        };
        let members = (0..ranks).map(member).collect::<Result<Vec<_>>>()?;
        let owner = PrivateKey::generate()?;
        std::fs::write(keys.owner(), owner.public().to_pem())?;
        Membership::new(JOB, 0..=0, None, members)?.write(keys.membership(), &owner)?;
        Ok(keys)
    }

    fn of_rank(&self, rank: usize) -> PathBuf {
        self.0.path().join(format!("rank{rank}.pem"))
    }

    fn membership(&self) -> PathBuf {
        self.0.path().join("membership.json")
    }

    fn owner(&self) -> PathBuf {
        self.0.path().join("owner.pub")
    }

    /// Returns the value of an environment variable of a rank; none if it has nothing to do with
    /// keys.
    pub(crate) fn variable(&self, rank: usize, name: &str) -> Option<String> {
        let path = match name {
            "TORCHELASTIC_RUN_ID" => return Some(JOB.into()),
            "SHARDWISE_KEY" => self.of_rank(rank),
            "SHARDWISE_MEMBERSHIP" => self.membership(),
            "SHARDWISE_OWNER" => self.owner(),
            _ => return None,
        };
        Some(path.to_string_lossy().into_owned())
    }
}
