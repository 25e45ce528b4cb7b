//! The keys and the signed membership file of a job over TLS.

#[path = "../../src/bin/shardwise/identity.rs"]
mod identity;

use identity::Identities;
use tempfile::TempDir;

const JOB: &str = "bench";

/// The identities of a job's ranks, in a folder that is removed when this is dropped.
pub(crate) struct Keys {
    identities: Identities,
    _folder: TempDir,
}

impl Keys {
    pub(crate) fn new(ranks: usize) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let identities = Identities::write(folder.path().join("keys"), JOB, ranks)?;
        Ok(Self { identities, _folder: folder })
    }

    /// Returns the value of an environment variable of a rank; none if it has nothing to do with
    /// keys.
    pub(crate) fn variable(&self, rank: usize, name: &str) -> Option<String> {
        if name == "TORCHELASTIC_RUN_ID" {
            return Some(JOB.into());
        }
        let (_, path) = self.identities.variables(rank).into_iter().find(|(known, _)| *known == name)?;
        Some(path.to_string_lossy().into_owned())
    }
}
