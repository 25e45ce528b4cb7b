//! Ranks that an MPI launcher has started.

use super::{
    Env,
    rank::{Audit, audit_folder},
};
use crate::{
    comm::{self, Communicator, Group, Universe},
    device::Cpu,
    error::{Error, LostReason, Result},
    security::{Identity, Policy},
    trace,
};
use std::{panic::resume_unwind, rc::Rc, thread, time::Duration};

/// How long a rank waits before it exits, so that other processes can print first.
const REPORT: Duration = Duration::from_millis(100);

/// Runs this process's rank of a program that `mpirun` or `srun` has started. It is the counterpart
/// of [`crate::launch::threads`] for MPI. Without a launcher, this process is the only rank.
///
/// # Errors
/// See [`Mpi::run`].
pub fn mpi<R>(rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
    Mpi::new().run(rank)
}

/// Options for running a rank over MPI. Pass the same options on every process.
#[derive(Clone, Copy, Debug)]
pub struct Mpi {
    deadline: Duration,
    message_limit: usize,
    policy: Option<Policy>,
}

impl Default for Mpi {
    fn default() -> Self {
        Self::new()
    }
}

impl Mpi {
    /// The defaults: a rank waits two minutes for the others in a collective, and splits messages
    /// of more than 64 MiB.
    pub fn new() -> Self {
        Self { deadline: Duration::from_secs(120), message_limit: 64 << 20, policy: None }
    }

    /// Sets how long a rank waits in one collective while no data arrives from the other ranks.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Sets the maximum length of a message in bytes. Longer messages are split, because MPI counts
    /// in `int` and because the deadline restarts with each fragment.
    pub fn message_limit(self, bytes: usize) -> Self {
        Self { message_limit: bytes, ..self }
    }

    /// Sets the policy. The default is `SHARDWISE_POLICY`. MPI encrypts nothing, so a policy other
    /// than [`Policy::Any`] refuses a job whose launcher does not report that all ranks are on one
    /// machine.
    pub fn policy(self, policy: Policy) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// Starts MPI, unless this program has started it, and runs `rank` with the group of all
    /// processes. Ends MPI when every rank has left. The group is a [`crate::comm::MpiComm`] and
    /// stays on this thread.
    ///
    /// If other ranks do not leave within the deadline, `MPI_Abort` ends the job, and the numbers
    /// of these ranks are printed on stderr. If `rank` fails with [`Error::Deadline`], this
    /// rank waits only briefly before it aborts. So a stopped process never blocks the others.
    ///
    /// `mpirun` ends all processes as soon as one exits with a failure. So a rank that panicked,
    /// and a rank whose peer returned an error, return a little later than the others. Print within
    /// `rank` what every process must report: no process returns before all have left.
    ///
    /// # Errors
    /// When the policy refuses MPI ([`Error::NotEncrypted`]), when the environment has an
    /// [`Identity`], when `rank` fails, or when this rank has not received a message that another
    /// rank sent to it. MPI's own errors end the process, as usual with MPI.
    pub fn run<R>(self, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let policy = self.policy.map_or_else(Policy::read, Ok)?;
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        if Identity::of(|name| Some(set(name)?.to_string_lossy().into()))?.is_some() {
            let reason = "MPI authenticates no rank, so keys and roles have no effect: unset SHARDWISE_KEY, or \
                          start the ranks with `Env::run`";
            return Err(Error::Unsupported { op: "identity", reason: reason.into() });
        }
        // The variables may be those of another launcher, whose job has another number of ranks.
        let env = Env::read().ok();
        let of_size = |size| env.as_ref().filter(|env| env.world == size);
        let one_machine = |size| of_size(size).is_some_and(|env| env.local_world >= env.world);
        let universe = Universe::start(self.deadline, self.message_limit, policy, one_machine)?;
        let comm = universe.world();
        // The job's name from the launcher, or else a constant, because all processes need the same
        // name.
        let job = std::env::var("PMIX_NAMESPACE").or_else(|_| std::env::var("PMI_JOBID"));
        let job = job.unwrap_or_else(|_| "mpi".into());
        trace::begin(job.clone(), comm.rank(), comm.size(), trace::folder());
        let (name, epoch) = of_size(comm.size()).map_or((&*job, 0), |env| (&*env.job, env.epoch));
        let place = (name, epoch, comm.rank(), comm.size());
        let audit =
            Audit::start(audit_folder().as_deref(), place, None, |event| event.text("policy", policy));
        let admitted = policy.admit("MPI", comm.channel(), None);
        let world = Group::new(Rc::new(comm), &Cpu::new());
        let result = match &audit {
            Ok(audit) => audit.run(world, |world| admitted.and_then(|()| rank(world))),
            Err(error) => Ok(Err(error.clone())),
        };
        trace::end(&result);
        audit.iter().for_each(|audit| audit.failed(&result));
        let unread = match &result {
            Ok(Ok(_)) => universe.end(LostReason::Left, None),
            Ok(Err(error)) => universe.end(LostReason::Failed, Some(error)),
            Err(_) => universe.end(LostReason::Panicked, None),
        };
        comm::settle();
        match result {
            Ok(Ok(result)) => unread.map_or(Ok(result), Err),
            Ok(Err(error)) => {
                // The rank that returned an error prints the cause.
                if matches!(error, Error::PeerLost { reason: LostReason::Failed, .. }) {
                    thread::sleep(REPORT);
                }
                Err(error)
            }
            // The cause is printed already. The other ranks print which rank was lost.
            Err(panic) => {
                thread::sleep(REPORT);
                resume_unwind(panic)
            }
        }
    }
}
