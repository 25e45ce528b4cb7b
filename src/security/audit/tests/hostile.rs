//! Files that somebody made to deceive or to stop a verification.

use super::job::{JOB, Job, RANKS, check, hash_of, name};
use crate::{
    error::Error,
    security::audit::{AuditLog, Event, Verdict, verify},
};
use std::{
    fs,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// What cannot be read in a folder does not hide what its logs say.
#[cfg(unix)]
#[test]
fn other_entries_of_a_folder_are_findings() {
    let job = Job::new(RANKS);
    job.run(0);
    let path = |name: &str| job.folder.path().join(name);
    let made = std::process::Command::new("mkfifo").arg(path("a.audit.jsonl")).status().unwrap();
    assert!(made.success());
    fs::create_dir(path("b.audit.jsonl")).unwrap();
    std::os::unix::fs::symlink("none", path("c.audit.jsonl")).unwrap();
    std::os::unix::fs::symlink("c.audit.jsonl", path("d.audit.jsonl")).unwrap();
    let (sender, receiver) = mpsc::channel();
    let folder = job.folder.path().to_path_buf();
    thread::spawn(move || sender.send(verify([folder])));
    let report = receiver.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    let found = [
        ("a.audit.jsonl", None, "is no regular file"),
        ("b.audit.jsonl", None, "is no regular file"),
        ("c.audit.jsonl", None, "cannot be read: No such file"),
        ("d.audit.jsonl", None, "cannot be read: No such file"),
    ];
    check(&report, Verdict::Changed, &found);
    assert_eq!(report.logs().len(), RANKS);
    // A path that is given by name is an error; a folder is one of logs whatever its name is.
    for name in ["a.audit.jsonl", "c.audit.jsonl"] {
        assert!(matches!(verify([path(name)]), Err(Error::Io { .. })), "{name}");
    }
    assert!(matches!(verify([path("b.audit.jsonl")]), Err(Error::Invalid { .. })));
    // Instead of a rank's file.
    fs::remove_file(job.path(1)).unwrap();
    fs::create_dir(job.path(1)).unwrap();
    let report = job.verify();
    let of_rank = report.findings().iter().filter(|it| it.path == job.path(1) && it.kind == Verdict::Changed);
    assert!(of_rank.count() > 0, "{report}");
}

/// Nothing of a file reaches a terminal as a control character.
#[test]
fn reports_have_no_control_characters() {
    let folder = tempfile::tempdir().unwrap();
    let job = "x\u{1b}[2Jjob, rank 0: fine\nintact\n\u{202e}\"\r\\";
    let log = AuditLog::open(folder.path(), job, 0, 0, None).unwrap();
    log.write(&Event::new("start").number("world", 3)).unwrap();
    drop(log);
    let path = AuditLog::path(folder.path(), job, 0);
    let whole = fs::read_to_string(&path).unwrap();
    let other = whole.replace("job, rank", "job,\\u001b rank");
    let name = if cfg!(unix) { "y\u{1b}[8m\n'.audit.jsonl" } else { "y.audit.jsonl" };
    fs::write(folder.path().join(name), whole.replace("world\":3", "world\":\u{1b}\n") + &other).unwrap();
    fs::write(&path, whole.clone() + &whole.replace("\"rank\":0", "\"rank\":1") + "\u{1b}[0m\n").unwrap();
    let report = verify([folder.path()]).unwrap();
    let text = report.to_string();
    assert!(!text.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text:?}");
    assert_eq!(text.lines().count(), report.logs().len() + report.findings().len() + 1, "{text}");
    assert!(
        text.contains("job x\\u{1b}[2Jjob, rank 0: fine\\nintact\\n\\u{202e}\"\\r\\\\, rank 0: "),
        "{text}"
    );
    let finding = report.findings().iter().find(|it| it.path.ends_with(name)).unwrap();
    assert!(!finding.to_string().contains(char::is_control), "{finding}");
    assert_eq!(finding.to_string().contains("y\\u{1b}[8m\\n'.audit"), cfg!(unix), "{finding}");
}

/// A line of rank 0 of a job of one rank. Its hash becomes the next `prev`.
fn push(text: &mut String, prev: &mut String, seq: u64, event: &str, fields: &str) {
    let begin = text.len();
    *text += &format!(
        r#"{{"seq":{seq},"utc":"2026-11-30T12:00:00.123456Z","rank":0,"job":"{JOB}","epoch":0,"event":"{event}","fields":{{{fields}}},"prev":"{prev}""#
    );
    *prev = hash_of(&text.as_bytes()[begin..]);
    *text += &format!(",\"hash\":\"{prev}\"}}\n");
}

/// Many lines with one number, and claims about them.
#[test]
fn many_contradictions_take_little_time() {
    const LINES: u64 = 20_000;
    let folder = tempfile::tempdir().unwrap();
    let mut whole = String::new();
    let mut prev = "0".repeat(64);
    push(&mut whole, &mut prev, 0, "start", "\"world\":1");
    for _ in 0..LINES {
        push(&mut whole, &mut prev, 1, "x", "");
    }
    let head = |hash: u64| format!(r#"{{"rank":0,"seq":1,"hash":"{hash:064x}"}}"#);
    let alike = vec![head(1); 100_000];
    let different: Vec<_> = (0..100_000).map(head).collect();
    for heads in [alike, different] {
        let (mut text, mut prev) = (whole.clone(), prev.clone());
        push(&mut text, &mut prev, 2, "witness", &format!("\"heads\":[{}]", heads.join(",")));
        let path = folder.path().join("x.audit.jsonl");
        fs::write(&path, text).unwrap();
        let begin = Instant::now();
        let report = verify([path]).unwrap();
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert_eq!((report.verdict(), report.logs()[0].lines), (Verdict::Changed, LINES + 2));
    }
}

#[test]
fn jobs_with_other_names_have_other_files() {
    let path = |job: &str| AuditLog::path(Path::new(""), job, 7).to_str().unwrap().to_string();
    assert_eq!(path("train-7"), "train-7-rank7.audit.jsonl");
    assert_eq!(path("größe"), "größe-rank7.audit.jsonl");
    let longest = "x".repeat(64);
    assert_eq!(path(&longest), format!("{longest}-rank7.audit.jsonl"));
    assert_eq!(path("a.b"), format!("a-b-{}-rank7.audit.jsonl", &hash_of(b"a.b")[..8]));
    let long = "x".repeat(300);
    assert_eq!(path(&long), format!("{longest}-{}-rank7.audit.jsonl", &hash_of(long.as_bytes())[..8]));
    assert_eq!(name(1), "train-7-rank1.audit.jsonl");
    let folder = tempfile::tempdir().unwrap();
    for job in ["a-b", "a.b", "a/b", &long] {
        let log = AuditLog::open(folder.path(), job, 0, 0, None).unwrap();
        log.write(&Event::new("start").number("world", 1)).unwrap();
        log.write(&Event::new("end").text("result", "failed")).unwrap();
    }
    let report = verify([folder.path()]).unwrap();
    assert_eq!((report.logs().len(), report.verdict()), (4, Verdict::Intact), "{report}");
}
