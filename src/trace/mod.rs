//! What each rank has done last: a flight recorder. Whoever runs ranks may use it; it knows elements, shapes and errors.
//!
//! Every call of a group, every wait for one that was started and every product of matrices is noted, on the thread of its
//! rank, always: the operation, its number in the group, element and shape, call site, begin, end and state of the last
//! [`CAPACITY`] of them; never an element's value.
//! What runs on no data ([`crate::comm::Group::planned`]) is not noted.
//! It costs a fraction of a microsecond. Where `SHARDWISE_FLIGHT_DIR` names a folder (or [`crate::launch::Threads::flight`]),
//! each rank writes its record there when a call fails, and when it ends, as lines of JSON.
//!
//! * [`blame`] reads the records of a job and names the rank that broke it: `shardwise blame FOLDER`.
//! * [`chrome`] lays them on a time line that `chrome://tracing` and Perfetto show: `shardwise trace FOLDER -o FILE`.
//! * The same events are spans of `tracing`, with the target `shardwise`; failures are its errors.

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

/// How many operations of a rank are kept.
pub const CAPACITY: usize = 2048;
/// How many groups and failures are kept.
const FEW: usize = 256;
/// The id of groups whose calls are not noted, as planned ones: no rank waits in them, and they
/// would push the calls that ranks make together out of the record.
pub(crate) const UNNOTED: u64 = u64::MAX;
/// A rank that goes on after failures does not write for ever.
const WRITES: usize = 8;

/// An operation, as it is noted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) op: &'static str,
    pub(crate) started: bool,
    pub(crate) reduce: Option<&'static str>,
    pub(crate) root: Option<usize>,
    pub(crate) dtype: Option<DType>,
    pub(crate) shape: Shape,
    /// A hash of the cut; 0 for none.
    pub(crate) parts: u64,
    /// The group and the call's number there; none of what a rank computes by itself.
    pub(crate) call: Option<(u64, u64)>,
    pub(crate) site: Option<Site>,
}

impl Operation {
    fn is_noted(&self) -> bool {
        self.call.is_none_or(|(group, _)| group != UNNOTED)
    }
}

/// How far an operation has come.
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

/// An operation that was entered: its number on this rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ticket(u64);

impl Ticket {
    /// The ticket of an operation that is not noted.
    const NONE: Self = Self(u64::MAX);
}

#[derive(Clone, Debug)]
struct GroupOf {
    name: String,
    rank: usize,
    size: usize,
}

#[derive(Debug)]
struct Failure {
    number: u64,
    kind: &'static str,
    words: String,
    /// The ranks that the error names, counted in the group.
    named: Vec<usize>,
}

#[derive(Debug)]
struct Recorder {
    job: String,
    rank: usize,
    world: usize,
    folder: Option<PathBuf>,
    /// A moment by both clocks.
    anchor: (Instant, u64),
    events: Vec<Event>,
    next: u64,
    groups: BTreeMap<u64, GroupOf>,
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

    /// Nanoseconds since 1970.
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
        // It may have been overwritten.
        if self.next - ticket.0 <= CAPACITY as u64
            && let Some(event) = self.events.get_mut(ticket.0 as usize % CAPACITY)
        {
            event.end = now;
            event.state = if failed { State::Failed } else { State::Done };
        }
    }

    /// Notes a failure, and returns what has to be written.
    fn fail(&mut self, failure: Failure) -> Option<Page> {
        if self.failures.len() < FEW {
            self.failures.push(failure);
        }
        self.writes += 1;
        (self.writes <= WRITES).then(|| self.page(Ended::NotYet)).flatten()
    }

    /// What has to be written, if there is a folder for it.
    fn page(&self, ended: Ended) -> Option<Page> {
        Some(Page { folder: self.folder.clone()?, record: self.record(ended) })
    }
}

/// A record that is to be written.
struct Page {
    folder: PathBuf,
    record: Record,
}

impl Page {
    fn write(&self) {
        if let Err(error) = self.record.write(&self.folder) {
            let rank = self.record.rank;
            tracing::warn!(target: "shardwise", rank, %error, "the flight record cannot be written");
        }
    }
}

// A subscriber of `tracing` may ask for a snapshot: nothing is told while the recorder is borrowed.
thread_local! {
    static RECORDER: RefCell<Recorder> = RefCell::new(Recorder::new());
}

/// The folder that the environment names for records.
pub(crate) fn folder() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER
        .get_or_init(|| env::var_os("SHARDWISE_FLIGHT_DIR").filter(|it| !it.is_empty()).map(PathBuf::from))
        .clone()
}

/// This thread becomes a rank.
pub(crate) fn begin(job: String, rank: usize, world: usize, folder: Option<PathBuf>) {
    if let Some(folder) = &folder {
        // A record of an earlier start of the same name says nothing of this one.
        let _ = std::fs::remove_file(Record::path(folder, &job, rank));
    }
    RECORDER.with_borrow_mut(|recorder| *recorder = Recorder { job, rank, world, folder, ..Recorder::new() });
}

/// This thread's rank ends.
pub(crate) fn end<R>(result: &std::thread::Result<Result<R>>) {
    let ended = match result {
        Ok(Ok(_)) => Ended::Well,
        Ok(Err(_)) => Ended::Failed,
        Err(_) => Ended::Panicked,
    };
    let page = RECORDER.with_borrow_mut(|recorder| {
        let page = recorder.page(ended);
        recorder.folder = None;
        page
    });
    page.iter().for_each(Page::write);
}

/// This rank is in a group.
pub(crate) fn join(id: u64, name: &str, rank: usize, size: usize) {
    if id == UNNOTED {
        return;
    }
    RECORDER.with_borrow_mut(|recorder| {
        if recorder.groups.len() >= FEW {
            let used = recorder.events.iter().filter_map(|event| event.operation.call);
            let used: std::collections::BTreeSet<_> = used.map(|(group, _)| group).collect();
            recorder.groups.retain(|id, _| used.contains(id));
        }
        recorder.groups.insert(id, GroupOf { name: name.into(), rank, size });
    });
}

/// Notes that an operation begins.
pub(crate) fn enter(operation: Operation) -> Ticket {
    if !operation.is_noted() {
        return Ticket::NONE;
    }
    RECORDER.with_borrow_mut(|recorder| recorder.enter(operation))
}

/// Notes that a rank begins to wait for an operation that it has started. How that ends is noted with the operation.
pub(crate) fn wait(operation: Operation) -> Ticket {
    if !operation.is_noted() {
        return Ticket::NONE;
    }
    enter(Operation { op: "wait", started: false, call: None, ..operation })
}

/// Notes how an operation ended.
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
    let failure = Failure { number: ticket.0, kind, words: error.to_string(), named };
    let (rank, page) = RECORDER.with_borrow_mut(|recorder| (recorder.rank, recorder.fail(failure)));
    // A subscriber may write to an output that nobody reads: the record is there before.
    page.iter().for_each(Page::write);
    tracing::error!(target: "shardwise", rank, %error);
}

/// Notes something that a rank computes by itself.
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
    let (started, reduce, root, parts, call, site) = Default::default();
    let ticket = enter(Operation { op, started, reduce, root, dtype: Some(dtype), shape, parts, call, site });
    let result = tracing::trace_span!(target: "shardwise", "compute", op, %dtype, %shape).in_scope(act);
    leave(ticket, result.as_ref().err());
    result
}

/// What this thread's rank has done last.
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
        assert_eq!(Record::read(&path).unwrap().ended, Ended::Well);
        start();
        assert!(!path.exists());
    }
}
