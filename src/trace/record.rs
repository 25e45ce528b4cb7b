//! A rank's record as a file: a line about the rank, then a line an operation, oldest first.

use super::{CAPACITY, Recorder, State};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// A longer file is not read: records have some hundred bytes an operation.
const LONGEST: u64 = 1 << 26;

/// How a rank ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It had not when it wrote.
    NotYet,
    /// It returned.
    Well,
    /// It returned an error.
    Failed,
    /// It panicked.
    Panicked,
}

impl Ended {
    const ALL: [(Self, &'static str); 4] = [
        (Self::NotYet, "not yet"),
        (Self::Well, "well"),
        (Self::Failed, "failed"),
        (Self::Panicked, "panicked"),
    ];

    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(ended, _)| *ended == self).map_or("", |(_, word)| word)
    }
}

/// A group, as one of its ranks knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupInfo {
    /// Its name.
    pub name: String,
    /// The rank's number in it.
    pub rank: usize,
    /// The number of its ranks.
    pub size: usize,
}

/// One operation of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// Its name.
    pub op: String,
    /// Its arguments in words: reduction, root, element and shape.
    pub what: String,
    /// Whether it was started, and waited for later.
    pub started: bool,
    /// The group's number; none for what a rank computes by itself.
    pub group: Option<String>,
    /// How many calls of the group came before.
    pub seq: u64,
    /// The layer that made the call, or its file and line.
    pub site: String,
    /// When it began, in nanoseconds since 1970.
    pub begin: u64,
    /// When it ended, if it has.
    pub end: Option<u64>,
    /// What it failed of: `mismatch`, `lost`, `deadline` or `error`.
    pub failure: Option<String>,
    /// The error's words.
    pub error: String,
    /// The ranks that the error names, counted in the group.
    pub named: Vec<usize>,
}

/// What a rank has done last.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The name of the job: the same on all its ranks.
    pub job: String,
    /// The rank in the world.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// When the rank began, in nanoseconds since 1970.
    pub began: u64,
    /// When it wrote.
    pub written: u64,
    /// How it ended.
    pub ended: Ended,
    /// Its groups, by number.
    pub groups: BTreeMap<String, GroupInfo>,
    /// How many older operations were forgotten.
    pub forgotten: u64,
    /// Its operations, oldest first.
    pub entries: Vec<Entry>,
}

impl Recorder {
    /// What was noted so far.
    pub(super) fn record(&self, ended: Ended) -> Record {
        let forgotten = self.next.saturating_sub(CAPACITY as u64);
        let entry = |number: u64| {
            let event = &self.events[number as usize % CAPACITY];
            let operation = &event.operation;
            let failure = self.failures.iter().find(|failure| failure.number == number);
            let mut what = String::new();
            let mut word = |word: &dyn std::fmt::Display| {
                let separator = if what.is_empty() { "" } else { ", " };
                let _ = write!(what, "{separator}{word}");
            };
            if let Some(reduce) = operation.reduce {
                word(&reduce);
            }
            if let Some(root) = operation.root {
                word(&format_args!("root {root}"));
            }
            if let Some(dtype) = operation.dtype {
                word(&format_args!("{dtype} {}", operation.shape));
            }
            if operation.parts != 0 {
                word(&format_args!("cut {:08x}", operation.parts as u32));
            }
            Entry {
                op: operation.op.into(),
                what,
                started: operation.started,
                group: operation.call.map(|(group, _)| format!("{group:016x}")),
                seq: operation.call.map_or(0, |(_, seq)| seq),
                site: operation.site.map(|site| site.to_string()).unwrap_or_default(),
                begin: event.begin,
                end: (event.state != State::Entered).then_some(event.end),
                failure: failure.map(|failure| failure.kind.into()),
                error: failure.map(|failure| failure.words.clone()).unwrap_or_default(),
                named: failure.map(|failure| failure.named.clone()).unwrap_or_default(),
            }
        };
        let span = |(id, group): (&u64, &super::GroupOf)| {
            let span = GroupInfo { name: group.name.clone(), rank: group.rank, size: group.size };
            (format!("{id:016x}"), span)
        };
        Record {
            job: self.job.clone(),
            rank: self.rank,
            world: self.world,
            began: self.anchor.1,
            written: self.now(),
            ended,
            groups: self.groups.iter().map(span).collect(),
            forgotten,
            entries: (forgotten..self.next).map(entry).collect(),
        }
    }
}

impl Record {
    /// The file of a rank of a job in a folder of records.
    pub fn path(folder: &Path, job: &str, rank: usize) -> PathBuf {
        let job: String =
            job.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect();
        folder.join(format!("{job}-rank{rank}.jsonl"))
    }

    /// Writes a file of its own for this rank into a folder, which is made if it is not there.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let path = Self::path(folder, &self.job, self.rank);
        // Whole, or not at all: a reader may come at any time.
        let part = path.with_extension(format!("part{}", self.rank));
        fs::write(&part, self.to_lines())?;
        fs::rename(part, path)
    }

    /// The record as lines of JSON.
    pub fn to_lines(&self) -> String {
        let groups: serde_json::Map<_, _> = self
            .groups
            .iter()
            .map(|(id, group)| {
                (id.clone(), json!({ "name": group.name, "rank": group.rank, "size": group.size }))
            })
            .collect();
        let mut lines = json!({
            "job": self.job, "rank": self.rank, "world": self.world, "began": self.began, "written": self.written,
            "ended": self.ended.word(), "groups": groups, "forgotten": self.forgotten,
        })
        .to_string();
        for entry in &self.entries {
            let mut line = json!({
                "op": entry.op, "what": entry.what, "started": entry.started, "group": entry.group, "seq": entry.seq,
                "site": entry.site, "begin": entry.begin, "end": entry.end,
                "state": match (&entry.failure, entry.end) {
                    (Some(_), _) => "failed",
                    (None, Some(_)) => "done",
                    (None, None) => "entered",
                },
            });
            if let Some(failure) = &entry.failure {
                line["failure"] = json!(failure);
                line["error"] = json!(entry.error);
                line["named"] = json!(entry.named);
            }
            let _ = write!(lines, "\n{line}");
        }
        lines + "\n"
    }

    /// Reads what a rank has written.
    ///
    /// # Errors
    /// When the file cannot be read, or is not a record.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let other = |what: String| Error::io(path, &io::Error::new(io::ErrorKind::InvalidData, what));
        let mut text = String::new();
        let file = fs::File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
        if file.map_err(|error| Error::io(path, &error))? as u64 > LONGEST {
            return Err(other(format!("not the record of a rank: longer than {LONGEST} bytes")));
        }
        Self::parse(&text).ok_or_else(|| other("not the record of a rank".into()))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).ok());
        let head = lines.next()??;
        let number = |value: &Value| value.as_u64();
        let text = |value: &Value| value.as_str().map(str::to_string);
        let ended = text(&head["ended"])?;
        let groups = head["groups"].as_object()?.iter().map(|(id, group)| {
            let (rank, size) = (number(&group["rank"])? as usize, number(&group["size"])? as usize);
            Some((id.clone(), GroupInfo { name: text(&group["name"])?, rank, size }))
        });
        let entry = |line: Option<Value>| {
            let line = line?;
            let named = line["named"].as_array().into_iter().flatten();
            Some(Entry {
                op: text(&line["op"])?,
                what: text(&line["what"])?,
                started: line["started"].as_bool()?,
                group: text(&line["group"]),
                seq: number(&line["seq"])?,
                site: text(&line["site"])?,
                begin: number(&line["begin"])?,
                end: number(&line["end"]),
                failure: text(&line["failure"]),
                error: text(&line["error"]).unwrap_or_default(),
                named: named.filter_map(|rank| Some(number(rank)? as usize)).collect(),
            })
        };
        let record = Self {
            job: text(&head["job"])?,
            rank: number(&head["rank"])? as usize,
            world: number(&head["world"])? as usize,
            began: number(&head["began"])?,
            written: number(&head["written"])?,
            ended: Ended::ALL.iter().find(|(_, word)| *word == ended)?.0,
            groups: groups.collect::<Option<_>>()?,
            forgotten: number(&head["forgotten"])?,
            entries: lines.map(entry).collect::<Option<_>>()?,
        };
        (record.rank < record.world).then_some(record)
    }

    /// Reads the records of the job that was started last, of these files and of those in these folders, by rank.
    ///
    /// # Errors
    /// When one cannot be read, or there is none.
    pub fn read_all<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Vec<Self>> {
        let mut records = Vec::new();
        for path in paths {
            let path = path.as_ref();
            if !path.is_dir() {
                records.push(Self::read(path)?);
                continue;
            }
            let io = |error: io::Error| Error::io(path, &error);
            let files = fs::read_dir(path).map_err(io)?.map(|entry| entry.map(|entry| entry.path()));
            let files: Vec<PathBuf> = files.collect::<io::Result<_>>().map_err(io)?;
            for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "jsonl")) {
                records.push(Self::read(file)?);
            }
        }
        let last = records.iter().max_by_key(|record| record.began).map(|record| record.job.clone());
        let last = last.ok_or_else(|| Error::invalid("trace", "there are no records"))?;
        records.retain(|record| record.job == last);
        records.sort_by_key(|record| record.rank);
        Ok(records)
    }
}
