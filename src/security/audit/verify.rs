//! Verifies the files of all ranks against each other.

use super::{
    file::{Checked, Claim, Entry, check},
    line::Hash,
    log::AuditLog,
    report::{
        Findings, RankLog, Report,
        Verdict::{Changed, Incomplete, Intact},
    },
    signature::Lists,
};
use crate::error::{Error, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// The most missing files that are listed.
const MOST_MISSING: usize = 10;

/// Verifies audit logs: files, or folders of files that end in `.audit.jsonl`. The files of each
/// job are compared with each other, so all of them have to be given. Lines are read one after the
/// other. In memory stay 48 bytes of each line, and 64 bytes of each head in a `witness`: with R
/// ranks that write W of them each, 64 W R² bytes.
///
/// `Changed` are lines whose form, number or hash is wrong, or whose rank or job is not the file's,
/// or whose epoch is not that of their start, or that follow an `end` and are no `witness`; lines
/// that another rank has witnessed and that are missing or have another hash; missing files of
/// ranks; and what is in a folder under the name of an audit log and is no file, or cannot be read.
/// `Incomplete` are a last start without `end`, a last `end` with result `ok` without a `witness`
/// of all ranks after it, a file that ends within a line, and lines that no other rank has
/// witnessed, except a `witness` at the end of a file.
///
/// # Errors
/// When a path does not exist or cannot be read, or there is no file.
pub fn verify<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Report> {
    verify_all(paths, Lists::default())
}

/// As [`verify`]. Also verifies the signatures of ranks that the given lists of keys have.
///
/// The field `membership` of an event `start` is the SHA-256 of the list that was used. `Changed`
/// are then also lines `end` and `witness` without a signature of the rank's key, and a rank or an
/// epoch that the list does not have. `Incomplete` are starts whose list was not given or not
/// named, or whose key is not Ed25519, unless they only failed; lines after the last signature of a
/// file; jobs of which no list is given; given lists of whose job there is no log; and ranks of a
/// list that have no file. All of that is asked only if a list is given.
///
/// # Errors
/// As [`verify`].
#[cfg(feature = "tls")]
#[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
pub fn verify_signed<P: AsRef<Path>>(
    paths: impl IntoIterator<Item = P>,
    lists: &[crate::security::Membership],
) -> Result<Report> {
    verify_all(paths, Lists::new(lists))
}

fn verify_all<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, lists: Lists<'_>) -> Result<Report> {
    let (mut jobs, mut report) = (BTreeMap::<String, Vec<(usize, Checked)>>::new(), Report::default());
    let mut unreadable = BTreeSet::new();
    let mut paths = paths.into_iter().peekable();
    let first = paths.peek().map(|path| path.as_ref().to_path_buf()).unwrap_or_default();
    for given in files(paths)? {
        let mut file = given.check(lists)?;
        match file.of.take() {
            Some((job, rank)) => jobs.entry(job).or_default().push((rank, file)),
            None => {
                unreadable.insert(given.path);
                file.findings.append_to(&mut report.findings);
            }
        }
    }
    if jobs.is_empty() && report.findings.is_empty() {
        return Err(Error::invalid("audit", "there are no audit logs (files that end in `.audit.jsonl`)"));
    }
    for job in lists.jobs().into_iter().filter(|job| !jobs.contains_key(*job)) {
        let mut findings = Findings::new(&first);
        findings.add(
            None,
            Incomplete,
            format!("there is no log of job `{job}`, whose list of keys is given"),
        );
        findings.append_to(&mut report.findings);
    }
    for (name, files) in jobs {
        Job::new(name, files).verify(&unreadable, lists, &mut report);
    }
    Ok(report)
}

/// A file to verify.
struct Given {
    path: PathBuf,
    /// Whether it was given by its name, and not by its folder's.
    is_named: bool,
}

impl Given {
    /// Verifies the file. What cannot be read in a folder is a finding, and an error otherwise.
    fn check(&self, lists: Lists<'_>) -> Result<Checked> {
        let text = match check(&self.path, lists) {
            Ok(file) => return Ok(file),
            Err(error) if self.is_named => return Err(error),
            Err(_) if fs::metadata(&self.path).is_ok_and(|data| !data.is_file()) => {
                "is no regular file".into()
            }
            Err(Error::Io { reason, .. }) => format!("cannot be read: {reason}"),
            Err(error) => format!("cannot be read: {error}"),
        };
        let mut file = Checked::new(&self.path);
        file.findings.add(None, Changed, text);
        Ok(file)
    }
}

/// Lists the files, each once.
fn files<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Vec<Given>> {
    let (mut files, mut seen) = (Vec::new(), BTreeSet::new());
    for path in paths {
        let path = path.as_ref();
        let io = |error: io::Error| Error::io(path, &error);
        let is_named = !fs::metadata(path).map_err(io)?.is_dir();
        let found = if is_named {
            vec![path.to_path_buf()]
        } else {
            let entries = fs::read_dir(path).map_err(io)?.map(|entry| entry.map(|entry| entry.path()));
            let mut found = entries.collect::<io::Result<Vec<_>>>().map_err(io)?;
            found.retain(|file| file.to_string_lossy().ends_with(".audit.jsonl"));
            found.sort();
            found
        };
        for path in found {
            // A link to nothing has no other path.
            if seen.insert(fs::canonicalize(&path).unwrap_or_else(|_| path.clone())) {
                files.push(Given { path, is_named });
            }
        }
    }
    Ok(files)
}

/// The files of a job.
struct Job {
    name: String,
    /// By rank.
    files: Vec<(usize, Checked)>,
    /// Other files of ranks of `files`.
    others: Vec<Checked>,
    /// The findings of files that are missing.
    missing: Vec<Findings>,
}

/// Claims about lines of a file that contradict it.
struct Contradictions {
    /// The first line.
    line: u64,
    /// The lines of other ranks about it.
    text: String,
    count: usize,
}

impl Job {
    fn new(name: String, mut found: Vec<(usize, Checked)>) -> Self {
        let is_named = |(rank, file): &(usize, Checked)| {
            file.path.file_name() == AuditLog::path(Path::new(""), &name, *rank).file_name()
        };
        // Of several files of a rank, the one with the rank's name is the rank's.
        found.sort_by_key(|file| (file.0, !is_named(file)));
        let (mut files, mut others) = (Vec::<(usize, Checked)>::new(), Vec::new());
        for (rank, mut file) in found {
            match files.last() {
                Some((other, first)) if *other == rank => {
                    let text = format!("the file is of rank {rank}, as {} is", first.path.display());
                    file.findings.add(None, Changed, text);
                    others.push(file);
                }
                _ => files.push((rank, file)),
            }
        }
        Self { name, files, others, missing: Vec::new() }
    }

    /// The largest number of ranks of a start.
    fn world(&self) -> u64 {
        self.files.iter().map(|(_, file)| file.world).max().unwrap_or(0)
    }

    fn folder(&self) -> PathBuf {
        self.files.first().and_then(|(_, file)| file.path.parent()).unwrap_or(Path::new("")).into()
    }

    /// The index of the file of a rank.
    fn file_of(&self, rank: usize) -> Option<usize> {
        self.files.binary_search_by_key(&rank, |(rank, _)| *rank).ok()
    }

    fn verify(mut self, unreadable: &BTreeSet<PathBuf>, lists: Lists<'_>, report: &mut Report) {
        self.missing(unreadable);
        self.unlisted(lists);
        let good = self.claims();
        for (at, (rank, file)) in self.files.iter_mut().enumerate() {
            let witnessed = good[at].values().copied().max().map_or(0, |seq| seq.saturating_add(1));
            if file.world <= 1 && good.len() == 1 {
                file.findings.add(
                    None,
                    Intact,
                    "no other rank has witnessed these lines: the job has one rank",
                );
            } else {
                uncovered(file, witnessed);
            }
            for &line in &file.killed {
                file.findings.add(Some(line), Intact, "this start has no `end`, but a later one follows");
            }
            if let Some(times) = file.times {
                report.logs.push(RankLog {
                    path: file.path.clone(),
                    job: self.name.clone(),
                    rank: *rank,
                    lines: file.lines,
                    starts: file.starts,
                    times,
                    witnessed,
                    signatures: file.signatures,
                });
            }
        }
        let files = self.files.into_iter().map(|(_, file)| file).chain(self.others);
        for findings in files.map(|file| file.findings).chain(self.missing) {
            findings.append_to(&mut report.findings);
        }
    }

    /// Finds ranks that have no file. A file without a line is enough for a rank whose lines nobody
    /// has witnessed: it was killed before.
    fn missing(&mut self, unreadable: &BTreeSet<PathBuf>) {
        let (world, folder) = (self.world(), self.folder());
        let claims: BTreeSet<usize> =
            self.files.iter().flat_map(|(_, file)| &file.claims).map(|claim| claim.rank).collect();
        let there = self.files.iter().filter(|(rank, _)| (*rank as u64) < world).count() as u64;
        let ranks = (0..world).map(|rank| rank as usize).filter(|rank| self.file_of(*rank).is_none());
        let ranks: Vec<_> = ranks.take(MOST_MISSING).collect();
        let left = world - there - ranks.len() as u64;
        for rank in ranks {
            let path = AuditLog::path(&folder, &self.name, rank);
            if unreadable.contains(&path) && !claims.contains(&rank) {
                continue;
            }
            let mut findings = Findings::new(&path);
            findings.add(None, Changed, format!("the file of rank {rank} of {world} is missing"));
            self.missing.push(findings);
        }
        if left > 0 {
            let mut findings = Findings::new(&folder);
            let text = format!("the files of {left} more ranks of job `{}` are missing", self.name);
            findings.add(None, Changed, text);
            self.missing.push(findings);
        }
    }

    /// Finds a job without a list among the given ones, and ranks of its lists that have no file.
    /// Ranks of the starts are not listed twice.
    fn unlisted(&mut self, lists: Lists<'_>) {
        let jobs = lists.jobs();
        if jobs.is_empty() {
            return;
        }
        let (world, folder) = (self.world(), self.folder());
        let Some((_, first)) = self.files.first_mut() else { return };
        if !jobs.contains(&*self.name) {
            let text = "no list of the keys of this job is given, so no key has signed these lines";
            first.findings.add(None, Incomplete, text);
        }
        for rank in lists.ranks(&self.name) {
            if (rank as u64) < world || self.file_of(rank).is_some() {
                continue;
            }
            let mut findings = Findings::new(&AuditLog::path(&folder, &self.name, rank));
            findings.add(None, Incomplete, format!("rank {rank} of the list of keys has no file"));
            self.missing.push(findings);
        }
    }

    /// Compares what the ranks have witnessed with the files. Returns, for each file, the number of
    /// its last line that each other file has witnessed as it is.
    fn claims(&mut self) -> Vec<BTreeMap<usize, u64>> {
        let mut good = vec![BTreeMap::new(); self.files.len()];
        let mut bad = Vec::new();
        let mut unknown = Vec::new();
        for (by, (_, file)) in self.files.iter().enumerate() {
            for claim in &file.claims {
                let Some(of) = self.file_of(claim.rank) else {
                    if claim.rank as u64 >= file.world {
                        unknown.push((by, claim.line, claim.rank));
                    }
                    continue;
                };
                if !has(&self.files[of].1.entries, claim.seq, &claim.hash) {
                    bad.push((of, by, claim));
                } else if of != by {
                    let last = good[of].entry(by).or_insert(claim.seq);
                    *last = claim.seq.max(*last);
                }
            }
        }
        let intact: Vec<bool> = self.files.iter().map(|(_, file)| file.findings.worst() < Changed).collect();
        let mut against = BTreeMap::<usize, BTreeSet<usize>>::new();
        for &(of, by, _) in &bad {
            against.entry(of).or_default().extend(Some(by).filter(|by| *by != of));
        }
        let confirmed = |file: usize, seq: u64, not_by: usize| {
            good[file].iter().any(|(by, last)| *by != not_by && *last >= seq)
        };
        let mut contradictions = BTreeMap::<usize, Contradictions>::new();
        for &(of, by, claim) in &bad {
            // Which of the two was changed: the line, or the line of the witness?
            let [of_too, by_too] = if of == by || (intact[of] && !intact[by]) {
                [false, true]
            } else if !intact[of] || against.get(&of).is_some_and(|by| by.len() > 1) {
                [true, false]
            } else {
                match (confirmed(of, claim.seq, by), confirmed(by, claim.by, of)) {
                    (true, false) => [false, true],
                    (false, true) => [true, false],
                    _ => [true, true],
                }
            };
            let [(_, file), (_, witness)] = [of, by].map(|at| &self.files[at]);
            if of_too {
                note(&mut contradictions, of, against_line(file, claim, &witness.path));
            }
            if by_too {
                note(&mut contradictions, by, against_witness(claim, &file.path));
            }
        }
        for (at, Contradictions { line, text, count }) in contradictions {
            let text = if count > 1 { format!("{text} ({count} such contradictions)") } else { text };
            self.files[at].1.findings.add(Some(line), Changed, text);
        }
        for (by, line, rank) in unknown {
            let findings = &mut self.files[by].1.findings;
            findings.add(
                Some(line),
                Changed,
                format!("`witness` names rank {rank}, which the job does not have"),
            );
        }
        good
    }
}

/// Returns the entries with a number.
fn find(entries: &[Entry], seq: u64) -> &[Entry] {
    let begin = entries.partition_point(|entry| entry.seq < seq);
    let len = entries[begin..].partition_point(|entry| entry.seq == seq);
    &entries[begin..begin + len]
}

/// Whether an entry has this number and hash.
fn has(entries: &[Entry], seq: u64, hash: &Hash) -> bool {
    find(entries, seq).split_first().is_some_and(|(first, others)| {
        first.hash == *hash || others.binary_search_by(|entry| entry.hash.cmp(hash)).is_ok()
    })
}

fn note(all: &mut BTreeMap<usize, Contradictions>, file: usize, (line, text): (u64, String)) {
    let known = all.entry(file).or_insert_with(|| Contradictions { line, text: text.clone(), count: 0 });
    known.count += 1;
    if line < known.line {
        (known.line, known.text) = (line, text);
    }
}

/// The line of a file that a claim contradicts, or the line after its end.
fn against_line(file: &Checked, claim: &Claim, witness: &Path) -> (u64, String) {
    let place = format!("line {} of {}", claim.line, witness.display());
    match find(&file.entries, claim.seq).first() {
        Some(entry) => {
            (entry.line, format!("{place} has witnessed another line with the number {}", entry.seq))
        }
        None => (
            file.lines + 1,
            format!("the line with the number {} is missing, which {place} has witnessed", claim.seq),
        ),
    }
}

/// The line of a witness that contradicts a file.
fn against_witness(claim: &Claim, file: &Path) -> (u64, String) {
    let Claim { rank, seq, .. } = claim;
    (
        claim.line,
        format!("`witness` of rank {rank} contradicts the line with the number {seq} of {}", file.display()),
    )
}

/// Reports the lines that no other rank has witnessed: those from number `witnessed` on.
fn uncovered(file: &mut Checked, witnessed: u64) {
    let begin = file.entries.partition_point(|entry| entry.seq < witnessed);
    let mut left = &file.entries[begin..];
    if file.ends_in_witness {
        left = &left[..left.len().saturating_sub(1)];
    }
    if let Some(first) = left.first() {
        let (line, count) = (first.line, left.len());
        let text = format!("no other rank has witnessed this line and what follows it: {count} lines");
        file.findings.add(Some(line), Incomplete, text);
    }
}
