//! The signed list of a job's members, their keys and roles.

use super::{
    PrivateKey, PublicKey, Role, Roles,
    keys::{read_file, unusable},
};
use crate::error::{Error, Refusal, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::HashSet,
    ffi::OsString,
    fmt::{self, Write},
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Longer files are no membership files. A rank takes about 150 bytes.
const MAX_BYTES: u64 = 1 << 26;

/// A key of a job and its role. Either `rank` or `name` is set: the role says which one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The rank, if the role joins the job ([`Role::joins`]).
    pub rank: Option<usize>,
    /// The name, if the role does not join.
    pub name: Option<String>,
    /// The role.
    pub role: Role,
    /// The public key.
    pub key: PublicKey,
    /// When the key expires; none if it does not.
    pub not_after: Option<SystemTime>,
}

impl Member {
    /// A rank: a trainer, a checkpointer or an aggregator.
    pub fn rank(rank: usize, role: Role, key: PublicKey) -> Self {
        Self { rank: Some(rank), name: None, role, key, not_after: None }
    }

    /// A member that is no rank: an operator, an auditor or an owner.
    pub fn named(name: impl Into<String>, role: Role, key: PublicKey) -> Self {
        Self { rank: None, name: Some(name.into()), role, key, not_after: None }
    }
}

/// As in `rank 3`, or `auditor ann`.
impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&who(self.rank, self.name.as_deref(), self.role))
    }
}

fn who(rank: Option<usize>, name: Option<&str>, role: Role) -> String {
    rank.map_or_else(|| format!("{role} {}", name.unwrap_or("without a name")), |rank| format!("rank {rank}"))
}

/// The members of a job, their keys and roles, from a file that the job's owner has signed.
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
///     { "rank": 0, "role": "checkpointer",
///       "key": "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=" },
///     { "rank": 1, "role": "trainer",
///       "key": "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
///       "not_after": "2026-12-31T00:00:00Z" },
///     { "name": "ann", "role": "auditor",
///       "key": "MCowBQYDK2VwAyEAfMpnBoaNHkiPTTcyQMbvZxIrJ9CtMs4E2Ua5bqMXYo0=" }
///   ]
/// }
/// ```
///
/// `epochs` are the first and the last start of the job for which the list is valid. Each `role` is
/// a [`Role`]: those that join have a `rank`, the others a `name`. Both `not_after` may be left
/// out. Unknown keys of the JSON are errors. If owners are listed, their key has to be the one that
/// signs. The Ed25519 signature of the
/// file's bytes is in the file of the same name with `.sig` appended. To exclude a rank or to
/// change a key, sign a new list and start the job again.
///
/// ```
/// use shardwise::security::{Member, Membership, PrivateKey, Role};
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("membership.json");
/// let (owner, rank0) = (PrivateKey::generate()?, PrivateKey::generate()?);
/// let member = Member::rank(0, Role::Checkpointer, rank0.public().clone());
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
    /// The ranks in their order, then the other members in the order of their names.
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rank: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    role: String,
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
}

impl Membership {
    /// Returns a list. It is valid for the given starts of the job, until `not_after` if that is
    /// set.
    ///
    /// # Errors
    /// When there is no epoch or no rank, two members have the same rank, name or key, a role that
    /// joins has no rank or another one has no name, or a time is not in the years 1970 to 9999.
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
            let (rank, name, role) = (member.rank, member.name, member.role.to_string());
            Ok(FileMember { rank, name, role, key, not_after })
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
        // Names are printed.
        let is_plain = |name: &str| !name.is_empty() && !name.chars().any(char::is_control);
        if !is_plain(&job) {
            return Err(format!(
                "the job's name is {job:?}: it must not be empty or have control characters"
            ));
        }
        let member = |FileMember { rank, name, role, key, not_after }| {
            let role = role.parse::<Role>().map_err(|error| error.to_string())?;
            let who = who(rank, name.as_deref(), role);
            if role.joins() != rank.is_some() || role.joins() == name.is_some() {
                let needs = if role.joins() { "a rank and no name" } else { "a name and no rank" };
                return Err(format!("{who} has the role `{role}`, which needs {needs}"));
            }
            if name.as_deref().is_some_and(|name| !is_plain(name)) {
                return Err(format!("{who:?} is no name: it must not be empty or have control characters"));
            }
            let public = PublicKey::parse(&key);
            let key = public.ok_or_else(|| format!("the key of {who} is no public key: `{key}`"))?;
            Ok(Member { rank, name, role, key, not_after: time(not_after)? })
        };
        let mut members: Vec<Member> = members.into_iter().map(member).collect::<Result<_, String>>()?;
        let place = |member: &Member| (member.rank.is_none(), member.rank, member.name.clone());
        members.sort_by_key(place);
        if members.first().is_none_or(|member| member.rank.is_none()) {
            return Err("there are no ranks among the members".into());
        }
        if let Some(pair) = members.windows(2).find(|pair| place(&pair[0]) == place(&pair[1])) {
            return Err(format!("{} is listed twice", pair[0]));
        }
        let mut keys = HashSet::new();
        if let Some(twice) = members.iter().find(|member| !keys.insert(&member.key)) {
            return Err(format!("the key of {twice} is also another member's"));
        }
        let digest = Sha256::digest(&text).into();
        Ok(Self { job, epochs: first..=last, not_after: time(not_after)?, members, text, digest })
    }

    /// Reads a file, after it has verified the owner's signature.
    ///
    /// # Errors
    /// When one of the two files cannot be read, the signature is not `owner`'s, the list names
    /// another owner, or the list is not valid as such ([`Membership::new`]).
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
        Self::parse(text).and_then(|list| list.owned_by(owner)).map_err(|reason| unusable(path, reason))
    }

    /// Checks an unsigned file and signs it.
    ///
    /// # Errors
    /// When the file cannot be read, is not valid, names another owner, or the signature cannot be
    /// written.
    pub fn sign(path: impl AsRef<Path>, owner: &PrivateKey) -> Result<Self> {
        let path = path.as_ref();
        let text = String::from_utf8(read_file(path, MAX_BYTES)?.to_vec());
        let text = text.map_err(|error| unusable(path, error.to_string()))?;
        let membership = Self::parse(text).and_then(|list| list.owned_by(owner.public()));
        let membership = membership.map_err(|reason| unusable(path, reason))?;
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

    /// Checks that the owners that the list names have this key.
    fn owned_by(self, owner: &PublicKey) -> Result<Self, String> {
        let is_other = |member: &&Member| member.role == Role::Owner && member.key != *owner;
        match self.members.iter().find(is_other) {
            Some(other) => Err(format!("{other} has another key than the one that signs the list")),
            None => Ok(self),
        }
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

    /// The members: the ranks in their order, then the others by name.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns the member of a rank.
    pub fn member(&self, rank: usize) -> Option<&Member> {
        let place = |member: &Member| (member.rank.is_none(), member.rank);
        let at = self.members.binary_search_by_key(&(false, Some(rank)), place).ok()?;
        Some(&self.members[at])
    }

    /// The roles of the ranks of a job with `world` ranks. A rank that is not listed cannot join.
    pub(crate) fn roles(&self, world: usize) -> Roles {
        let role = |rank| self.member(rank).map_or(Role::Trainer, |member| member.role);
        Roles::new((0..world).map(role).collect::<Vec<_>>())
    }

    /// The SHA-256 of the file.
    pub(crate) fn digest(&self) -> [u8; 32] {
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
            _ => Err(match self.members.iter().find(|member| member.key.der() == key) {
                Some(member) if member.rank.is_none() => Refusal::Role,
                Some(_) => Refusal::OtherRank,
                None => Refusal::UnknownKey,
            }),
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
        let key = PrivateKey::generate().unwrap().public().clone();
        Member { not_after, ..Member::rank(rank, Role::Trainer, key) }
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
        refused(0..=1, vec![], "no ranks");
        #[expect(clippy::reversed_empty_ranges)]
        refused(3..=2, vec![one.clone()], "the first epoch, 3, is after the last, 2");
        refused(0..=1, vec![one.clone(), Member { rank: Some(0), ..two.clone() }], "rank 0 is listed twice");
        refused(
            0..=1,
            vec![one.clone(), Member { key: one.key.clone(), ..two.clone() }],
            "the key of rank 1 is also another member's",
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
    fn roles_say_who_is_a_rank() {
        let key = || PrivateKey::generate().unwrap();
        let (owner, ann) = (key(), key());
        let rank = member(0, None);
        let list = |other: Member| Membership::new("job", 0..=0, None, [other, rank.clone()]);
        let refused = |other: Member, words: &str| {
            let error = list(other).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let auditor = Member::named("ann", Role::Auditor, ann.public().clone());
        refused(Member { role: Role::Auditor, ..member(1, None) }, "rank 1 has the role `auditor`");
        refused(Member { role: Role::Trainer, ..auditor.clone() }, "which needs a rank and no name");
        refused(Member { rank: Some(1), ..auditor.clone() }, "which needs a name and no rank");
        refused(Member { name: None, ..auditor.clone() }, "auditor without a name");
        refused(Member { name: Some("a\nrank 9: checkpointer".into()), ..auditor.clone() }, "is no name");
        refused(Member { name: Some(String::new()), ..auditor.clone() }, "is no name");
        assert!(Membership::new("job\u{1b}[2J", 0..=0, None, [rank.clone()]).is_err());
        assert!(Membership::new("job", 0..=0, None, [auditor.clone()]).is_err());
        let listed = list(auditor.clone()).unwrap();
        assert_eq!(listed.members(), [rank.clone(), auditor.clone()]);
        assert_eq!(listed.admit(0, ann.public().der(), SystemTime::now()), Err(Refusal::Role));
        let unknown = Membership::parse(listed.text.replace("auditor", "editor")).unwrap_err();
        assert!(unknown.contains("`editor` is no role"), "{unknown}");
        let without = Membership::parse(listed.text.replace("\"role\": \"trainer\",", "")).unwrap_err();
        assert!(without.contains("missing field `role`"), "{without}");
        // An owner that is listed has to be the one that signs.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("membership.json");
        let of = |key: &PrivateKey| list(Member::named("eve", Role::Owner, key.public().clone())).unwrap();
        of(&owner).write(&path, &owner).unwrap();
        assert!(Membership::read(&path, owner.public()).is_ok());
        let error = of(&ann).write(&path, &owner).unwrap_err().to_string();
        assert!(error.contains("owner eve has another key"), "{error}");
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
