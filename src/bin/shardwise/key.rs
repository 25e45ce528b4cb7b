//! `shardwise key`: makes private keys, and prints public keys.

use clap::Subcommand;
use shardwise::{Result, security::PrivateKey};
use std::path::PathBuf;

#[derive(Subcommand)]
pub(crate) enum Key {
    /// Makes an Ed25519 private key and prints its public key, as membership files list it.
    New {
        /// The file to write, in PEM. Only the user can read it. An existing file is not replaced.
        file: PathBuf,
    },
    /// Prints the public key of a private key, in PEM. SHARDWISE_OWNER names a file with this text.
    Public {
        /// The file of the private key, in PEM.
        file: PathBuf,
    },
}

impl Key {
    /// Returns what the command prints.
    pub(crate) fn run(&self) -> Result<String> {
        match self {
            Self::New { file } => {
                let key = PrivateKey::generate()?;
                key.write(file)?;
                Ok(format!("{}\n", key.public()))
            }
            Self::Public { file } => Ok(PrivateKey::read(file)?.public().to_pem()),
        }
    }
}
