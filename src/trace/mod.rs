//! A flight recorder: the last operations of each rank.
//!
//! Each rank's thread records every group call, every wait for a started call and every matrix
//! product. For each of the last [`CAPACITY`] operations, the record has the operation's name,
//! sequence number, element type, shape, call site, begin, end and state, but no values of tensors.
//! The recorder is always on and costs a fraction of a microsecond per operation. Calls of planned
//! groups ([`crate::comm::Group::planned`]) are not recorded.
//!
//! The environment variable `SHARDWISE_FLIGHT_DIR` or [`crate::launch::Threads::flight`] can name a
//! folder. Then each rank writes its record there, as lines of JSON, when a call fails and when the
//! rank ends.
//!
//! * [`blame`] reads the records of a job and names the rank that broke it:
//!   `shardwise blame FOLDER`.
//! * [`chrome`] converts the records to a timeline for `chrome://tracing` and Perfetto:
//!   `shardwise trace FOLDER -o FILE`.
//! * Each operation is also a `tracing` span with the target `shardwise`, and each failure is also
//!   an error event.

mod blame;
mod chrome;
mod record;

pub use blame::{Blame, blame};
pub use chrome::chrome;
pub use record::{Ended, Entry, GroupInfo, Record};

use crate::{
    device::{DType, Device},
    error::{Error, Result, Site},
    shard::Shape,
};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    env,
    path::PathBuf,
    sync::OnceLock,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// The number of operations that a rank's record keeps.
pub const CAPACITY: usize = 2048;
/// The maximum number of failures in a rank's record. If the record has at least this many groups
/// when the rank joins a new one, it drops the groups without a recorded operation.
const MAX_KEPT: usize = 256;
/// The id of groups whose calls are not recorded. Planned groups use it, because their calls would
/// displace calls of real groups from the record, and no rank waits in them.
pub(crate) const UNRECORDED: u64 = u64::MAX;
/// A rank writes its record when a call fails, but only for this many failures.
const MAX_WRITES: usize = 8;

/// An operation to record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) op: &'static str,
    pub(crate) started: bool,
    pub(crate) reduce: Option<&'static str>,
    pub(crate) root: Option<usize>,
    pub(crate) dtype: Option<DType>,
    pub(crate) shape: Shape,
    /// A hash of the partition; 0 without a partition.
    pub(crate) partition: u64,
    /// The group's id and the sequence number; none for local computation.
    pub(crate) call: Option<(u64, u64)>,
    pub(crate) site: Option<Site>,
}

impl Operation {
    fn is_recorded(&self) -> bool {
        self.call.is_none_or(|(group, _)| group != UNRECORDED)
    }
}

/// The progress of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Entered,
    Done,
    Failed,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    operation: Operation,
    begin: u64,
    end: u64,
    state: State,
}

/// The number of a recorded operation on this rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ticket(u64);

impl Ticket {
    /// The ticket of an operation that is not recorded.
    const NONE: Self = Self(u64::MAX);
}

#[derive(Debug)]
struct Failure {
    number: u64,
    kind: &'static str,
    message: String,
    /// The ranks that the error names, as ranks of the group.
    named: Vec<usize>,
}

#[derive(Debug)]
struct Recorder {
    job: String,
    rank: usize,
    world: usize,
    folder: Option<PathBuf>,
    /// The time at which the recorder was created: on the monotonic clock, and on the system clock
    /// in nanoseconds since 1970.
    anchor: (Instant, u64),
    events: Vec<Event>,
    next: u64,
    groups: BTreeMap<u64, GroupInfo>,
    failures: Vec<Failure>,
    writes: usize,
}

impl Recorder {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        Self {
            job: format!("{}", std::process::id()),
            rank: 0,
            world: 1,
            folder: None,
            anchor: (Instant::now(), now),
            events: Vec::new(),
            next: 0,
            groups: BTreeMap::new(),
            failures: Vec::new(),
            writes: 0,
        }
    }

    /// The current time in nanoseconds since 1970.
    fn now(&self) -> u64 {
        self.anchor.1 + self.anchor.0.elapsed().as_nanos() as u64
    }

    fn enter(&mut self, operation: Operation) -> Ticket {
        let event = Event { operation, begin: self.now(), end: 0, state: State::Entered };
        let number = self.next;
        self.next += 1;
        match self.events.get_mut(number as usize % CAPACITY) {
            Some(oldest) => *oldest = event,
            None => self.events.push(event),
        }
        Ticket(number)
    }

    fn leave(&mut self, ticket: Ticket, failed: bool) {
        let now = self.now();
        // A newer event may have overwritten this one.
        if self.next - ticket.0 <= CAPACITY as u64
            && let Some(event) = self.events.get_mut(ticket.0 as usize % CAPACITY)
        {
            event.end = now;
            event.state = if failed { State::Failed } else { State::Done };
        }
    }

    /// Records a failure. Returns the record if the rank has to write it now.
    fn fail(&mut self, failure: Failure) -> Option<RecordFile> {
        if self.failures.len() < MAX_KEPT {
            self.failures.push(failure);
        }
        self.writes += 1;
        (self.writes <= MAX_WRITES).then(|| self.file(Ended::NotYet)).flatten()
    }

    /// Returns the record to write; none if no folder is set.
    fn file(&self, ended: Ended) -> Option<RecordFile> {
        Some(RecordFile { folder: self.folder.clone()?, record: self.record(ended) })
    }
}

/// A record and the folder to write it to.
struct RecordFile {
    folder: PathBuf,
    record: Record,
}

impl RecordFile {
    fn write(&self) {
        if let Err(error) = self.record.write(&self.folder) {
            let rank = self.record.rank;
            tracing::warn!(target: "shardwise", rank, %error, "the flight record cannot be written");
        }
    }
}

// Emit no `tracing` event while the recorder is borrowed, because a subscriber may call `snapshot`,
// which borrows it too.
thread_local! {
    static RECORDER: RefCell<Recorder> = RefCell::new(Recorder::new());
}

/// The folder for records, from the environment variable.
pub(crate) fn folder() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER
        .get_or_init(|| env::var_os("SHARDWISE_FLIGHT_DIR").filter(|it| !it.is_empty()).map(PathBuf::from))
        .clone()
}

/// Starts the record of rank `rank` on this thread.
pub(crate) fn begin(job: String, rank: usize, world: usize, folder: Option<PathBuf>) {
    if let Some(folder) = &folder {
        // Removes the file of an earlier job with the same name, so that no reader takes it for
        // this job's record.
        let _ = std::fs::remove_file(Record::path(folder, &job, rank));
    }
    RECORDER.with_borrow_mut(|recorder| *recorder = Recorder { job, rank, world, folder, ..Recorder::new() });
}

/// Ends the record of this thread's rank and writes it.
pub(crate) fn end<R>(result: &std::thread::Result<Result<R>>) {
    let ended = match result {
        Ok(Ok(_)) => Ended::Returned,
        Ok(Err(_)) => Ended::Failed,
        Err(_) => Ended::Panicked,
    };
    let file = RECORDER.with_borrow_mut(|recorder| {
        let file = recorder.file(ended);
        recorder.folder = None;
        file
    });
    file.iter().for_each(RecordFile::write);
}

/// Records that this rank belongs to a group, and how the group's data travels.
pub(crate) fn join(id: u64, name: &str, rank: usize, size: usize, channel: String) {
    if id == UNRECORDED {
        return;
    }
    RECORDER.with_borrow_mut(|recorder| {
        if recorder.groups.len() >= MAX_KEPT {
            let used = recorder.events.iter().filter_map(|event| event.operation.call);
            let used: std::collections::BTreeSet<_> = used.map(|(group, _)| group).collect();
            recorder.groups.retain(|id, _| used.contains(id));
        }
        recorder.groups.insert(id, GroupInfo { name: name.into(), rank, size, channel });
    });
}

/// Records the begin of an operation.
pub(crate) fn enter(operation: Operation) -> Ticket {
    if !operation.is_recorded() {
        return Ticket::NONE;
    }
    RECORDER.with_borrow_mut(|recorder| recorder.enter(operation))
}

/// Records the begin of a wait for a started operation. The outcome is recorded with the operation.
pub(crate) fn wait(operation: Operation) -> Ticket {
    if !operation.is_recorded() {
        return Ticket::NONE;
    }
    enter(Operation { op: "wait", started: false, call: None, ..operation })
}

/// Records the end of an operation.
pub(crate) fn leave(ticket: Ticket, error: Option<&Error>) {
    if ticket == Ticket::NONE {
        return;
    }
    RECORDER.with_borrow_mut(|recorder| recorder.leave(ticket, error.is_some()));
    if let Some(error) = error {
        fail(ticket, error);
    }
}

#[cold]
fn fail(ticket: Ticket, error: &Error) {
    let (kind, named) = match error {
        Error::Mismatch(mismatch) => ("mismatch", vec![mismatch.left_rank, mismatch.right_rank]),
        Error::PeerLost { rank, .. } => ("lost", vec![*rank]),
        Error::Deadline { missing, .. } => ("deadline", missing.clone()),
        _ => ("error", Vec::new()),
    };
    let failure = Failure { number: ticket.0, kind, message: error.to_string(), named };
    let (rank, file) = RECORDER.with_borrow_mut(|recorder| (recorder.rank, recorder.fail(failure)));
    // Writes the record before the `tracing` event, because a subscriber may block on an output
    // that nobody reads.
    file.iter().for_each(RecordFile::write);
    tracing::error!(target: "shardwise", rank, %error);
}

/// Runs and records a local computation.
pub(crate) fn compute<B: Device, R>(
    op: &'static str,
    dtype: DType,
    dims: &[usize],
    act: impl FnOnce() -> Result<R>,
) -> Result<R> {
    if !B::HAS_VALUES {
        return act();
    }
    let shape = Shape::new(dims);
    let (started, reduce, root, partition, call, site) = Default::default();
    let ticket =
        enter(Operation { op, started, reduce, root, dtype: Some(dtype), shape, partition, call, site });
    let result = tracing::trace_span!(target: "shardwise", "compute", op, %dtype, %shape).in_scope(act);
    leave(ticket, result.as_ref().err());
    result
}

/// Returns the record of this thread's rank so far.
pub fn snapshot() -> Record {
    RECORDER.with_borrow(|recorder| recorder.record(Ended::NotYet))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_an_earlier_start_of_the_same_name_is_not_taken_for_the_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let start = || begin("job.0".into(), 3, 8, Some(folder.path().into()));
        let path = Record::path(folder.path(), "job.0", 3);
        start();
        end(&Ok(Ok(())));
        assert_eq!(Record::read(&path).unwrap().ended, Ended::Returned);
        start();
        assert!(!path.exists());
    }
}
