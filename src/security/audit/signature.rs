//! Signatures of lines.

#[cfg(feature = "tls")]
pub(crate) use signed::Signer;
#[cfg(not(feature = "tls"))]
pub(crate) use unsigned::Signer;

/// Whether lines of this event are signed.
pub(super) fn signs(event: &str) -> bool {
    matches!(event, "end" | "witness")
}

#[cfg(feature = "tls")]
mod signed {
    use crate::{
        error::Result,
        security::{PrivateKey, audit::line::Hash},
    };
    use base64::{Engine, prelude::BASE64_STANDARD};

    /// What is signed: this text, and the hash of the line.
    pub(super) fn message(hash: &Hash) -> [u8; 47] {
        let mut message = *b"shardwise audit--------------------------------";
        message[15..].copy_from_slice(hash);
        message
    }

    /// The key with which a rank signs. `Debug` shows the public key only.
    #[derive(Clone, Debug)]
    pub(crate) struct Signer(PrivateKey);

    impl Signer {
        /// Returns none if the key is not Ed25519: such a rank signs nothing.
        #[allow(dead_code)]
        pub(crate) fn of(key: &PrivateKey) -> Option<Self> {
            key.public().is_ed25519().then(|| Self(key.clone()))
        }

        /// Returns the signature of a line in base64.
        pub(in crate::security::audit) fn sign(&self, hash: &Hash) -> Result<String> {
            Ok(BASE64_STANDARD.encode(self.0.sign(&message(hash))?))
        }
    }
}

#[cfg(not(feature = "tls"))]
mod unsigned {
    use crate::{error::Result, security::audit::line::Hash};

    /// Without the feature `tls` there are no keys.
    #[derive(Clone, Debug)]
    pub(crate) enum Signer {}

    impl Signer {
        pub(in crate::security::audit) fn sign(&self, _: &Hash) -> Result<String> {
            match *self {}
        }
    }
}
