//! Ranks as processes that a launcher has started, connected over TCP.

use super::{Env, rank::Audit, rendezvous::Rendezvous};
use crate::{
    comm::{self, Group, Link},
    device::Cpu,
    error::{LostReason, Result},
    trace,
};
use std::{panic::resume_unwind, rc::Rc, time::Duration};

/// The longest deadline: longer than any job, but short enough to add to an `Instant`.
const FOREVER: Duration = Duration::from_secs(1 << 32);

impl Env {
    /// Connects to the other processes and runs `rank` with the group of all processes, which is a
    /// [`Link`]. It is the counterpart of [`crate::launch::threads`] for processes that a launcher
    /// has started.
    ///
    /// Returns when all ranks have left the group. A rank waits for the other ranks for at most
    /// `deadline`.
    ///
    /// # Errors
    /// When not all ranks connect within the deadline, when `rank` fails, or when this rank has not
    /// received a message that another rank sent to it.
    pub fn run<R>(&self, deadline: Duration, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let rendezvous = Rendezvous::new(self);
        let place = (&*self.job, self.epoch, self.rank, self.world);
        let signer = rendezvous.as_ref().ok().and_then(Rendezvous::signer);
        let describe = |event| match &rendezvous {
            Ok(rendezvous) => rendezvous.describe(event),
            Err(_) => event,
        };
        let audit = Audit::start(self.audit.as_deref(), place, signer, describe)?;
        let connections = rendezvous.and_then(|to| to.join(deadline.min(FOREVER), audit.log()));
        let connections = match connections {
            Ok(connections) => connections,
            Err(error) => {
                audit.not_connected(&error);
                return Err(error);
            }
        };
        trace::begin(format!("{}.{}", self.job, self.epoch), self.rank, self.world, trace::folder());
        let world = Group::new(Rc::new(Link::world(&connections)), &Cpu::new());
        let result = audit.run(world, rank);
        trace::end(&result);
        connections.close(match &result {
            Ok(Ok(_)) => LostReason::Left,
            Ok(Err(_)) => LostReason::Failed,
            Err(_) => LostReason::Panicked,
        });
        audit.failed(&result);
        comm::settle();
        match result {
            Ok(Ok(result)) => connections.unread().map_or(Ok(result), Err),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }
}
