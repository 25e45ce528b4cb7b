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

/// Runs this process's rank of a program that `mpirun` or `srun` has started: [`crate::launch::threads`] for MPI. Without a
/// launcher it is one rank.
///
/// # Errors
/// What `rank` returns: see [`Mpi::run`].
pub fn mpi<R>(rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
    Mpi::new().run(rank)
}

/// How to run a rank over MPI. The same on every process.
#[derive(Clone, Copy, Debug)]
pub struct Mpi {
    deadline: Duration,
    piece: usize,
}

impl Default for Mpi {
    fn default() -> Self {
        Self::new()
    }
}

impl Mpi {
    /// A rank that is not joined by the others in a collective within two minutes gives up.
    pub fn new() -> Self {
        Self { deadline: Duration::from_secs(120), piece: 64 << 20 }
    }

    /// How long a rank waits for the others in one collective while nothing moves.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// The length in bytes from which on messages go in pieces: MPI counts in `int`, and the deadline starts anew with each.
    pub fn piece(self, bytes: usize) -> Self {
        Self { piece: bytes, ..self }
    }

    /// Starts MPI, unless this program has, runs `rank` with the group of all processes, and ends MPI when every rank has
    /// left. The group is a [`crate::comm::MpiComm`]; it stays on this thread.
    ///
    /// If ranks do not leave within the deadline, or this one gave up on them, the job is ended by `MPI_Abort`, with their
    /// numbers on stderr: a stopped process holds up nobody.
    ///
    /// # Errors
    /// What `rank` returns, and when another rank has sent a message to this one that it did not
    /// receive. MPI's own errors end the process, as is MPI's way.
    pub fn run<R>(self, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let universe = Universe::start(self.deadline, self.piece)?;
        let comm = universe.world();
        // The launcher's name of the job, or else nothing that all processes would know.
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
