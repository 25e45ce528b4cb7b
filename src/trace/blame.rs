//! Finds the ranks that broke a job from the flight records of all ranks.

use super::{Ended, Entry, Record};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// The ranks that broke a job, with the evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blame {
    /// The ranks, as ranks of the world; empty if no rank is to blame.
    pub ranks: Vec<usize>,
    /// What the ranks did, as text.
    pub reason: String,
    /// The first error that a rank got from a group's call; the text names the failed call. None if
    /// no call failed.
    pub waited: Option<String>,
}

/// The maximum number of ranks in [`Blame::ranks`] that have no record.
const MAX_NAMED: usize = 4096;
/// The maximum number of ranks that [`Blame::who`] prints.
const MAX_PRINTED: usize = 8;

impl Blame {
    /// Formats the ranks. If there are many, formats the first ones and says how many more there
    /// are.
    pub fn who(&self) -> String {
        match self.ranks.as_slice() {
            [] => "no rank".into(),
            [rank] => format!("rank {rank}"),
            ranks if ranks.len() <= MAX_PRINTED => format!("ranks {ranks:?}"),
            ranks => format!("ranks {:?} and {} more", &ranks[..MAX_PRINTED], ranks.len() - MAX_PRINTED),
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

/// A failed operation and the record of the rank that ran it.
#[derive(Clone, Copy)]
struct Failed<'a> {
    record: &'a Record,
    entry: &'a Entry,
}

impl Failed<'_> {
    fn is(&self, kind: &str) -> bool {
        self.entry.failure.as_deref() == Some(kind)
    }

    fn message(&self) -> String {
        format!("rank {} received: {}", self.record.rank, self.entry.error)
    }
}

/// Finds the ranks that broke a job.
///
/// Returns the first of these sets that is not empty:
///
/// 1. the ranks whose call differs from the majority's;
/// 2. the first rank that panicked or returned an error, among the ranks for which no call failed
///    because of a lost rank or a deadline;
/// 3. the ranks without a record, whose processes were killed, were stopped or exited;
/// 4. the ranks that returned while others needed them;
/// 5. the ranks that did not join a call.
pub fn blame(records: &[Record]) -> Blame {
    let mut failures: Vec<Failed<'_>> = Vec::new();
    for record in records {
        failures.extend(
            record
                .entries
                .iter()
                .filter(|entry| entry.failure.is_some())
                .map(|entry| Failed { record, entry }),
        );
    }
    failures.sort_by_key(|failed| failed.entry.end);
    let first = failures.iter().find(|failed| !failed.is("error")).copied();
    let waited = first.map(|failed| failed.message());
    let verdict = |ranks: Vec<usize>, reason: String| Blame { ranks, reason, waited: waited.clone() };

    if let Some(failed) = failures.iter().find(|failed| failed.is("mismatch")) {
        return Blame { waited: Some(failed.message()), ..disagreeing(records, failed) };
    }
    // A rank that fails after it got an error for a lost rank or a deadline is not the cause.
    let is_consequence = |record: &Record| {
        record.entries.iter().any(|e| matches!(e.failure.as_deref(), Some("lost" | "deadline")))
    };
    let broke = records.iter().filter(|record| !is_consequence(record));
    let broke = broke.filter(|record| matches!(record.ended, Ended::Panicked | Ended::Failed));
    if let Some(record) = broke.min_by_key(|record| record.written) {
        let last = last_call(record);
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
        // Names only some of the ranks, because `world` comes from a file that may be damaged.
        let ranks: Vec<_> = (0..world).filter(|rank| !written.contains(rank)).take(MAX_NAMED).collect();
        let more = silent - ranks.len();
        let more = if more > 0 { format!("; the same holds for {more} more ranks") } else { String::new() };
        return verdict(ranks, format!("no record: killed, stopped, or exited without writing one{more}"));
    }
    let named = named(records, &first);
    let left: Vec<_> = named
        .iter()
        .copied()
        .filter(|rank| of(records, *rank).is_some_and(|r| r.ended == Ended::Returned))
        .collect();
    if !left.is_empty() {
        let last = of(records, left[0]).map(last_call).unwrap_or_default();
        return verdict(left, format!("it returned while others needed it{last}"));
    }
    let late: Vec<_> = named
        .iter()
        .copied()
        .filter(|rank| of(records, *rank).is_some_and(|r| !had_entered(r, first.entry)))
        .collect();
    let late = if late.is_empty() { named } else { late };
    let last = late.first().and_then(|rank| of(records, *rank)).map(last_call).unwrap_or_default();
    verdict(late, format!("it did not join{last}"))
}

fn of(records: &[Record], rank: usize) -> Option<&Record> {
    records.iter().find(|record| record.rank == rank)
}

/// Formats a rank's last call that did not fail.
fn last_call(record: &Record) -> String {
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

/// Whether a rank had joined `call`, or a later call of the same group, before `call` failed.
fn had_entered(record: &Record, call: &Entry) -> bool {
    let failed = call.end.unwrap_or(u64::MAX);
    let mut entries = record.entries.iter().filter(|entry| entry.group == call.group);
    entries.any(|entry| entry.seq >= call.seq && entry.begin <= failed)
}

/// Returns the ranks that an error names, converted from ranks of its group to ranks of the world.
fn named(records: &[Record], failed: &Failed<'_>) -> Vec<usize> {
    let Some(id) = &failed.entry.group else { return Vec::new() };
    let named = failed.entry.named.iter();
    let world = named.filter_map(|rank| {
        let holds = |record: &&Record| record.groups.get(id).is_some_and(|group| group.rank == *rank);
        records.iter().find(holds).map(|record| record.rank)
    });
    world.collect()
}

/// Returns the ranks whose call differs from the majority's; all ranks if there is no majority.
fn disagreeing(records: &[Record], failed: &Failed<'_>) -> Blame {
    let call = failed.entry;
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
        // No recorded call differs, for example because a message was not received. The error names
        // two ranks, so blame both.
        ranks = named(records, failed);
    }
    ranks.sort_unstable();
    Blame { ranks, reason: "called something else than the others".into(), waited: None }
}
