//! The logs of a job, and changes of their text.

use crate::security::audit::{AuditLog, Event, Finding, Head, Report, Verdict};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

pub(super) const JOB: &str = "train-7";
pub(super) const RANKS: usize = 3;
/// The lines that a rank writes in a start.
pub(super) const LINES: usize = 8;

#[cfg(feature = "tls")]
pub(super) struct Keys {
    keys: Vec<crate::security::PrivateKey>,
    pub(super) list: crate::security::Membership,
}

#[cfg(feature = "tls")]
impl Keys {
    pub(super) fn new(ranks: usize) -> Self {
        use crate::security::{Member, Membership, PrivateKey, Role};
        let keys: Vec<_> = (0..ranks).map(|_| PrivateKey::generate().unwrap()).collect();
        let member =
            |(rank, key): (usize, &PrivateKey)| Member::rank(rank, Role::Trainer, key.public().clone());
        let list = Membership::new(JOB, 0..=9, None, keys.iter().enumerate().map(member)).unwrap();
        Self { keys, list }
    }
}

/// The folder of the logs of a job, and what verifies them.
pub(super) struct Job {
    pub(super) folder: TempDir,
    pub(super) ranks: usize,
    #[cfg(feature = "tls")]
    pub(super) keys: Option<Keys>,
}

impl Job {
    /// A job whose ranks have no keys, and that was not started yet.
    pub(super) fn new(ranks: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            folder,
            ranks,
            #[cfg(feature = "tls")]
            keys: None,
        }
    }

    pub(super) fn path(&self, rank: usize) -> PathBuf {
        AuditLog::path(self.folder.path(), JOB, rank)
    }

    pub(super) fn open(&self, epoch: u64) -> Vec<AuditLog> {
        let open = |rank: usize| {
            #[cfg(feature = "tls")]
            let signer =
                self.keys.as_ref().and_then(|keys| crate::security::audit::Signer::of(&keys.keys[rank]));
            #[cfg(not(feature = "tls"))]
            let signer = None;
            AuditLog::open(self.folder.path(), JOB, epoch, rank, signer).unwrap()
        };
        (0..self.ranks).map(open).collect()
    }

    /// Writes what all ranks do until they work.
    pub(super) fn begin(&self, epoch: u64) -> Vec<AuditLog> {
        let logs = self.open(epoch);
        let start =
            Event::new("start").number("world", self.ranks as u64).text("channel", "one machine, TLS 1.3");
        let start = start.text("policy", "any").text("role", "trainer");
        #[cfg(feature = "tls")]
        let start = match &self.keys {
            Some(keys) => start.text("membership", crate::security::audit::line::hex(&keys.list.digest())),
            None => start,
        };
        write(&logs, &start.text("version", "0.1.0"));
        write(&logs, &Event::new("join").number("ranks", self.ranks as u64).durable());
        witness(&logs);
        logs
    }

    /// Writes a start of the job from its beginning to its end.
    pub(super) fn run(&self, epoch: u64) {
        let logs = self.begin(epoch);
        write(&logs, &Event::new("data_set").text("sha256", "ab".repeat(32)).flag("complete", true));
        write(&logs, &Event::new("save").text("folder", "out/step 7").list("files", ["a", "b"]).durable());
        write(&logs, &Event::new("gather").text("tensor", "lm_head.weight").number("by", 0));
        end(&logs, "ok");
        witness(&logs);
    }

    pub(super) fn verify(&self) -> Report {
        #[cfg(feature = "tls")]
        if let Some(keys) = &self.keys {
            return crate::security::audit::verify_signed([&self.folder], std::slice::from_ref(&keys.list))
                .unwrap();
        }
        crate::security::audit::verify([&self.folder]).unwrap()
    }

    pub(super) fn text(&self, rank: usize) -> String {
        fs::read_to_string(self.path(rank)).unwrap()
    }
}

pub(super) fn write(logs: &[AuditLog], event: &Event) {
    logs.iter().for_each(|log| log.write(event).unwrap());
}

pub(super) fn witness(logs: &[AuditLog]) {
    let heads: Vec<Head> = logs.iter().map(AuditLog::head).collect();
    logs.iter().for_each(|log| log.witness(&heads).unwrap());
}

pub(super) fn end(logs: &[AuditLog], result: &str) {
    write(logs, &Event::new("end").text("result", result).durable());
}

pub(super) fn hash_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives the lines from `from` on the numbers and hashes that continue the lines before, as
/// somebody without keys can do it. Signatures stay what they are.
pub(super) fn rechain(lines: &mut [String], from: usize) {
    let mut prev = match from {
        0 => "0".repeat(64),
        from => hash_field(&lines[from - 1]).into(),
    };
    for (seq, line) in lines.iter_mut().enumerate().skip(from) {
        let (rest, tail) = line.rsplit_once(",\"hash\":\"").unwrap();
        let (_, body) = rest.split_once(',').unwrap();
        let (body, _) = body.rsplit_once(",\"prev\":\"").unwrap();
        let hashed = format!("{{\"seq\":{seq},{body},\"prev\":\"{prev}\"");
        prev = hash_of(hashed.as_bytes());
        *line = format!("{hashed},\"hash\":\"{prev}{}", &tail[64..]);
    }
}

fn hash_field(line: &str) -> &str {
    &line.rsplit_once(",\"hash\":\"").unwrap().1[..64]
}

/// Writes a new file in place of a file, because some file systems wait for the disk when a file is
/// cut and written again.
pub(super) fn replace_file(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

pub(super) fn lines(text: &str) -> Vec<String> {
    text.lines().map(String::from).collect()
}

pub(super) fn join(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Returns the findings about a file that are no notes.
pub(super) fn about<'a>(report: &'a Report, path: &'a Path) -> impl Iterator<Item = &'a Finding> {
    report.findings().iter().filter(move |finding| finding.path == path && finding.kind > Verdict::Intact)
}

/// Checks verdict and findings of a report: file name, line, and words of the text.
#[track_caller]
pub(super) fn check(report: &Report, verdict: Verdict, findings: &[(&str, Option<u64>, &str)]) {
    assert_eq!(report.verdict(), verdict, "{report}");
    let found: Vec<_> = report.findings().iter().collect();
    assert_eq!(found.len(), findings.len(), "{report}");
    for (finding, (name, line, words)) in found.into_iter().zip(findings) {
        let file = finding.path.file_name().unwrap().to_str().unwrap();
        assert!(
            file == *name && finding.line == *line && finding.text.contains(words),
            "{finding}\n{report}"
        );
    }
}

pub(super) fn name(rank: usize) -> String {
    AuditLog::path(Path::new(""), JOB, rank).to_str().unwrap().into()
}
