//! The keys of the ranks of `shardwise launch --tls`, and of benches.

use shardwise::{
    Error, Result,
    security::{Member, Membership, PrivateKey, Role},
};
use std::{fs, path::PathBuf};

/// A folder with a private key for each rank of one start of a job, and the signed list of their
/// public keys.
pub(crate) struct Identities(PathBuf);

impl Identities {
    /// Writes the files into a new folder. The key that signs the list is never written, so nobody
    /// can sign another list.
    pub(crate) fn write(folder: PathBuf, job: &str, ranks: usize) -> Result<Self> {
        let this = Self(folder);
        fs::create_dir(&this.0).map_err(|error| Error::io(&this.0, &error))?;
        let owner = PrivateKey::generate()?;
        let member = |rank| {
            let key = PrivateKey::generate()?;
            key.write(this.key(rank))?;
            // Every rank of a local job belongs to the user who started it.
            Ok(Member::rank(rank, Role::Checkpointer, key.public().clone()))
        };
        let members = (0..ranks).map(member).collect::<Result<Vec<_>>>()?;
        Membership::new(job, 0..=0, None, members)?.write(this.membership(), &owner)?;
        let written = fs::write(this.owner(), owner.public().to_pem());
        written.map_err(|error| Error::io(this.owner(), &error))?;
        Ok(this)
    }

    /// Returns the environment variables of a rank.
    pub(crate) fn variables(&self, rank: usize) -> [(&'static str, PathBuf); 3] {
        [
            ("SHARDWISE_KEY", self.key(rank)),
            ("SHARDWISE_MEMBERSHIP", self.membership()),
            ("SHARDWISE_OWNER", self.owner()),
        ]
    }

    fn key(&self, rank: usize) -> PathBuf {
        self.0.join(format!("rank{rank}.pem"))
    }

    fn membership(&self) -> PathBuf {
        self.0.join("membership.json")
    }

    fn owner(&self) -> PathBuf {
        self.0.join("owner.pub")
    }
}
