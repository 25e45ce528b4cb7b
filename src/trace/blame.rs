//! Who broke a job, by the records of its ranks.

use super::{Ended, Entry, Record};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// The ranks that broke a job, and why they are thought to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blame {
    /// The ranks, counted in the world; none if nothing failed.
    pub ranks: Vec<usize>,
    /// What they did.
    pub reason: String,
    /// What another rank was doing that needed them: operation, number, group and call site.
    pub waited: Option<String>,
}

/// So many ranks without a record are named.
const NAMED: usize = 4096;
/// So many ranks are printed.
const PRINTED: usize = 8;

impl Blame {
    /// The ranks in words; of many, the first and a count.
    pub fn who(&self) -> String {
        match self.ranks.as_slice() {
            [] => "no rank".into(),
            [rank] => format!("rank {rank}"),
            ranks if ranks.len() <= PRINTED => format!("ranks {ranks:?}"),
            ranks => format!("ranks {:?} and {} more", &ranks[..PRINTED], ranks.len() - PRINTED),
        }
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.ranks.is_empty() {
            write!(f, "{}: ", self.who())?;
        }
        f.write_str(&self.reason)?;
        self.waited.as_ref().map_or(Ok(()), |waited| write!(f, "\n{waited}"))
    }
}

/// A failed operation, and whose.
#[derive(Clone, Copy)]
struct Complaint<'a> {
    by: &'a Record,
    entry: &'a Entry,
}

impl Complaint<'_> {
    fn is(&self, kind: &str) -> bool {
        self.entry.failure.as_deref() == Some(kind)
    }

    fn words(&self) -> String {
        format!("rank {} was told: {}", self.by.rank, self.entry.error)
    }
}

/// Names the ranks that broke a job.
///
/// In this order: ranks that disagree with the most; a rank that panicked or failed before any other had told it of a loss; ranks
/// without a record, whose processes were killed, stopped or have exited; a rank that returned while others needed it; ranks that
/// did not come to a call.
pub fn blame(records: &[Record]) -> Blame {
    let mut complaints: Vec<Complaint<'_>> = Vec::new();
    for record in records {
        complaints.extend(
            record
                .entries
                .iter()
                .filter(|entry| entry.failure.is_some())
                .map(|entry| Complaint { by: record, entry }),
        );
    }
    complaints.sort_by_key(|complaint| complaint.entry.end);
    let first = complaints.iter().find(|complaint| !complaint.is("error")).copied();
    let waited = first.map(|complaint| complaint.words());
    let verdict = |ranks: Vec<usize>, reason: String| Blame { ranks, reason, waited: waited.clone() };

    if let Some(complaint) = complaints.iter().find(|complaint| complaint.is("mismatch")) {
        return Blame { waited: Some(complaint.words()), ..odd(records, complaint) };
    }
    // Who fails because it was told of another's loss is not the first.
    let told = |record: &Record| {
        record.entries.iter().any(|e| matches!(e.failure.as_deref(), Some("lost" | "deadline")))
    };
    let broke = records.iter().filter(|record| !told(record));
    let broke = broke.filter(|record| matches!(record.ended, Ended::Panicked | Ended::Failed));
    if let Some(record) = broke.min_by_key(|record| record.written) {
        let last = last_words(record);
        let how = if record.ended == Ended::Panicked { "it panicked" } else { "it returned an error" };
        return verdict(vec![record.rank], format!("{how}{last}"));
    }
    let Some(first) = first else {
        return verdict(Vec::new(), "no call of a group has failed".into());
    };
    let world = records.iter().map(|record| record.world).max().unwrap_or(0);
    let written: BTreeSet<_> =
        records.iter().map(|record| record.rank).filter(|rank| *rank < world).collect();
    let silent = world - written.len();
    if silent > 0 {
        // The number is a file's, which may be damaged.
        let ranks: Vec<_> = (0..world).filter(|rank| !written.contains(rank)).take(NAMED).collect();
        let more = silent - ranks.len();
        let more = if more > 0 { format!(", like {more} more") } else { String::new() };
        return verdict(ranks, format!("no record: killed, stopped, or gone without a word{more}"));
    }
    let named = named(records, &first);
    let left: Vec<_> = named
        .iter()
        .copied()
        .filter(|rank| of(records, *rank).is_some_and(|r| r.ended == Ended::Well))
        .collect();
    if !left.is_empty() {
        let last = of(records, left[0]).map(last_words).unwrap_or_default();
        return verdict(left, format!("it returned while others needed it{last}"));
    }
    let late: Vec<_> = named
        .iter()
        .copied()
        .filter(|rank| of(records, *rank).is_some_and(|r| !had_entered(r, first.entry)))
        .collect();
    let late = if late.is_empty() { named } else { late };
    let last = late.first().and_then(|rank| of(records, *rank)).map(last_words).unwrap_or_default();
    verdict(late, format!("it did not come{last}"))
}

fn of(records: &[Record], rank: usize) -> Option<&Record> {
    records.iter().find(|record| record.rank == rank)
}

/// What a rank did last, in words.
fn last_words(record: &Record) -> String {
    let mut calls = record.entries.iter().filter(|entry| entry.group.is_some() && entry.failure.is_none());
    calls.next_back().map_or_else(
        || ", before any call of a group".into(),
        |entry| {
            let group = entry.group.as_ref().and_then(|id| record.groups.get(id));
            let name = group.map_or("?", |group| &group.name);
            let state = if entry.end.is_some() { "after" } else { "in" };
            format!(
                ", {state} {} ({}, call {} of group `{name}`, at {})",
                entry.op, entry.what, entry.seq, entry.site
            )
        },
    )
}

/// Whether a rank had come to a call, or a later one of its group, when that failed: what came too late did not come.
fn had_entered(record: &Record, call: &Entry) -> bool {
    let failed = call.end.unwrap_or(u64::MAX);
    let mut entries = record.entries.iter().filter(|entry| entry.group == call.group);
    entries.any(|entry| entry.seq >= call.seq && entry.begin <= failed)
}

/// The ranks, in the world, that a complaint names by their numbers in its group.
fn named(records: &[Record], complaint: &Complaint<'_>) -> Vec<usize> {
    let Some(id) = &complaint.entry.group else { return Vec::new() };
    let named = complaint.entry.named.iter();
    let world = named.filter_map(|rank| {
        let holds = |record: &&Record| record.groups.get(id).is_some_and(|group| group.rank == *rank);
        records.iter().find(holds).map(|record| record.rank)
    });
    world.collect()
}

/// Who called something else than most ranks did.
fn odd(records: &[Record], complaint: &Complaint<'_>) -> Blame {
    let call = complaint.entry;
    let mut kinds: BTreeMap<(&str, &str, bool), Vec<usize>> = BTreeMap::new();
    for record in records {
        let same =
            |entry: &&Entry| entry.group == call.group && entry.seq == call.seq && entry.op != "exchange";
        if let Some(entry) = record.entries.iter().find(same) {
            kinds.entry((&entry.op, &entry.what, entry.started)).or_default().push(record.rank);
        }
    }
    let most = kinds.values().map(Vec::len).max().unwrap_or(0);
    let tied = kinds.values().filter(|ranks| ranks.len() == most).count() > 1;
    let mut ranks: Vec<_> =
        kinds.into_values().filter(|ranks| tied || ranks.len() < most).flatten().collect();
    if ranks.is_empty() {
        // A cut, or a message that was not expected: the error names both sides.
        ranks = named(records, complaint);
    }
    ranks.sort_unstable();
    Blame { ranks, reason: "called something else than the others".into(), waited: None }
}
