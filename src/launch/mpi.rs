//! Ranks that an MPI launcher has started.

use crate::{
    comm::{self, Communicator, Group, Universe},
    device::Cpu,
    error::{LostReason, Result},
    trace,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    time::Duration,
};

/// Runs this process's rank of a program started by `mpirun` or `srun`: [`crate::launch::threads`]
/// for MPI. Without a launcher it is the only rank.
///
/// # Errors
/// The error of `rank`: see [`Mpi::run`].
pub fn mpi<R>(rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
    Mpi::new().run(rank)
}

/// Options for running a rank over MPI. The same on every process.
#[derive(Clone, Copy, Debug)]
pub struct Mpi {
    deadline: Duration,
    message_limit: usize,
}

impl Default for Mpi {
    fn default() -> Self {
        Self::new()
    }
}

impl Mpi {
    /// The defaults: a rank waits two minutes for the others in a collective, and messages of 64
    /// MiB are split.
    pub fn new() -> Self {
        Self { deadline: Duration::from_secs(120), message_limit: 64 << 20 }
    }

    /// Sets how long a rank waits for the others in one collective while nothing moves.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Sets the length in bytes from which messages are split. MPI counts in `int`, and the
    /// deadline restarts with each fragment.
    pub fn message_limit(self, bytes: usize) -> Self {
        Self { message_limit: bytes, ..self }
    }

    /// Starts MPI, unless this program has, runs `rank` with the group of all processes, and ends
    /// MPI when every rank has left. The group is a [`crate::comm::MpiComm`]; it stays on this
    /// thread.
    ///
    /// If ranks do not leave within the deadline, or this one gave up on them, `MPI_Abort` ends the
    /// job with their numbers on stderr. So a stopped process never blocks the others.
    ///
    /// # Errors
    /// The error of `rank`; also when another rank has sent this one a message that it did not
    /// receive. MPI's own errors end the process, as usual with MPI.
    pub fn run<R>(self, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let universe = Universe::start(self.deadline, self.message_limit)?;
        let comm = universe.world();
        // The launcher's name of the job, else a constant: only these are known to all processes.
        let job = std::env::var("PMIX_NAMESPACE").or_else(|_| std::env::var("PMI_JOBID"));
        trace::begin(job.unwrap_or_else(|_| "mpi".into()), comm.rank(), comm.size(), trace::folder());
        let world = Group::new(Rc::new(comm), &Cpu::new());
        let result = catch_unwind(AssertUnwindSafe(|| rank(world)));
        trace::end(&result);
        let unread = match &result {
            Ok(Ok(_)) => universe.end(LostReason::Left, None),
            Ok(Err(error)) => universe.end(LostReason::Failed, Some(error)),
            Err(_) => universe.end(LostReason::Panicked, None),
        };
        comm::settle();
        match result {
            Ok(Ok(result)) => unread.map_or(Ok(result), Err),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }
}
