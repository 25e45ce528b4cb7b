//! The signed list of a job's ranks and their keys.

use super::{
    PrivateKey, PublicKey,
    keys::{read_file, unusable},
};
use crate::error::{Error, Refusal, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::HashSet,
    ffi::OsString,
    fmt::Write,
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Longer files are no membership files. A rank takes about 150 bytes.
const MAX_BYTES: u64 = 1 << 26;

/// A rank of a job and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The rank.
    pub rank: usize,
    /// Its public key.
    pub key: PublicKey,
    /// When the key expires; none if it does not.
    pub not_after: Option<SystemTime>,
}

/// The ranks of a job and their keys, from a file that the job's owner has signed.
///
/// The file is JSON:
///
/// ```json
/// {
///   "version": 1,
///   "job": "train-7",
///   "epochs": [0, 9],
///   "not_after": "2027-01-31T00:00:00Z",
///   "members": [
///     { "rank": 0, "key": "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=" },
///     { "rank": 1, "key": "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
///       "not_after": "2026-12-31T00:00:00Z" }
///   ]
/// }
/// ```
///
/// `epochs` are the first and the last start of the job for which the list is valid. Both
/// `not_after` may be left out. Unknown keys of the JSON are errors. The Ed25519 signature of the
/// file's bytes is in the file of the same name with `.sig` appended. To exclude a rank or to
/// change a key, sign a new list and start the job again.
///
/// ```
/// use shardwise::security::{Member, Membership, PrivateKey};
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("membership.json");
/// let (owner, rank0) = (PrivateKey::generate()?, PrivateKey::generate()?);
/// let member = Member { rank: 0, key: rank0.public().clone(), not_after: None };
/// Membership::new("train-7", 0..=9, None, [member])?.write(&path, &owner)?;
///
/// let membership = Membership::read(&path, owner.public())?;
/// assert_eq!(membership.member(0).unwrap().key, *rank0.public());
/// std::fs::write(&path, std::fs::read_to_string(&path)?.replace("train-7", "train-8"))?;
/// assert!(Membership::read(&path, owner.public()).is_err()); // the signature is another file's
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Membership {
    job: String,
    epochs: RangeInclusive<u64>,
    not_after: Option<SystemTime>,
    /// In rank order.
    members: Vec<Member>,
    /// The file's bytes, and their SHA-256.
    text: String,
    digest: [u8; 32],
}

/// The file as JSON.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u64,
    job: String,
    epochs: [u64; 2],
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
    members: Vec<FileMember>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct FileMember {
    rank: usize,
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
}

impl Membership {
    /// Returns a list. It is valid for the given starts of the job, until `not_after` if that is
    /// set.
    ///
    /// # Errors
    /// When there is no epoch or no member, two members have the same rank or the same key, or a
    /// time is not in the years 1970 to 9999.
    pub fn new(
        job: impl Into<String>,
        epochs: RangeInclusive<u64>,
        not_after: Option<SystemTime>,
        members: impl IntoIterator<Item = Member>,
    ) -> Result<Self> {
        let bad = |reason: String| Error::invalid("membership", reason);
        let text = |time: Option<SystemTime>| time.map(rfc3339).transpose().map_err(bad);
        let member = |member: Member| -> Result<_> {
            let (key, not_after) = (member.key.to_string(), text(member.not_after)?);
            Ok(FileMember { rank: member.rank, key, not_after })
        };
        let file = File {
            version: 1,
            job: job.into(),
            epochs: [*epochs.start(), *epochs.end()],
            not_after: text(not_after)?,
            members: members.into_iter().map(member).collect::<Result<_>>()?,
        };
        let text = serde_json::to_string_pretty(&file).map_err(|error| bad(error.to_string()))?;
        Self::parse(text + "\n").map_err(bad)
    }

    /// Parses the text of a file. The error is the reason.
    fn parse(text: String) -> Result<Self, String> {
        let file: File =
            serde_json::from_str(&text).map_err(|error| format!("no membership file: {error}"))?;
        let File { version, job, epochs: [first, last], not_after, members } = file;
        if version != 1 {
            return Err(format!("version {version} of membership files is not known: there is version 1"));
        }
        if first > last {
            return Err(format!("the first epoch, {first}, is after the last, {last}"));
        }
        let time = |text: Option<String>| {
            let parse = |text: String| {
                humantime::parse_rfc3339(&text).map_err(|error| {
                    format!("`not_after` is `{text}`, not a time such as 2027-01-31T00:00:00Z: {error}")
                })
            };
            text.map(parse).transpose()
        };
        let member = |FileMember { rank, key, not_after }| {
            let public = PublicKey::parse(&key)
                .ok_or_else(|| format!("the key of rank {rank} is no public key: `{key}`"))?;
            Ok(Member { rank, key: public, not_after: time(not_after)? })
        };
        let mut members: Vec<Member> = members.into_iter().map(member).collect::<Result<_, String>>()?;
        members.sort_by_key(|member| member.rank);
        if members.is_empty() {
            return Err("there are no members".into());
        }
        if let Some(pair) = members.windows(2).find(|pair| pair[0].rank == pair[1].rank) {
            return Err(format!("rank {} is listed twice", pair[0].rank));
        }
        let mut keys = HashSet::new();
        if let Some(twice) = members.iter().find(|member| !keys.insert(&member.key)) {
            return Err(format!("the key of rank {} is also another rank's", twice.rank));
        }
        let digest = Sha256::digest(&text).into();
        Ok(Self { job, epochs: first..=last, not_after: time(not_after)?, members, text, digest })
    }

    /// Reads a file, after it has verified the owner's signature.
    ///
    /// # Errors
    /// When one of the two files cannot be read, the signature is not `owner`'s, or the list is not
    /// valid as such ([`Membership::new`]).
    pub fn read(path: impl AsRef<Path>, owner: &PublicKey) -> Result<Self> {
        let path = path.as_ref();
        let (text, signature) = (read_file(path, MAX_BYTES)?, read_file(&signature_of(path), 64)?);
        if !owner.verifies(&text, &signature) {
            return Err(unusable(
                path,
                "the owner has not signed this file: was it changed, or is SHARDWISE_OWNER another key?",
            ));
        }
        let text = String::from_utf8(text.to_vec()).map_err(|error| unusable(path, error.to_string()))?;
        Self::parse(text).map_err(|reason| unusable(path, reason))
    }

    /// Checks an unsigned file and signs it.
    ///
    /// # Errors
    /// When the file cannot be read, is not valid, or the signature cannot be written.
    pub fn sign(path: impl AsRef<Path>, owner: &PrivateKey) -> Result<Self> {
        let path = path.as_ref();
        let text = String::from_utf8(read_file(path, MAX_BYTES)?.to_vec());
        let text = text.map_err(|error| unusable(path, error.to_string()))?;
        let membership = Self::parse(text).map_err(|reason| unusable(path, reason))?;
        let signature = owner.sign(membership.text.as_bytes())?;
        let to = signature_of(path);
        fs::write(&to, signature).map_err(|error| Error::io(to, &error))?;
        Ok(membership)
    }

    /// Writes the list and its signature.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>, owner: &PrivateKey) -> Result<()> {
        let path = path.as_ref();
        fs::write(path, &self.text).map_err(|error| Error::io(path, &error))?;
        Self::sign(path, owner).map(drop)
    }

    /// The job's name.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// The starts of the job for which the list is valid.
    pub fn epochs(&self) -> RangeInclusive<u64> {
        self.epochs.clone()
    }

    /// When the list expires; none if it does not.
    pub fn not_after(&self) -> Option<SystemTime> {
        self.not_after
    }

    /// The members, in rank order.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns the member of a rank.
    pub fn member(&self, rank: usize) -> Option<&Member> {
        let at = self.members.binary_search_by_key(&rank, |member| member.rank).ok()?;
        Some(&self.members[at])
    }

    /// The SHA-256 of the file.
    pub(super) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Checks that `key` is the key of a rank, and has not expired.
    pub(super) fn admit(&self, rank: usize, key: &[u8], now: SystemTime) -> Result<(), Refusal> {
        let expired = |not_after: Option<SystemTime>| not_after.is_some_and(|end| end < now);
        match self.member(rank) {
            Some(member) if member.key.der() == key => {
                if expired(self.not_after) || expired(member.not_after) {
                    Err(Refusal::Expired)
                } else {
                    Ok(())
                }
            }
            _ if self.members.iter().any(|member| member.key.der() == key) => Err(Refusal::OtherRank),
            _ => Err(Refusal::UnknownKey),
        }
    }
}

/// Formats a time as the file has it. The error is the reason.
fn rfc3339(time: SystemTime) -> Result<String, String> {
    let mut text = String::new();
    let is_late_enough = time >= SystemTime::UNIX_EPOCH; // Earlier times would panic.
    if is_late_enough && write!(text, "{}", humantime::format_rfc3339(time)).is_ok() {
        return Ok(text);
    }
    Err(format!("`not_after` is {time:?}, but the year has to be between 1970 and 9999"))
}

/// The path of a file's signature.
fn signature_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".sig");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn member(rank: usize, not_after: Option<SystemTime>) -> Member {
        Member { rank, key: PrivateKey::generate().unwrap().public().clone(), not_after }
    }

    /// Changes every byte of the list and of its signature, and cuts both at every length.
    #[test]
    fn every_change_of_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("membership.json");
        let (owner, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let list = Membership::new("job", 0..=0, None, [member(0, None), member(1, None)]).unwrap();
        list.write(&path, &owner).unwrap();
        let read = || Membership::read(&path, owner.public());
        assert_eq!(read().unwrap().members(), list.members());
        assert!(matches!(Membership::read(&path, other.public()), Err(Error::Credential { .. })));
        for file in [path.clone(), signature_of(&path)] {
            let bytes = fs::read(&file).unwrap();
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                fs::write(&file, &changed).unwrap();
                assert!(matches!(read(), Err(Error::Credential { .. })), "byte {at} of {}", file.display());
                fs::write(&file, &bytes[..at]).unwrap();
                assert!(matches!(read(), Err(Error::Credential { .. })), "{at} bytes of {}", file.display());
            }
            fs::write(&file, &bytes).unwrap();
        }
        read().unwrap();
    }

    #[test]
    fn lists_that_contradict_themselves_are_refused() {
        let refused = |epochs, members: Vec<Member>, words: &str| {
            let error = Membership::new("job", epochs, None, members).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let (one, two) = (member(0, None), member(1, None));
        refused(0..=1, vec![], "no members");
        #[expect(clippy::reversed_empty_ranges)]
        refused(3..=2, vec![one.clone()], "the first epoch, 3, is after the last, 2");
        refused(0..=1, vec![one.clone(), Member { rank: 0, ..two.clone() }], "rank 0 is listed twice");
        refused(
            0..=1,
            vec![one.clone(), Member { key: one.key.clone(), ..two.clone() }],
            "also another rank's",
        );
        let epoch = SystemTime::UNIX_EPOCH;
        for time in [epoch - Duration::from_secs(1), epoch + Duration::from_secs(253_402_300_800)] {
            refused(0..=1, vec![Member { not_after: Some(time), ..one.clone() }], "between 1970 and 9999");
            assert!(Membership::new("train", 0..=1, Some(time), [one.clone()]).is_err());
        }
        let text = Membership::new("train", 0..=1, None, [one]).unwrap().text;
        let parsed = |from: &str, to: &str| Membership::parse(text.replace(from, to)).unwrap_err();
        assert!(parsed("\"version\": 1", "\"version\": 2").contains("version 2"));
        assert!(parsed("\"job\"", "\"jobs\"").contains("jobs"));
        for wrong in ["", "MCsw", "MCowMCow"] {
            assert!(parsed("MCow", wrong).contains("is no public key"), "{wrong}");
        }
        assert!(parsed("\"job\"", "\"not_after\": \"tomorrow\", \"job\"").contains("tomorrow"));
    }

    #[test]
    fn keys_belong_to_one_rank_and_expire() {
        let now = SystemTime::now();
        let (before, after) = (now - Duration::from_secs(1), now + Duration::from_secs(1));
        let members = [member(0, None), member(1, Some(before)), member(2, Some(after))];
        let key = |rank: usize| members[rank].key.der().to_vec();
        let list = Membership::new("job", 0..=0, None, members.clone()).unwrap();
        assert_eq!(list.admit(0, &key(0), now), Ok(()));
        assert_eq!(list.admit(1, &key(1), now), Err(Refusal::Expired));
        assert_eq!(list.admit(2, &key(2), now), Ok(()));
        assert_eq!(list.admit(2, &key(0), now), Err(Refusal::OtherRank));
        assert_eq!(list.admit(3, &key(0), now), Err(Refusal::OtherRank));
        assert_eq!(list.admit(0, b"unknown", now), Err(Refusal::UnknownKey));
        let list = Membership::new("job", 0..=0, Some(before), members.clone()).unwrap();
        assert_eq!(list.admit(0, &key(0), now), Err(Refusal::Expired));
    }
}
