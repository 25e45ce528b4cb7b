//! The audit log: what each rank of a job has done, in files whose changes are noticed.
//!
//! A rank appends one line of JSON for each event to its own file,
//! `<job>-rank<rank>.audit.jsonl`, over all starts of the job:
//!
//! ```text
//! {"seq":N,"utc":"2026-11-30T12:00:00.123456Z","rank":R,"job":"…","epoch":E,"event":"…",
//!  "fields":{…},"prev":"<64 hex digits>","hash":"<64 hex digits>"}
//! ```
//!
//! * `hash` is the SHA-256 of the line's bytes before `,"hash"`, and `prev` is the hash of the line
//!   before, or zeros. So no line can be changed, inserted or removed without changing all later
//!   hashes of the file.
//! * In an event `witness`, each rank writes the last hashes of all ranks. So the lines before it
//!   cannot be changed or removed without changing the files of all ranks.
//! * With keys (feature `tls`), the events `end` and `witness` are signed: `"signature":"…"` is the
//!   base64 of Ed25519 over `shardwise audit` and the 32 bytes of the hash.
//!
//! A process that is killed while it writes leaves a line without an end. The next start keeps it,
//! and has its length in the field `torn`; `prev` is then the SHA-256 of the 32 bytes of the hash
//! of the last whole line, or zeros, and the torn bytes.
//!
//! Fields are texts, integers, booleans, and lists and objects of these. They never have values of
//! tensors, and never keys.
//!
//! In the names of files, `-` replaces every character of a job's name that is not alphanumeric. If
//! that changes the name, or it has more than 64 characters, 64 of them and 8 hexadecimal digits of
//! the SHA-256 of the name are used. After `end`, a log has nothing but `witness` until the next
//! `start`.
//!
//! [`verify`] checks the files of a job. Not noticed are:
//!
//! * the files of all ranks replaced by earlier copies of one time, or all removed (but that there
//!   is no log of a job whose list of keys is given is noticed);
//! * between a crash and the next start: lines of a killed rank after the last `witness` that
//!   another rank has written, if they are removed, or changed with all hashes after them. Until
//!   the next start the verdict is [`Verdict::Incomplete`] anyway;
//! * what somebody who has a rank's key and can write its file does after the last `witness` that
//!   another rank has written;
//! * at the end of a file, an added or removed start that names no list of keys and only failed: it
//!   is a note of the report;
//! * without signatures or without the list of keys: `utc` of the last `witness` of a file, and
//!   heads in it of earlier lines instead of the last ones; and whatever is done by somebody who
//!   can write the files of all ranks.

mod event;
mod file;
mod line;
mod log;
mod report;
mod signature;
#[cfg(test)]
mod tests;
mod verify;

#[cfg(feature = "privacy")]
pub(crate) use line::parse_hex;
#[cfg(feature = "tls")]
pub use verify::verify_signed;
pub use {
    event::Event,
    report::{Finding, RankLog, Report, Verdict},
    verify::verify,
};
pub(crate) use {
    line::hex,
    log::{AuditLog, Head},
    signature::Signer,
};

use crate::error::Result;
use std::cell::RefCell;

thread_local! {
    /// The logs of the jobs that this thread runs, one within the other; none for a job without.
    static LOGS: RefCell<Vec<Option<AuditLog>>> = const { RefCell::new(Vec::new()) };
}

/// Makes a log the current one of this thread, until [`end`].
pub(crate) fn begin(log: Option<AuditLog>) {
    LOGS.with_borrow_mut(|logs| logs.push(log));
}

/// Ends the current log of this thread. The log before it is then the current one again.
pub(crate) fn end() {
    LOGS.with_borrow_mut(|logs| drop(logs.pop()));
}

/// The current log of this thread.
pub(crate) fn current() -> Option<AuditLog> {
    LOGS.try_with(|logs| logs.borrow().last().cloned().flatten()).ok().flatten()
}

/// Writes an event of the program, such as the SHA-256 of a data set's manifest, to the audit log
/// of the rank whose thread calls this. On any other thread, and if the rank has no log, it does
/// nothing after the checks of the event.
///
/// ```
/// use shardwise::security::audit::{self, Event};
/// audit::record(&Event::new("data_set").text("sha256", "9f86d081").number("rows", 60_000))?;
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// When the event's name is not 1 to 64 of `a` to `z` and `_`, or is one of the library's own
/// (`start`, `join`, `refuse`, `save`, `load`, `gather`, `deny`, `witness`, `end`); when a field's
/// name is not 1 to 64 of `a` to `z`, `0` to `9` and `_`, or occurs twice;
/// when the line is longer than 1 MiB; or when this or an earlier event could not be written.
pub fn record(event: &Event) -> Result<()> {
    event.check_name()?;
    match current() {
        Some(log) => log.write_within(event, line::MAX_OF_PROGRAM),
        None => event.check_fields(),
    }
}
