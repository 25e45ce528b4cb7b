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
        let Some(folder) = folder else { return Ok(Self(None)) };
        let log = AuditLog::open(folder, job, epoch, rank, signer)?;
        let event = Event::new("start").number("world", world as u64);
        log.write(&describe(event.text("version", env!("CARGO_PKG_VERSION"))).durable())?;
        audit::begin(Some(log.clone()));
        Ok(Self(Some(log)))
    }

    pub(super) fn log(&self) -> Option<&AuditLog> {
        self.0.as_ref()
    }

    /// Runs `rank` with the group of all ranks. Writes `join`, `end`, and the witnesses of the
    /// other ranks' logs: before `rank`, and after it if it returned without an error.
    pub(super) fn run<R>(&self, world: Group<Cpu>, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Ended<R> {
        let Some(log) = &self.0 else { return catch_unwind(AssertUnwindSafe(|| rank(world))) };
        let all = world.clone();
        let joined = |world: Group<Cpu>| {
            log.write(&Event::new("join").text("channel", world.communicator().channel()))?;
            world.witness()?;
            rank(world)
        };
        let ended = catch_unwind(AssertUnwindSafe(|| joined(world)));
        if let Err(error) = self.end(&ended) {
            return Ok(Err(error));
        }
        if matches!(ended, Ok(Ok(_))) {
            match catch_unwind(AssertUnwindSafe(|| all.witness())) {
                Ok(Err(error @ Error::Io { .. })) => return Ok(Err(error)),
                // Without a log, the failure of another rank would not be this rank's either.
                Ok(Err(error)) => tracing::warn!(
                    target: "shardwise", rank = all.rank(), %error,
                    "the other ranks have not witnessed the end of the audit log"
                ),
                _ => {}
            }
        }
        ended
    }

    /// Writes how the rank ended. Returns the error of the log only if the rank had none.
    fn end<R>(&self, ended: &Ended<R>) -> Result<()> {
        let Some(log) = &self.0 else { return Ok(()) };
        match ended {
            Ok(Ok(_)) => log.write(&Event::new("end").text("result", "ok").durable()),
            Ok(Err(error)) => {
                self.failed(text(error));
                Ok(())
            }
            // The text of a panic is the program's, and may have values of tensors.
            Err(_) => {
                let _ = log.write(&Event::new("end").text("result", "panicked").durable());
                Ok(())
            }
        }
    }

    /// Writes that the rank failed. An error of the log is not reported: the rank's own is.
    pub(super) fn failed(&self, error: String) {
        let Some(log) = &self.0 else { return };
        let _ = log.write(&Event::new("end").text("result", "failed").text("error", error).durable());
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
        if self.0.is_some() {
            audit::end();
        }
    }
}
