//! What a verification with lists of keys says.

use super::job::{
    JOB, Job, Keys, LINES, RANKS, about, check, end, join, lines, name, rechain, replace_file, witness, write,
};
use crate::security::audit::{AuditLog, Event, Finding, Verdict, line, verify, verify_signed};
use std::fs;

fn signed(ranks: usize) -> Job {
    Job { keys: Some(Keys::new(ranks)), ..Job::new(ranks) }
}

#[test]
fn signatures_need_the_list_of_the_start() {
    let job = Job { keys: Some(Keys::new(2)), ..Job::new(2) };
    job.run(0);
    let (names, list) = ([0, 1].map(name), &job.keys.as_ref().unwrap().list);
    let report = job.verify();
    check(&report, Verdict::Intact, &[]);
    assert!(report.logs().iter().all(|log| log.signatures == 3), "{report}");
    let unchecked = [0, 1].map(|rank| (&*names[rank], None, "3 signatures were not verified"));
    check(&verify([&job.folder]).unwrap(), Verdict::Intact, &unchecked);
    let other = Keys::new(2);
    let wrong = std::slice::from_ref(&other.list);
    let digest = line::hex(&list.digest());
    let not_given = format!("the list of keys {digest} was not given");
    let [one, two] = [0, 1].map(|rank| [unchecked[rank], (&*names[rank], Some(1), &*not_given)]);
    check(&verify_signed([&job.folder], wrong).unwrap(), Verdict::Incomplete, &[one, two].concat());

    // A later start with another list does not answer for the lines before it.
    let later = Job { folder: job.folder, ranks: 2, keys: Some(other) };
    later.run(0);
    check(&later.verify(), Verdict::Incomplete, &[one, two].concat());
    let job = Job { keys: Some(Keys::new(2)), ..Job::new(2) };
    job.run(0);
    let digest = line::hex(&job.keys.as_ref().unwrap().list.digest());

    let text = job.text(0);
    let changed = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = lines(&text);
        change(&mut lines);
        fs::write(job.path(0), join(&lines)).unwrap();
        let report = job.verify();
        let found: Vec<_> = about(&report, &job.path(0)).map(|it| (it.line, it.text.clone())).collect();
        (report.verdict(), found)
    };
    let strip = |line: &str| line.split(",\"signature\"").next().unwrap().to_string() + "}";
    for at in [2, 6, 7] {
        let found = changed(&|lines| lines[at] = strip(&lines[at]));
        assert_eq!(found, (Verdict::Changed, vec![(Some(at as u64 + 1), "the line is not signed".into())]));
        let swapped = changed(&|lines| {
            let (begin, other) =
                (lines[at].len() - 90, text.lines().nth(if at == 7 { 6 } else { 7 }).unwrap());
            lines[at].replace_range(begin.., &other[other.len() - 90..]);
        });
        let wanted = "the signature is not of the rank's key and this line";
        assert_eq!(swapped, (Verdict::Changed, vec![(Some(at as u64 + 1), wanted.into())]));
    }
    let signed = changed(&|lines| {
        let end = lines[6].split_once(",\"signature\"").unwrap().1.to_string();
        lines[3] = lines[3].trim_end_matches('}').to_string() + ",\"signature\"" + &end;
    });
    assert_eq!(signed, (Verdict::Changed, vec![(Some(4), "events `data_set` are not signed".into())]));
    // A rank, an epoch and a job that the list does not have.
    for (from, to) in [("\"epoch\":0", "\"epoch\":99"), ("\"rank\":0", "\"rank\":7"), (JOB, "train-8")] {
        let (verdict, found) = changed(&|lines| {
            lines.iter_mut().for_each(|line| *line = line.replacen(from, to, 1));
            rechain(lines, 0);
        });
        let none = found
            .iter()
            .any(|(line, text)| *line == Some(1) && text.contains("the list of keys has no rank"));
        assert!(verdict == Verdict::Changed && none, "{found:?}");
    }
    let (verdict, found) = changed(&|lines| {
        lines[0] = lines[0].replace(&format!(",\"membership\":\"{digest}\""), "");
        rechain(lines, 0);
    });
    assert_eq!(verdict, Verdict::Changed);
    assert!(found.iter().any(|(_, text)| text.contains("this start names no list of keys")), "{found:?}");
}

/// Without a key, somebody writes the files of all ranks anew, as if the job had no keys. The next
/// start has keys and continues the files.
#[test]
fn history_that_is_written_without_a_key_is_not_intact() {
    for keeps_events in [true, false] {
        let job = Job { keys: Some(Keys::new(2)), ..Job::new(2) };
        job.run(0);
        let digest = line::hex(&job.keys.as_ref().unwrap().list.digest());
        for rank in 0..2 {
            let mut lines = lines(&job.text(rank));
            lines[0] = lines[0].replace(&format!(",\"membership\":\"{digest}\""), "");
            lines.retain(|line| !line.contains("\"event\":\"witness\""));
            lines[2] = lines[2].replace("data_set", "data_sets");
            if !keeps_events {
                // Only a start that failed remains.
                lines.drain(1..5);
                lines[1] = lines[1].replace("\"ok\"", "\"failed\"");
            }
            for (seq, line) in lines.iter_mut().enumerate() {
                let (_, rest) = line.split_once(',').unwrap();
                *line = format!("{{\"seq\":{seq},{rest}");
                if let Some((unsigned, _)) = line.split_once(",\"signature\"") {
                    *line = format!("{unsigned}}}");
                }
            }
            rechain(&mut lines, 0);
            fs::write(job.path(rank), join(&lines)).unwrap();
        }
        job.run(1);
        let report = job.verify();
        let unsigned = |finding: &Finding| finding.text.contains("this start names no list of keys");
        assert_eq!(report.findings().iter().filter(|finding| unsigned(finding)).count(), 2, "{report}");
        // A start that failed hides nothing that its removal would not hide.
        let want = if keeps_events { Verdict::Incomplete } else { Verdict::Intact };
        assert_eq!(report.verdict(), want, "{report}");
    }
}

/// Without a key, somebody changes a line before a torn one, and the hashes up to it.
#[test]
fn lines_before_a_torn_one_are_bound() {
    // The torn line may lack only its newline.
    for cut in [1, 20] {
        let job = Job { keys: Some(Keys::new(RANKS)), ..Job::new(RANKS) };
        job.run(0);
        let logs = job.begin(1);
        for name in ["data_set", "torn"] {
            write(&logs, &Event::new(name).text("sha256", "ab".repeat(32)));
        }
        drop(logs);
        let text = job.text(1);
        replace_file(&job.path(1), &text.as_bytes()[..text.len() - cut]);
        job.run(2);
        let report = job.verify();
        assert_eq!(report.verdict(), Verdict::Intact, "{cut}: {report}");
        let text = job.text(1);
        let torn = text.lines().position(|line| line.contains("\"torn\":")).unwrap() - 1;
        assert_eq!(torn, LINES + 4);
        for at in 0..torn {
            let mut lines = lines(&text);
            lines[at] = lines[at].replacen("\"utc\":\"20", "\"utc\":\"19", 1);
            let after = lines.split_off(torn);
            rechain(&mut lines, at);
            lines.extend(after);
            replace_file(&job.path(1), join(&lines).as_bytes());
            let report = job.verify();
            let found = about(&report, &job.path(1))
                .any(|it| it.line == Some(torn as u64 + 2) && it.text.starts_with("`torn` or `prev`"));
            assert!(found && report.verdict() == Verdict::Changed, "{cut}, line {at}: {report}");
        }
    }
}

/// Jobs, lists and ranks that do not fit each other.
#[test]
fn logs_and_lists_belong_together() {
    let job = signed(2);
    let list = std::slice::from_ref(&job.keys.as_ref().unwrap().list);
    // Files of another job that nobody has signed, in place of those of the list's job.
    for rank in 0..2 {
        let log = AuditLog::open(job.folder.path(), "other", 0, rank, None).unwrap();
        log.write(&Event::new("start").number("world", 2)).unwrap();
        log.write(&Event::new("end").text("result", "failed")).unwrap();
    }
    let report = verify_signed([&job.folder], list).unwrap();
    let kinds = |words: &str| -> Vec<Verdict> {
        report.findings().iter().filter(|it| it.text.contains(words)).map(|it| it.kind).collect()
    };
    assert_eq!(kinds("no list of the keys of this job is given"), [Verdict::Incomplete], "{report}");
    assert_eq!(kinds("there is no log of job `train-7`"), [Verdict::Incomplete], "{report}");
    // Without lists nothing is asked of keys.
    assert!(!verify([&job.folder]).unwrap().to_string().contains("list"));

    // Rank 0 alone, which says that it is the only one.
    let alone = Job { ranks: 1, ..signed(3) };
    alone.run(0);
    let report = alone.verify();
    let note = (&*name(0), None, "no other rank has witnessed these lines");
    let missing = [1, 2].map(name);
    let missing = [0, 1].map(|at| (&*missing[at], None, "of the list of keys has no file"));
    check(&report, Verdict::Incomplete, &[&[note], &missing[..]].concat());
}

#[test]
fn ranks_that_cannot_sign_are_incomplete() {
    use crate::security::{Member, Membership, PrivateKey, PublicKey, Role};
    let mut job = signed(2);
    let keys = job.keys.as_mut().unwrap();
    let p256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEfxpEj3a6hy2M8n3SQ67Aw3KNoGUv\
                uHcH4OV98HkSiu57nthJZP4w51XXC7puYQbM/GHGULTomejTu5isnHlRvw==";
    let p256 = PublicKey::parse(p256).unwrap();
    assert!(!p256.is_ed25519());
    let ed25519 = PrivateKey::generate().unwrap().public().clone();
    let members = [(0, ed25519), (1, p256)].map(|(rank, key)| Member::rank(rank, Role::Trainer, key));
    keys.list = Membership::new(JOB, 0..=9, None, members).unwrap();
    job.run(0);
    let (report, path) = (job.verify(), job.path(1));
    let found: Vec<_> = about(&report, &path).map(|it| (it.line, it.kind, &*it.text)).collect();
    let wanted = "the rank's key is not Ed25519, so it has signed nothing";
    assert_eq!(found, [(Some(1), Verdict::Incomplete, wanted)], "{report}");
}

#[test]
fn lines_without_a_later_signature_are_incomplete() {
    // The job of one rank, whose lines no other rank knows.
    let job = signed(1);
    let logs = job.begin(0);
    let note = (&*name(0), None, "no other rank has witnessed these lines");
    let unended = (&*name(0), Some(1), "this start has no `end`");
    check(&job.verify(), Verdict::Incomplete, &[note, unended]);
    write(&logs, &Event::new("data_set"));
    write(&logs, &Event::new("save"));
    let uncovered = (&*name(0), Some(4), "no signature follows this line: in all 2 such lines");
    check(&job.verify(), Verdict::Incomplete, &[note, unended, uncovered]);
    end(&logs, "failed");
    check(&job.verify(), Verdict::Intact, &[note]);
    witness(&logs);
    check(&job.verify(), Verdict::Intact, &[note]);
    drop(logs);
    // The end of a file that is added by somebody without the key.
    let log = AuditLog::open(job.folder.path(), JOB, 0, 0, None).unwrap();
    log.write(&Event::new("save")).unwrap();
    let report = job.verify();
    let follows = (&*name(0), Some(8), "`save` follows `end`");
    let uncovered = (&*name(0), Some(8), "no signature follows this line: in all 1 such lines");
    check(&report, Verdict::Changed, &[note, follows, uncovered]);
}

#[test]
fn memberships_are_hashes() {
    for membership in ["", "abc", &"g".repeat(64), &"A".repeat(64), "\u{1b}[2J"] {
        let job = signed(1);
        let log = AuditLog::open(job.folder.path(), JOB, 0, 0, None).unwrap();
        log.write(&Event::new("start").number("world", 1).text("membership", membership)).unwrap();
        for report in [job.verify(), verify([&job.folder]).unwrap()] {
            let words = "`membership` is not 64 hexadecimal digits";
            let found = report.findings().iter().any(|it| it.line == Some(1) && it.text == words);
            assert!(found && report.verdict() == Verdict::Changed, "{report}");
        }
    }
}
