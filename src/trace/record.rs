//! The record of a rank and its file. The file has one line about the rank, then one line per
//! operation, oldest first.

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

/// The maximum size of a record file, in bytes. An operation takes a few hundred bytes.
const MAX_BYTES: u64 = 1 << 26;

/// How a rank ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The rank was still running when it wrote the record.
    NotYet,
    /// The rank returned a value.
    Returned,
    /// The rank returned an error.
    Failed,
    /// The rank panicked.
    Panicked,
}

impl Ended {
    const ALL: [(Self, &'static str); 4] = [
        (Self::NotYet, "not yet"),
        (Self::Returned, "well"),
        (Self::Failed, "failed"),
        (Self::Panicked, "panicked"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(ended, _)| *ended == self).map_or("", |(_, name)| name)
    }
}

/// A group, as seen by one of its ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupInfo {
    /// The name of the group.
    pub name: String,
    /// The rank in the group.
    pub rank: usize,
    /// The number of ranks.
    pub size: usize,
    /// How the group's data travels, as text: [`Channel`](crate::security::Channel). Empty in
    /// records of earlier versions.
    pub channel: String,
}

/// One operation of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// The name of the operation.
    pub op: String,
    /// The operation's arguments as text: reduction, root, element type, shape and a hash of the
    /// partition.
    pub what: String,
    /// Whether the call was asynchronous: it started the operation, and a later call waits for it.
    pub started: bool,
    /// The group's id; none for local computation.
    pub group: Option<String>,
    /// The sequence number in the group, from 0.
    pub seq: u64,
    /// The layer that made the call, or the file and line of the call.
    pub site: String,
    /// When the operation began, in nanoseconds since 1970.
    pub begin: u64,
    /// When the operation ended, in nanoseconds since 1970; none if it was still running.
    pub end: Option<u64>,
    /// The kind of failure: `mismatch`, `lost`, `deadline` or `error`.
    pub failure: Option<String>,
    /// The error message.
    pub error: String,
    /// The ranks that the error names, as ranks of the group.
    pub named: Vec<usize>,
}

/// The last operations of a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The name of the job, the same on all its ranks.
    pub job: String,
    /// The rank in the world.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// When the rank began, in nanoseconds since 1970.
    pub began: u64,
    /// When the rank wrote the record, in nanoseconds since 1970.
    pub written: u64,
    /// How the rank ended.
    pub ended: Ended,
    /// The rank's groups, by id.
    pub groups: BTreeMap<String, GroupInfo>,
    /// The number of older operations that are no longer in the record.
    pub forgotten: u64,
    /// The rank's last operations, oldest first.
    pub entries: Vec<Entry>,
}

impl Recorder {
    /// Converts the operations recorded so far to a [`Record`].
    pub(super) fn record(&self, ended: Ended) -> Record {
        let forgotten = self.next.saturating_sub(CAPACITY as u64);
        let entry = |number: u64| {
            let event = &self.events[number as usize % CAPACITY];
            let operation = &event.operation;
            let failure = self.failures.iter().find(|failure| failure.number == number);
            let mut what = String::new();
            let mut argument = |argument: &dyn std::fmt::Display| {
                let separator = if what.is_empty() { "" } else { ", " };
                let _ = write!(what, "{separator}{argument}");
            };
            if let Some(reduce) = operation.reduce {
                argument(&reduce);
            }
            if let Some(root) = operation.root {
                argument(&format_args!("root {root}"));
            }
            if let Some(dtype) = operation.dtype {
                argument(&format_args!("{dtype} {}", operation.shape));
            }
            if operation.partition != 0 {
                argument(&format_args!("partition {:08x}", operation.partition as u32));
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
                error: failure.map(|failure| failure.message.clone()).unwrap_or_default(),
                named: failure.map(|failure| failure.named.clone()).unwrap_or_default(),
            }
        };
        Record {
            job: self.job.clone(),
            rank: self.rank,
            world: self.world,
            began: self.anchor.1,
            written: self.now(),
            ended,
            groups: self.groups.iter().map(|(id, group)| (format!("{id:016x}"), group.clone())).collect(),
            forgotten,
            entries: (forgotten..self.next).map(entry).collect(),
        }
    }
}

impl Record {
    /// Returns the path, in `folder`, of the record of rank `rank` of a job.
    pub fn path(folder: &Path, job: &str, rank: usize) -> PathBuf {
        let job: String = job.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
        folder.join(format!("{job}-rank{rank}.jsonl"))
    }

    /// Writes the record to its own file in `folder`. Creates the folder if it does not exist.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let path = Self::path(folder, &self.job, self.rank);
        // Writes a temporary file and renames it, so that a concurrent reader sees a whole file or
        // none.
        let partial = path.with_extension(format!("part{}", self.rank));
        fs::write(&partial, self.to_lines())?;
        fs::rename(partial, path)
    }

    /// Formats the record as lines of JSON.
    pub fn to_lines(&self) -> String {
        let groups: serde_json::Map<_, _> = self
            .groups
            .iter()
            .map(|(id, group)| {
                let GroupInfo { name, rank, size, channel } = group;
                (id.clone(), json!({ "name": name, "rank": rank, "size": size, "channel": channel }))
            })
            .collect();
        let mut lines = json!({
            "job": self.job, "rank": self.rank, "world": self.world, "began": self.began, "written": self.written,
            "ended": self.ended.name(), "groups": groups, "forgotten": self.forgotten,
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

    /// Reads the record that a rank has written.
    ///
    /// # Errors
    /// When the file cannot be read, is too long, or is not a record.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let other = |what: String| Error::io(path, &io::Error::new(io::ErrorKind::InvalidData, what));
        let mut text = String::new();
        let file = fs::File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text));
        if file.map_err(|error| Error::io(path, &error))? as u64 > MAX_BYTES {
            return Err(other(format!("not the record of a rank: longer than {MAX_BYTES} bytes")));
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
            let channel = text(&group["channel"]).unwrap_or_default();
            Some((id.clone(), GroupInfo { name: text(&group["name"])?, rank, size, channel }))
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
            ended: Ended::ALL.iter().find(|(_, name)| *name == ended)?.0,
            groups: groups.collect::<Option<_>>()?,
            forgotten: number(&head["forgotten"])?,
            entries: lines.map(entry).collect::<Option<_>>()?,
        };
        (record.rank < record.world).then_some(record)
    }

    /// Reads the records in these files and folders. Returns the records of the job that started
    /// last, in rank order.
    ///
    /// # Errors
    /// When a record cannot be read, or there is no record.
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
            // The folder may also have audit logs, `.audit.jsonl`.
            let is_record = |file: &&PathBuf| {
                let name = file.to_string_lossy();
                name.ends_with(".jsonl") && !name.ends_with(".audit.jsonl")
            };
            for file in files.iter().filter(is_record) {
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
