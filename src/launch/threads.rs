//! Ranks as threads of this process, without any installation or configuration.

use super::{
    MAX_RANKS,
    rank::{Audit, audit_folder},
};
use crate::{
    comm::{
        self, Group,
        threads::{Endpoint, JoinedGroups, ThreadComm},
    },
    device::Cpu,
    error::{Error, LostReason, Result, same_size},
    security::{Role, Roles},
    trace,
};
use std::{
    any::Any,
    num::NonZeroUsize,
    path::PathBuf,
    rc::Rc,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Runs `rank` on `ranks` threads, each with the group of all ranks. Returns the results in rank
/// order. For options other than the defaults, see [`Threads`].
///
/// ```
/// use shardwise::prelude::*;
/// let sums = launch::threads(4, |world| {
///     let mut x = Tensor::from_slice(world.device(), [1], &[world.rank() as f32])?;
///     world.all_reduce(ReduceOp::Sum, &mut x)?;
///     Ok(x.to_vec()?[0])
/// })?;
/// assert_eq!(sums, [6.0; 4]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// The first failure: see [`Threads::run`].
pub fn threads<R: Outcome>(ranks: usize, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Result<Vec<R>> {
    Threads::new(ranks).run(rank)
}

/// A type that a rank can return from its thread: any type that is [`Send`]. Tensors, parameters
/// and groups are not `Send`; their elements are.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot leave the thread of its rank",
    label = "what the ranks return has to be `Send`",
    note = "a rank's tensors, parameters and groups share memory on its thread only",
    note = "return the elements: `tensor.to_vec()?` or `tensor.to_array()?`, of a `DTensor` those of its `local()`"
)]
pub trait Outcome: Send {}

#[diagnostic::do_not_recommend]
impl<R: Send> Outcome for R {}

/// Options for running ranks as threads.
#[derive(Clone, Debug)]
pub struct Threads {
    ranks: usize,
    deadline: Duration,
    device: fn() -> Cpu,
    gemm_threads: Option<NonZeroUsize>,
    flight: Option<PathBuf>,
    roles: Option<Vec<Role>>,
    audit: Option<PathBuf>,
}

impl Threads {
    /// Options for `ranks` ranks, each of which waits two minutes for the others in a collective.
    pub fn new(ranks: usize) -> Self {
        let deadline = Duration::from_secs(120);
        let (flight, audit) = (trace::folder(), audit_folder());
        Self { ranks, deadline, device: Cpu::new, gemm_threads: None, flight, roles: None, audit }
    }

    /// Sets how long a rank waits for the others in one collective.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// use std::time::Duration;
    /// let brief = launch::Threads::new(2).deadline(Duration::from_millis(50));
    /// let outcomes = brief.run_each(|world| {
    ///     if world.rank() == 0 {
    ///         return world.barrier();
    ///     }
    ///     Ok(std::thread::sleep(Duration::from_millis(500)))
    /// })?;
    /// assert!(matches!(&outcomes[0], Err(Error::Deadline { missing, .. }) if *missing == [1]));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Sets the function that creates each rank's device, on the rank's thread.
    pub fn device(self, device: fn() -> Cpu) -> Self {
        Self { device, ..self }
    }

    /// Sets the number of threads with which each rank's device computes GEMMs
    /// ([`Cpu::with_threads`]). The default is the device's own number, 1 for [`Cpu::new`].
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// use std::num::NonZeroUsize;
    /// let two = NonZeroUsize::MIN.saturating_add(1);
    /// let ranks = launch::Threads::new(3).gemm_threads(two);
    /// assert_eq!(ranks.run(|world| Ok(world.device().threads()))?, [2; 3]);
    /// # Ok::<(), Error>(())
    /// ```
    pub fn gemm_threads(self, threads: NonZeroUsize) -> Self {
        Self { gemm_threads: Some(threads), ..self }
    }

    /// Sets the folder for the ranks' flight records: see [`trace`]. The default is
    /// `SHARDWISE_FLIGHT_DIR`.
    pub fn flight(self, folder: impl Into<PathBuf>) -> Self {
        Self { flight: Some(folder.into()), ..self }
    }

    /// Sets the folder for the ranks' audit logs: see [`audit`](crate::security::audit). The
    /// default is `SHARDWISE_AUDIT_DIR`. A job of threads has a name of its own, so each has new
    /// files.
    pub fn audit(self, folder: impl Into<PathBuf>) -> Self {
        Self { audit: Some(folder.into()), ..self }
    }

    /// Sets the role of each rank, as a membership file does for processes. The default is no
    /// roles: every rank may see everything.
    ///
    /// ```
    /// use shardwise::{prelude::*, security};
    /// let roles = [security::Role::Checkpointer, security::Role::Trainer];
    /// let outcomes = launch::Threads::new(2).roles(roles).run_each(|world| {
    ///     let (source, columns) = (Random::normal(1, 0.02), Columns::even(&world, 6)?);
    ///     let weights = Weights::new(&source);
    ///     let fc = ColumnLinear::<f32, _>::load(&world, &weights, 4, &columns, Bias::None)?;
    ///     let weight = fc.params()[0].value()?;
    ///     world.all_gather(&weight, 0, columns.partition()).map(drop)
    /// })?;
    /// // Rank 1, a trainer, may not see the weights of rank 0.
    /// assert!(matches!(outcomes[0], Err(Error::NotPermitted { role: "trainer", .. })));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn roles(self, roles: impl IntoIterator<Item = Role>) -> Self {
        Self { roles: Some(roles.into_iter().collect()), ..self }
    }

    /// Runs the ranks and returns their results in rank order.
    ///
    /// # Errors
    /// When a rank failed: its error or panic, with the number of the rank. If several ranks
    /// failed, this is the failure of the lowest rank whose error does not merely report another
    /// rank's failure ([`Error::is_consequence`]). Also when there are no ranks or more than
    /// 65,536, when not each rank has one role that joins, or when a thread cannot be started.
    pub fn run<R: Outcome>(&self, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Result<Vec<R>> {
        let (outcomes, results) = self.outcomes(rank)?;
        first_failure(outcomes)?;
        results.into_iter().enumerate().map(|(rank, result)| of_rank(rank, result)).collect()
    }

    /// Runs the ranks and returns each rank's result or error, in rank order. If no rank failed, a
    /// rank gets an error for a message that it has not received.
    ///
    /// # Errors
    /// When there are no ranks or more than 65,536, not each rank has one role that joins, or a
    /// thread cannot be started.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let outcomes = launch::Threads::new(3).run_each(|world| {
    ///     if world.rank() == 2 { Err(Error::invalid("load", "no file")) } else { world.barrier() }
    /// })?;
    /// // The others do not wait for rank 2: their barrier fails because rank 2 is lost.
    /// assert!(matches!(outcomes[0], Err(Error::PeerLost { rank: 2, .. })), "{outcomes:?}");
    /// # Ok::<(), Error>(())
    /// ```
    pub fn run_each<R: Outcome>(
        &self,
        rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
    ) -> Result<Vec<Result<R>>> {
        let (outcomes, results) = self.outcomes(rank)?;
        let outcomes = outcomes.into_iter().zip(results).enumerate();
        Ok(outcomes.map(|(rank, (outcome, result))| outcome.and_then(|()| of_rank(rank, result))).collect())
    }

    /// Runs the ranks. Returns each rank's outcome, and separately the value that it returned.
    fn outcomes<R: Outcome>(
        &self,
        rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
    ) -> Result<(Vec<Result<()>>, Vec<Mutex<Option<R>>>)> {
        let results: Vec<_> = (0..self.ranks.min(MAX_RANKS)).map(|_| Mutex::new(None)).collect();
        let outcomes = self.run_all(&|world| {
            let number = world.rank();
            let result = rank(world)?;
            *comm::lock(&results[number]) = Some(result);
            Ok(())
        })?;
        Ok((outcomes, results))
    }

    /// Checks that each rank has one role, which joins.
    fn check_roles(&self) -> Result<()> {
        let Some(roles) = &self.roles else { return Ok(()) };
        same_size("launch", "the number of roles", roles.len(), "the number of ranks", self.ranks)?;
        match roles.iter().position(|role| !role.joins()) {
            Some(rank) => {
                let reason = format!("rank {rank} has the role `{}`, which does not join", roles[rank]);
                Err(Error::invalid("launch", reason))
            }
            None => Ok(()),
        }
    }

    /// Runs the ranks. Not generic, because programs and tests start ranks in many places, and each
    /// place would compile this code again.
    fn run_all(&self, rank: &(dyn Fn(Group<Cpu>) -> Result<()> + Sync)) -> Result<Vec<Result<()>>> {
        if self.ranks == 0 {
            return Err(Error::invalid("launch", "a group needs at least one rank"));
        }
        if self.ranks > MAX_RANKS {
            let reason = format!("{} ranks: at most {MAX_RANKS} can be threads of one process", self.ranks);
            return Err(Error::invalid("launch", reason));
        }
        self.check_roles()?;
        static JOBS: AtomicUsize = AtomicUsize::new(0);
        let job = format!("{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed));
        let run = |number: usize, endpoint: Endpoint| {
            trace::begin(job.clone(), number, self.ranks, self.flight.clone());
            let groups = Rc::new(JoinedGroups::default());
            let comm = ThreadComm::join(endpoint, Rc::clone(&groups));
            let device = (self.device)();
            let device = match self.gemm_threads {
                Some(threads) => device.with_threads(threads),
                None => device,
            };
            let world = Group::new(Rc::new(comm), &device);
            let audit =
                Audit::start(self.audit.as_deref(), (&job, 0, number, self.ranks), None, |event| event);
            let result = match &audit {
                Ok(audit) => audit.run(world, rank),
                Err(error) => Ok(Err(error.clone())),
            };
            // This thread leaves all its groups now, even groups that `rank` has leaked. It leaves
            // before it writes its record, so that ranks that wait for it learn at once why it
            // left.
            groups.leave_all(match &result {
                Ok(Ok(_)) => LostReason::Left,
                Ok(Err(_)) => LostReason::Failed,
                Err(_) => LostReason::Panicked,
            });
            trace::end(&result);
            audit.iter().for_each(|audit| audit.failed(&result));
            comm::settle();
            result
                .unwrap_or_else(|panic| Err(Error::RankPanicked { rank: number, message: message(&*panic) }))
        };
        let roles = self.roles.clone().map_or(Roles::UNRESTRICTED, Roles::new);
        let endpoints = ThreadComm::group(self.ranks, self.deadline, roles);
        let unread = endpoints[0].unread();
        let mut outcomes = thread::scope(|scope| {
            let mut started = Vec::with_capacity(self.ranks);
            // If a thread cannot be started, its endpoint is dropped, so that the other ranks do
            // not wait for it.
            for (number, endpoint) in endpoints.into_iter().enumerate() {
                let run = &run;
                let thread = thread::Builder::new()
                    .name(format!("rank {number}"))
                    .spawn_scoped(scope, move || run(number, endpoint))
                    .map_err(|error| {
                        Error::invalid("launch", format!("cannot start the thread of rank {number}: {error}"))
                    })?;
                started.push(thread);
            }
            let joined = started.into_iter().enumerate().map(|(number, thread)| {
                thread.join().unwrap_or_else(|panic| {
                    Err(Error::RankPanicked { rank: number, message: message(&*panic) })
                })
            });
            Ok::<Vec<_>, Error>(joined.collect())
        })?;
        if outcomes.iter().all(Result::is_ok) {
            for (rank, error) in comm::lock(&unread).drain(..) {
                outcomes[rank] = Err(error);
            }
        }
        Ok(outcomes)
    }
}

/// Returns the error to report for a job: the error of the lowest rank whose failure is not a
/// consequence of another rank's. If there is no such rank, the error of the lowest rank that
/// failed.
fn first_failure(outcomes: Vec<Result<()>>) -> Result<()> {
    let failed = |consequence: bool| {
        let is_wanted =
            |outcome: &Result<()>| outcome.as_ref().is_err_and(|error| error.is_consequence() == consequence);
        outcomes.iter().position(is_wanted)
    };
    let Some(rank) = failed(false).or_else(|| failed(true)) else { return Ok(()) };
    match outcomes.into_iter().nth(rank) {
        Some(Err(Error::RankPanicked { rank, message })) => Err(Error::RankPanicked { rank, message }),
        Some(Err(source)) => Err(Error::RankFailed { rank, source: Box::new(source) }),
        _ => Err(Error::internal("launch", "a failed rank has no error")),
    }
}

/// Returns the value of a rank that ended without an error.
fn of_rank<R>(rank: usize, result: Mutex<Option<R>>) -> Result<R> {
    let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    result.ok_or_else(|| Error::internal("launch", format!("rank {rank} returned nothing")))
}

/// The message of a panic.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)").to_string()
}
