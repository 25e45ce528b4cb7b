//! What a verification says of logs that were not changed by somebody, and of other files.

use super::job::{
    JOB, Job, RANKS, about, check, end, join, lines, name, rechain, replace_file, witness, write,
};
use crate::{
    error::Error,
    security::audit::{AuditLog, Event, Finding, Verdict, line, verify},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// A rank that is killed before its first line is whole has changed nothing.
#[test]
fn files_without_lines_are_incomplete() {
    let job = Job::new(2);
    let logs = job.open(0);
    write(&logs[..1], &Event::new("start").number("world", 2));
    drop(logs);
    let (names, unended) = ([0, 1].map(name), "this start has no `end`");
    let tail = "no other rank has witnessed this line";
    for (text, line, words) in [("", None, "the file is empty"), ("{\"seq", Some(1), "the file ends within")]
    {
        fs::write(job.path(1), text).unwrap();
        let mut findings =
            vec![(&*names[1], line, words), (&names[0], Some(1), unended), (&names[0], Some(1), tail)];
        check(&job.verify(), Verdict::Incomplete, &findings);
        fs::write(job.path(1), format!("{text}\n")).unwrap();
        findings = vec![
            (&names[1], None, "the file has no line of an audit log"),
            (&names[1], Some(1), "is no line"),
        ];
        findings.extend([(&*names[0], Some(1), unended), (&names[0], Some(1), tail)]);
        check(&job.verify(), Verdict::Changed, &findings);
    }
    fs::remove_file(job.path(1)).unwrap();
    let missing = (&*names[1], None, "the file of rank 1 of 2 is missing");
    check(
        &job.verify(),
        Verdict::Changed,
        &[(&names[0], Some(1), unended), (&names[0], Some(1), tail), missing],
    );
}

const KILLED: &str = "this start has no `end`, but a later one follows";

/// Cuts the last line of a killed rank at every byte. The next start continues it.
#[test]
fn torn_lines_are_no_changes() {
    let job = Job::new(RANKS);
    write(&job.begin(0)[1..2], &Event::new("data_set").text("sha256", "ab".repeat(32)));
    let texts: Vec<_> = (0..RANKS).map(|rank| job.text(rank)).collect();
    let whole = lines(&texts[1])[..3].concat().len() + 3;
    let names = [0, 1, 2].map(name);
    for cut in whole..=texts[1].len() {
        let put = |rank: usize, text: &str| replace_file(&job.path(rank), text.as_bytes());
        texts.iter().enumerate().for_each(|(rank, text)| put(rank, text));
        put(1, &texts[1][..cut]);
        if cut != whole && cut != texts[1].len() {
            let torn = (&*names[1], Some(4), "the file ends within this line");
            assert!(
                about(&job.verify(), &job.path(1))
                    .any(|finding| finding.text == torn.2 && finding.line == torn.1)
            );
        }
        job.run(0);
        let killed = [0, 1, 2].map(|rank| (&*names[rank], Some(1), KILLED));
        check(&job.verify(), Verdict::Intact, &killed);
        if cut == whole || cut == texts[1].len() {
            continue;
        }
        // The torn line is covered by the chain.
        let text = job.text(1);
        for at in [whole, cut - 1] {
            let mut changed = text.clone().into_bytes();
            changed[at] ^= 1;
            fs::write(job.path(1), &changed).unwrap();
            let report = job.verify();
            assert_eq!(report.verdict(), Verdict::Changed, "{report}");
            assert!(about(&report, &job.path(1)).any(|finding| finding.line == Some(4)), "{report}");
        }
        let mut all = lines(&text);
        let field = format!(",\"torn\":{}}}", cut - whole);
        assert!(all[4].contains(&field), "{}", all[4]);
        for other in ["}", ",\"torn\":1000000}", ",\"torn\":\"1\"}"] {
            all[4] = lines(&text)[4].replace(&field, other);
            put(1, &join(&all));
            assert_eq!(job.verify().verdict(), Verdict::Changed);
        }
        // A line that says that the line before is torn, but it is not.
        let mut all = lines(&text);
        all[5] = all[5].replace("}", ",\"torn\":5}").replace("\"join\"", "\"start\"");
        rechain(&mut all, 6);
        put(1, &join(&all));
        let report = job.verify();
        assert!(about(&report, &job.path(1)).any(|finding| finding.line == Some(6)), "{report}");
    }
}

#[test]
fn missing_ends_are_incomplete() {
    let (job, names) = (Job::new(2), [0, 1].map(name));
    job.run(0);
    let logs = job.begin(1);
    let unended = |line: u64| [0, 1].map(|rank| (&*names[rank], Some(line), "this start has no `end`"));
    check(&job.verify(), Verdict::Incomplete, &unended(9));
    write(&logs, &Event::new("save"));
    let tail = |line: u64, rank: usize| (&*names[rank], Some(line), "no other rank has witnessed this line");
    let [one, two] = unended(9);
    check(&job.verify(), Verdict::Incomplete, &[one, tail(11, 0), two, tail(11, 1)]);
    end(&logs, "failed");
    check(&job.verify(), Verdict::Incomplete, &[tail(11, 0), tail(11, 1)]);
    witness(&logs);
    check(&job.verify(), Verdict::Intact, &[]);
    drop(logs);
    let logs = job.begin(1);
    end(&logs, "ok");
    let unwitnessed =
        [0, 1].map(|rank| (&*names[rank], Some(15), "no `witness` follows the `end` of this start"));
    let [one, two] = unwitnessed;
    check(&job.verify(), Verdict::Incomplete, &[one, tail(17, 0), two, tail(17, 1)]);
    // Only rank 0 writes the last witness: it witnesses rank 1, but nobody witnesses rank 0.
    let heads: Vec<_> = logs.iter().map(AuditLog::head).collect();
    logs[0].witness(&heads).unwrap();
    check(&job.verify(), Verdict::Incomplete, &[tail(17, 0), unwitnessed[1]]);
    logs[1].witness(&heads).unwrap();
    let report = job.verify();
    check(&report, Verdict::Intact, &[]);
    let summary: Vec<_> =
        report.logs().iter().map(|log| (log.rank, log.lines, log.starts, log.witnessed)).collect();
    assert_eq!(summary, [(0, 19, 3, 18), (1, 19, 3, 18)]);
    let counts = "starts 3, lines 19, witnessed by other ranks 18, signatures verified 0, ";
    assert_eq!(report.to_string().matches(counts).count(), 2, "{report}");
    assert!(report.to_string().ends_with("\nintact\n"), "{report}");
}

/// The last `witness` of a rank, which no other rank has witnessed.
#[test]
fn the_last_witness_names_all_ranks() {
    let job = Job::new(RANKS);
    let logs = job.begin(0);
    end(&logs, "ok");
    let heads: Vec<_> = logs.iter().map(AuditLog::head).collect();
    logs[1..].iter().for_each(|log| log.witness(&heads).unwrap());
    let too_few = [&[][..], &heads[..2], &heads[1..], &[heads[0], heads[0], heads[1]]];
    for (at, some) in (5..).zip(too_few) {
        logs[0].witness(some).unwrap();
        let report = job.verify();
        let text = "the `witness` after `end` does not name all ranks";
        assert!(about(&report, &job.path(0)).any(|it| it.line == Some(at) && it.text == text), "{report}");
        assert_eq!(report.verdict(), Verdict::Incomplete, "{report}");
    }
    logs[0].witness(&heads).unwrap();
    assert!(!job.verify().to_string().contains("does not name all ranks"));
}

#[test]
fn nothing_but_a_witness_follows_an_end() {
    let job = Job::new(2);
    let logs = job.begin(0);
    end(&logs, "ok");
    let error = logs[0].write(&Event::new("refuse")).unwrap_err();
    assert!(error.to_string().contains("event `refuse` follows `end`"), "{error}");
    witness(&logs);
    drop(logs);
    check(&job.verify(), Verdict::Intact, &[]);
    let text = job.text(1);
    for event in ["save", "end", "join"] {
        replace_file(&job.path(1), text.as_bytes());
        let log = AuditLog::open(job.folder.path(), JOB, 0, 1, None).unwrap();
        log.write(&Event::new(event).text("result", "ok")).unwrap();
        let report = job.verify();
        let words = format!("`{event}` follows `end`");
        let found = about(&report, &job.path(1)).any(|it| it.line == Some(6) && it.text == words);
        assert!(found && report.verdict() == Verdict::Changed, "{report}");
    }
}

/// A job of one rank, whose lines nobody else knows: what is wrong with a line by itself.
#[test]
fn lines_that_contradict_their_log_are_changes() {
    let job = Job::new(1);
    job.run(3);
    let name = name(0);
    let alone = (&*name, None, "no other rank has witnessed these lines");
    check(&job.verify(), Verdict::Intact, &[alone]);
    let text = job.text(0);
    let changed = |at: usize, from: &str, to: &str| {
        let mut lines = lines(&text);
        assert!(lines[at].contains(from), "{}", lines[at]);
        lines[at] = lines[at].replacen(from, to, 1);
        rechain(&mut lines, at);
        fs::write(job.path(0), join(&lines)).unwrap();
        job.verify()
    };
    // The last line has the head of the line before, which has another hash now.
    let one = |at: usize, from: &str, to: &str, words: &str| {
        let (report, path) = (changed(at, from, to), job.path(0));
        let is_wanted =
            |finding: &Finding| finding.line == Some(at as u64 + 1) && finding.text.contains(words);
        assert!(about(&report, &path).any(is_wanted), "{words}:\n{report}");
        let lines = [1, 3, at as u64 + 1, 8];
        assert!(
            about(&report, &path).all(|it| it.line.is_some_and(|line| lines.contains(&line))),
            "{report}"
        );
        assert_eq!(report.verdict(), Verdict::Changed);
    };
    one(3, "\"epoch\":3", "\"epoch\":2", "the epoch is 2, but 3 in line 1");
    one(3, "\"rank\":0", "\"rank\":1", "the line is of rank 1 of job `train-7`, but the file of rank 0");
    one(3, "\"rank\":0", "\"rank\":00", "has no number after `\",\"rank\":`");
    one(3, "train-7", "train-8", "the line is of rank 0 of job `train-8`");
    one(3, "train-7", "train\\u002d7", "has no text in `job`");
    one(3, "\"complete\":true", "\"complete\":0.5", "has a float or null in `fields`");
    one(3, "\"complete\":true", "\"complete\":[{\"x\":null}]", "has a float or null in `fields`");
    one(3, "\"complete\":true", "\"complete\":true,", "has no JSON in `fields`");
    one(3, "\"fields\":{", "\"fields\":[{", "has no JSON in `fields`");
    one(3, "\"data_set\"", "\"data-set\"", "has no name of an event");
    one(3, "\"event\":", "\"kind\":0,\"event\":", "has no `,\"event\":\"` at its place");
    one(3, "Z\"", "+\"", "has no time in `utc`");
    one(6, "\"ok\"", "\"good\"", "`end` has no `result` that is ok, failed or panicked");
    one(7, "\"seq\":6,\"hash\"", "\"seq\":6,\"x\":1,\"hash\"", "`witness` has no list of heads");
    one(
        7,
        "\"seq\":6,\"hash\"",
        "\"seq\":5,\"hash\"",
        "`witness` of rank 0 contradicts the line with the number 5",
    );
    one(7, "\"rank\":0,\"seq\":6", "\"rank\":9,\"seq\":6", "`witness` names rank 9");
    one(0, "\"world\":1", "\"world\":true", "`start` has no number `world`");
    one(0, "\"world\":1", "\"world\":0", "rank 0 of 0 ranks");
    let report = changed(0, "\"world\":1", "\"world\":18446744073709551615");
    assert_eq!(report.verdict(), Verdict::Changed);
    assert!(report.to_string().contains("the files of 18446744073709551604 more ranks"), "{report}");
    let report = changed(3, "\"utc\":\"2", "\"utc\":\"3");
    let back = "the clock went back before this line, in all 1 times";
    assert!(
        report.findings().iter().any(|finding| finding.line == Some(5) && finding.text == back),
        "{report}"
    );
    let mut no_start = lines(&text)[1..].to_vec();
    rechain(&mut no_start, 0);
    fs::write(job.path(0), join(&no_start)).unwrap();
    let report = job.verify();
    assert_eq!(about(&report, &job.path(0)).count(), no_start.len(), "{report}");
    assert!(report.findings()[1].text.contains("no `start` is before this line"), "{report}");
}

/// Launchers count starts from 0 again, so a later start may have an earlier epoch.
#[test]
fn epochs_may_begin_anew() {
    let job = Job::new(RANKS);
    [3, 0, 0].into_iter().for_each(|epoch| job.run(epoch));
    assert_eq!(job.verify().verdict(), Verdict::Intact);
}

#[test]
fn files_of_any_name_are_verified() {
    let job = Job::new(RANKS);
    job.run(0);
    let other = tempfile::tempdir().unwrap();
    let named = |rank: usize| other.path().join(format!("host{rank}.jsonl"));
    for rank in 0..RANKS {
        fs::copy(job.path(rank), named(rank)).unwrap();
    }
    let all: Vec<_> = (0..RANKS).map(named).collect();
    check(&verify(&all).unwrap(), Verdict::Intact, &[]);
    // A file that is given twice is one file.
    check(&verify([&all[0], &all[1], &all[2], &all[0]]).unwrap(), Verdict::Intact, &[]);
    let missing = "the file of rank 2 of 3 is missing";
    check(&verify(&all[..2]).unwrap(), Verdict::Changed, &[(&name(2), None, missing)]);
    // Of two files of a rank, that with another name is one too many.
    fs::copy(job.path(1), job.folder.path().join("copy.audit.jsonl")).unwrap();
    check(&job.verify(), Verdict::Changed, &[("copy.audit.jsonl", None, "the file is of rank 1, as ")]);
    fs::remove_file(job.folder.path().join("copy.audit.jsonl")).unwrap();
    // Other files of a folder are no audit logs, and jobs do not mix.
    fs::write(job.folder.path().join("train-7-rank9.jsonl"), "x").unwrap();
    let log = AuditLog::open(job.folder.path(), "another", 0, 0, None).unwrap();
    log.write(&Event::new("start").number("world", 1)).unwrap();
    log.write(&Event::new("end").text("result", "failed")).unwrap();
    let report = job.verify();
    check(&report, Verdict::Intact, &[("another-rank0.audit.jsonl", None, "no other rank")]);
    assert_eq!(report.logs().len(), 4);
}

#[test]
fn other_files_are_no_audit_logs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.audit.jsonl");
    assert!(matches!(verify([folder.path()]), Err(Error::Invalid { .. })));
    assert!(matches!(verify([&file]), Err(Error::Io { .. })));
    fs::write(&file, "").unwrap();
    check(&verify([&file]).unwrap(), Verdict::Incomplete, &[("x.audit.jsonl", None, "the file is empty")]);
    fs::write(&file, [0, 159, 146, 150, b'\n']).unwrap();
    let none = ("x.audit.jsonl", None, "the file has no line of an audit log");
    check(&verify([&file]).unwrap(), Verdict::Changed, &[none, ("x.audit.jsonl", Some(1), "is not UTF-8")]);
    // Of many findings some are listed.
    fs::write(&file, "\n".repeat(1000)).unwrap();
    let report = verify([&file]).unwrap();
    assert_eq!((report.verdict(), report.findings().len()), (Verdict::Changed, 101));
    assert!(report.findings()[100].text == "901 more findings", "{report}");
    // A line that is too long ends the chain, but not the verification.
    let job = Job::new(1);
    job.run(0);
    let text = job.text(0) + &"x".repeat(2 * line::MAX + 7) + "\nx\n";
    fs::write(job.path(0), text).unwrap();
    let (report, path) = (job.verify(), job.path(0));
    let found: Vec<_> = about(&report, &path).map(|finding| (finding.line, &*finding.text)).collect();
    assert_eq!(found.len(), 2, "{report}");
    assert_eq!(found[0], (Some(9), "is longer than 16777216 bytes"));
    assert!(found[1].0 == Some(10) && found[1].1.contains("is no line of an audit log"), "{report}");
}

fn replace(bytes: &mut Vec<u8>, range: std::ops::Range<usize>, by: &[u8]) {
    bytes.splice(range, by.iter().copied());
}

/// Random changes of random files. No change is overlooked, and none makes the verification panic.
#[test]
fn random_changes_are_found() {
    const CASES: usize = 2000;
    let job = Job::new(RANKS);
    job.run(0);
    job.run(1);
    let texts: Vec<_> = (0..RANKS).map(|rank| job.text(rank).into_bytes()).collect();
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let parts: [&[u8]; 14] = [
        b"\"",
        b"\\",
        b"{",
        b"}",
        b"[",
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\xc3\xa4",
        b"\"hash\":\"",
        b"18446744073709551616",
        b"-1",
    ];
    let (mut verdicts, mut texts_found) = (BTreeMap::<Verdict, usize>::new(), BTreeSet::new());
    for case in 0..CASES {
        let rank = random(RANKS);
        let mut bytes = texts[rank].clone();
        for _ in 0..=random(3) {
            let (at, len) = (random(bytes.len()), 1 + random(80));
            let end = (at + len).min(bytes.len());
            match random(7) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = random(256) as u8,
                2 => replace(&mut bytes, at..end, &[]),
                3 => replace(&mut bytes, at..at, parts[random(parts.len())]),
                4 => {
                    let from = random(texts[0].len() - 80);
                    replace(&mut bytes, at..end, &texts[0][from..from + len]);
                }
                5 => bytes.truncate(at.max(1)),
                _ => {
                    let part = bytes[at..end].to_vec();
                    replace(&mut bytes, at..at, &part);
                }
            }
        }
        replace_file(&job.path(rank), &bytes);
        let report = job.verify();
        assert_eq!(report.verdict() == Verdict::Intact, bytes == texts[rank], "case {case}:\n{report}");
        *verdicts.entry(report.verdict()).or_default() += 1;
        // Texts of findings, without what differs from case to case.
        let is_word =
            |word: &&str| !word.contains(['/', '`']) && !word.contains(|c: char| c.is_ascii_digit());
        let words = |text: &str| text.split(' ').filter(is_word).take(5).collect::<Vec<_>>().join(" ");
        texts_found.extend(report.findings().iter().map(|finding| words(&finding.text)));
        replace_file(&job.path(rank), &texts[rank]);
    }
    println!("{verdicts:?} {} {texts_found:#?}", texts_found.len());
    assert_eq!(verdicts.values().sum::<usize>(), CASES);
    assert!(verdicts[&Verdict::Changed] > CASES / 2 && verdicts[&Verdict::Incomplete] > 3, "{verdicts:?}");
    assert!(texts_found.len() > 15, "{texts_found:#?}");
}
