//! N ranks as threads of this process: nothing to install, nothing to configure.

use super::MAX_RANKS;
use crate::{
    comm::{
        self, Group,
        threads::{Presence, Seat, ThreadComm},
    },
    device::Cpu,
    error::{Error, LostReason, Result},
    trace,
};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

/// Runs `rank` on `ranks` threads at once, each with its own end of a group of all, and returns
/// what they return, in rank order: [`Threads`] with its defaults.
///
/// ```
/// use shardwise::{Tensor, comm::ReduceOp, launch};
/// let sums = launch::threads(4, |world| {
///     let mut x = Tensor::from_slice(world.device(), [1], &[world.rank() as f32])?;
///     world.all_reduce(ReduceOp::Sum, &mut x)?;
///     Ok(x.to_vec()?[0])
/// })?;
/// assert_eq!(sums, [6.0; 4]);
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// What went wrong first: see [`Threads::run`].
pub fn threads<R: Outcome>(ranks: usize, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Result<Vec<R>> {
    Threads::new(ranks).run(rank)
}

/// What a rank can return from its thread: everything that is [`Send`]. Tensors, parameters and
/// groups are not; their elements are.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot leave the thread of its rank",
    label = "what the ranks return has to be `Send`",
    note = "a rank's tensors, parameters and groups share memory on its thread only",
    note = "return the elements: `tensor.to_vec()?` or `tensor.to_array()?`, of a `DTensor` those of its `local()`"
)]
pub trait Outcome: Send {}

#[diagnostic::do_not_recommend]
impl<R: Send> Outcome for R {}

/// How to run ranks as threads.
#[derive(Clone, Debug)]
pub struct Threads {
    ranks: usize,
    deadline: Duration,
    device: fn() -> Cpu,
    flight: Option<PathBuf>,
}

impl Threads {
    /// This many ranks. A rank that is not joined by the others in a collective within two minutes
    /// gives up.
    pub fn new(ranks: usize) -> Self {
        Self { ranks, deadline: Duration::from_secs(120), device: Cpu::new, flight: trace::folder() }
    }

    /// How long a rank waits for the others in one collective.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// What each rank's device is made by, on its thread.
    pub fn device(self, device: fn() -> Cpu) -> Self {
        Self { device, ..self }
    }

    /// A folder where the ranks write what they did last: see [`trace`]. By default the one that
    /// `SHARDWISE_FLIGHT_DIR` names.
    pub fn flight(self, folder: impl Into<PathBuf>) -> Self {
        Self { flight: Some(folder.into()), ..self }
    }

    /// Runs the ranks and returns what they return, in rank order.
    ///
    /// # Errors
    /// What went wrong first: of all ranks' errors and panics one that is not the consequence of
    /// another's, named by its rank. Also when there are no ranks or more than 65,536, or a thread
    /// cannot be started.
    pub fn run<R: Outcome>(&self, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Result<Vec<R>> {
        let outcomes = self.run_each(rank)?;
        let failed = |consequence: bool| {
            let wanted = |outcome: &&Result<R>| {
                outcome.as_ref().is_err_and(|error| error.is_consequence() == consequence)
            };
            outcomes.iter().position(|outcome| wanted(&outcome))
        };
        if let Some(rank) = failed(false).or_else(|| failed(true)) {
            let source = outcomes.into_iter().nth(rank).and_then(Result::err);
            return Err(match source {
                Some(Error::RankPanicked { rank, message }) => Error::RankPanicked { rank, message },
                Some(source) => Error::RankFailed { rank, source: Box::new(source) },
                None => Error::internal("launch", "a failed rank has no error"),
            });
        }
        outcomes.into_iter().collect()
    }

    /// Runs the ranks and returns what became of each, in rank order. A rank that has left without
    /// receiving a message which another one sent to it has an error.
    ///
    /// # Errors
    /// When there are no ranks or more than 65,536, or a thread cannot be started.
    pub fn run_each<R: Outcome>(
        &self,
        rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
    ) -> Result<Vec<Result<R>>> {
        if self.ranks == 0 {
            return Err(Error::invalid("launch", "a group needs at least one rank"));
        }
        if self.ranks > MAX_RANKS {
            let reason = format!("{} ranks: at most {MAX_RANKS} can be threads of one process", self.ranks);
            return Err(Error::invalid("launch", reason));
        }
        static JOBS: AtomicUsize = AtomicUsize::new(0);
        let job = format!("{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed));
        let run = |number: usize, seat: Seat| {
            trace::begin(job.clone(), number, self.ranks, self.flight.clone());
            let presence = Rc::new(Presence::default());
            let end = ThreadComm::join(seat, Rc::clone(&presence));
            let world = Group::new(Rc::new(end), &(self.device)());
            let result = catch_unwind(AssertUnwindSafe(|| rank(world)));
            // Whatever the function did with its groups, this rank is in none of them any more.
            // Before a record is written: the others wait to hear why.
            presence.end(match &result {
                Ok(Ok(_)) => LostReason::Left,
                Ok(Err(_)) => LostReason::Failed,
                Err(_) => LostReason::Panicked,
            });
            trace::end(&result);
            comm::settle();
            result
                .unwrap_or_else(|panic| Err(Error::RankPanicked { rank: number, message: message(&*panic) }))
        };
        let seats = ThreadComm::group(self.ranks, self.deadline);
        let unread = seats[0].unread();
        let mut outcomes = thread::scope(|scope| {
            let mut started = Vec::with_capacity(self.ranks);
            // If a thread cannot be started, its seat is dropped and the ranks that were started do
            // not wait for it.
            for (number, seat) in seats.into_iter().enumerate() {
                let run = &run;
                let thread = thread::Builder::new()
                    .name(format!("rank {number}"))
                    .spawn_scoped(scope, move || run(number, seat))
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

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)").to_string()
}
