//! Verifies the file of one rank.

use super::{
    line::{self, Hash, Line, torn_hash},
    report::{
        Findings,
        Verdict::{Changed, Incomplete, Intact},
    },
    signature::{self, Lists, Verifier},
};
use crate::error::{Error, Result};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A line as it can be witnessed.
pub(super) struct Entry {
    pub(super) seq: u64,
    /// The line of the file, from 1.
    pub(super) line: u64,
    /// The hash that the line has of itself; of a torn line, the `prev` of the next one.
    pub(super) hash: Hash,
}

/// What a line `witness` says of a rank's line.
pub(super) struct Claim {
    /// The line of the `witness`, and its number.
    pub(super) line: u64,
    pub(super) by: u64,
    pub(super) rank: usize,
    pub(super) seq: u64,
    pub(super) hash: Hash,
}

/// A verified file.
pub(super) struct Checked {
    pub(super) path: PathBuf,
    pub(super) findings: Findings,
    /// The job and the rank; none if no line has the form of a line.
    pub(super) of: Option<(String, usize)>,
    pub(super) lines: u64,
    pub(super) starts: u64,
    /// The times of the first and of the last line.
    pub(super) times: Option<[SystemTime; 2]>,
    /// The largest number of ranks of a start.
    pub(super) world: u64,
    /// By number; of equal numbers the first line, then the others by hash.
    pub(super) entries: Vec<Entry>,
    pub(super) claims: Vec<Claim>,
    /// Whether the last line is a `witness`, which no other rank can have witnessed.
    pub(super) ends_in_witness: bool,
    /// The lines of earlier starts that have no `end`.
    pub(super) killed: Vec<u64>,
    pub(super) signatures: u64,
}

impl Checked {
    /// A file of which no line was read.
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.into(),
            findings: Findings::new(path),
            of: None,
            lines: 0,
            starts: 0,
            times: None,
            world: 0,
            entries: Vec::new(),
            claims: Vec::new(),
            ends_in_witness: false,
            killed: Vec::new(),
            signatures: 0,
        }
    }
}

/// The start of the job to which the lines belong.
struct Start {
    line: u64,
    epoch: u64,
    /// The key that has to sign, if it is known.
    verifier: Option<Verifier>,
    /// Why the lines should be signed, but the key is not known.
    unsigned: Option<String>,
    /// Whether there is another event than `start` and `end`.
    worked: bool,
    /// The number of ranks.
    world: u64,
    /// The result of the event `end`.
    end: Option<String>,
    /// Whether a `witness` of all ranks follows `end`.
    witnessed: bool,
    /// The line of a `witness` of some ranks that follows `end`.
    partial: Option<u64>,
}

/// What the next line has to continue.
struct Next {
    seq: u64,
    /// None after a line without the form of a line.
    prev: Option<Hash>,
}

struct Check<'a> {
    lists: Lists<'a>,
    out: Checked,
    next: Next,
    /// The hash of the last line that has the form of a line, or zeros: before the line that is
    /// read, and before the line before that.
    last: [Hash; 2],
    start: Option<Start>,
    /// The first line whose time is before the time of an earlier line, and the number of such.
    backwards: Option<(u64, u64)>,
    /// The signatures that could not be verified.
    unchecked: u64,
    /// The first of the lines that no later signature covers, and their number; none if the key is
    /// not known.
    uncovered: Option<(u64, u64)>,
    /// A line without the form of a line, and why. It may be a torn one.
    unread: Option<(u64, String)>,
}

/// Reads a file line by line.
pub(super) fn check(path: &Path, lists: Lists<'_>) -> Result<Checked> {
    let io = |error: io::Error| Error::io(path, &error);
    // To open something else, such as a pipe, may wait for ever.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::no_file(path));
    }
    let file = File::open(path).map_err(io)?;
    check_lines(path, BufReader::with_capacity(1 << 16, file), lists).map_err(io)
}

fn check_lines(path: &Path, mut from: impl BufRead, lists: Lists<'_>) -> io::Result<Checked> {
    let out = Checked::new(path);
    let next = Next { seq: 0, prev: Some(Hash::default()) };
    let (last, start, backwards, unchecked, uncovered, unread) = Default::default();
    let mut check = Check { lists, out, next, last, start, backwards, unchecked, uncovered, unread };
    let (mut bytes, mut before) = (Vec::new(), Vec::new());
    loop {
        bytes.clear();
        let limit = line::MAX as u64 + 1;
        if from.by_ref().take(limit).read_until(b'\n', &mut bytes)? == 0 {
            break;
        }
        check.out.lines += 1;
        let ends = bytes.pop_if(|byte| *byte == b'\n').is_some();
        if !ends && bytes.len() > line::MAX {
            check.add(Changed, format!("is longer than {} bytes", line::MAX));
            check.forget();
            from.skip_until(b'\n')?;
        } else {
            check.line(&bytes, &before);
            if !ends {
                check.ends_in_line();
            }
        }
        check.last[1] = check.last[0];
        check.last[0] = check.next.prev.unwrap_or(check.last[0]);
        std::mem::swap(&mut bytes, &mut before);
    }
    Ok(check.finish())
}

impl Check<'_> {
    /// Adds a finding of the line that was read last.
    fn add(&mut self, kind: super::Verdict, text: impl Into<String>) {
        self.out.findings.add(Some(self.out.lines), kind, text);
    }

    /// Continues after a line that cannot be used.
    fn forget(&mut self) {
        self.next = Next { seq: self.next.seq.saturating_add(1), prev: None };
        self.out.ends_in_witness = false;
    }

    fn line(&mut self, bytes: &[u8], before: &[u8]) {
        match Line::parse(bytes) {
            Ok(line) => self.parsed(&line, before),
            Err(reason) => {
                self.report_unread();
                self.unread = Some((self.out.lines, reason));
                self.forget();
            }
        }
    }

    /// Reports a line without the form of a line, if it is no torn one.
    fn report_unread(&mut self) {
        if let Some((line, reason)) = self.unread.take() {
            self.out.findings.add(Some(line), Changed, format!("is no line of an audit log: it {reason}"));
        }
    }

    fn parsed(&mut self, line: &Line<'_>, before: &[u8]) {
        self.chain(line, before);
        let whole = line.is_whole();
        if !whole {
            self.add(Changed, "the line was changed: its hash is another one");
        }
        self.identity(line, whole);
        let (seq, hash, at) = (line.seq, line.hash, self.out.lines);
        self.out.entries.push(Entry { seq, line: at, hash });
        self.out.ends_in_witness = line.event == "witness";
        match line.event {
            "start" => self.start(line),
            _ if self.start.is_none() => self.add(Changed, "no `start` is before this line"),
            _ => {}
        }
        self.signature(line);
        let Some(start) = &mut self.start else { return };
        if start.epoch != line.epoch {
            let text = format!("the epoch is {}, but {} in line {}", line.epoch, start.epoch, start.line);
            self.add(Changed, text);
            return;
        }
        start.worked |= !matches!(line.event, "start" | "end");
        if start.end.is_some() && line.event != "witness" {
            self.add(Changed, format!("`{}` follows `end`", line.event));
            return;
        }
        match line.event {
            "end" => match line.text("result") {
                Some(result @ ("ok" | "failed" | "panicked")) => {
                    start.end = Some(result.into());
                }
                _ => self.add(Changed, "`end` has no `result` that is ok, failed or panicked"),
            },
            "witness" => {
                let heads = heads(&line.fields);
                if start.end.is_some() {
                    let ranks = heads.iter().flatten().map(|head| head.0).collect::<BTreeSet<_>>();
                    let of_job = ranks.into_iter().filter(|rank| (*rank as u64) < start.world).count();
                    start.witnessed |= of_job as u64 == start.world;
                    start.partial = Some(at);
                }
                match heads {
                    None => self.add(Changed, "`witness` has no list of heads"),
                    // What a changed line says is of no use.
                    Some(heads) if whole => {
                        self.out.claims.extend(heads.into_iter().map(|(rank, seq, hash)| Claim {
                            line: at,
                            by: line.seq,
                            rank,
                            seq,
                            hash,
                        }))
                    }
                    Some(_) => {}
                }
            }
            _ => {}
        }
    }

    /// Checks that the line continues the line before.
    fn chain(&mut self, line: &Line<'_>, before: &[u8]) {
        let torn = line.number("torn").filter(|_| line.event == "start");
        let is_torn =
            |bytes: u64| bytes == before.len() as u64 && torn_hash(&self.last[1], before) == line.prev;
        if torn.is_some_and(is_torn) && self.out.lines > 1 {
            // The line before is what a killed process has left. Others may have witnessed it.
            let (seq, at) = (self.next.seq.saturating_sub(1), self.out.lines - 1);
            self.unread = None;
            self.out.entries.push(Entry { seq, line: at, hash: line.prev });
        } else {
            self.report_unread();
            if torn.is_some() {
                self.add(Changed, "`torn` or `prev` does not fit the lines before");
            } else if self.next.prev.is_some_and(|prev| prev != line.prev) {
                self.add(Changed, "`prev` is not the hash of the line before");
            }
        }
        if line.seq != self.next.seq {
            let text = format!("the line has the number {}, but {} is the next one", line.seq, self.next.seq);
            self.add(Changed, text);
        }
        self.next = Next { seq: line.seq.saturating_add(1), prev: Some(line.hash) };
        let last = self.out.times.map_or(line.time, |[_, last]| last);
        if line.time < last {
            let (first, count) = self.backwards.unwrap_or((self.out.lines, 0));
            self.backwards = Some((first, count + 1));
        }
        let first = self.out.times.map_or(line.time, |[first, _]| first);
        self.out.times = Some([first, line.time]);
    }

    /// Checks that all lines are of one rank and one job. A line that was changed does not say of
    /// which.
    fn identity(&mut self, line: &Line<'_>, whole: bool) {
        match &self.out.of {
            Some((job, rank)) if whole && (*job != line.job || *rank != line.rank) => {
                let text = format!(
                    "the line is of rank {} of job `{}`, but the file of rank {rank} of job `{job}`",
                    line.rank, line.job
                );
                self.add(Changed, text);
            }
            None if whole => self.out.of = Some((line.job.clone(), line.rank)),
            _ => {}
        }
    }

    fn start(&mut self, line: &Line<'_>) {
        self.out.killed.extend(self.start.as_ref().filter(|start| start.end.is_none()).map(|it| it.line));
        self.unsigned();
        let world = line.number("world");
        match world {
            Some(world) if (line.rank as u64) < world => self.out.world = self.out.world.max(world),
            Some(world) => self.add(Changed, format!("rank {} of {world} ranks", line.rank)),
            None => self.add(Changed, "`start` has no number `world`"),
        }
        // A list that is not named by its SHA-256.
        let membership = line.fields.get("membership");
        let is_hash = membership.is_none_or(|list| list.as_str().and_then(line::parse_hex).is_some());
        let chosen = if is_hash {
            self.lists.choose(line)
        } else {
            Err((Changed, "`membership` is not 64 hexadecimal digits".into()))
        };
        let (verifier, unsigned) = match chosen {
            Ok(verifier) => (verifier, None),
            Err((Incomplete, text)) => (None, Some(text)),
            Err((kind, text)) => {
                self.add(kind, text);
                (None, None)
            }
        };
        self.out.starts += 1;
        let (at, epoch, world) = (self.out.lines, line.epoch, world.unwrap_or(0));
        let (end, witnessed, partial, worked) = Default::default();
        let line = at;
        self.start = Some(Start { line, epoch, verifier, unsigned, worked, world, end, witnessed, partial });
    }

    /// Reports, at its end, a start whose lines should be signed. A rank that cannot use its list
    /// ends at once, and has no key to sign that. Nothing could be hidden in such a start that is
    /// not hidden by its removal.
    fn unsigned(&mut self) {
        let Some(start) = &mut self.start else { return };
        let Some(text) = start.unsigned.take() else { return };
        let is_failure = !start.worked && start.end.as_deref() == Some("failed");
        let kind = if is_failure { Intact } else { Incomplete };
        self.out.findings.add(Some(start.line), kind, text);
    }

    fn signature(&mut self, line: &Line<'_>) {
        let signs = signature::signs(line.event);
        let verifier = self.start.as_ref().and_then(|start| start.verifier.as_ref());
        match (line.signature, verifier) {
            (Some(_), _) if !signs => self.add(Changed, format!("events `{}` are not signed", line.event)),
            (Some(signature), Some(verifier)) if verifier.verifies(&line.hash, signature) => {
                self.out.signatures += 1;
                self.uncovered = None;
            }
            (Some(_), Some(_)) => self.add(Changed, "the signature is not of the rank's key and this line"),
            (Some(_), None) => self.unchecked += 1,
            (None, Some(_)) if signs => self.add(Changed, "the line is not signed"),
            (None, Some(_)) => {
                let (first, count) = self.uncovered.unwrap_or((self.out.lines, 0));
                self.uncovered = Some((first, count + 1));
            }
            (None, None) => {}
        }
    }

    /// The file does not end in a newline.
    fn ends_in_line(&mut self) {
        self.unread = None;
        self.add(Incomplete, "the file ends within this line");
    }

    fn finish(mut self) -> Checked {
        self.report_unread();
        self.unsigned();
        let findings = &mut self.out.findings;
        if self.out.lines == 0 {
            findings.add(None, Incomplete, "the file is empty");
        } else if self.out.of.is_none() && (self.out.lines > 1 || findings.worst() == Changed) {
            findings.add(None, Changed, "the file has no line of an audit log");
        }
        if let Some(start) = &self.start {
            let line = Some(start.line);
            match start.end.as_deref() {
                None => findings.add(line, Incomplete, "this start has no `end`"),
                Some("ok") if !start.witnessed => match start.partial {
                    Some(at) => {
                        let text = "the `witness` after `end` does not name all ranks";
                        findings.add(Some(at), Incomplete, text);
                    }
                    None => findings.add(line, Incomplete, "no `witness` follows the `end` of this start"),
                },
                Some(_) => {}
            }
        }
        if let Some((line, count)) = self.backwards {
            let text = format!("the clock went back before this line, in all {count} times");
            findings.add(Some(line), Intact, text);
        }
        if let Some((line, count)) = self.uncovered {
            let text = format!("no signature follows this line: in all {count} such lines");
            findings.add(Some(line), Incomplete, text);
        }
        if self.unchecked > 0 {
            let text = format!("{} signatures were not verified: their key is not known", self.unchecked);
            findings.add(None, Intact, text);
        }
        self.out.entries.sort_by_key(|entry| entry.seq);
        for same in self.out.entries.chunk_by_mut(|one, other| one.seq == other.seq) {
            same[1..].sort_unstable_by_key(|entry| entry.hash);
        }
        self.out
    }
}

/// The heads of an event `witness`, each once: rank, number and hash of the last line of each rank.
fn heads(fields: &Value) -> Option<Vec<(usize, u64, Hash)>> {
    let head = |head: &Value| {
        let head = head.as_object().filter(|head| head.len() == 3)?;
        let [rank, seq] = ["rank", "seq"].map(|key| head.get(key)?.as_u64());
        Some((usize::try_from(rank?).ok()?, seq?, line::parse_hex(head.get("hash")?.as_str()?)?))
    };
    let mut heads: Vec<_> = fields.get("heads")?.as_array()?.iter().map(head).collect::<Option<_>>()?;
    heads.sort_unstable();
    heads.dedup();
    Some(heads)
}
