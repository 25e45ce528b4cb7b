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
    sync::OnceLock,
    thread,
};

/// How a rank ended: its result, or its panic.
pub(super) type Ended<R> = thread::Result<Result<R>>;

/// The folder for audit logs, from the environment variable.
pub(super) fn audit_folder() -> Option<PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER
        .get_or_init(|| env::var_os("SHARDWISE_AUDIT_DIR").filter(|it| !it.is_empty()).map(PathBuf::from))
        .clone()
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
            // If a rank failed, the others cannot see the end of its log. Its failure is not that
            // of this rank, as without a log.
            let witnessed = catch_unwind(AssertUnwindSafe(|| all.witness()));
            if let Ok(Err(error @ Error::Io { .. })) = witnessed {
                return Ok(Err(error));
            }
        }
        ended
    }

    /// Writes how the rank ended. Returns the error of the log only if the rank had none.
    pub(super) fn end<R>(&self, ended: &Ended<R>) -> Result<()> {
        let Some(log) = &self.0 else { return Ok(()) };
        let event = Event::new("end");
        let written = log.write(&match ended {
            Ok(Ok(_)) => event.text("result", "ok").durable(),
            Ok(Err(error)) => event.text("result", "failed").text("error", error).durable(),
            // The text of a panic is the program's, and may have values of tensors.
            Err(_) => event.text("result", "panicked").durable(),
        });
        if matches!(ended, Ok(Ok(_))) { written } else { Ok(()) }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        if self.0.is_some() {
            audit::end();
        }
    }
}
