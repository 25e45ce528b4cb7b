//! Changes every line of every file of a job in every way that somebody without keys can think of.

use super::job::{Job, LINES, RANKS, about, join, lines, rechain, replace_file};
use crate::security::audit::Verdict;
use std::{collections::BTreeMap, fs};

/// The lines of a file after two starts.
const ALL: usize = 2 * LINES;

/// The logs of a job as they were written.
struct Matrix {
    job: Job,
    texts: Vec<String>,
    /// The number of cases of each kind.
    cases: BTreeMap<&'static str, usize>,
    /// The cases that were not found: kind, rank and line.
    missed: Vec<(&'static str, usize, usize)>,
}

/// The line to which a finding has to point, from 0.
type At = Option<usize>;

impl Matrix {
    fn new(job: Job) -> Self {
        job.run(0);
        job.run(1);
        let report = job.verify();
        assert_eq!((report.verdict(), report.findings()), (Verdict::Intact, &[][..]), "{report}");
        let texts: Vec<_> = (0..RANKS).map(|rank| job.text(rank)).collect();
        assert!(texts.iter().all(|text| text.lines().count() == ALL));
        Self { job, texts, cases: BTreeMap::new(), missed: Vec::new() }
    }

    /// Verifies the job with another text of a rank's file; without the file if there is none.
    fn case(&mut self, kind: &'static str, rank: usize, line: usize, text: Option<&str>, at: At) {
        *self.cases.entry(kind).or_default() += 1;
        let path = self.job.path(rank);
        match text {
            Some(text) => replace_file(&path, text.as_bytes()),
            None => fs::remove_file(&path).unwrap(),
        }
        assert!(text != Some(&*self.texts[rank]), "{kind}, line {line}: nothing was changed");
        let report = self.job.verify();
        replace_file(&path, self.texts[rank].as_bytes());
        if report.verdict() == Verdict::Intact {
            self.missed.push((kind, rank, line));
            return;
        }
        let fits = |found: Option<u64>| at.is_none_or(|at| found == Some(at as u64 + 1));
        let named = about(&report, &path).any(|finding| fits(finding.line));
        assert!(named, "{kind}, rank {rank}, line {line}, not at {at:?}:\n{report}");
    }

    /// Verifies the job with other lines of a rank's file.
    fn changed(
        &mut self,
        kind: &'static str,
        rank: usize,
        line: usize,
        at: At,
        change: impl FnOnce(&mut Vec<String>),
    ) {
        let mut lines = lines(&self.texts[rank]);
        change(&mut lines);
        self.case(kind, rank, line, Some(&join(&lines)), at);
    }

    /// Runs all cases. Returns those that were not found.
    fn run(&mut self) -> Vec<(&'static str, usize, usize)> {
        for rank in 0..RANKS {
            for line in 0..ALL {
                self.line(rank, line);
            }
            self.case("truncated to nothing", rank, 0, Some(""), None);
            self.case("deleted file", rank, 0, None, None);
            for other in (0..RANKS).filter(|other| *other != rank) {
                let text = self.texts[other].clone();
                self.case("another rank's file", rank, other, Some(&text), None);
            }
            let older = join(&lines(&self.texts[rank])[..LINES]);
            self.case("an older copy", rank, 0, Some(&older), None);
        }
        let report = self.job.verify();
        assert_eq!((report.verdict(), report.findings()), (Verdict::Intact, &[][..]), "{report}");
        std::mem::take(&mut self.missed)
    }

    fn line(&mut self, rank: usize, line: usize) {
        let text = lines(&self.texts[rank])[line].clone();
        // A byte in the middle of each key and value.
        for (begin, run) in runs(&text) {
            let changed = with_byte(&text, begin + run / 2);
            self.changed("one byte", rank, line, Some(line), |lines| lines[line] = changed);
        }
        let is_last = line + 1 == ALL;
        let unless_last = |at: usize| Some(at).filter(|_| !is_last);
        self.changed("deleted line", rank, line, unless_last(line), |lines| drop(lines.remove(line)));
        self.changed("duplicated line", rank, line, Some(line + 1), |lines| lines.insert(line, text.clone()));
        if !is_last {
            self.changed("swapped lines", rank, line, Some(line), |lines| lines.swap(line, line + 1));
        }
        // A line that continues the one before; the one after it no longer does.
        let forged = self.forged(rank, line);
        let at = if is_last { line } else { line + 2 };
        self.changed("inserted line", rank, line, Some(at), |lines| lines.insert(line + 1, forged.clone()));
        if !is_last {
            self.changed("truncated after a line", rank, line, None, |lines| lines.truncate(line + 1));
        }
        let whole = join(&lines(&self.texts[rank])[..line]) + &text;
        self.case("truncated in a line", rank, line, Some(&whole[..whole.len() - text.len() / 2]), None);
        self.case("truncated before a newline", rank, line, Some(&whole), None);

        let rechained = "with a new chain";
        let year = |lines: &mut Vec<String>| lines[line] = text.replacen("\"utc\":\"2", "\"utc\":\"3", 1);
        self.changed(rechained, rank, line, None, |lines| {
            year(lines);
            rechain(lines, line);
        });
        for (begin, run) in runs(&text).into_iter().filter(|(begin, _)| is_value_of_field(&text, *begin)) {
            let changed = with_byte(&text, begin + run - 1);
            self.changed("field with a new chain", rank, line, None, |lines| {
                lines[line] = changed;
                rechain(lines, line);
            });
        }
        self.changed("deleted line with a new chain", rank, line, None, |lines| {
            lines.remove(line);
            rechain(lines, line);
        });
        self.changed("inserted line with a new chain", rank, line, None, |lines| {
            lines.insert(line + 1, forged);
            rechain(lines, line + 1);
        });
    }

    /// A line that may follow a line.
    fn forged(&self, rank: usize, line: usize) -> String {
        let mut lines = lines(&self.texts[rank]);
        let gather = lines.iter().find(|line| line.contains("\"gather\"")).unwrap().clone();
        // With the epoch of the line before.
        let epoch = |line: &str| line.find("\"epoch\":").map(|at| at + 8).unwrap();
        let (from, to) = (epoch(&lines[line]), epoch(&gather));
        let digit = lines[line][from..=from].to_string();
        let mut forged = gather.replace("lm_head", "a_head");
        forged.replace_range(to..=to, &digit);
        lines.insert(line + 1, forged);
        rechain(&mut lines, line + 1);
        lines.swap_remove(line + 1)
    }
}

/// Returns begin and length of the words, numbers and texts in base64 of a line.
fn runs(line: &str) -> Vec<(usize, usize)> {
    let (mut runs, bytes, mut at) = (Vec::new(), line.as_bytes(), 0);
    while at < bytes.len() {
        let is_in = |byte: &&u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
        let run = bytes[at..].iter().take_while(is_in).count();
        if run > 0 {
            runs.push((at, run));
        }
        at += run.max(1);
    }
    runs
}

/// Returns a line with another digit or character at a place.
fn with_byte(line: &str, at: usize) -> String {
    let mut bytes = line.as_bytes().to_vec();
    bytes[at] = match bytes[at] {
        b'9' | b'f' | b'z' | b'Z' => bytes[at] - 1,
        byte => byte + 1,
    };
    String::from_utf8(bytes).unwrap()
}

/// Whether a word or number at `begin` is in a value of the fields.
fn is_value_of_field(line: &str, begin: usize) -> bool {
    let (fields, end) = (line.find("\"fields\":").unwrap() + 9, line.rfind(",\"prev\"").unwrap());
    let after = line[begin..].trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_');
    (fields..end).contains(&begin) && !after.starts_with("\":")
}

/// Checks the number of cases of each kind, where `runs` are those of one byte and of fields.
fn check_counts(matrix: &Matrix, runs: [usize; 2]) {
    let each = RANKS * ALL;
    let wanted = [
        ("an older copy", RANKS),
        ("another rank's file", RANKS * (RANKS - 1)),
        ("deleted file", RANKS),
        ("deleted line", each),
        ("deleted line with a new chain", each),
        ("duplicated line", each),
        ("field with a new chain", runs[1]),
        ("inserted line", each),
        ("inserted line with a new chain", each),
        ("one byte", runs[0]),
        ("swapped lines", each - RANKS),
        ("truncated after a line", each - RANKS),
        ("truncated before a newline", each),
        ("truncated in a line", each),
        ("truncated to nothing", RANKS),
        ("with a new chain", each),
    ];
    assert_eq!(matrix.cases, BTreeMap::from(wanted));
}

/// Nobody but the rank itself knows its last line.
#[test]
fn changes_are_found() {
    let mut matrix = Matrix::new(Job::new(RANKS));
    let missed = matrix.run();
    check_counts(&matrix, [1554, 246]);
    assert_eq!(missed, [0, 1, 2].map(|rank| ("with a new chain", rank, ALL - 1)));
}

#[cfg(feature = "tls")]
#[test]
fn changes_of_signed_logs_are_found() {
    let job = Job { keys: Some(super::job::Keys::new(RANKS)), ..Job::new(RANKS) };
    let mut matrix = Matrix::new(job);
    let missed = matrix.run();
    check_counts(&matrix, [1602, 252]);
    assert_eq!(missed, []);
}
