//! The file of a rank's audit log.

use super::{
    event::{self, Event},
    line::{self, Hash, Line, Place, hex, sha256},
    signature::{self, Signer},
};
use crate::error::{Error, Result};
use serde_json::Value;
use std::{
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How long a start waits for an earlier one that still has the file.
const WAIT: Duration = Duration::from_secs(5);
/// The most characters of a job's name in the name of its files.
const MAX_NAME: usize = 64;
/// The bytes of the end of a file that are read first.
const BLOCK: u64 = 1 << 13;

/// The audit log of a rank, open for appending. A clone is the same log.
#[derive(Clone)]
pub(crate) struct AuditLog(Arc<Mutex<State>>);

struct State {
    path: PathBuf,
    file: File,
    /// The file's length in bytes.
    len: u64,
    rank: usize,
    /// In JSON, with quotes.
    job: String,
    epoch: u64,
    signer: Option<Signer>,
    /// The number of the next line.
    seq: u64,
    /// The hash of the last line; zeros if there is none.
    last: Hash,
    /// The number of bytes of a torn line at the end of the file.
    torn: Option<usize>,
    /// Whether `end` was written.
    ended: bool,
    /// The first failure.
    failed: Option<Error>,
    /// The line that is written; kept for its memory.
    line: String,
}

/// The last line of a rank's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The rank.
    pub(crate) rank: usize,
    /// The number of the line, from 0 over all starts.
    pub(crate) seq: u64,
    /// The line's hash.
    pub(crate) hash: [u8; 32],
}

impl Head {
    /// Rank and number of the line as u64, little endian, then the hash.
    pub(crate) fn to_bytes(self) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[..8].copy_from_slice(&(self.rank as u64).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..].copy_from_slice(&self.hash);
        bytes
    }

    /// The inverse of [`Head::to_bytes`]; none if the rank is larger than any.
    pub(crate) fn from_bytes(bytes: &[u8; 48]) -> Option<Self> {
        let (numbers, hash) = bytes.split_at(16);
        let [rank, seq] = [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|byte| numbers[at + byte])));
        let mut head = Self { rank: usize::try_from(rank).ok()?, seq, hash: [0; 32] };
        head.hash.copy_from_slice(hash);
        Some(head)
    }

    /// The head as an element of the list `heads` of an event `witness`.
    fn to_json(self) -> String {
        format!(r#"{{"rank":{},"seq":{},"hash":"{}"}}"#, self.rank, self.seq, hex(&self.hash))
    }
}

impl AuditLog {
    /// Returns the path, in `folder`, of the audit log of rank `rank` of a job. If its name
    /// has more than [`MAX_NAME`] characters, or others than alphanumeric ones and `-`, digits of
    /// its SHA-256 follow the first ones.
    pub(crate) fn path(folder: &Path, job: &str, rank: usize) -> PathBuf {
        let fits = |c: char| if c.is_alphanumeric() { c } else { '-' };
        let mut name: String = job.chars().take(MAX_NAME).map(fits).collect();
        if name != job {
            name.push('-');
            name.push_str(&hex(&sha256(job.as_bytes()))[..8]);
        }
        folder.join(format!("{name}-rank{rank}.audit.jsonl"))
    }

    /// Opens the log of a rank, and makes folder and file if they do not exist. The file continues
    /// after the lines of earlier starts. Nothing is written until the first event, which has to be
    /// `start`.
    ///
    /// # Errors
    /// When the file cannot be opened, or another process writes it for more than five seconds.
    /// When its last line is damaged, or is of another rank or job.
    pub(crate) fn open(
        folder: &Path,
        job: &str,
        epoch: u64,
        rank: usize,
        signer: Option<Signer>,
    ) -> Result<Self> {
        Self::open_within(folder, job, epoch, rank, signer, WAIT)
    }

    pub(super) fn open_within(
        folder: &Path,
        job: &str,
        epoch: u64,
        rank: usize,
        signer: Option<Signer>,
        wait: Duration,
    ) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|error| {
            let reason = format!("the folder for audit logs (SHARDWISE_AUDIT_DIR): {error}");
            Error::io(folder, &io::Error::new(error.kind(), reason))
        })?;
        let path = Self::path(folder, job, rank);
        let io = |error: io::Error| Error::io(&path, &error);
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&path).map_err(io)?;
        lock(&file, wait).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        if len == 0 {
            sync_folder(folder)?;
        }
        let Tail { last, torn } = Tail::read(&mut file, len).map_err(io)?;
        let (mut seq, mut hash) = (0, Hash::default());
        if let Some(bytes) = last {
            let line = follows(&bytes, job, rank).map_err(|reason| {
                let reason = format!(
                    "the last line {reason}: verify the audit logs of this job (`shardwise audit verify`), then move \
                     those of all its ranks away"
                );
                io(io::Error::new(io::ErrorKind::InvalidData, reason))
            })?;
            (seq, hash) = (line.seq + 1, line.hash);
        }
        if !torn.is_empty() {
            (seq, hash) = (seq + 1, line::torn_hash(&hash, &torn));
        }
        let torn = Some(torn.len()).filter(|&bytes| bytes > 0);
        let job = Value::from(job).to_string();
        let state = State {
            path,
            file,
            len,
            rank,
            job,
            epoch,
            signer,
            seq,
            last: hash,
            torn,
            ended: false,
            failed: None,
            line: String::new(),
        };
        Ok(Self(Arc::new(Mutex::new(state))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event. It is in the file when this returns, and on the disk if it is durable.
    ///
    /// # Errors
    /// When a field is not valid, the line is longer than 16 MiB, or `end` was written and the
    /// event is not `witness`, as a late `refuse` of a thread: then nothing was written. When
    /// the event cannot be written: then every later call returns the same error, because a log
    /// with a gap must not go unnoticed.
    pub(crate) fn write(&self, event: &Event) -> Result<()> {
        self.write_within(event, line::MAX)
    }

    /// As [`AuditLog::write`], with another limit of the line's length.
    pub(super) fn write_within(&self, event: &Event, most: usize) -> Result<()> {
        event.check_fields()?;
        self.state().write(event, most)
    }

    /// The last line of the log; line 0 with a hash of zeros if there is none. Before other ranks
    /// write it as a witness, the line has to be on the disk: its event has to be durable.
    pub(crate) fn head(&self) -> Head {
        let state = self.state();
        Head { rank: state.rank, seq: state.seq.saturating_sub(1), hash: state.last }
    }

    /// Syncs the lines so far to the disk.
    ///
    /// # Errors
    /// As [`AuditLog::write`].
    pub(crate) fn sync(&self) -> Result<()> {
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        state.file.sync_data().map_err(|error| {
            let error = Error::io(&state.path, &error);
            state.failed = Some(error.clone());
            error
        })
    }

    /// Writes the last lines of all ranks as an event `witness`, and syncs it to the disk.
    ///
    /// # Errors
    /// As [`AuditLog::write`].
    pub(crate) fn witness(&self, heads: &[Head]) -> Result<()> {
        let heads: Vec<_> = heads.iter().map(|head| head.to_json()).collect();
        self.write(&Event::new("witness").value("heads", format!("[{}]", heads.join(","))).durable())
    }
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuditLog({})", self.state().path.display())
    }
}

impl State {
    fn write(&mut self, event: &Event, most: usize) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.ended && event.name != "witness" {
            return Err(event::after_end(event));
        }
        self.line.clear();
        if self.torn.is_some() {
            self.line.push('\n');
        }
        let Self { seq, rank, epoch, last: prev, torn, .. } = *self;
        let place = Place { seq, time: SystemTime::now(), rank, job: &self.job, epoch, prev, torn };
        let hash = line::push(&mut self.line, &place, event);
        if let Some(signer) = self.signer.as_ref().filter(|_| signature::signs(&event.name)) {
            self.line.push_str(",\"signature\":\"");
            self.line.push_str(&signer.sign(&hash)?);
            self.line.push('"');
        }
        self.line.push_str("}\n");
        if self.line.len() > most {
            return Err(event::too_long(event, self.line.len(), most));
        }
        if let Err(error) = self.append(event.durable) {
            let error = Error::io(&self.path, &error);
            self.failed = Some(error.clone());
            return Err(error);
        }
        (self.seq, self.last, self.torn) = (seq + 1, hash, None);
        self.ended |= event.name == "end";
        Ok(())
    }

    /// Writes the line. A line that is written in part is removed again if that is possible, so
    /// that starts on a full disk do not leave one torn line after the other.
    fn append(&mut self, durable: bool) -> io::Result<()> {
        if let Err(error) = self.file.write_all(self.line.as_bytes()) {
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.len += self.line.len() as u64;
        if durable { self.file.sync_data() } else { Ok(()) }
    }
}

/// Locks the file, as soon as no other process has locked it.
fn lock(file: &File, wait: Duration) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            // Continue without a lock if the file system has no locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if begin.elapsed() >= wait => {
                let busy = "another process writes this audit log: is the rank still running?";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, busy));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Syncs the folder of a new file, so that the file is found after a loss of power.
fn sync_folder(folder: &Path) -> Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Not every file system can sync folders.
        Err(error) if !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Err(Error::io(folder, &error))
        }
        _ => Ok(()),
    }
}

/// Checks that the next line may follow a line. The error says why it may not.
fn follows<'a>(bytes: &'a [u8], job: &str, rank: usize) -> Result<Line<'a>, String> {
    let line = Line::parse(bytes)?;
    if !line.is_whole() {
        return Err("was changed: its hash is another one".into());
    }
    if line.rank != rank || line.job != job {
        let (of_rank, of_job) = (line.rank, &line.job);
        return Err(format!("is of rank {of_rank} of job `{of_job}`, not of rank {rank} of job `{job}`"));
    }
    if line.seq > u64::MAX / 2 {
        return Err(format!("has the number {}", line.seq));
    }
    Ok(line)
}

/// The end of a file.
struct Tail {
    /// The last line that ends in a newline, without it.
    last: Option<Vec<u8>>,
    /// What follows the last newline.
    torn: Vec<u8>,
}

impl Tail {
    /// Reads the end of a file, and not the whole file.
    fn read(file: &mut File, len: u64) -> io::Result<Self> {
        let newline = |bytes: &[u8]| bytes.iter().rposition(|&byte| byte == b'\n');
        let too_long = || {
            let reason = format!("no audit log: a line is longer than {} bytes", line::MAX);
            io::Error::new(io::ErrorKind::InvalidData, reason)
        };
        let mut size = BLOCK.min(len);
        loop {
            let mut bytes = vec![0; size as usize];
            file.seek(SeekFrom::Start(len - size))?;
            file.read_exact(&mut bytes)?;
            let end = newline(&bytes);
            let begin = end.and_then(|end| newline(&bytes[..end]));
            if begin.is_some() || size == len {
                let torn = bytes[end.map_or(0, |end| end + 1)..].to_vec();
                let last = end.map(|end| bytes[begin.map_or(0, |begin| begin + 1)..end].to_vec());
                let longest = last.as_ref().map_or(0, Vec::len).max(torn.len());
                return if longest < line::MAX { Ok(Self { last, torn }) } else { Err(too_long()) };
            }
            if size > 2 * line::MAX as u64 {
                return Err(too_long());
            }
            size = (4 * size).min(len);
        }
    }
}
