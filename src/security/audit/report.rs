//! What a verification has found.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The most findings of a file that are kept.
const MOST: usize = 100;

/// The result of a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All lines are as they were written, and all ranks ended.
    Intact,
    /// Nothing shows that a line was changed, but the end of a log is missing, or nobody has
    /// witnessed it.
    Incomplete,
    /// A line was changed, added or removed.
    Changed,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Intact => "intact",
            Self::Incomplete => "incomplete",
            Self::Changed => "changed",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text of the files as one line without control characters. Quotes stay as they are.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.split_inclusive(['"', '\'']) {
            let text = part.trim_end_matches(['"', '\'']);
            write!(f, "{}{}", text.escape_debug(), &part[text.len()..])?;
        }
        Ok(())
    }
}

/// Something that a verification has found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// The file. It may be missing.
    pub path: PathBuf,
    /// The line of the file, from 1; none if it is no certain line.
    pub line: Option<u64>,
    /// What follows from this finding alone. [`Verdict::Intact`] is a note.
    pub kind: Verdict,
    /// What was found. It may have texts of the files as they are; `Display` escapes them.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, kind, text } = self;
        write!(f, "{}", Escaped(&path.display().to_string()))?;
        if let Some(line) = line {
            write!(f, ":{line}")?;
        }
        let kind = if *kind == Verdict::Intact { "note" } else { kind.name() };
        write!(f, ": {kind}: {}", Escaped(text))
    }
}

/// A file of a verification.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankLog {
    /// The file.
    pub path: PathBuf,
    /// The job.
    pub job: String,
    /// The rank in the world.
    pub rank: usize,
    /// The number of lines.
    pub lines: u64,
    /// The number of starts of the job.
    pub starts: u64,
    /// The times of the first and of the last line.
    pub times: [SystemTime; 2],
    /// How many lines from the first one on another rank has witnessed.
    pub witnessed: u64,
    /// The number of signatures that were verified.
    pub signatures: u64,
}

/// The result of [`verify`](super::verify). `Display` has a line for each rank, then a line for
/// each finding, then the verdict. Control characters of names and texts are escaped.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub(super) logs: Vec<RankLog>,
    pub(super) findings: Vec<Finding>,
}

impl Report {
    /// The files that are audit logs, by job and rank.
    pub fn logs(&self) -> &[RankLog] {
        &self.logs
    }

    /// The findings, by file and line. At most 100 of a file are listed, and the number of others.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The worst of the findings.
    pub fn verdict(&self) -> Verdict {
        self.findings.iter().map(|finding| finding.kind).max().unwrap_or(Verdict::Intact)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for log in &self.logs {
            let [first, last] = log.times.map(humantime::format_rfc3339_seconds);
            let job = Escaped(&log.job);
            let RankLog { rank, lines, starts, witnessed, signatures, .. } = log;
            writeln!(
                f,
                "job {job}, rank {rank}: starts {starts}, lines {lines}, witnessed by other ranks {witnessed}, \
                 signatures verified {signatures}, {first} to {last}",
            )?;
        }
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        writeln!(f, "{}", self.verdict())
    }
}

/// The findings of a file, at most [`MOST`] of them.
pub(super) struct Findings {
    path: PathBuf,
    kept: Vec<Finding>,
    /// The number of the others, and the worst of them.
    others: (u64, Verdict),
}

impl Findings {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.into(), kept: Vec::new(), others: (0, Verdict::Intact) }
    }

    pub(super) fn add(&mut self, line: Option<u64>, kind: Verdict, text: impl Into<String>) {
        if self.kept.len() < MOST {
            self.kept.push(Finding { path: self.path.clone(), line, kind, text: text.into() });
        } else {
            self.others = (self.others.0 + 1, self.others.1.max(kind));
        }
    }

    pub(super) fn worst(&self) -> Verdict {
        self.kept.iter().map(|finding| finding.kind).fold(self.others.1, Verdict::max)
    }

    /// Appends the findings in the order of the lines.
    pub(super) fn append_to(mut self, all: &mut Vec<Finding>) {
        self.kept.sort_by_key(|finding| finding.line);
        all.append(&mut self.kept);
        let (count, kind) = self.others;
        if count > 0 {
            let text = format!("{count} more findings");
            all.push(Finding { path: self.path, line: None, kind, text });
        }
    }
}
