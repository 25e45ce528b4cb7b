//! What all launchers do with a rank: its audit log and its panics.

use crate::{
    comm::Group,
    device::Cpu,
    error::{Error, Result},
    security::audit::{self, AuditLog, Event, Signer},
};
use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
};

/// How a rank ended: its result, or its panic.
pub(super) type Ended<R> = thread::Result<Result<R>>;

/// The environment variable that names the folder for audit logs.
pub(super) const AUDIT_DIR: &str = "SHARDWISE_AUDIT_DIR";

/// The folder for audit logs that the environment names.
pub(super) fn audit_folder() -> Option<PathBuf> {
    env::var_os(AUDIT_DIR).filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// The audit log of a rank, from its start to its end; none if it keeps none.
pub(super) struct Audit(Option<AuditLog>);

impl Audit {
    /// Opens the log in `folder`, if there is one, and writes `start`. The log is the current one
    /// of this thread until this value is dropped.
    pub(super) fn start(
        folder: Option<&Path>,
        (job, epoch, rank, world): (&str, u64, usize, usize),
        signer: Option<Signer>,
        describe: impl FnOnce(Event) -> Event,
    ) -> Result<Self> {
        let open = |folder: &Path| -> Result<AuditLog> {
            let log = AuditLog::open(folder, job, epoch, rank, signer)?;
            let event = Event::new("start").number("world", world as u64);
            log.write(&describe(event.text("version", env!("CARGO_PKG_VERSION"))).durable())?;
            Ok(log)
        };
        let log = folder.map(open).transpose()?;
        // Also without a log: this job may run within a rank of another one.
        audit::begin(log.clone());
        Ok(Self(log))
    }

    pub(super) fn log(&self) -> Option<&AuditLog> {
        self.0.as_ref()
    }

    /// Runs `rank` with the group of all ranks. Writes `join`, and the witnesses of the other
    /// ranks' logs: before `rank` and, behind `end`, after it, if it returned without an error.
    /// Otherwise [`Audit::failed`] has to write the end, after the other ranks know of the failure.
    pub(super) fn run<R>(&self, world: Group<Cpu>, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Ended<R> {
        let Some(log) = &self.0 else { return catch_unwind(AssertUnwindSafe(|| rank(world))) };
        catch_unwind(AssertUnwindSafe(|| {
            log.write(&Event::new("join").text("channel", world.communicator().channel()))?;
            // A group of its own, so that the last exchange cannot be taken for a call of `rank`.
            let all = world.split_all(0)?;
            all.witness()?;
            let result = rank(world)?;
            log.write(&Event::new("end").text("result", "ok").durable())?;
            match all.witness() {
                Err(error @ Error::Io { .. }) => return Err(error),
                // Without a log, the failure of another rank would not be this rank's either.
                Err(error) => tracing::warn!(
                    target: "shardwise", rank = all.rank(), %error,
                    "the other ranks have not witnessed the end of the audit log"
                ),
                Ok(()) => {}
            }
            Ok(result)
        }))
    }

    /// Writes how the rank ended, if it failed. An error of the log is not reported: the rank's own
    /// is.
    pub(super) fn failed<R>(&self, ended: &Ended<R>) {
        let event = Event::new("end");
        let event = match ended {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => event.text("result", "failed").text("error", text(error)),
            // The text of a panic is the program's, and may have values of tensors.
            Err(_) => event.text("result", "panicked"),
        };
        self.end(event);
    }

    /// Writes why the ranks have not connected.
    pub(super) fn not_connected(&self, error: &Error) {
        self.end(Event::new("end").text("result", "failed").text("error", error));
    }

    fn end(&self, event: Event) {
        if let Some(log) = &self.0 {
            let _ = log.write(&event.durable());
        }
    }
}

/// The text of an error, without what a program may have put into it: values of tensors.
fn text(error: &Error) -> String {
    match error {
        Error::Invalid { op, .. } => format!("{op}: invalid"),
        Error::RankPanicked { rank, .. } => format!("rank {rank} panicked"),
        Error::RankFailed { rank, source } => format!("rank {rank}: {}", text(source)),
        error => error.to_string(),
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        audit::end();
    }
}
