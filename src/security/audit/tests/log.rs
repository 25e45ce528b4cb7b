//! What is written, and how a log is continued.

use crate::{
    error::{Error, Result},
    security::audit::{self, AuditLog, Event, Head, line::Line, record},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{fs, io, path::Path, thread, time::Duration};

const JOB: &str = "train \"7\"/ü";

fn open(folder: &Path, epoch: u64) -> Result<AuditLog> {
    AuditLog::open_within(folder, JOB, epoch, 2, None, Duration::ZERO)
}

fn path(folder: &Path) -> std::path::PathBuf {
    AuditLog::path(folder, JOB, 2)
}

fn start() -> Event {
    Event::new("start").number("world", 3).text("channel", "network, TLS 1.3")
}

fn hash_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks form, numbers and hashes of all lines, without the code that has written them. Returns
/// the lines.
fn check(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path(folder)).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    let mut prev = "0".repeat(64);
    let check = |(seq, line): (usize, &str)| {
        let value: Value = serde_json::from_str(line).unwrap();
        let (hashed, _) = line.rsplit_once(",\"hash\":\"").unwrap();
        let keys = ["seq", "utc", "rank", "job", "epoch", "event", "fields", "prev", "hash"];
        let find = |key: &str| match key {
            "hash" => hashed.len() + 1,
            key => line.find(&format!("\"{key}\":")).unwrap(),
        };
        let at = keys.map(find);
        assert!(at.is_sorted() && at[0] == 1, "{line}");
        assert_eq!(value.as_object().unwrap().len(), keys.len(), "{line}");
        assert_eq!(value["hash"], hash_of(hashed.as_bytes()), "{line}");
        assert_eq!((&value["seq"], &value["prev"]), (&json!(seq), &json!(prev)), "{line}");
        assert_eq!((&value["rank"], &value["job"]), (&json!(2), &json!(JOB)), "{line}");
        prev = value["hash"].as_str().unwrap().into();
        value
    };
    text.lines().enumerate().map(check).collect()
}

#[test]
fn lines_are_chained_over_starts() {
    let folder = tempfile::tempdir().unwrap();
    let folder = &folder.path().join("new/folder");
    let log = open(folder, 0).unwrap();
    assert_eq!(log.head(), Head { rank: 2, seq: 0, hash: [0; 32] });
    log.write(&start()).unwrap();
    let fields =
        Event::new("data").text("path", "a \"b\"\n\u{1}").number("files", u64::MAX).flag("all", true);
    log.clone().write(&fields.list("names", ["x", "y"]).json("more", json!({ "a": [-1] }))).unwrap();
    let heads = [log.head(), Head { rank: 0, seq: 7, hash: [0xab; 32] }];
    log.witness(&heads).unwrap();
    drop(log);
    let log = open(folder, 1).unwrap();
    log.write(&start().durable()).unwrap();
    let lines = check(folder);
    assert_eq!(lines.len(), 4);
    assert_eq!(
        lines[1]["fields"],
        json!({ "path": "a \"b\"\n\u{1}", "files": u64::MAX, "all": true, "names": ["x", "y"], "more": { "a": [-1] } })
    );
    let wanted = json!([{ "rank": 2, "seq": 1, "hash": lines[1]["hash"] }, { "rank": 0, "seq": 7, "hash": "ab".repeat(32) }]);
    assert_eq!(lines[2]["fields"], json!({ "heads": wanted }));
    let text = fs::read_to_string(path(folder)).unwrap();
    assert!(
        text.contains(&format!("{{\"rank\":0,\"seq\":7,\"hash\":\"{}\"}}]}}", "ab".repeat(32))),
        "{text}"
    );
    assert_eq!((&lines[2]["epoch"], &lines[3]["epoch"]), (&json!(0), &json!(1)));
    assert_eq!(log.head().seq, 3);
    assert_eq!(lines[3]["hash"], audit::line::hex(&log.head().hash));
    for head in heads {
        assert_eq!(Head::from_bytes(&head.to_bytes()), Some(head));
    }
    assert!(format!("{log:?}").contains("rank2.audit.jsonl"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(path(folder)).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

/// Cuts the file at every byte of its last line. A later start keeps what is left and says so.
#[test]
fn torn_lines_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (folder, file) = (folder.path(), path(folder.path()));
    let log = open(folder, 0).unwrap();
    log.write(&start()).unwrap();
    log.write(&Event::new("data")).unwrap();
    drop(log);
    let whole = fs::read(&file).unwrap();
    let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    let whole_hash = Line::parse(&whole[..first - 1]).unwrap().hash;
    for end in 0..whole.len() {
        fs::write(&file, &whole[..end]).unwrap();
        let log = open(folder, 0).unwrap();
        let torn = &whole[if end < first { 0 } else { first }..end];
        assert_eq!(fs::metadata(&file).unwrap().len(), end as u64, "opening writes nothing");
        log.write(&start()).unwrap();
        log.write(&Event::new("more")).unwrap();
        let after = fs::read(&file).unwrap();
        assert_eq!(after[..end], whole[..end]);
        let (mark, text) = (usize::from(!torn.is_empty()), String::from_utf8(after[end..].to_vec()).unwrap());
        let text = text.strip_prefix(&"\n"[..mark]).unwrap();
        let lines: Vec<_> = text.lines().map(|line| Line::parse(line.as_bytes()).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        if torn.is_empty() {
            assert_eq!(lines[0].fields.get("torn"), None);
        } else {
            let last = if end < first { [0; 32] } else { whole_hash };
            let prev = hash_of(&[&last[..], torn].concat());
            assert_eq!(audit::line::hex(&lines[0].prev), prev, "{end}");
            assert_eq!(lines[0].number("torn"), Some(torn.len() as u64), "{end}");
        }
        assert_eq!(lines[0].seq, u64::from(end >= first) + mark as u64, "{end}");
        assert_eq!((lines[1].seq, lines[1].prev), (lines[0].seq + 1, lines[0].hash), "{end}");
        assert_eq!(lines[1].fields.get("torn"), None);
    }
}

/// The end of a file is found whatever the lengths of its lines are.
#[test]
fn long_lines_are_continued() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), 0).unwrap();
    log.write(&start()).unwrap();
    drop(log);
    for len in [1, 7_800, 7_900, 8_000, 8_192, 32_500, 32_768, 200_000, 1 << 20] {
        let log = open(folder.path(), 0).unwrap();
        log.write(&Event::new("data").text("text", "x".repeat(len))).unwrap();
    }
    assert_eq!(check(folder.path()).len(), 10);
    let too_long = Event::new("data").text("text", "x".repeat(1 << 24));
    let log = open(folder.path(), 0).unwrap();
    assert!(matches!(log.write(&too_long), Err(Error::Invalid { .. })));
    // An event that is refused is no gap.
    log.write(&Event::new("data")).unwrap();
    assert_eq!(check(folder.path()).len(), 11);
    fs::write(path(folder.path()), vec![b'x'; 1 << 26]).unwrap();
    drop(log);
    let error = open(folder.path(), 0).unwrap_err();
    assert!(matches!(&error, Error::Io { kind: io::ErrorKind::InvalidData, .. }), "{error}");
}

#[test]
fn one_process_writes_a_log() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), 0).unwrap();
    let error = open(folder.path(), 0).unwrap_err();
    assert!(matches!(&error, Error::Io { kind: io::ErrorKind::ResourceBusy, .. }), "{error}");
    assert!(
        error.to_string().contains("rank2.audit.jsonl: another process writes this audit log"),
        "{error}"
    );
    thread::scope(|scope| {
        let later = scope.spawn(|| AuditLog::open(folder.path(), JOB, 0, 2, None));
        thread::sleep(Duration::from_millis(50));
        assert!(!later.is_finished());
        drop(log);
        later.join().unwrap().unwrap().write(&start()).unwrap();
    });
    assert_eq!(check(folder.path()).len(), 1);
}

#[test]
fn damaged_and_other_logs_are_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), 3).unwrap();
    log.write(&start()).unwrap();
    log.write(&Event::new("data").text("path", "here")).unwrap();
    drop(log);
    let refused = |text: &str, words: &str| {
        fs::write(path(folder.path()), text).unwrap();
        let error = open(folder.path(), 3).unwrap_err();
        assert!(matches!(&error, Error::Io { kind: io::ErrorKind::InvalidData, .. }), "{error}");
        let error = error.to_string();
        for words in [words, "rank2.audit.jsonl", "then move those of all its ranks away"] {
            assert!(error.contains(words), "`{words}` is not in: {error}");
        }
        assert_eq!(fs::read_to_string(path(folder.path())).unwrap(), text);
    };
    let text = fs::read_to_string(path(folder.path())).unwrap();
    refused(&text.replace("here", "hers"), "the last line was changed");
    refused(&text.replace("\"data\"", "\"DATA\""), "has no name of an event");
    refused(&format!("{text}\n"), "the last line has no `{\"seq\":` at its place");
    refused(&format!("{text}x\ny"), "the last line has no `{\"seq\":` at its place");
    let other = tempfile::tempdir().unwrap();
    for (job, rank) in [(JOB, 1), ("train -7-/ü", 2)] {
        let log = AuditLog::open(other.path(), job, 0, rank, None).unwrap();
        log.write(&start()).unwrap();
        let text = fs::read_to_string(AuditLog::path(other.path(), job, rank)).unwrap();
        refused(&text, &format!("is of rank {rank} of job `{job}`, not of rank 2 of job `{JOB}`"));
    }
    fs::write(path(folder.path()), text).unwrap();
    open(folder.path(), 3).unwrap();
}

/// A log that could not write stays failed.
#[cfg(target_os = "linux")]
#[test]
fn gaps_do_not_go_unnoticed() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", path(folder.path())).unwrap();
    let log = open(folder.path(), 0).unwrap();
    let error = log.write(&start()).unwrap_err();
    assert!(matches!(&error, Error::Io { kind: io::ErrorKind::StorageFull, .. }), "{error}");
    assert_eq!(log.clone().write(&Event::new("data")).unwrap_err(), error);
    assert_eq!(log.witness(&[]).unwrap_err(), error);
}

#[test]
fn programs_write_their_own_events() {
    let folder = tempfile::tempdir().unwrap();
    let event = |name: &str| Event::new(name).number("n", 1);
    record(&event("unwritten")).unwrap();
    let log = open(folder.path(), 0).unwrap();
    log.write(&start()).unwrap();
    audit::begin(Some(log));
    record(&event("data_set")).unwrap();
    audit::begin(None);
    record(&event("unwritten")).unwrap();
    audit::end();
    record(&event("data_set")).unwrap();
    thread::scope(|scope| scope.spawn(|| record(&event("unwritten"))).join().unwrap()).unwrap();
    let refused = |event: Event, words: &str| {
        let error = record(&event).unwrap_err();
        assert!(matches!(&error, Error::Invalid { reason, .. } if reason.contains(words)), "{error}");
    };
    let own = ["start", "join", "refuse", "save", "load", "gather", "deny", "witness", "end"];
    own.iter().for_each(|name| refused(event(name), "only the library writes events"));
    let long = "x".repeat(65);
    for name in ["", "Data", "data set", "data1", "dätä", "a\"", "a\n", &*long] {
        refused(event(name), "the name of an event is 1 to 64");
        let name = if name == "data1" { "a-b" } else { name };
        refused(event("data").text(name, 1), "the name of a field is 1 to 64");
    }
    refused(event("data").flag("n", true), "event `data` has two fields `n`");
    refused(event("data").json("f", json!([{ "x": 0.5 }])), "field `f` of event `data` has a float or null");
    refused(event("data").json("f", json!({ "x": null })), "has a float or null");
    refused(event("data").text("f", "x".repeat(1 << 20)), "but the most is 1048576");
    record(&event(&long[1..]).text("f", "x".repeat((1 << 20) - 500))).unwrap();
    audit::end();
    record(&event("unwritten")).unwrap();
    assert!(audit::current().is_none());
    let lines = check(folder.path());
    let events: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["start", "data_set", "data_set", &long[1..]]);
}

#[cfg(feature = "tls")]
#[test]
fn ends_and_witnesses_are_signed() {
    use crate::security::{PrivateKey, audit::Signer};
    use base64::{Engine, prelude::BASE64_STANDARD};
    let folder = tempfile::tempdir().unwrap();
    let key = PrivateKey::generate().unwrap();
    let signer = Signer::of(&key).unwrap();
    let secret = folder.path().join("key.pem");
    key.write(&secret).unwrap();
    let secret = fs::read_to_string(secret).unwrap();
    let secret = &secret.lines().nth(1).unwrap()[24..];
    let log = AuditLog::open(folder.path(), JOB, 0, 2, Some(signer.clone())).unwrap();
    assert!(!format!("{signer:?} {log:?}").contains(secret));
    for event in [start(), Event::new("join"), Event::new("end")] {
        log.write(&event).unwrap();
    }
    log.witness(&[log.head()]).unwrap();
    let text = fs::read_to_string(path(folder.path())).unwrap();
    assert!(!text.contains(secret));
    for (at, text) in text.lines().enumerate() {
        let line = Line::parse(text.as_bytes()).unwrap();
        assert_eq!(line.signature.is_some(), at > 1, "{text}");
        assert!(line.is_whole(), "{text}");
        let Some(signature) = line.signature else { continue };
        let signature = BASE64_STANDARD.decode(signature).unwrap();
        let message = [&b"shardwise audit"[..], &line.hash].concat();
        assert!(key.public().verifies(&message, &signature), "{text}");
        assert!(!key.public().verifies(&[&b"shardwise"[..], &line.hash].concat(), &signature), "{text}");
    }
}
