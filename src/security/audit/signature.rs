//! Signatures of lines.

#[cfg(feature = "tls")]
pub(crate) use signed::Signer;
#[cfg(feature = "tls")]
pub(super) use signed::{Lists, Verifier};
#[cfg(not(feature = "tls"))]
pub(crate) use unsigned::Signer;
#[cfg(not(feature = "tls"))]
pub(super) use unsigned::{Lists, Verifier};

/// Whether lines of this event are signed.
pub(super) fn signs(event: &str) -> bool {
    matches!(event, "end" | "witness")
}

#[cfg(feature = "tls")]
mod signed {
    use crate::{
        error::Result,
        security::{
            Membership, PrivateKey, PublicKey,
            audit::{
                Verdict,
                line::{Hash, Line, hex},
            },
        },
    };
    use base64::{Engine, prelude::BASE64_STANDARD};
    use std::collections::BTreeSet;

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
        pub(crate) fn of(key: &PrivateKey) -> Option<Self> {
            key.public().is_ed25519().then(|| Self(key.clone()))
        }

        /// Returns the signature of a line in base64.
        pub(in crate::security::audit) fn sign(&self, hash: &Hash) -> Result<String> {
            Ok(BASE64_STANDARD.encode(self.0.sign(&message(hash))?))
        }
    }

    /// The key of a rank.
    pub(in crate::security::audit) struct Verifier(PublicKey);

    impl Verifier {
        /// Whether `signature`, in base64, is of the line with this hash.
        pub(in crate::security::audit) fn verifies(&self, hash: &Hash, signature: &str) -> bool {
            BASE64_STANDARD
                .decode(signature)
                .is_ok_and(|signature| self.0.verifies(&message(hash), &signature))
        }
    }

    /// The lists of keys of a verification.
    #[derive(Clone, Copy, Default)]
    pub(in crate::security::audit) struct Lists<'a>(&'a [Membership]);

    impl<'a> Lists<'a> {
        pub(in crate::security::audit) fn new(lists: &'a [Membership]) -> Self {
            Self(lists)
        }

        /// The jobs of the lists.
        pub(in crate::security::audit) fn jobs(&self) -> BTreeSet<&'a str> {
            self.0.iter().map(Membership::job).collect()
        }

        /// The ranks that the lists of a job have.
        pub(in crate::security::audit) fn ranks(&self, job: &str) -> BTreeSet<usize> {
            let lists = self.0.iter().filter(|list| list.job() == job);
            lists.flat_map(Membership::members).filter_map(|member| member.rank).collect()
        }

        /// Returns the key that signs the lines of a start; none if they need no signature. The
        /// error is what follows from a list that does not fit, and the reason.
        pub(in crate::security::audit) fn choose(
            &self,
            start: &Line<'_>,
        ) -> Result<Option<Verifier>, (Verdict, String)> {
            let has_job = |list: &Membership| list.job() == start.job;
            let Some(digest) = start.text("membership") else {
                return if self.0.iter().any(has_job) {
                    Err((Verdict::Incomplete, "this start names no list of keys, so it is not signed".into()))
                } else {
                    Ok(None)
                };
            };
            let Some(list) = self.0.iter().find(|list| hex(&list.digest()) == digest) else {
                return if self.0.is_empty() {
                    Ok(None)
                } else {
                    let what = "was not given (its SHA-256 is this number)";
                    Err((Verdict::Incomplete, format!("the list of keys {digest} {what}")))
                };
            };
            let member =
                list.member(start.rank).filter(|_| has_job(list) && list.epochs().contains(&start.epoch));
            let member = member.ok_or_else(|| {
                let text = format!(
                    "the list of keys has no rank {} and epoch {} of this job",
                    start.rank, start.epoch
                );
                (Verdict::Changed, text)
            })?;
            if !member.key.is_ed25519() {
                let text = "the rank's key is not Ed25519, so it has signed nothing";
                return Err((Verdict::Incomplete, text.into()));
            }
            Ok(Some(Verifier(member.key.clone())))
        }
    }
}

#[cfg(not(feature = "tls"))]
mod unsigned {
    use crate::{
        error::Result,
        security::audit::{
            Verdict,
            line::{Hash, Line},
        },
    };
    use std::{collections::BTreeSet, marker::PhantomData};

    /// Without the feature `tls` there are no keys.
    #[derive(Clone, Debug)]
    pub(crate) enum Signer {}

    impl Signer {
        pub(in crate::security::audit) fn sign(&self, _: &Hash) -> Result<String> {
            match *self {}
        }
    }

    /// Without keys no signature is verified.
    pub(in crate::security::audit) enum Verifier {}

    impl Verifier {
        pub(in crate::security::audit) fn verifies(&self, _: &Hash, _: &str) -> bool {
            match *self {}
        }
    }

    #[derive(Clone, Copy, Default)]
    pub(in crate::security::audit) struct Lists<'a>(PhantomData<&'a ()>);

    impl<'a> Lists<'a> {
        pub(in crate::security::audit) fn jobs(&self) -> BTreeSet<&'a str> {
            BTreeSet::new()
        }

        pub(in crate::security::audit) fn ranks(&self, _: &str) -> BTreeSet<usize> {
            BTreeSet::new()
        }

        pub(in crate::security::audit) fn choose(
            &self,
            _: &Line<'_>,
        ) -> Result<Option<Verifier>, (Verdict, String)> {
            Ok(None)
        }
    }
}
